"""From patch features to visual tokens of the decoder's width, mixed over space and time.

    "storm"         pixel shuffle -> Linear -> depth x (x + MambaMixer(LayerNorm(x)))
    "mlp"           pixel shuffle -> LayerNorm -> Linear -> GELU -> Linear   (VILA: no time)
    "module:Class"  pixel shuffle -> Linear -> the user's Flax module

The mixing stage is any module with `(x [B, F, N, D], frame_clip [B, F]) -> [B, F, N, D]`. Frames of
a clip share an id in `frame_clip`, 0 is padding, and nothing may pass from one clip to another.

Mamba layers of `direction="forward"` also read a clip in blocks of frames (`extend`), with the same
result as in one pass.
"""

from __future__ import annotations

import importlib
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import MambaConfig, ModelConfig
from storm_jax.models.layers import Einsum, run_layers, stack_layers
from storm_jax.models.mamba import MambaMixer, State
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
        return self.mixer(self._merge(x), frame_clip)

    def extend(self, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        """The next block of a clip's frames.

        Args:
          x: [B, F, P, Dv], one clip a row.
          state: from the block before, or `initial_state`.

        Returns:
          [B, F, N, D] and the state for the next block. Blocks of any sizes give what the whole
          clip gives.

        Raises:
          ValueError: the projector does not read in blocks (see `initial_state`).
        """
        return self._streaming_mixer().extend(self._merge(x), state)

    def initial_state(self, batch: int) -> State:
        """The state before the first block, each array with a leading layer axis.

        Raises:
          ValueError: the projector is not made of Mamba layers of direction="forward".
        """
        return self._streaming_mixer().initial_state(batch)

    def _streaming_mixer(self) -> MambaLayers:
        if isinstance(self.mixer, MambaLayers) and self.mixer.direction == "forward":
            return self.mixer
        raise ValueError(
            'only projector="storm" with mamba.direction="forward" reads a clip in blocks of frames'
        )

    def _merge(self, x: jax.Array) -> jax.Array:
        """[B, F, P, Dv] -> [B, F, N, D], each frame alone."""
        batch, frames = x.shape[:2]
        x = pixel_shuffle(x.reshape(batch * frames, *x.shape[2:]), self.downsample)
        x = x.reshape(batch, frames, *x.shape[1:])  # [B, F, N, r * r * Dv]
        if self.norm is not None:
            x = self.norm(x)
        return self.linear(x)


class MambaLayers(nnx.Module):
    """Pre-norm residual Mamba layers over the raster-flattened clips (the paper's equation 5)."""

    def __init__(
        self, width: int, config: MambaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, remat: bool
    ):
        self.remat, self.direction = remat, config.direction
        self.layers = stack_layers(
            lambda rngs: MambaLayer(width, config, rngs=rngs, dtype=dtype), config.depth, rngs
        )

    def __call__(self, x: jax.Array, frame_clip: jax.Array) -> jax.Array:
        segment_ids = jnp.repeat(frame_clip, x.shape[2], axis=1)  # [B, F * N]
        return self._run(x, segment_ids, None)[0]

    def extend(self, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        """The next block [B, F, N, D] of one clip a row."""
        return self._run(x, None, state)

    def initial_state(self, batch: int) -> State:
        return jax.vmap(lambda layer: layer.mixer.initial_state(batch))(self.layers)

    def _run(
        self, x: jax.Array, segment_ids: jax.Array | None, state: State | None
    ) -> tuple[jax.Array, State]:
        batch, frames, tokens, width = x.shape

        def call(args: tuple, x: jax.Array) -> tuple[jax.Array, State | None]:
            layer, state = args
            x, after = layer(x, segment_ids, state)
            return x, None if state is None else after

        x = x.reshape(batch, frames * tokens, width)
        x, state = run_layers((self.layers, state), x, call, self.remat)
        return x.reshape(batch, frames, tokens, width), state


class MambaLayer(nnx.Module):
    """x + MambaMixer(LayerNorm(x)) on [B, L, D]."""

    def __init__(self, width: int, config: MambaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.mixer = MambaMixer(width, config, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, state: State | None
    ) -> tuple[jax.Array, State]:
        y, state = self.mixer(self.norm(x), segment_ids, state)
        return x + y, state


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
