"""Means over frames and over patches, and the pixel shuffle before them."""

from __future__ import annotations

from typing import NamedTuple

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


class OpenGroup(NamedTuple):
    """The frames of a clip's last group, which may not be full yet."""

    total: jax.Array  # [B, N, D] fp32, their sum
    frames: jax.Array  # int [B], how many

    def mean(self) -> jax.Array:
        """[B, N, D]: what `temporal_pool` makes of the group if the clip ends here; zero for an
        empty one."""
        return self.total / jnp.maximum(self.frames, 1)[:, None, None]


def open_group(batch: int, tokens: int, width: int) -> OpenGroup:
    """The group before the first frame of a clip."""
    return OpenGroup(jnp.zeros((batch, tokens, width), jnp.float32), jnp.zeros((batch,), jnp.int32))


def temporal_pool_block(
    x: jax.Array, group: OpenGroup, size: int
) -> tuple[jax.Array, jax.Array, OpenGroup]:
    """Mean over every `size` frames of a clip that arrives in blocks.

    Args:
      x: [B, F, N, D], the next frames of one clip a row.
      group: the frames before them that no full group has taken yet.
      size: frames per group.

    Returns:
      means [B, G, N, D] with G = ceil((F + size - 1) / size), as many as could become full; how many
      of them did, int [B], from the first; the open group.
    """
    frames = x.shape[1]
    slots = -(-(frames + size - 1) // size)
    number = (group.frames[:, None] + jnp.arange(frames)[None]) // size  # [B, F]
    members = number[:, None, :] == jnp.arange(slots)[None, :, None]  # [B, G, F]
    total = jnp.einsum(
        "bgf,bfnd->bgnd", members.astype(x.dtype), x, preferred_element_type=jnp.float32
    )
    total = total.at[:, 0].add(group.total)
    full, count = jnp.divmod(group.frames + frames, size)
    rest = jnp.take_along_axis(total, jnp.minimum(full, slots - 1)[:, None, None, None], axis=1)
    rest = jnp.where((count > 0)[:, None, None], rest[:, 0], 0.0)
    return (total / size).astype(x.dtype), full, OpenGroup(rest, count)


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
