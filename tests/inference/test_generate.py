"""Generation: the cache does not change results, and prompts of a batch are independent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict
from rows_by_hand import build_rows

from configs.storm_qwen2_7b import MODEL as QWEN2_7B
from configs.tiny import MODEL as TINY
from storm_jax.compression import Grid, plan_clip
from storm_jax.config import CompressionConfig
from storm_jax.data.rows import RowSample, RowShape
from storm_jax.inference.generate import Sampling, choose, decode_step, generate, prefill
from storm_jax.models.storm import Storm, VisualShape
from storm_jax.params import abstract_model, compute_dtypes, flat_params
from storm_jax.text.conversation import Encoded

SHAPE = RowShape(
    tokens=48,
    frames=8,
    image_size=32,
    grid=Grid.of(TINY),
    compression=CompressionConfig(num_frames=8, temporal_pool=4),
)
VISUAL = VisualShape(SHAPE.num_groups, 1)
NEW = 5  # tokens
# Shared by all tests, so that each shape is compiled once.
run_generate = nnx.jit(generate, static_argnames=("slots", "stop_ids"))
OPTIONS: dict = {"sampling": Sampling(max_new_tokens=NEW), "slots": NEW, "stop_ids": (511,)}


@pytest.fixture(scope="module")
def batch() -> dict[str, jax.Array]:
    """Three prompts of 11, 29 and 48 tokens, the last two about a clip."""
    rng = np.random.default_rng(0)
    rows, lengths = [], []
    for frames, words in ((0, 11), (8, 21), (7, 40)):
        visual = plan_clip(frames, SHAPE.grid, SHAPE.compression).num_tokens if frames else 0
        tokens = np.concatenate([np.zeros(visual, int), rng.integers(1, 500, words)])
        media = np.where(np.arange(visual + words) < visual, 0, -1)
        clips = [rng.integers(0, 256, (frames, 32, 32, 3)).astype(np.uint8)] if frames else []
        encoded = Encoded(tokens.astype(np.int32), media < 0, media)
        rows.append([RowSample(encoded, clips)])
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


def test_cached_logits_equal_uncached_ones(model, batch, visual):
    extra = np.random.default_rng(1).integers(1, 500, (3, NEW)).astype(np.int32)
    expected = full_logits(model, batch, extra)
    lengths = np.asarray(batch["lengths"])
    logits, cache = nnx.jit(prefill, static_argnums=3)(model, batch, visual, 48 + NEW)
    extend = nnx.jit(decode_step)
    for step in range(NEW + 1):
        rows = expected[np.arange(3), lengths - 1 + step]
        np.testing.assert_allclose(logits, rows, atol=2e-4, rtol=1e-4)
        if step < NEW:
            logits, cache = extend(model, extra[:, step], lengths + step, cache)


def test_greedy_generation_is_the_argmax_of_uncached_logits(model, batch, visual):
    tokens = np.asarray(run_generate(model, batch, visual, jax.random.key(0), **OPTIONS))
    expected = full_logits(model, batch, tokens)
    lengths = np.asarray(batch["lengths"])
    for step in range(NEW):
        best = expected[np.arange(3), lengths - 1 + step].argmax(axis=-1)
        np.testing.assert_array_equal(tokens[:, step], best)


def test_prompts_of_a_batch_do_not_change_each_other(model, batch, visual):
    together = run_generate(model, batch, visual, jax.random.key(0), **OPTIONS)
    for row in range(3):
        alone = {name: array[row : row + 1] for name, array in batch.items()}
        tokens = run_generate(model, alone, visual[row : row + 1], jax.random.key(0), **OPTIONS)
        np.testing.assert_array_equal(tokens[0], together[row])


def test_generation_ends_each_row_at_its_stop_token(model, batch, visual):
    free = np.asarray(run_generate(model, batch, visual, jax.random.key(0), **OPTIONS))
    stop = int(free[0, 2])
    stopped = np.asarray(
        run_generate(model, batch, visual, jax.random.key(0), **OPTIONS | {"stop_ids": (511, stop)})
    )
    first = list(free[0]).index(stop)
    np.testing.assert_array_equal(stopped[0, :first], free[0, :first])
    assert stopped[0, first] == stop
    assert (stopped[0, first + 1 :] == 511).all()  # the first stop token fills


def test_an_empty_row_is_not_continued(model, batch, visual):
    whole = np.asarray(run_generate(model, batch, visual, jax.random.key(0), **OPTIONS))
    lengths = batch["lengths"].at[1].set(0)
    tokens = np.asarray(
        run_generate(model, batch | {"lengths": lengths}, visual, jax.random.key(0), **OPTIONS)
    )
    assert (tokens[1] == 511).all() and (whole[1] != 511).any()
    np.testing.assert_array_equal(tokens[[0, 2]], whole[[0, 2]])


def test_the_papers_longest_setting_has_the_shapes_it_should():
    """256 frames of 448 pixels, pooled by 4, before a 7B decoder: 64 groups of 256 tokens."""
    config = QWEN2_7B
    graphdef, abstract = abstract_model(config)
    params = unflatten_dict(compute_dtypes(flat_params(abstract), config), sep="/")

    def shape(size, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(size, dtype)

    def encode(params, frames, clip, group):
        return nnx.merge(graphdef, params).encode(frames, clip, group, VisualShape(64, 1))

    frames = shape((1, 256, 448, 448, 3), jnp.uint8)
    table = jax.eval_shape(encode, params, frames, shape((1, 256)), shape((1, 256)))
    assert (table.shape, table.dtype) == ((1, 16_384, 3584), jnp.bfloat16)

    def answer(params, batch, visual, key):
        model = nnx.merge(graphdef, params)
        return generate(model, batch, visual, key, Sampling(16), slots=16, stop_ids=(1,))

    batch = {
        "tokens": shape((8, 16_896)),
        "visual_index": shape((8, 16_896)),
        "lengths": shape((8,)),
    }
    tables = shape((8, *table.shape[1:]), table.dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert jax.eval_shape(answer, params, batch, tables, key).shape == (8, 16)


def test_top_p_draws_only_from_the_nucleus_and_by_its_probabilities():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.broadcast_to(jnp.log(probabilities)[None], (4000, 4))
    drawn = np.asarray(choose(logits, jax.random.key(0), Sampling(temperature=1.0, top_p=0.7)))
    share = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(share, [0.625, 0.375, 0, 0], atol=0.03)


def test_temperature_sharpens():
    probabilities = np.array([0.6, 0.4])
    logits = jnp.broadcast_to(jnp.log(probabilities)[None], (4000, 2))
    drawn = np.asarray(choose(logits, jax.random.key(0), Sampling(temperature=0.5)))
    expected = probabilities[0] ** 2 / (probabilities**2).sum()
    assert abs((drawn == 0).mean() - expected) < 0.03


@pytest.mark.parametrize(
    "fields", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_impossible_sampling_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Sampling(**fields)
