"""Whole generation in one call, with a row for each prompt."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from storm_jax.inference.generate import Choice, decode, empty_answers, insert, prefill
from storm_jax.models.storm import Storm


@functools.partial(nnx.jit, static_argnames=("new", "stop_ids"))
def _greedy(
    model: Storm, batch: dict, visual: jax.Array, new: int, stop_ids: tuple[int, ...]
) -> jax.Array:
    x = model.merge(batch["tokens"], visual, batch["visual_index"])
    rows, slots = x.shape[:2]
    prompts = prefill(model, x, batch["lengths"], slots=slots)
    choice = Choice(jnp.zeros(rows), jnp.ones(rows), jnp.zeros(rows, jnp.uint32))
    answers, first = insert(
        model,
        empty_answers(model, rows, slots + new),
        prompts,
        jnp.arange(rows),
        batch["lengths"],
        jnp.full(rows, new),
        choice,
        stop_ids=stop_ids,
    )
    is_kept = batch["lengths"] > 0
    _, more = decode(model, answers, is_kept, new - 1, room=new - 1, stop_ids=stop_ids)
    return jnp.concatenate([first[:, None], more], axis=1)


def greedy(
    model: Storm, batch: dict, visual: jax.Array, new: int, stop_ids: tuple[int, ...]
) -> np.ndarray:
    """The most likely tokens, int [B, new]; -1 after a stop token."""
    return np.asarray(_greedy(model, batch, visual, new=new, stop_ids=stop_ids))
