"""Next-token loss, computed without materialising the logits of a whole row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from storm_jax.ops.chunks import to_chunks
from storm_jax.ops.spans import unify_varying_axes
from storm_jax.sharding import mesh_axes_in_context

TOKEN_CHUNK = 1024


def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the weighted sums of loss, weight and accuracy over all tokens.

    Sums rather than means, so that shards, accumulation steps and hosts combine exactly. Logits are
    computed in chunks of TOKEN_CHUNK tokens and recomputed in the backward pass. Chunks without an answer are skipped:
    most of a row is video. Targets are not one-hot encoded. On a mesh, each device cuts its own tokens into chunks and has a part of the vocabulary; the
    gradient of the head is reduced once, not once per chunk.

    Args:
      hidden: [B, S, D].
      head: [D, V].
      targets: int [B, S].
      weights: float [B, S]; 0 masks a token. They get no gradient.

    Returns:
      Three fp32 scalars: the summed loss in nats, the summed weight, and the summed weight of the
      tokens whose target has the highest logit.
    """
    arrays = (hidden, head, targets, jax.lax.stop_gradient(weights))
    shape = (*hidden.shape[:2], head.shape[1])
    rows, steps, columns = mesh_axes_in_context(shape, "batch", "sequence", "vocab")
    if not (rows or steps or columns):
        loss, correct = _sums(*arrays, vocab=())
    else:

        def shard_sums(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _over((*rows, *steps), jax.lax.psum, _sums(*arrays, vocab=columns))

        tokens = P(rows, steps)
        in_specs = (P(rows, steps, None), P(None, columns), tokens, tokens)
        loss, correct = jax.shard_map(shard_sums, in_specs=in_specs, out_specs=P())(*arrays)
    return loss, weights.sum(), correct


def _sums(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    vocab: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """Summed loss and accuracy of the tokens of a device; `vocab` are the mesh axes that shard V."""
    first = jax.lax.axis_index(vocab) * head.shape[1] if vocab else 0  # of this device's tokens
    # Devices sum their gradients of the head after the loop: in it, some of them skip a chunk that others do not.
    head = unify_varying_axes((hidden, head))[1]

    def chunk_sums(args: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden, targets, weights = args
        logits = jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=jnp.float32)
        largest = jax.lax.stop_gradient(logits).max(axis=-1)  # [B, S]
        largest = _over(vocab, jax.lax.pmax, largest)
        total = jnp.exp(logits - largest[..., None]).sum(axis=-1)
        total = _over(vocab, jax.lax.psum, total)
        column = targets - first
        is_here = (column >= 0) & (column < logits.shape[-1])
        column = jnp.where(is_here, column, 0)[..., None]
        target = jnp.take_along_axis(logits, column, axis=-1)[..., 0]
        target = _over(vocab, jax.lax.psum, jnp.where(is_here, target, 0))
        loss = jnp.log(total) + largest - target
        return jnp.sum(loss * weights), jnp.sum((target >= largest) * weights)

    def sums_if_any(args: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        none = 0 * args[2].sum()
        return jax.lax.cond(args[2].any(), chunk_sums, lambda _: (none, none), args)

    # Devices that share the vocabulary exchange sums of every chunk.
    sums = chunk_sums if vocab else sums_if_any
    size = min(TOKEN_CHUNK, hidden.shape[1])
    chunks = jax.tree.map(lambda x: to_chunks(x, size), (hidden, targets, weights))
    loss, correct = jax.lax.map(jax.checkpoint(sums), chunks)
    return loss.sum(), correct.sum()


def _over(axes: tuple[str, ...], collective: Callable, x: Any) -> Any:
    """A collective over mesh axes; over none, it would be an error."""
    return collective(x, axes) if axes else x
