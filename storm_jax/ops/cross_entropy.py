"""Next-token loss, computed without materialising the logits of a whole row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

TOKEN_CHUNK = 1024


def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the weighted sums of loss, weight and accuracy over all tokens.

    Sums rather than means, so that shards, accumulation steps and hosts combine exactly. Logits are
    computed in chunks of TOKEN_CHUNK tokens and recomputed in the backward pass. Targets are not
    one-hot encoded.

    Args:
      hidden: [B, S, D].
      head: [D, V].
      targets: int [B, S].
      weights: float [B, S]; 0 masks a token.

    Returns:
      Three fp32 scalars: the summed loss in nats, the summed weight, and the summed weight of the
      tokens whose target has the highest logit.
    """

    def chunk_sums(args: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden, targets, weights = args
        logits = jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=jnp.float32)
        target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - target_logit
        correct = target_logit >= logits.max(axis=-1)
        return jnp.sum(loss * weights), jnp.sum(correct * weights)

    length = hidden.shape[1]
    size = min(TOKEN_CHUNK, length)

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    loss, correct = jax.lax.map(
        jax.checkpoint(chunk_sums), (chunks(hidden), chunks(targets), chunks(weights))
    )
    return loss.sum(), weights.sum(), correct.sum()
