"""Autoregressive generation: one prefill of whole prompts, then one token per row and step.

Prompts are padded on the right. Cache slots are indexed by position, so a row's first new token
overwrites its first padding slot. Padding is never attended to, since it has later positions than any
query.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.models.decoder import Cache
from storm_jax.models.storm import Storm


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, otherwise sampled from the smallest set of tokens
    whose probabilities add up to `top_p` (Holtzman et al., arXiv 1904.09751).

    Its values are inputs of compiled programs: other values compile nothing new.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")

    def as_arrays(self) -> Sampling:
        """The values with the dtypes that compiled programs take."""
        return jax.tree.map(lambda value: np.asarray(value, jnp.result_type(value)), self)

    def tree_flatten(self) -> tuple[tuple, None]:
        return (self.max_new_tokens, self.temperature, self.top_p), None

    @classmethod
    def tree_unflatten(cls, _: None, values: tuple) -> Sampling:
        sampling = object.__new__(cls)  # traced values cannot be checked
        for field, value in zip(dataclasses.fields(cls), values, strict=True):
            object.__setattr__(sampling, field.name, value)
        return sampling


class Generation(NamedTuple):
    """Answers that are being written.

    Attributes:
      step: number of tokens so far.
      tokens: int32 [B, N], padded with the first stop token.
      is_done: bool [B].
      lengths: int [B], of the prompts.
    """

    step: jax.Array
    tokens: jax.Array
    is_done: jax.Array
    lengths: jax.Array
    cache: Cache


def begin(
    model: Storm,
    batch: dict[str, jax.Array],
    visual: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    *,
    slots: int,
    stop_ids: tuple[int, ...],
) -> Generation:
    """Reads the prompts and chooses the first token of each answer; arguments as in `generate`."""
    lengths = batch["lengths"]
    logits, cache = prefill(model, batch, visual, batch["tokens"].shape[1] + slots)
    tokens = jnp.full((len(lengths), slots), stop_ids[0], jnp.int32)
    start = Generation(jnp.int32(0), tokens, lengths == 0, lengths, cache)
    return _add(start, logits, key, sampling, stop_ids)


def extend(
    model: Storm,
    generation: Generation,
    key: jax.Array,
    sampling: Sampling,
    limit: int | jax.Array,
    *,
    stop_ids: tuple[int, ...],
) -> Generation:
    """Adds tokens until each answer ends or has `limit` tokens; other arguments as in `begin`."""

    def unfinished(state: Generation) -> jax.Array:
        return (state.step < limit) & ~state.is_done.all()

    def decode(state: Generation) -> Generation:
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=1, keepdims=False)
        positions = state.lengths + state.step - 1
        logits, cache = decode_step(model, last, positions, state.cache)
        return _add(state._replace(cache=cache), logits, key, sampling, stop_ids)

    return jax.lax.while_loop(unfinished, decode, generation)


def generate(
    model: Storm,
    batch: dict[str, jax.Array],
    visual: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    *,
    slots: int,
    stop_ids: tuple[int, ...],
) -> jax.Array:
    """Continues each prompt until a stop token or `max_new_tokens`, which is at most `slots`.

    Args:
      batch: `tokens` and `visual_index`, int [B, S], one sample per row (see `storm_jax.data.rows`), and
        `lengths`, int [B]; rows of length 0 are empty and are not continued.
      visual: [B, V, D], the rows' visual tables (see `Storm.encode`).
      key: random key; unused at temperature 0.
      slots: room for new tokens; a program is compiled for each number.
      stop_ids: tokens that end an answer; the rest of the row is padded with the first of them.

    Returns:
      int32 [B, slots].
    """
    first = begin(model, batch, visual, key, sampling, slots=slots, stop_ids=stop_ids)
    return extend(model, first, key, sampling, sampling.max_new_tokens, stop_ids=stop_ids).tokens


def _add(
    state: Generation,
    logits: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> Generation:
    """Adds the next token of each answer, from fp32 logits [B, V]."""
    stops = jnp.array(stop_ids, jnp.int32)
    chosen = choose(logits, jax.random.fold_in(key, state.step), sampling)
    chosen = jnp.where(state.is_done, stops[0], chosen).astype(jnp.int32)
    return state._replace(
        step=state.step + 1,
        tokens=state.tokens.at[:, state.step].set(chosen),
        is_done=state.is_done | (chosen[:, None] == stops[None]).any(axis=1),
    )


def score_first(
    model: Storm, batch: dict[str, jax.Array], visual: jax.Array, candidates: jax.Array
) -> jax.Array:
    """Log-probabilities of `candidates`, int [B, K], as the first token of each answer, fp32 [B, K];
    `batch` and `visual` as in `generate`."""
    logits, _ = prefill(model, batch, visual, batch["tokens"].shape[1])
    return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), candidates, axis=-1)


def prefill(
    model: Storm, batch: dict[str, jax.Array], visual: jax.Array, cache_length: int
) -> tuple[jax.Array, Cache]:
    """Runs whole prompts through the decoder; `batch` and `visual` as in `generate`.

    Returns:
      fp32 logits [B, V] of the token after each prompt, and a cache of `cache_length` slots.
    """
    x = model.merge(batch["tokens"], visual, batch["visual_index"])  # [B, S, D]
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    hidden, cache = model.decode(x, positions, new_cache=cache_length)
    end = jnp.maximum(batch["lengths"] - 1, 0)
    last = jnp.take_along_axis(hidden, end[:, None, None], axis=1)  # [B, 1, D]
    return _logits(model, last), cast(Cache, cache)


def decode_step(
    model: Storm, tokens: jax.Array, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Runs one token per row, int [B], at its position, int [B]; returns logits [B, V] of the next."""
    x = model.decoder.embed(tokens[:, None])  # [B, 1, D]
    hidden, extended = model.decode(x, positions[:, None], cache=cache)
    return _logits(model, hidden), cast(Cache, extended)


def choose(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Chooses the next token of each row, int [B], from fp32 logits [B, V]."""
    return jax.lax.cond(sampling.temperature > 0, _sample, _most_likely, logits, key, sampling)


def _most_likely(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    return jnp.argmax(logits, axis=-1)


def _sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # total probability of higher ranks
    rank = jax.random.categorical(key, jnp.where(before < sampling.top_p, ranked, -jnp.inf))
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]


def _logits(model: Storm, hidden: jax.Array) -> jax.Array:
    """[B, 1, D] -> fp32 [B, V]."""
    return jnp.einsum(
        "bd,dv->bv", hidden[:, 0], model.decoder.head(), preferred_element_type=jnp.float32
    )
