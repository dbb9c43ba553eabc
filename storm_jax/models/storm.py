"""STORM: vision tower, temporal projector, compression, decoder.

    encode  frames -> visual table [B, V, D]; mixes all frames before it drops tokens
    merge   text and visual embeddings -> one sequence
    decode  embeddings -> hidden states

Training composes the three (`__call__`); inference calls them separately.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.compression import VisualShape
from storm_jax.config import CompressionConfig, ModelConfig
from storm_jax.models.decoder import Cache, Decoder
from storm_jax.models.mamba import State
from storm_jax.models.siglip import SigLIP
from storm_jax.models.temporal_projector import TemporalProjector
from storm_jax.ops.pooling import PartialGroup, spatial_pool, temporal_pool, temporal_pool_block
from storm_jax.sharding import constrain


class StreamState(NamedTuple):
    """What is kept of the frames of a video that is still arriving: it does not grow with their number."""

    mixer: State
    group: PartialGroup


class Storm(nnx.Module):
    """The complete model.

    Args:
      remat: recompute layers in the backward pass instead of storing their activations.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, remat: bool = False):
        dtype = jnp.dtype(config.dtype)
        self.video_tokens = config.video_side**2  # of a frame, before pooling
        self.vision = SigLIP(config.vision, rngs=rngs, dtype=dtype, remat=remat)
        self.projector = TemporalProjector(config, rngs=rngs, dtype=dtype, remat=remat)
        self.decoder = Decoder(config.decoder, rngs=rngs, dtype=dtype, remat=remat)

    def __call__(self, batch: dict[str, jax.Array], shape: VisualShape) -> jax.Array:
        """Maps a training batch (see `storm_jax.data.rows`) to hidden states [B, S, D]."""
        visual = self.encode(batch["frames"], batch["frame_clip"], batch["frame_group"], shape)
        x = self.merge(batch["tokens"], visual, batch["visual_index"])
        return self.decode(x, batch["positions"], batch["segment_ids"])[0]

    def encode(
        self, frames: jax.Array, frame_clip: jax.Array, frame_group: jax.Array, shape: VisualShape
    ) -> jax.Array:
        """Encodes frames as a visual table in the layout of `storm_jax.compression`.

        Args:
          frames: uint8 [B, F, H, W, 3].
          frame_clip: int [B, F], the clip of each frame; 0 is padding.
          frame_group: int [B, F], the group of each frame; -1 is padding or sampled out.

        Returns:
          [B, V, D]: G * N' tokens for each spatial pooling factor, G * N tokens of images if none of those are theirs,
          and the newline if there is one.
        """
        with jax.named_scope("vision"):
            features = self.vision.encode_clips(frames)  # [B, F, P, Dv]
        return self.compress(features, frame_clip, frame_group, shape)

    def compress(
        self, features: jax.Array, frame_clip: jax.Array, frame_group: jax.Array, shape: VisualShape
    ) -> jax.Array:
        """Mixes the features of all frames [B, F, P, Dv] over time and pools them; otherwise as `encode`."""
        batch = features.shape[0]
        with jax.named_scope("projector"):
            videos, images = self.projector(features, frame_clip)  # [B, F, Nv, D], [B, F, N, D]
        with jax.named_scope("pool"):
            groups = temporal_pool(videos, frame_group, shape.num_groups)  # [B, G, Nv, D]
            parts = [spatial_pool(groups, pool) for pool in shape.spatial_pools]  # [B, G, N', D]
            if images is not videos:
                parts.append(temporal_pool(images, frame_group, shape.num_groups))  # [B, G, N, D]
            elif 1 not in shape.spatial_pools:
                parts.append(groups)
            width = videos.shape[-1]
            tables = [part.reshape(batch, -1, width) for part in parts]
            if self.projector.newline is not None:
                newline = self.projector.newline[...].astype(videos.dtype)
                tables.append(jnp.broadcast_to(newline, (batch, 1, width)))
        return constrain(jnp.concatenate(tables, axis=1), "batch", None, None)

    def start_stream(self, rows: int) -> StreamState:
        """The state before the first frame of a video in each row.

        Raises:
          ValueError: the projector cannot process a video in blocks.
        """
        mixer = self.projector.initial_state(rows)
        width = self.decoder.config.width
        return StreamState(mixer, PartialGroup.empty(rows, self.video_tokens, width))

    def extend_stream(
        self, frames: jax.Array, state: StreamState, compression: CompressionConfig
    ) -> tuple[jax.Array, jax.Array, jax.Array, StreamState]:
        """Encodes the next frames of a video. All of its frames, in blocks of any sizes, give what `encode` does.

        Args:
          frames: uint8 [B, F, H, W, 3].
          state: that of the frames before, from `start_stream` or this method.

        Returns:
          The groups that these frames complete, [B, G, N', D], of which the first few are valid; their number,
          int [B]; the mean of the frames of the group that is not complete, [B, N', D]; and the new state.
        """
        features = self.vision.encode_clips(frames)  # [B, F, P, Dv]
        tokens, mixer = self.projector.extend(features, state.mixer)  # [B, F, Nv, D]
        size, factor = compression.temporal_pool, compression.spatial_pool
        groups, count, group = temporal_pool_block(tokens, state.group, size)  # [B, G, Nv, D]
        partial = group.mean().astype(groups.dtype)  # [B, Nv, D]
        pooled = spatial_pool(groups, factor), spatial_pool(partial, factor)
        return pooled[0], count, pooled[1], StreamState(mixer, group)

    def merge(self, tokens: jax.Array, visual: jax.Array, visual_index: jax.Array) -> jax.Array:
        """Embeds the text and inserts the visual tokens.

        Args:
          tokens: int [B, S].
          visual: [B, V, D].
          visual_index: int [B, S], the entry of `visual` at each position; -1 is text.

        Returns:
          [B, S, D].
        """
        text = self.decoder.embed(tokens)
        index = jnp.maximum(visual_index, 0)
        inserted = jnp.take_along_axis(visual, index[..., None], axis=1)  # [B, S, D]
        x = jnp.where((visual_index >= 0)[..., None], inserted.astype(text.dtype), text)
        return constrain(x, "batch", "sequence", None)

    def decode(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        new_cache: int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns hidden states [B, S, D] and the updated or new cache (see `Decoder`)."""
        with jax.named_scope("decoder"):
            return self.decoder(x, positions, segment_ids, cache, new_cache)
