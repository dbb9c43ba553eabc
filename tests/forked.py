"""Runs a script with many command lines in processes that share one start of Python and its imports."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[1]
_FORK = """
import importlib, json, os, runpy, sys, tempfile
script, modules, calls = json.loads(sys.argv[1])
for module in modules:
    importlib.import_module(module)
results = []
for arguments in calls:
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]
    child = os.fork()
    if not child:
        for number, file in enumerate(files, start=1):
            os.dup2(file.fileno(), number)
        sys.argv = [script, *arguments]
        if script.endswith(".py"):
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        sys.exit()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in files:
        file.seek(0)
    results.append([status, *(file.read() for file in files)])
print(json.dumps(results))
"""


def run_forked(
    script: str,
    modules: Sequence[str],
    calls: Sequence[Sequence[str]],
    **environment: str,
) -> list[subprocess.CompletedProcess]:
    """Runs `python SCRIPT ARGUMENTS` in the repository's root for each of `calls`.

    Args:
      script: a file such as "train.py", or a module such as "storm_jax.weights".
      modules: what to import before.
      environment: variables to set.
    """
    done = subprocess.run(
        [sys.executable, "-c", _FORK, json.dumps([script, modules, [list(c) for c in calls]])],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [
        subprocess.CompletedProcess(arguments, status, stdout, stderr)
        for arguments, (status, stdout, stderr) in zip(calls, json.loads(done.stdout), strict=True)
    ]
