"""STORM in JAX: token-efficient long video understanding (arXiv 2503.04130).

storm = storm_jax.load("runs/sft")
storm.answer("clip.mp4", "Which flash came first?")
"""

from __future__ import annotations

import os
import pathlib
import typing

if typing.TYPE_CHECKING:
    from storm_jax.inference.predictor import Predictor

__version__ = "0.1.0"

# Only tokenizers are used of transformers; it would advise to install torch for its models.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def load(workdir: str | pathlib.Path, step: int | None = None) -> Predictor:
    """The model of a run that `train.py` wrote, ready to answer (see `Predictor`).

    Args:
      step: the checkpoint to load; the last one by default.
    """
    from storm_jax.inference.predictor import Predictor  # the package itself imports nothing heavy

    return Predictor(workdir, step)
