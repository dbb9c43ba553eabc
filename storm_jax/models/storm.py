"""STORM: vision tower, temporal projector, compression, decoder.

    encode  frames -> visual table [B, V, D]       the scan sees all frames, then tokens are dropped
    merge   text and visual embeddings -> one sequence
    decode  embeddings -> hidden states

Training is the three in a row (`__call__`); inference calls them apart.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import ModelConfig
from storm_jax.models.decoder import Cache, Decoder
from storm_jax.models.siglip import SigLIP
from storm_jax.models.temporal_projector import TemporalProjector
from storm_jax.ops.pooling import spatial_pool, temporal_pool
from storm_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class VisualShape:
    """Static shape of a row's visual table: group slots (G) and the spatial pooling factor (p)."""

    num_groups: int
    spatial_pool: int


class Storm(nnx.Module):
    """The whole model. `remat` trades compute for memory in training."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, remat: bool = False):
        dtype = jnp.dtype(config.dtype)
        self.vision = SigLIP(config.vision, rngs=rngs, dtype=dtype, remat=remat)
        self.projector = TemporalProjector(config, rngs=rngs, dtype=dtype, remat=remat)
        self.decoder = Decoder(config.decoder, rngs=rngs, dtype=dtype, remat=remat)

    def __call__(self, batch: dict[str, jax.Array], shape: VisualShape) -> jax.Array:
        """A training batch (see `storm_jax.data.rows`) to hidden states [B, S, D]."""
        visual = self.encode(batch["frames"], batch["frame_clip"], batch["frame_group"], shape)
        x = self.merge(batch["tokens"], visual, batch["visual_index"])
        return self.decode(x, batch["positions"], batch["segment_ids"])[0]

    def encode(
        self, frames: jax.Array, frame_clip: jax.Array, frame_group: jax.Array, shape: VisualShape
    ) -> jax.Array:
        """Frames to the visual table that `storm_jax.compression` lays out.

        Args:
          frames: uint8 [B, F, H, W, 3].
          frame_clip: int [B, F], clip id in the row, 0 = padding.
          frame_group: int [B, F], group slot, -1 = padding or sampled out.

        Returns:
          [B, V, D] with V = G * N', plus G * N tokens without spatial pooling when p > 1.
        """
        batch, num_frames = frames.shape[:2]
        with jax.named_scope("vision"):
            x = self.vision(frames.reshape(batch * num_frames, *frames.shape[2:]))
            x = x.reshape(batch, num_frames, *x.shape[1:])  # [B, F, P, Dv]
            x = constrain(x, "batch", "sequence", None, None)
        with jax.named_scope("projector"):
            x = self.projector(x, frame_clip)  # [B, F, N, D]
        with jax.named_scope("pool"):
            x = temporal_pool(x, frame_group, shape.num_groups)  # [B, G, N, D]
            pooled = spatial_pool(x, shape.spatial_pool)  # [B, G, N', D]
            width = x.shape[-1]
            table = pooled.reshape(batch, -1, width)
            if shape.spatial_pool > 1:  # images are not pooled
                table = jnp.concatenate([table, x.reshape(batch, -1, width)], axis=1)
        return table

    def merge(self, tokens: jax.Array, visual: jax.Array, visual_index: jax.Array) -> jax.Array:
        """Places visual tokens among the text: a gather and a where.

        Args:
          tokens: int [B, S].
          visual: [B, V, D].
          visual_index: int [B, S], entry of `visual` that stands here, -1 = text.

        Returns:
          [B, S, D].
        """
        text = self.decoder.embed(tokens)
        index = jnp.maximum(visual_index, 0)
        seen = jnp.take_along_axis(visual, index[..., None], axis=1)  # [B, S, D]
        x = jnp.where((visual_index >= 0)[..., None], seen.astype(text.dtype), text)
        return constrain(x, "batch", "sequence", None)

    def decode(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states [B, S, D] and the updated cache (see `Decoder`)."""
        with jax.named_scope("decoder"):
            return self.decoder(x, positions, segment_ids, cache)
