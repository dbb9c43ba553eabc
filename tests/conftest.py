"""Eight fake CPU devices, no silent rank promotion, and the fixtures that many tests share."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import pytest
from flax import nnx

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def randomise():
    """Replaces every parameter of a module by random values: zero-initialised ones would hide
    what they multiply."""

    def apply(module: nnx.Module, seed: int = 0, scale: float = 0.2) -> nnx.Module:
        rng = np.random.default_rng(seed)
        graphdef, params = nnx.split(module)

        def noise(path: tuple, value: jax.Array) -> np.ndarray:
            drawn = (rng.standard_normal(value.shape) * scale).astype(np.float32)
            return drawn + value if "norm" in jax.tree_util.keystr(path) else drawn

        pure = jax.tree_util.tree_map_with_path(noise, nnx.to_pure_dict(params))
        return nnx.merge(graphdef, pure)

    return apply
