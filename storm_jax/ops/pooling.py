"""Means over frames and over patches, and the pixel shuffle before them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """Merges factor x factor neighbours into channels; odd grids get zeros at bottom and right.

    Channels of a merged token are row-major over its neighbours (VILA's order).

    Args:
      x: [B, P, D] with P a square grid in raster order.

    Returns:
      [B, ceil(side / factor)^2, factor^2 * D].
    """
    batch, width = x.shape[0], x.shape[-1]
    x = _grid(x, factor)  # [B, h, r, w, r, D]
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, x.shape[1] * x.shape[2], factor * factor * width)


def temporal_pool(x: jax.Array, frame_group: jax.Array, num_groups: int) -> jax.Array:
    """Mean over the frames of each group.

    Args:
      x: [B, F, N, D].
      frame_group: int [B, F], in [0, num_groups); -1 leaves a frame out.

    Returns:
      [B, G, N, D]; groups without frames are zero.
    """
    members = frame_group[:, None, :] == jnp.arange(num_groups)[None, :, None]  # [B, G, F]
    count = jnp.maximum(members.sum(axis=-1), 1)[:, :, None, None]
    total = jnp.einsum(
        "bgf,bfnd->bgnd", members.astype(x.dtype), x, preferred_element_type=jnp.float32
    )
    return (total / count).astype(x.dtype)


def spatial_pool(x: jax.Array, factor: int) -> jax.Array:
    """Mean over factor x factor cells of the token grid; edge cells average what is there.

    Args:
      x: [..., N, D] with N a square grid in raster order.

    Returns:
      [..., ceil(side / factor)^2, D].
    """
    if factor == 1:
        return x
    *lead, tokens, width = x.shape
    cells = _grid(x.reshape(-1, tokens, width).astype(jnp.float32), factor)
    count = _grid(jnp.ones((1, tokens, 1), jnp.float32), factor).sum(axis=(2, 4))
    mean = cells.sum(axis=(2, 4)) / count
    return mean.reshape(*lead, -1, width).astype(x.dtype)


def _grid(x: jax.Array, factor: int) -> jax.Array:
    """[B, side * side, D] -> zero-padded [B, cells, factor, cells, factor, D]."""
    batch, tokens, width = x.shape
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens are not a square grid")
    x = x.reshape(batch, side, side, width)
    pad = -side % factor
    x = jnp.pad(x, ((0, 0), (0, pad), (0, pad), (0, 0)))
    cells = (side + pad) // factor
    return x.reshape(batch, cells, factor, cells, factor, width)
