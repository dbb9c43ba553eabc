"""From patch features to visual tokens of the decoder's width, mixed over space and time.

    "storm"         pixel shuffle -> Linear -> depth x (x + MambaMixer(LayerNorm(x)))
    "mlp"           pixel shuffle -> LayerNorm -> Linear -> GELU -> Linear   (VILA: no time)
    "module:Class"  pixel shuffle -> Linear -> the user's Flax module

The mixing stage is any module with `(x [B, F, N, D], frame_clip [B, F]) -> [B, F, N, D]`. Frames of
a clip share an id in `frame_clip`, 0 is padding, and nothing may pass from one clip to another.
"""

from __future__ import annotations

import importlib
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import MambaConfig, ModelConfig
from storm_jax.models.layers import Einsum, run_layers, stack_layers
from storm_jax.models.mamba import MambaMixer
from storm_jax.ops.pooling import pixel_shuffle


class TemporalMixer(Protocol):
    """What a projector of the user's own implements."""

    def __call__(self, x: jax.Array, frame_clip: jax.Array) -> jax.Array: ...


class TemporalProjector(nnx.Module):
    """[B, F, P, Dv] patch features -> [B, F, N, D] visual tokens, before any pooling."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, remat: bool):
        self.downsample = config.downsample
        merged, width = config.vision.width * config.downsample**2, config.decoder.width

        def linear(inputs: int) -> Einsum:
            return Einsum(
                "bfnc,cd->bfnd",
                (inputs, width),
                (None, "embed"),
                bias=True,
                rngs=rngs,
                dtype=dtype,
            )

        self.norm = (
            nnx.LayerNorm(merged, epsilon=1e-5, dtype=dtype, rngs=rngs)
            if config.projector == "mlp"
            else None
        )
        self.mixer: TemporalMixer
        self.linear = linear(merged)
        if config.projector == "mlp":
            self.mixer = MLPHead(linear(width))
        elif config.projector == "storm":
            self.mixer = MambaLayers(width, config.mamba, rngs=rngs, dtype=dtype, remat=remat)
        else:
            make = import_mixer(config.projector)
            self.mixer = make(width, rngs=rngs, dtype=dtype, **config.projector_args)

    def __call__(self, x: jax.Array, frame_clip: jax.Array) -> jax.Array:
        batch, frames = x.shape[:2]
        x = pixel_shuffle(x.reshape(batch * frames, *x.shape[2:]), self.downsample)
        x = x.reshape(batch, frames, *x.shape[1:])  # [B, F, N, r * r * Dv]
        if self.norm is not None:
            x = self.norm(x)
        return self.mixer(self.linear(x), frame_clip)


class MambaLayers(nnx.Module):
    """Pre-norm residual Mamba layers over the raster-flattened clips (the paper's equation 5)."""

    def __init__(
        self, width: int, config: MambaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, remat: bool
    ):
        self.remat = remat
        self.layers = stack_layers(
            lambda rngs: MambaLayer(width, config, rngs=rngs, dtype=dtype), config.depth, rngs
        )

    def __call__(self, x: jax.Array, frame_clip: jax.Array) -> jax.Array:
        batch, frames, tokens, width = x.shape
        segment_ids = jnp.repeat(frame_clip, tokens, axis=1)  # [B, F * N]
        x = x.reshape(batch, frames * tokens, width)
        x = run_layers(self.layers, x, lambda layer, x: layer(x, segment_ids), self.remat)
        return x.reshape(batch, frames, tokens, width)


class MambaLayer(nnx.Module):
    """x + MambaMixer(LayerNorm(x)) on [B, L, D]."""

    def __init__(self, width: int, config: MambaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.mixer = MambaMixer(width, config, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, segment_ids: jax.Array) -> jax.Array:
        return x + self.mixer(self.norm(x), segment_ids)


class MLPHead(nnx.Module):
    """GELU and the second linear layer of VILA's projector."""

    def __init__(self, linear: Einsum):
        self.linear = linear

    def __call__(self, x: jax.Array, frame_clip: jax.Array) -> jax.Array:
        return self.linear(jax.nn.gelu(x, approximate=False))


def import_mixer(spec: str) -> type:
    """The class that "module:Class" names.

    Raises:
      ImportError: naming the projector, when the module or the class is not there.
    """
    module_name, _, class_name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"model.projector={spec!r}: {error}. The module must be importable where the run is "
            f"loaded: start from its folder or add it to PYTHONPATH"
        ) from error
