"""The server as a process: its flags, SIGTERM, and the benchmark that loads it."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import openai
import pytest
from serving.conftest import ask

from benchmarks import serve as serve_benchmark

ROOT = pathlib.Path(__file__).parents[2]


def start(*flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "storm_jax.serve", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def process(trained_run) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server and its address."""
    running = start(f"--workdir={trained_run}", "--port=0", "--rows=2", "--length=512")
    try:
        cache = running.stdout.readline()
        assert "for 2 answers of 512 tokens" in cache, running.stderr.read()
        yield running, running.stdout.readline().split()[-1]
    finally:
        running.kill()
        running.wait()


def test_sigterm_finishes_open_answers(process, trained_run):
    running, url = process
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list()
    assert model.id == trained_run.name and model.max_model_len == 512
    stream = client.chat.completions.create(
        model=model.id,
        messages=ask("What?"),
        stream=True,
        temperature=5.0,
        max_tokens=200,
        seed=1,
    )
    chunks = [next(stream)]
    running.send_signal(signal.SIGTERM)
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert running.wait(30) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(url.removeprefix("http://").split(":"), 1)


def error_of(*flags: str) -> str:
    running = start(*flags)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 1 and "Traceback" not in error
    return error


def test_mistakes_are_one_line(trained_run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "cannot listen on 127.0.0.1" in error_of(
            f"--workdir={trained_run}", f"--port={port}"
        )
    missing = tmp_path / "none"
    assert f"--allowed_media_folder={missing} is not a folder" in error_of(
        f"--workdir={trained_run}", f"--allowed_media_folder={missing}"
    )


@pytest.mark.slow
def test_the_benchmark_of_load_and_faults(trained_run, shapes_folder, tmp_path, capsys):
    flags = [f"--workdir={trained_run}", f"--videos={shapes_folder / 'media/test'}"]
    serve_benchmark.main([*flags, "--requests=8", "--faults=40", f"--out={tmp_path}"])
    results = json.loads((tmp_path / "serve.json").read_text())
    assert [row["clients"] for row in results["load"]] == [1, 8, 32]
    assert all(row["requests a second"] > 0 for row in results["load"])
    faults = results["faults"]
    assert faults["errors of the server"] == 0 and faults["files left"] == 0
    assert faults["is alive"] and sum(faults["statuses"].values()) == 40
    assert faults["statuses"]["200"] >= 20 and faults["statuses"]["400"] > 0
    assert sum(faults["statuses with kills"].values()) == 100
    assert "| 32 |" in capsys.readouterr().out
