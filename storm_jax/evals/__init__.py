"""Evaluation on benchmarks.

from storm_jax import evals

report = evals.evaluate("runs/sft", "videomme", data_root="data/videomme", num_frames=64)
print(report)

`evaluate` asks a run the questions of a benchmark, `sweep` does so for several compressions, `score`
scores replies again without a model, and `check` looks at a benchmark's files. Importing this package
imports none of them, and no JAX.
"""

from __future__ import annotations

import importlib
import typing
from typing import Any

if typing.TYPE_CHECKING:
    from storm_jax.evals.checks import check
    from storm_jax.evals.evaluation import evaluate
    from storm_jax.evals.rescoring import judge, score
    from storm_jax.evals.sweeps import sweep

__all__ = ["check", "evaluate", "judge", "score", "sweep"]

_MODULES = {
    "check": "checks", "evaluate": "evaluation", "judge": "rescoring", "score": "rescoring",
    "sweep": "sweeps",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
