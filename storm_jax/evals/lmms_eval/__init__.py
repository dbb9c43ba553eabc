"""STORM as a model of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval):

    lmms-eval --model storm_jax --model_args workdir=runs/sft,num_frames=64 --tasks mvbench --batch_size 32

lmms-eval finds `manifest` through the entry-point group "lmms_eval.models" when this project is installed.
"""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

NAME = "storm_jax"


def manifest() -> ModelManifest:
    """Names the model class; JAX is imported only when lmms-eval loads it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=NAME, simple_class_path="storm_jax.evals.lmms_eval.model.StormForLmmsEval"
    )
