"""Autoregressive generation in rows of fixed size.

    prefill   reads a block of prompts, of which earlier blocks may have been read
    insert    puts prompts that were read into free rows, with their first tokens
    decode    continues all rows, one token per step

Prompts are padded on the right. Cache slots are indexed by position, so a row's first new token overwrites its first
padding slot. Padding is never attended to, since it has later positions than any query. Rows are independent: the
tokens of one do not depend on the others.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from storm_jax.models.decoder import Cache
from storm_jax.models.storm import Storm

# Temperatures up to this are 0: logits divided by less have no precision left.
_COLD = 1e-5


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, otherwise sampled from the smallest set of tokens
    whose probabilities add up to `top_p` (Holtzman et al., arXiv 1904.09751)."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


class Choice(NamedTuple):
    """How each row chooses its tokens; inputs of compiled programs, so that other values compile nothing."""

    temperature: jax.Array  # fp32 [R]
    top_p: jax.Array  # fp32 [R]
    seed: jax.Array  # uint32 [R]


class Prompts(NamedTuple):
    """P prompts that are being read."""

    cache: Cache  # of P rows
    last: jax.Array  # [P, D], hidden states of their last tokens, where those were read


class Answers(NamedTuple):
    """Answers that are being written in R rows."""

    cache: Cache  # of R rows
    token: jax.Array  # int32 [R], the last one
    position: jax.Array  # int32 [R], where it goes; 0 in a row without an answer
    written: jax.Array  # int32 [R], tokens so far
    left: jax.Array  # int32 [R], tokens that may follow; 0 if the answer has ended
    choice: Choice


def prefill(
    model: Storm,
    x: jax.Array,
    lengths: jax.Array,
    start: int | jax.Array = 0,
    prompts: Prompts | None = None,
    *,
    slots: int = 0,
) -> Prompts:
    """Reads the tokens from `start` on of P prompts.

    Args:
      x: their embeddings [P, C, D] (see `Storm.merge`).
      lengths: int [P], of the whole prompts; 0 is an empty row.
      prompts: the tokens before them; None at the start.
      slots: of the cache that is made at the start.
    """
    positions = start + jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    if prompts is None:
        hidden, cache = model.decode(x, positions, new_cache=slots)
    else:
        hidden, cache = model.decode(x, positions, cache=prompts.cache)
    end = jnp.clip(lengths - 1 - start, 0, x.shape[1] - 1)
    last = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]  # [P, D]
    if prompts is not None:  # some ended earlier
        last = jnp.where((lengths > start)[:, None], last, prompts.last)
    return Prompts(cast(Cache, cache), last)


def next_logits(model: Storm, hidden: jax.Array) -> jax.Array:
    """Hidden states [B, D] -> fp32 logits [B, V] of the next tokens."""
    return jnp.einsum("bd,dv->bv", hidden, model.decoder.head(), preferred_element_type=jnp.float32)


def empty_answers(model: Storm, rows: int, length: int) -> Answers:
    """Rows of `length` positions without an answer."""
    config = model.decoder.config
    shape = (config.depth, rows, length, config.num_kv_heads, config.head_dim)
    cache = Cache(*(jnp.zeros(shape, model.decoder.dtype) for _ in Cache._fields))
    zeros = jnp.zeros(rows, jnp.int32)
    nothing = Choice(jnp.zeros(rows), jnp.ones(rows), jnp.zeros(rows, jnp.uint32))
    return Answers(cache, zeros, zeros, zeros, zeros, nothing)


def insert(
    model: Storm,
    answers: Answers,
    prompts: Prompts,
    rows: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    choice: Choice,
    *,
    stop_ids: tuple[int, ...],
) -> tuple[Answers, jax.Array]:
    """Puts P prompts into rows and chooses the first tokens of their answers.

    Args:
      rows: int [P], the row of each; R is nowhere.
      lengths, limits: int [P], tokens of each prompt, and of its answer at most.
      choice: of the P prompts.

    Returns:
      The answers and the first tokens, int [P].
    """
    written = jnp.zeros_like(lengths)
    token = choose(next_logits(model, prompts.last), choice, written)
    is_last = _is_stop(token, stop_ids)
    slots = prompts.cache.key.shape[2]
    cache = Cache(
        *(
            old.at[:, rows, :slots].set(new)
            for old, new in zip(answers.cache, prompts.cache, strict=True)
        )
    )
    new = Answers(cache, token, lengths, written + 1, jnp.where(is_last, 0, limits - 1), choice)
    placed = jax.tree.map(lambda old, new: old.at[rows].set(new), answers[1:], new[1:])
    return Answers(cache, *placed), token


def decode(
    model: Storm,
    answers: Answers,
    is_kept: jax.Array,
    steps: int | jax.Array,
    *,
    room: int,
    stop_ids: tuple[int, ...],
) -> tuple[Answers, jax.Array]:
    """Continues all answers by up to `steps` tokens, until one of the rows has none.

    Args:
      is_kept: bool [R]; the answers of other rows end here.
      steps: at most `room`.

    Returns:
      The answers and their new tokens, int [R, room]; -1 where there is none.
    """

    def is_unfinished(state: tuple) -> jax.Array:
        step, answers, _ = state
        return (step < steps) & (answers.left > 0).any()

    def add(state: tuple) -> tuple:
        step, answers, tokens = state
        answers, new = decode_step(model, answers, stop_ids=stop_ids)
        return step + 1, answers, tokens.at[:, step].set(new)

    answers = answers._replace(left=jnp.where(is_kept, answers.left, 0))
    tokens = jnp.full((len(is_kept), room), -1, jnp.int32)
    _, answers, tokens = jax.lax.while_loop(is_unfinished, add, (jnp.int32(0), answers, tokens))
    return answers, tokens


def decode_step(
    model: Storm, answers: Answers, *, stop_ids: tuple[int, ...]
) -> tuple[Answers, jax.Array]:
    """Adds one token to all answers; returns them and the tokens, int [R], -1 where there is none."""
    is_active = answers.left > 0
    # A row without an answer writes to its first slot, which the next prompt overwrites.
    position = jnp.where(is_active, answers.position, 0)
    x = model.decoder.embed(answers.token[:, None])  # [R, 1, D]
    hidden, cache = model.decode(x, position[:, None], cache=answers.cache)
    token = choose(next_logits(model, hidden[:, 0]), answers.choice, answers.written)
    left = jnp.where(is_active & ~_is_stop(token, stop_ids), answers.left - 1, 0)
    written = answers.written + 1
    extended = Answers(cast(Cache, cache), token, position + 1, written, left, answers.choice)
    return extended, jnp.where(is_active, token, -1)


def choose(logits: jax.Array, choice: Choice, written: jax.Array) -> jax.Array:
    """Chooses the next token of each row, int32 [R], from fp32 logits [R, V].

    Args:
      written: int [R], tokens that the answer has. A draw depends on it and the row's seed only.
    """
    is_random = (choice.temperature > _COLD).any()
    return jax.lax.cond(is_random, _sample, _most_likely, logits, choice, written)


def _most_likely(logits: jax.Array, choice: Choice, written: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _sample(logits: jax.Array, choice: Choice, written: jax.Array) -> jax.Array:
    is_random = choice.temperature > _COLD
    scaled = logits / jnp.where(is_random, choice.temperature, 1)[:, None]
    probabilities = jax.nn.softmax(scaled, axis=-1)
    is_in = probabilities >= _nucleus(probabilities, choice.top_p)[:, None]
    keys = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(
        choice.seed, written
    )
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(is_in, scaled, -jnp.inf))
    greedy = _most_likely(logits, choice, written)
    return jnp.where(is_random, drawn, greedy).astype(jnp.int32)


def _nucleus(probabilities: jax.Array, top_p: jax.Array) -> jax.Array:
    """The smallest probability, fp32 [R], in the smallest set whose sum reaches `top_p`.

    Bisects the bits of floats, which are ordered like the floats themselves: sums are cheaper than sorting.
    """
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def bisect(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        total = jnp.where(bits >= middle[:, None], probabilities, 0).sum(axis=-1)
        reaches = total >= top_p
        return jnp.where(reaches, middle, low), jnp.where(reaches, high, middle)

    start = jnp.zeros_like(top_p, jnp.int32), bits.max(axis=-1) + 1
    low, _ = jax.lax.fori_loop(0, 31, bisect, start)
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _is_stop(token: jax.Array, stop_ids: tuple[int, ...]) -> jax.Array:
    return (token[:, None] == jnp.array(stop_ids, jnp.int32)[None]).any(axis=1)
