"""The projector's stem: the patch features of each frame -> visual tokens of the decoder's width.

    linear                   shuffle -> Linear                              (STORM, SmolVLM)
    mlp2x_gelu               shuffle -> Linear -> GELU -> Linear            (LLaVA, without shuffle)
    mlp_downsample           shuffle -> LN -> Linear -> GELU -> Linear      (VILA)
    mlp_downsample_3x3_fix   shuffle -> LN -> Linear -> GELU -> LN -> Linear -> GELU -> Linear   (VILA)

*Shuffle* is pixel shuffle by r = `stem.downsample`: it concatenates the features of r x r patches.
`stem.video_pool` then halves the grid of a video's frames, as in LLaVA (`Stem.pool`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import ModelConfig
from storm_jax.models.layers import Einsum
from storm_jax.ops.pooling import halve_grid, pixel_shuffle


class Stem(nnx.Module):
    """Maps patch features [B, F, P, Dv] to tokens [B, F, N, D], frame by frame."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        kind, r = config.stem.kind, config.stem.downsample
        self.downsample, self.video_pool = r, config.stem.video_pool
        width, vision_width = config.decoder.width, config.vision.width
        is_deep = kind == "mlp_downsample_3x3_fix"
        merged, inner = vision_width * r * r, vision_width * r if is_deep else width

        def linear(inputs: int, outputs: int, bias: bool = True) -> Einsum:
            return Einsum(
                "bfnc,cd->bfnd",
                (inputs, outputs),
                (None, "embed"),
                bias=bias,
                rngs=rngs,
                dtype=dtype,
            )

        def norm(width: int) -> nnx.LayerNorm:
            return nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)

        self.norm1 = norm(merged) if kind.startswith("mlp_downsample") else None
        self.linear1 = linear(merged, inner, config.stem.bias)
        self.norm2 = norm(inner) if is_deep else None
        self.linear2 = linear(inner, width) if kind != "linear" else None
        self.linear3 = linear(width, width) if is_deep else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = pixel_shuffle(x, self.downsample)  # [B, F, N, r * r * Dv]
        if self.norm1 is not None:
            x = self.norm1(x)
        x = self.linear1(x)  # [B, F, N, D], or [B, F, N, r * Dv]
        if self.linear2 is not None:
            x = jax.nn.gelu(x, approximate=False)
            x = self.linear2(x if self.norm2 is None else self.norm2(x))  # [B, F, N, D]
        if self.linear3 is not None:
            x = self.linear3(jax.nn.gelu(x, approximate=False))
        return x

    def pool(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, F, N, D] to those of a video [B, F, Nv, D]."""
        return x if self.video_pool == "none" else halve_grid(x, self.video_pool)
