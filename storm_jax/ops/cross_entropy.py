"""Next-token loss without ever holding the logits of a whole row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

TOKEN_CHUNK = 1024


def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sums over tokens, so that shards, accumulation steps and hosts add up exactly.

    Tokens go through the head in chunks that the backward pass recomputes; labels stay integers.

    Args:
      hidden: [B, S, D].
      head: [D, V].
      targets: int [B, S].
      weights: float [B, S]; 0 leaves a token out.

    Returns:
      fp32 scalars: summed loss in nats, summed weight, summed weight of tokens predicted right.
    """

    def chunk_sums(args: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden, targets, weights = args
        logits = jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=jnp.float32)
        label = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - label
        right = label >= logits.max(axis=-1)
        return jnp.sum(loss * weights), jnp.sum(right * weights)

    length = hidden.shape[1]
    size = min(TOKEN_CHUNK, length)

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    loss, right = jax.lax.map(
        jax.checkpoint(chunk_sums), (chunks(hidden), chunks(targets), chunks(weights))
    )
    return loss.sum(), weights.sum(), right.sum()
