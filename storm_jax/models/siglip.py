"""The SigLIP vision tower (Zhai et al., arXiv 2303.15343), without its pooling head.

    pixels -> patch embedding + position embedding -> depth x (x + Attn(LN(x)); x + MLP(LN(x))) [-> LN]

Frames are independent, so they are spread over all devices, which gather the parameters of one layer at a time.
Only the layers up to the feature layer run, and the final norm only with `final_norm`. What does not run is
stored in `unused`, so that the whole tower can be exported again, and is never trained.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import VisionConfig
from storm_jax.models.layers import Einsum, run_layers, stack_layers
from storm_jax.ops.attention import attention
from storm_jax.sharding import constrain, num_shards

FRAME_CHUNK = 16


class SigLIP(nnx.Module):
    """Encodes frames as patch features."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, remat: bool):
        self.config, self.dtype, self.remat = config, dtype, remat
        patches, width = config.side**2, config.width
        self.patch = Einsum(
            "bpc,cd->bpd",
            (3 * config.patch_size**2, width),
            (None, "tower"),
            bias=True,
            rngs=rngs,
            dtype=dtype,
        )
        init = nnx.initializers.normal(width**-0.5)
        self.position = nnx.Param(
            init(rngs.params(), (patches, width), jnp.float32), logical_axes=(None, "tower")
        )
        num_layers = config.depth + 1 + config.feature_layer

        def make(rngs: nnx.Rngs) -> EncoderLayer:
            return EncoderLayer(config, rngs=rngs, dtype=dtype)

        self.layers = stack_layers(make, num_layers, rngs)
        norm = nnx.LayerNorm(width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.norm = norm if config.final_norm else None
        self.unused = nnx.Dict() if config.final_norm else nnx.Dict(norm=norm)
        if num_layers < config.depth:
            self.unused["layers"] = stack_layers(make, config.depth - num_layers, rngs)

    def encode_clips(self, frames: jax.Array) -> jax.Array:
        """Encodes uint8 [B, F, H, W, 3] as [B, F, P, D], in chunks of FRAME_CHUNK frames per device.

        With `remat`, the backward pass stores the frames and recomputes a chunk at a time.
        """
        batch, num_frames, *size = frames.shape
        rows, parts = num_shards((batch, num_frames), "batch", "frames")
        local = (batch // rows, num_frames // parts)  # rows and frames of a device
        count = -(-math.prod(local) // FRAME_CHUNK)
        x = frames.reshape(rows, local[0], parts, local[1], *size)
        x = x.swapaxes(1, 2).reshape(rows, parts, math.prod(local), *size)
        x = jnp.pad(x, [(0, 0)] * 2 + [(0, -x.shape[2] % count)] + [(0, 0)] * 3)
        x = jnp.moveaxis(x.reshape(rows, parts, count, -1, *size), 2, 0)
        x = constrain(x, None, "batch", "frames", None, None, None, None)

        def encode(x: jax.Array) -> jax.Array:  # [rows, parts, C, H, W, 3]
            return self(x.reshape(-1, *size)).reshape(*x.shape[:3], -1, self.config.width)

        x = jax.lax.map(jax.checkpoint(encode) if self.remat else encode, x)
        x = jnp.moveaxis(x, 0, 2).reshape(rows, parts, -1, *x.shape[4:])[:, :, : math.prod(local)]
        x = x.reshape(rows, parts, *local, *x.shape[3:]).swapaxes(1, 2)
        x = x.reshape(batch, num_frames, *x.shape[4:])
        return constrain(x, "batch", "frames", None, None)

    def __call__(self, frames: jax.Array) -> jax.Array:
        """Encodes uint8 [B, H, W, 3] as [B, P, D], patches in raster order.

        Raises:
          ValueError: the frames are not of the configured image size.
        """
        size, patch, side = self.config.image_size, self.config.patch_size, self.config.side
        if frames.shape[1:] != (size, size, 3):
            raise ValueError(f"frames have shape {frames.shape}, expected [B, {size}, {size}, 3]")
        pixels = frames.astype(jnp.float32) / 127.5 - 1.0  # mean 0.5, standard deviation 0.5
        # As a strided convolution, ignore the rest at the bottom and right: 384 = 27 * 14 + 6.
        pixels = pixels[:, : side * patch, : side * patch]
        x = pixels.reshape(-1, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch(x.reshape(-1, side * side, patch * patch * 3))  # [B, P, D]
        x += self.position[...].astype(self.dtype)[None]

        def layer_fn(layer: EncoderLayer, x: jax.Array) -> tuple[jax.Array, None]:
            return layer(constrain(x, "frames", None, None)), None

        x, _ = run_layers(self.layers, x, layer_fn, self.remat)
        return x if self.norm is None else self.norm(x)


class EncoderLayer(nnx.Module):
    """Pre-norm attention over the patches of one frame, then a GELU (tanh) MLP."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        width, heads = config.width, config.num_heads
        head_dim = width // heads

        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)

        def project() -> Einsum:
            return Einsum(
                "bpd,dhk->bphk",
                (width, heads, head_dim),
                ("tower", None, None),
                bias=True,
                rngs=rngs,
                dtype=dtype,
            )

        self.attn_norm, self.mlp_norm = norm(), norm()
        self.query, self.key, self.value = project(), project(), project()
        self.out = Einsum(
            "bphk,hkd->bpd",
            (heads, head_dim, width),
            (None, None, "tower"),
            bias=True,
            rngs=rngs,
            dtype=dtype,
        )
        self.up = Einsum(
            "bpd,dm->bpm",
            (width, config.mlp_dim),
            ("tower", None),
            bias=True,
            rngs=rngs,
            dtype=dtype,
        )
        self.down = Einsum(
            "bpm,md->bpd",
            (config.mlp_dim, width),
            (None, "tower"),
            bias=True,
            rngs=rngs,
            dtype=dtype,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.attn_norm(x)
        x += self.out(attention(self.query(y), self.key(y), self.value(y), batch="frames"))
        y = self.up(self.mlp_norm(x))  # [B, P, M]
        return x + self.down(jax.nn.gelu(y, approximate=True))
