"""Generation: the cache does not change results, and prompts of a batch are independent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict
from generation import greedy
from rows_by_hand import build_rows

from configs.storm_qwen2_7b import MODEL as QWEN2_7B
from configs.tiny import MODEL as TINY
from storm_jax.compression import Grid, VisualShape, plan_clip
from storm_jax.config import CompressionConfig
from storm_jax.data.rows import RowSample, RowShape
from storm_jax.inference.generate import (
    Answers,
    Choice,
    Sampling,
    _nucleus,
    choose,
    decode,
    decode_step,
    empty_answers,
    insert,
    next_logits,
    prefill,
)
from storm_jax.models.storm import Storm
from storm_jax.params import abstract_model, compute_dtypes, flat_params
from storm_jax.text.conversation import Encoded

SHAPE = RowShape(
    tokens=48,
    frames=8,
    image_size=32,
    grid=Grid.of(TINY),
    compressions=(CompressionConfig(num_frames=8, temporal_pool=4),),
)
VISUAL = SHAPE.visual
NEW = 5  # tokens
STOP = (511,)


@pytest.fixture(scope="module")
def batch() -> dict[str, jax.Array]:
    """Three prompts of 11, 29 and 48 tokens, the last two about a clip."""
    rng = np.random.default_rng(0)
    rows, lengths = [], []
    for frames, words in ((0, 11), (8, 21), (7, 40)):
        visual = plan_clip(frames, SHAPE.grid, SHAPE.compressions[0]).num_tokens if frames else 0
        tokens = np.concatenate([np.zeros(visual, int), rng.integers(1, 500, words)])
        media = np.where(np.arange(visual + words) < visual, 0, -1)
        clips = [rng.integers(0, 256, (frames, 32, 32, 3)).astype(np.uint8)] if frames else []
        encoded = Encoded(tokens.astype(np.int32), media < 0, media)
        rows.append([RowSample(encoded, clips, SHAPE.compressions[0])])
        lengths.append(len(encoded))
    arrays = build_rows(rows, 0, SHAPE) | {"lengths": np.array(lengths, np.int32)}
    return {name: jnp.asarray(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def model(small_model, randomise) -> Storm:
    return randomise(Storm(small_model, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def visual(model, batch) -> jax.Array:
    encode = nnx.jit(Storm.encode, static_argnames=("shape",))
    frames = (batch[name] for name in ("frames", "frame_clip", "frame_group"))
    return encode(model, *frames, shape=VISUAL)


@nnx.jit
def run_uncached(model: Storm, batch: dict, tokens, index, positions):
    visual = model.encode(batch["frames"], batch["frame_clip"], batch["frame_group"], VISUAL)
    hidden, _ = model.decode(model.merge(tokens, visual, index), positions)
    return hidden @ model.decoder.head()


def full_logits(model: Storm, batch: dict, extra: np.ndarray) -> np.ndarray:
    """Logits [B, S + n, V] without a cache, with `extra` [B, n] after each prompt."""
    rows = np.asarray(batch["tokens"])
    size, more = rows.shape[1], extra.shape[1]
    tokens = np.pad(rows, ((0, 0), (0, more)))
    index = np.pad(np.asarray(batch["visual_index"]), ((0, 0), (0, more)), constant_values=-1)
    for row, length in enumerate(np.asarray(batch["lengths"])):
        tokens[row, length : length + more] = extra[row]
        index[row, length:] = -1
    positions = np.broadcast_to(np.arange(size + more), tokens.shape)

    return np.asarray(run_uncached(model, batch, tokens, index, positions))


def lengths_of(batch: dict) -> np.ndarray:
    return np.asarray(batch["lengths"])


@nnx.jit
def extend(model: Storm, answers: Answers, token: jax.Array) -> tuple[Answers, jax.Array]:
    """The hidden states after the tokens, through the logits that `decode_step` would choose from."""
    position = answers.position
    x = model.decoder.embed(token[:, None])
    hidden, cache = model.decode(x, position[:, None], cache=answers.cache)
    return answers._replace(cache=cache, position=position + 1), next_logits(model, hidden[:, 0])


@nnx.jit
def start(model: Storm, batch: dict, visual: jax.Array) -> tuple[Answers, jax.Array]:
    x = model.merge(batch["tokens"], visual, batch["visual_index"])
    prompts = prefill(model, x, batch["lengths"], slots=x.shape[1])
    rows = jnp.arange(3)
    choice = Choice(jnp.zeros(3), jnp.ones(3), jnp.zeros(3, jnp.uint32))
    empty = empty_answers(model, 3, x.shape[1] + NEW)
    answers, _ = insert(
        model,
        empty,
        prompts,
        rows,
        batch["lengths"],
        jnp.full(3, NEW),
        choice,
        stop_ids=STOP,
    )
    return answers, next_logits(model, prompts.last)


def test_cached_logits_equal_uncached_ones(model, batch, visual):
    extra = np.random.default_rng(1).integers(1, 500, (3, NEW)).astype(np.int32)
    expected = full_logits(model, batch, extra)
    lengths = lengths_of(batch)
    answers, logits = start(model, batch, visual)
    for step in range(NEW + 1):
        rows = expected[np.arange(3), lengths - 1 + step]
        np.testing.assert_allclose(logits, rows, atol=2e-4, rtol=1e-4)
        if step < NEW:
            answers, logits = extend(model, answers, extra[:, step])


def test_greedy_generation_is_the_argmax_of_uncached_logits(model, batch, visual):
    tokens = greedy(model, batch, visual, NEW, STOP)
    expected = full_logits(model, batch, tokens)
    for step in range(NEW):
        best = expected[np.arange(3), lengths_of(batch) - 1 + step].argmax(axis=-1)
        np.testing.assert_array_equal(tokens[:, step], best)


def test_prompts_of_a_batch_do_not_change_each_other(model, batch, visual):
    together = greedy(model, batch, visual, NEW, STOP)
    for row in range(3):
        alone = {name: array[row : row + 1] for name, array in batch.items()}
        tokens = greedy(model, alone, visual[row : row + 1], NEW, STOP)
        np.testing.assert_array_equal(tokens[0], together[row])


@pytest.mark.parametrize("size", [16, 24])
def test_blocks_of_a_prompt_give_what_the_whole_prompt_does(model, batch, visual, size):
    """Prompts of 11, 29 and 48 tokens end in different blocks."""
    x = nnx.jit(Storm.merge)(model, batch["tokens"], visual, batch["visual_index"])
    read = nnx.jit(prefill, static_argnames="slots")
    lengths = batch["lengths"]
    whole = read(model, x, lengths, slots=48)
    prompts = read(model, x[:, :size], lengths, slots=48)
    for begin in range(size, 48, size):
        prompts = read(model, x[:, begin : begin + size], lengths, begin, prompts)
    np.testing.assert_allclose(prompts.last, whole.last, atol=1e-4, rtol=1e-4)
    for row, length in enumerate(lengths_of(batch)):
        for part, expected in zip(prompts.cache, whole.cache, strict=True):
            np.testing.assert_allclose(
                part[:, row, :length], expected[:, row, :length], atol=1e-4, rtol=1e-4
            )


def test_a_prompt_may_go_to_any_row_and_to_none(model, batch, visual):
    """Other rows, and their answers, stay as they are."""
    whole = greedy(model, batch, visual, NEW, STOP)
    answers, _ = start(model, batch, visual)
    step = nnx.jit(decode_step, static_argnames="stop_ids")
    answers, second = step(model, answers, stop_ids=STOP)
    np.testing.assert_array_equal(second, whole[:, 1])
    x = model.merge(batch["tokens"], visual, batch["visual_index"])[:2]
    prompts = prefill(model, x, batch["lengths"][:2], slots=48)
    choice = Choice(jnp.zeros(2), jnp.ones(2), jnp.zeros(2, jnp.uint32))
    rows = jnp.array([2, 3])  # the second is nowhere
    answers, first = insert(
        model,
        answers,
        prompts,
        rows,
        batch["lengths"][:2],
        jnp.full(2, NEW),
        choice,
        stop_ids=STOP,
    )
    np.testing.assert_array_equal(first, whole[:2, 0])
    answers, third = step(model, answers, stop_ids=STOP)
    np.testing.assert_array_equal(third, [whole[0, 2], whole[1, 2], whole[0, 1]])


def test_generation_ends_each_row_at_its_stop_token(model, batch, visual):
    free = greedy(model, batch, visual, NEW, STOP)
    stop = int(free[0, 2])
    stopped = greedy(model, batch, visual, NEW, (*STOP, stop))
    first = list(free[0]).index(stop)
    np.testing.assert_array_equal(stopped[0, : first + 1], free[0, : first + 1])
    assert (stopped[0, first + 1 :] == -1).all()


def test_an_empty_row_is_not_continued(model, batch, visual):
    whole = greedy(model, batch, visual, NEW, STOP)
    lengths = batch["lengths"].at[1].set(0)
    tokens = greedy(model, batch | {"lengths": lengths}, visual, NEW, STOP)
    assert (tokens[1, 1:] == -1).all() and (whole[1] != -1).all()
    np.testing.assert_array_equal(tokens[[0, 2]], whole[[0, 2]])


def test_the_papers_longest_setting_has_the_shapes_it_should():
    """256 frames of 448 pixels, pooled by 4, before a 7B decoder: 64 groups of 256 tokens."""
    config = QWEN2_7B
    graphdef, abstract = abstract_model(config)
    params = unflatten_dict(compute_dtypes(flat_params(abstract), config), sep="/")

    def shape(size, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(size, dtype)

    def encode(params, frames, clip, group):
        return nnx.merge(graphdef, params).encode(frames, clip, group, VisualShape(64, (1,)))

    frames = shape((1, 256, 448, 448, 3), jnp.uint8)
    table = jax.eval_shape(encode, params, frames, shape((1, 256)), shape((1, 256)))
    assert (table.shape, table.dtype) == ((1, 16_384, 3584), jnp.bfloat16)

    def read(params, batch, visual):
        model = nnx.merge(graphdef, params)
        x = model.merge(batch["tokens"], visual, batch["visual_index"])
        return prefill(model, x, batch["lengths"], slots=16_896)

    batch = {
        "tokens": shape((8, 16_896)),
        "visual_index": shape((8, 16_896)),
        "lengths": shape((8,)),
    }
    tables = shape((8, *table.shape[1:]), table.dtype)
    prompts = jax.eval_shape(read, params, batch, tables)
    assert prompts.cache.key.shape == (28, 8, 16_896, 4, 128)

    def answer(params, prompts):
        model = nnx.merge(graphdef, params)
        rows, empty = jnp.arange(8), empty_answers(model, 8, 16_912)
        choice = Choice(jnp.zeros(8), jnp.ones(8), jnp.zeros(8, jnp.uint32))
        limits = jnp.full(8, 16)
        answers, _ = insert(model, empty, prompts, rows, limits, limits, choice, stop_ids=(1,))
        return decode(model, answers, rows > 0, 15, room=15, stop_ids=(1,))

    assert jax.eval_shape(answer, params, prompts)[1].shape == (8, 15)


def draw(logits: jax.Array, temperature: float, top_p: float = 1.0) -> np.ndarray:
    rows = len(logits)
    choice = Choice(
        jnp.full(rows, temperature), jnp.full(rows, top_p), jnp.arange(rows, dtype=jnp.uint32)
    )
    return np.asarray(choose(logits, choice, jnp.zeros(rows, jnp.int32)))


def test_top_p_draws_only_from_the_nucleus_and_by_its_probabilities():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.broadcast_to(jnp.log(probabilities)[None], (4000, 4))
    drawn = draw(logits, temperature=1.0, top_p=0.7)
    share = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(share, [0.625, 0.375, 0, 0], atol=0.03)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_the_nucleus_is_that_of_sorted_probabilities(top_p):
    rng = np.random.default_rng(0)
    logits = (
        rng.standard_normal((6, 5000)).astype(np.float32) * np.arange(6, dtype=np.float32)[:, None]
    )
    probabilities = np.asarray(jax.nn.softmax(logits))
    smallest = np.asarray(_nucleus(jnp.asarray(probabilities), jnp.full(6, top_p)))
    for row, least in zip(probabilities, smallest, strict=True):
        ranked = np.sort(row)[::-1].astype(np.float64)
        before = np.cumsum(ranked) - ranked
        kept = ranked[before < top_p * ranked.sum()]
        if top_p == 1:
            assert least <= 1e-6 * row.max()
        else:  # a sum in float32 may end one token earlier or later
            assert abs((row >= least).sum() - len(kept)) <= (row == kept[-1]).sum()


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-20, 1e-36])
def test_temperatures_near_0_take_the_most_likely_token(temperature):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((16, 50)), jnp.float32)
    np.testing.assert_array_equal(draw(logits, temperature), logits.argmax(-1))


def test_temperature_sharpens():
    probabilities = np.array([0.6, 0.4])
    logits = jnp.broadcast_to(jnp.log(probabilities)[None], (4000, 2))
    drawn = draw(logits, temperature=0.5)
    expected = probabilities[0] ** 2 / (probabilities**2).sum()
    assert abs((drawn == 0).mean() - expected) < 0.03


def test_each_row_draws_by_its_own_settings(batch):
    """A draw depends on the row's seed and the number of its tokens, and not on other rows."""
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, 50)), jnp.float32)
    temperature = jnp.array([0.0, 1.0, 1.0, 0.0])
    seed, written = jnp.array([1, 2, 2, 3], jnp.uint32), jnp.array([0, 1, 5, 0])
    top_p = jnp.array([1.0, 1.0, 1e-6, 0.5])
    drawn = np.asarray(choose(logits, Choice(temperature, top_p, seed), written))
    best = np.asarray(logits.argmax(-1))
    np.testing.assert_array_equal(drawn[[0, 2, 3]], best[[0, 2, 3]])
    alone = choose(logits[1:2], Choice(temperature[1:2], top_p[1:2], seed[1:2]), written[1:2])
    assert drawn[1] == alone[0]
    many = jnp.broadcast_to(logits[1:2], (64, 50))
    ones = jnp.ones(64)
    later = choose(many, Choice(ones, ones, jnp.full(64, 2, jnp.uint32)), jnp.arange(64))
    assert len(set(np.asarray(later).tolist())) > 5


@pytest.mark.parametrize(
    "fields", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_impossible_sampling_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Sampling(**fields)
