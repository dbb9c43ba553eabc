"""Attention by the splash kernel of JAX, for TPUs. It skips the upper half of a causal square."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from storm_jax.ops.attention.keys import KeyRange

_LANES = 128
_BLOCKS = (512, 256, 128)  # steps; the largest that divides the padded length


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: KeyRange | None, *, interpret: bool
) -> jax.Array:
    """As `storm_jax.ops.attention.attention`, on one device; keys are all, or a causal range of as many as queries."""
    (_, length, heads, channels), num_keys = q.shape, k.shape[1]
    scaled = (q.astype(jnp.float32) * channels**-0.5).astype(q.dtype)
    q, k, v = (_pad(x, 1, 3).swapaxes(1, 2) for x in (scaled, k, v))  # [B, H, S, K]
    if keys is None:
        in_row = jnp.zeros((len(q), num_keys), jnp.int32)
        segments = jnp.zeros((len(q), q.shape[2]), jnp.int32), _pad(in_row, 1, fill=1)
    else:  # all queries of a segment have the same first key
        segments = (_pad(keys.first, 1, fill=-1),) * 2
    kernel = _kernel(heads, q.shape[2], k.shape[2], keys is not None, interpret)
    y = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(*segments))
    return y.swapaxes(1, 2)[:, :length, :, :channels]


def _kernel(heads: int, queries: int, keys: int, is_causal: bool, interpret: bool) -> Any:
    """The kernel for q [H, S, K] and k, v [H_kv, T, K]."""
    rows, columns = (next(b for b in _BLOCKS if not size % b) for size in (queries, keys))
    mask = (masks.CausalMask if is_causal else masks.FullMask)((queries, keys))
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_q_dq=rows,
            block_kv_dq=columns,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _pad(x: jax.Array, *axes: int, fill: int = 0) -> jax.Array:
    """Pads axes to multiples of the lanes of a TPU."""
    widths = [(0, -size % _LANES if axis in axes else 0) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=fill)
