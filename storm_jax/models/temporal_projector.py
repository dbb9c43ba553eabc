"""Projects patch features to visual tokens of the decoder's width and mixes them over space and time.

    stem    patches of each frame -> tokens [B, F, N, D]   (`storm_jax.models.stems`)
            videos may have a smaller grid than images, [B, F, Nv, D]
    mixer   "mamba1", "mamba2"   depth x (x + MambaMixer(LayerNorm(x)))
            "module:Class"       a custom Flax module
            "none"               nothing: frames are encoded independently

A mixer maps `(x [B, F, N, D], frame_clip [B, F])` to [B, F, N, D]. Frames of a clip share an id in
`frame_clip`, and 0 is padding. Clips must not interact. Mamba layers start as the identity.

With `mamba.direction="forward"`, Mamba layers can also process a clip in blocks of frames (`extend`). The result
is the same as for the whole clip.
"""

from __future__ import annotations

import importlib
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import MambaConfig, ModelConfig
from storm_jax.models.layers import run_layers, stack_layers
from storm_jax.models.mamba import MambaMixer, State
from storm_jax.models.stems import Stem
from storm_jax.sharding import constrain


class Mixer(Protocol):
    """The interface of a mixer."""

    def __call__(self, x: jax.Array, frame_clip: jax.Array) -> jax.Array: ...


class TemporalProjector(nnx.Module):
    """Maps patch features [B, F, P, Dv] to visual tokens, before pooling.

    `newline` [D] is the vector that the layout puts between visual tokens, or None.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, remat: bool):
        self.stem = Stem(config, rngs=rngs, dtype=dtype)
        self.mixer = _make_mixer(config, rngs=rngs, dtype=dtype, remat=remat)
        width = config.decoder.width
        init = nnx.initializers.normal(width**-0.5)
        self.newline = (
            nnx.Param(init(rngs.params(), (width,), jnp.float32), logical_axes=("embed",))
            if config.layout.has_newline
            else None
        )

    def __call__(self, x: jax.Array, frame_clip: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the tokens of videos [B, F, Nv, D] and of images [B, F, N, D]; they are the same array if the
        grids are the same."""
        tokens = constrain(self.stem(x), "batch", "frames", None, None)  # [B, F, N, D]
        tokens = constrain(tokens, "batch", "sequence", None, None)
        videos = self._mix(self.stem.pool(tokens), frame_clip)  # [B, F, Nv, D]
        if self.stem.video_pool == "none":
            return videos, videos
        images = _only_images(frame_clip)
        # Most rows of videos have no image; then its larger grid is not mixed.
        return videos, jax.lax.cond(
            jnp.any(images > 0), lambda x: self._mix(x, images), lambda x: x, tokens
        )

    def _mix(self, x: jax.Array, frame_clip: jax.Array) -> jax.Array:
        return x if self.mixer is None else self.mixer(x, frame_clip)

    def extend(self, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        """Processes the next block of frames of a clip. Blocks may have any sizes.

        Args:
          x: [B, F, P, Dv], one clip per row.
          state: the state after the previous block, or `initial_state`.

        Returns:
          [B, F, Nv, D], and the state for the next block.

        Raises:
          ValueError: the projector does not support blocks (see `initial_state`).
        """
        return self._streaming_mixer().extend(self.stem.pool(self.stem(x)), state)

    def initial_state(self, batch: int) -> State:
        """Returns the state before the first block; arrays have a leading layer axis.

        Raises:
          ValueError: the projector does not consist of Mamba layers with direction="forward".
        """
        return self._streaming_mixer().initial_state(batch)

    def _streaming_mixer(self) -> MambaLayers:
        if isinstance(self.mixer, MambaLayers) and self.mixer.direction == "forward":
            return self.mixer
        raise ValueError(
            'processing a clip in blocks needs Mamba layers with mamba.direction="forward"'
        )


class MambaLayers(nnx.Module):
    """Pre-norm residual Mamba layers over raster-flattened clips (equation 5 of the STORM paper)."""

    def __init__(
        self,
        width: int,
        version: str,
        config: MambaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        remat: bool,
    ):
        self.remat, self.direction = remat, config.direction
        self.layers = stack_layers(
            lambda rngs: MambaLayer(width, version, config, rngs=rngs, dtype=dtype),
            config.depth,
            rngs,
        )

    def __call__(self, x: jax.Array, frame_clip: jax.Array) -> jax.Array:
        segment_ids = jnp.repeat(frame_clip, x.shape[2], axis=1)  # [B, F * N]
        return self._run_layers(x, segment_ids, None)[0]

    def extend(self, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        """Processes the next block [B, F, N, D], one clip per row."""
        return self._run_layers(x, None, state)

    def initial_state(self, batch: int) -> State:
        """Returns the state before the first block; arrays have a leading layer axis."""
        return jax.vmap(lambda layer: layer.mixer.initial_state(batch))(self.layers)

    def _run_layers(
        self, x: jax.Array, segment_ids: jax.Array | None, state: State | None
    ) -> tuple[jax.Array, State]:
        batch, frames, tokens, width = x.shape

        def layer_fn(layer_and_state: tuple, x: jax.Array) -> tuple[jax.Array, State | None]:
            layer, state = layer_and_state
            x, next_state = layer(x, segment_ids, state)
            return x, None if state is None else next_state

        x = x.reshape(batch, frames * tokens, width)
        x, state = run_layers((self.layers, state), x, layer_fn, self.remat)
        return x.reshape(batch, frames, tokens, width), state


class MambaLayer(nnx.Module):
    """x + MambaMixer(LayerNorm(x)) on [B, L, D]."""

    def __init__(
        self, width: int, version: str, config: MambaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype
    ):
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.mixer = MambaMixer(width, version, config, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, state: State | None
    ) -> tuple[jax.Array, State]:
        y, state = self.mixer(self.norm(x), segment_ids, state)
        return x + y, state


def _only_images(frame_clip: jax.Array) -> jax.Array:
    """`frame_clip` [B, F] with clips of several frames as padding, 0."""
    frames = (frame_clip[:, :, None] == frame_clip[:, None, :]).sum(-1)
    return jnp.where(frames == 1, frame_clip, 0)


def _make_mixer(
    config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, remat: bool
) -> Mixer | None:
    width = config.decoder.width
    if config.mixer == "none":
        return None
    if config.mixer in ("mamba1", "mamba2"):
        return MambaLayers(width, config.mixer, config.mamba, rngs=rngs, dtype=dtype, remat=remat)
    return import_mixer(config.mixer)(width, rngs=rngs, dtype=dtype, **config.mixer_args)


def import_mixer(spec: str) -> type:
    """Imports the class named by "module:Class".

    Raises:
      ImportError: the module or class does not exist; the message contains `spec`.
    """
    module_name, _, class_name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"model.mixer={spec!r}: {error}. The module must be importable: start from its folder "
            f"or add it to PYTHONPATH"
        ) from error
