"""Pixel shuffle, temporal pooling and spatial pooling."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """Concatenates the channels of each factor x factor block of tokens.

    The grid is zero-padded at the bottom and right to a multiple of `factor`. Channels are ordered
    row-major over the block, as in VILA.

    Args:
      x: [..., P, D]; the P tokens are a square grid in raster order.

    Returns:
      [..., ceil(side / factor)^2, factor^2 * D].
    """
    *lead, _, width = x.shape
    x = _grid(x, factor).swapaxes(-4, -3)  # [..., h, w, r, r, D]
    return x.reshape(*lead, x.shape[-5] * x.shape[-4], factor * factor * width)


def temporal_pool(x: jax.Array, frame_group: jax.Array, num_groups: int) -> jax.Array:
    """Averages the frames of each group.

    Args:
      x: [B, F, N, D].
      frame_group: int [B, F], in [0, num_groups); -1 drops a frame.

    Returns:
      [B, G, N, D]; empty groups are zero.
    """
    members = frame_group[:, None, :] == jnp.arange(num_groups)[None, :, None]  # [B, G, F]
    count = jnp.maximum(members.sum(axis=-1), 1)[:, :, None, None]
    total = jnp.einsum(
        "bgf,bfnd->bgnd", members.astype(x.dtype), x, preferred_element_type=jnp.float32
    )
    return (total / count).astype(x.dtype)


def halve_grid(x: jax.Array, method: str) -> jax.Array:
    """Halves the sides of a square grid of tokens, as LLaVA does in videos (`get_2dPool`).

    Args:
      x: [..., N, D]; the N tokens are a square grid in raster order.
      method: "average" or "max" of 2 x 2 cells, without the last row and column of an odd grid; or "bilinear"
        with half-pixel centres and no antialiasing, whose side is rounded up.

    Returns:
      [..., Nv, D].
    """
    *lead, tokens, width = x.shape
    side = _side(tokens)
    x = x.reshape(*lead, side, side, width)
    if method == "bilinear":
        weights = jnp.asarray(_bilinear(side), jnp.float32)
        y = jnp.einsum("ip,jq,...pqd->...ijd", weights, weights, x.astype(jnp.float32))
        return y.reshape(*lead, -1, width).astype(x.dtype)
    half = side // 2
    x = x[..., : 2 * half, : 2 * half, :]
    if method == "average":
        return spatial_pool(x.reshape(*lead, -1, width), 2)
    x = x.reshape(*lead, half, 2, half, 2, width).max(axis=(-4, -2))
    return x.reshape(*lead, -1, width)


def _bilinear(side: int) -> np.ndarray:
    """Weights [ceil(side / 2), side] of linear interpolation along one axis."""
    new = -(-side // 2)
    centres = np.clip((np.arange(new) + 0.5) * side / new - 0.5, 0, None)
    first = np.floor(centres).astype(int)
    weights = np.zeros((new, side))
    rows = np.arange(new)
    np.add.at(weights, (rows, first), 1 - (centres - first))
    np.add.at(weights, (rows, np.minimum(first + 1, side - 1)), centres - first)
    return weights


class PartialGroup(NamedTuple):
    """The frames of the last group of a clip that is still arriving."""

    total: jax.Array  # [B, N, D] fp32, sum over the frames
    num_frames: jax.Array  # int [B]

    @classmethod
    def empty(cls, batch: int, tokens: int, width: int) -> PartialGroup:
        """The group before the first frame of a clip."""
        return cls(jnp.zeros((batch, tokens, width), jnp.float32), jnp.zeros((batch,), jnp.int32))

    def mean(self) -> jax.Array:
        """[B, N, D], equal to `temporal_pool` if the clip ends here; zero for an empty group."""
        return self.total / jnp.maximum(self.num_frames, 1)[:, None, None]


def temporal_pool_block(
    x: jax.Array, group: PartialGroup, size: int
) -> tuple[jax.Array, jax.Array, PartialGroup]:
    """Averages every `size` frames of a clip that arrives in blocks.

    Args:
      x: [B, F, N, D], the next frames of one clip per row.
      group: the earlier frames that do not fill a group yet.
      size: frames per group.

    Returns:
      The means of the groups that this block completes, [B, G, N, D]; the number of them, int [B];
      and the new partial group. G = ceil((F + size - 1) / size) is the most that a block can
      complete; ignore the means beyond the number.
    """
    frames = x.shape[1]
    num_groups = -(-(frames + size - 1) // size)
    frame_group = (group.num_frames[:, None] + jnp.arange(frames)[None]) // size  # [B, F]
    members = frame_group[:, None, :] == jnp.arange(num_groups)[None, :, None]  # [B, G, F]
    total = jnp.einsum(
        "bgf,bfnd->bgnd", members.astype(x.dtype), x, preferred_element_type=jnp.float32
    )
    total = total.at[:, 0].add(group.total)
    completed, count = jnp.divmod(group.num_frames + frames, size)
    last = jnp.minimum(completed, num_groups - 1)[:, None, None, None]
    remainder = jnp.take_along_axis(total, last, axis=1)[:, 0]
    remainder = jnp.where((count > 0)[:, None, None], remainder, 0.0)
    return (total / size).astype(x.dtype), completed, PartialGroup(remainder, count)


def spatial_pool(x: jax.Array, factor: int) -> jax.Array:
    """Averages factor x factor cells of the token grid; partial edge cells average their tokens.

    Args:
      x: [..., N, D]; the N tokens are a square grid in raster order.

    Returns:
      [..., ceil(side / factor)^2, D].
    """
    if factor == 1:
        return x
    *lead, tokens, width = x.shape
    cells = _grid(x.astype(jnp.float32), factor)
    ones = jnp.ones((1,) * len(lead) + (tokens, 1), jnp.float32)
    mean = cells.sum(axis=(-4, -2)) / _grid(ones, factor).sum(axis=(-4, -2))
    return mean.reshape(*lead, -1, width).astype(x.dtype)


def _grid(x: jax.Array, factor: int) -> jax.Array:
    """Reshapes [..., side * side, D] to [..., cells, factor, cells, factor, D], zero-padded."""
    *lead, tokens, width = x.shape
    side = _side(tokens)
    pad = -side % factor
    x = x.reshape(*lead, side, side, width)
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, pad), (0, pad), (0, 0)])
    cells = (side + pad) // factor
    return x.reshape(*lead, cells, factor, cells, factor, width)


def _side(tokens: int) -> int:
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens do not form a square grid")
    return side
