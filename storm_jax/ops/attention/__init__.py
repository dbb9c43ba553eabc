"""Grouped-query attention over a range of keys.

    y[i] = sum_j softmax_j(q[i] . k[j] / sqrt(K)) v[j]    for first[i] <= j <= last[i]

Logits and softmax are fp32. No [S, T] array is stored; the backward pass recomputes the logits.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from storm_jax.ops import sequence_shards
from storm_jax.ops.attention import xla
from storm_jax.ops.attention.keys import KeyRange, causal_keys
from storm_jax.ops.guard import agrees
from storm_jax.sharding import mesh_axes_in_context, platform

__all__ = ["IMPLEMENTATIONS", "KeyRange", "attention", "causal_keys"]

IMPLEMENTATIONS = ("xla", "splash")
_TOLERANCE = 1e-2  # of splash, whose products are bfloat16, relative to the largest value


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: KeyRange | None = None,
    *,
    batch: str = "batch",
    implementation: str | None = None,
) -> jax.Array:
    """Computes attention on the rows, heads and queries of each device.

    If the sequence is sharded over the mesh, each device gathers all keys and values of its rows and heads. A ring
    would move as many bytes, in more steps: every device needs every key. With few key-value heads, they are small
    compared to the activations.

    Args:
      q: [B, S, H, K].
      k, v: [B, T, H_kv, K]; H must be a multiple of H_kv.
      keys: those that each query attends to; all by default.
      batch: logical axis of B.
      implementation: one of `IMPLEMENTATIONS`; None selects the fastest one for the platform that the program is
        lowered for. "splash" is a TPU kernel, for all keys or causal ranges; it is interpreted on CPU, which is slow.

    Returns:
      [B, S, H, K] in the dtype of `q`.

    Raises:
      ValueError: unknown `implementation`.
    """
    sequence = "sequence" if batch == "batch" else None
    axes = (batch, sequence, "kv_heads", None)
    rows, key_steps, heads, _ = mesh_axes_in_context(k.shape, *axes)
    steps = mesh_axes_in_context(q.shape, *axes)[1]
    if implementation is None:
        implementation = _fastest(keys, is_sharded=bool(steps))
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: use one of {IMPLEMENTATIONS} or None")

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, keys: KeyRange | None) -> jax.Array:
        if key_steps:
            k, v = sequence_shards.gather(k), sequence_shards.gather(v)
        return _attend_with(implementation)(q, k, v, keys)

    if not (rows or steps or key_steps or heads):
        return attend(q, k, v, keys)
    q_spec, kv_spec = P(rows, steps, heads), P(rows, key_steps, heads)
    in_specs = (q_spec, kv_spec, kv_spec, P(rows, steps))
    # Kernels lose track of varying axes, so these cannot be checked.
    attend = jax.shard_map(
        attend, in_specs=in_specs, out_specs=q_spec, check_vma=implementation == "xla"
    )
    return attend(q, k, v, keys)


def _fastest(keys: KeyRange | None, is_sharded: bool) -> str:
    """The implementation for the platform, the keys and the sharding of queries.

    A kernel is replaced by "xla" if it does not agree with it on this device, which is logged once.
    """
    if platform() != "tpu" or is_sharded or not (keys is None or keys.is_causal):
        return "xla"
    return "splash" if jax.default_backend() != "tpu" or _is_right("splash") else "xla"


def _attend_with(implementation: str) -> Callable[..., jax.Array]:
    if implementation == "xla":
        return xla.attend
    # Imported on first use: another version of JAX may not have what it imports.
    module = importlib.import_module("storm_jax.ops.attention.tpu")
    return functools.partial(module.attend, interpret=platform() == "cpu")


@functools.cache
def _is_right(implementation: str) -> bool:
    """Whether an implementation agrees with "xla", values and gradients, on ragged packed samples."""
    rng = np.random.default_rng(0)
    length, segments = 300, np.sort(rng.integers(0, 4, (2, 300)), axis=1)
    q, k, v, weights = (
        jnp.asarray(rng.standard_normal((2, length, heads, 64)), jnp.bfloat16)
        for heads in (4, 2, 2, 4)
    )

    def run(implementation: str) -> Any:
        def loss(inputs: tuple, keys: KeyRange | None) -> tuple[jax.Array, jax.Array]:
            q, k, v = inputs
            y = attention(q, k, v, keys, implementation=implementation)
            return (y * weights).astype(jnp.float32).sum(), y

        gradient = jax.jit(jax.grad(loss, has_aux=True))
        return [gradient((q, k, v), keys) for keys in (None, causal_keys(jnp.asarray(segments)))]

    return agrees(
        f"the attention kernel {implementation}",
        functools.partial(run, implementation),
        functools.partial(run, "xla"),
        tolerance=_TOLERANCE,
        instead="xla",
    )
