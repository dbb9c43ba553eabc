"""One of several compressions is drawn for each training sample: in its proportion, exactly repeatable, and planned on
exact lengths."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from storm_jax.compression import Grid
from storm_jax.config import (
    CompressionConfig,
    ConfigError,
    FramesConfig,
    RunConfig,
    SourceConfig,
    from_dict,
    to_dict,
)
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.mixture import Mixture, Ref
from storm_jax.data.pipeline import batches
from storm_jax.data.plan import TrainPlan
from storm_jax.data.rows import RowShape, row_shapes
from storm_jax.media.reader import MediaReader
from storm_jax.media.workers import WorkerPool
from storm_jax.text.conversation import ConversationEncoder

ONE, FOUR, EIGHT = (
    CompressionConfig(num_frames=16, **factors)
    for factors in (
        {},
        {"temporal_pool": 4},
        {"temporal_pool": 4, "spatial_pool": 2, "temporal_sample": 2},
    )
)
WEIGHTS = (1.0, 2.0, 1.0)


@pytest.fixture
def make(shapes_folder, tokenizer, tmp_path):
    def mixture(*, tokens: int = 400, weights=WEIGHTS, compressions=(ONE, FOUR, EIGHT), seed=0):
        shape = RowShape(
            tokens=tokens, frames=48, image_size=32, grid=Grid.square(2), compressions=compressions
        )
        encoder = SampleEncoder(
            text=ConversationEncoder(tokenizer, ""),
            grid=shape.grid,
            compression=ONE,
            frames=FramesConfig(),
        )
        source = SourceConfig(name="shapes", path=str(shapes_folder / "train.json"))
        return Mixture(
            [source], encoder, [shape], weights=weights, seed=seed, index_dir=str(tmp_path),
            max_skip_fraction=1.0, pool=WorkerPool(0),
        )  # fmt: skip

    return mixture


def drawn(mixture, windows: int) -> list[Ref]:
    return [ref for window in range(windows) for ref in mixture.draw(window)]


def test_each_is_drawn_in_its_proportion_anew_in_each_epoch(make):
    mixture = make()
    windows = -(-4000 // len(mixture.draw(0)))
    refs = drawn(mixture, windows)
    counts = Counter(ref.compression for ref in refs)
    for number, weight in enumerate(WEIGHTS):
        share = weight / sum(WEIGHTS)
        error = np.sqrt(share * (1 - share) / len(refs))
        assert abs(counts[number] / len(refs) - share) < 4 * error
    by_item = defaultdict(set)
    for ref in refs:
        by_item[ref.item].add(ref.compression)
    assert np.mean([len(found) == 3 for found in by_item.values()]) > 0.9


def test_the_draw_changes_neither_the_samples_nor_their_order(make):
    several, one = make(), make(compressions=(FOUR,), weights=(1.0,))
    for window in range(3):
        items = [ref.item for ref in several.draw(window)]
        assert items == [ref.item for ref in one.draw(window)]
        assert {ref.compression for ref in one.draw(window)} == {0}
    assert drawn(make(), 3) == drawn(several, 3) != drawn(make(seed=1), 3)


def test_draws_are_independent_of_the_shuffle(make):
    """A draw that follows the order of the samples would train some positions of a window at one compression."""
    refs = drawn(make(), 8)
    place = np.arange(len(refs)) / len(refs)
    for number in range(3):
        mine = place[[ref.compression == number for ref in refs]]
        assert abs(mine.mean() - 0.5) < 4 * np.sqrt(1 / 12 / len(mine))


def test_rows_hold_what_was_planned(make):
    """Each sample has exactly the tokens that its row was planned with, in its compression."""
    mixture = make()
    plan = TrainPlan(mixture, 4)
    reader = MediaReader(WorkerPool(0), 32, FramesConfig())
    seen = set()
    for step, batch in enumerate(batches(mixture, plan, range(6), range(4), reader)):
        for number, refs in enumerate(plan[step].rows):
            segments = batch.arrays["segment_ids"][number]
            visual = batch.arrays["visual_index"][number] >= 0
            for segment, ref in enumerate(refs, start=1):
                here = segments == segment
                assert here.sum() == mixture.lengths([ref])[0, 0]
                if mixture.parts[0].lengths.frames[ref.item] == 16:
                    seen.add(ref.compression)
                    assert (here & visual).sum() == (64, 16, 2)[ref.compression]
    assert seen == {0, 1, 2}


def test_a_sample_is_drawn_only_in_compressions_in_which_it_fits(make):
    """Of a row of 50 tokens, a video needs 64 or 16: the first never fit, the second do if the question is short. Images fit."""
    mixture = make(tokens=50)
    lengths = mixture.parts[0].lengths
    found: dict[tuple, Counter] = defaultdict(Counter)
    for ref in drawn(mixture, 20):
        fits = tuple((lengths.min_tokens[ref.item] <= 50).tolist())
        assert fits[ref.compression]
        found[fits][ref.compression] += 1
    assert set(found) == {(True, True, True), (False, True, True), (False, False, True)}
    short = found[False, True, True]
    assert abs(short[1] / short.total() - 2 / 3) < 4 * np.sqrt(2 / 9 / short.total())
    assert not mixture.skips
    assert make(tokens=50, compressions=(ONE,), weights=(1.0,)).skips  # where they never fit


def test_a_plan_resumes_with_the_same_draws(make):
    whole = TrainPlan(make(), 4)
    steps = [whole[step].rows for step in range(40)]
    for start in (0, 7, 31):
        state = json.loads(json.dumps(whole.state(start)))
        resumed = TrainPlan(make(), 4, state)
        assert [resumed[step].rows for step in range(start, 40)] == steps[start:]


def test_states_of_earlier_versions_are_read(make):
    """Their references have no compression."""
    state = {"window": 1, "first_step": 3, "carried": [[[0, 5], [0, 7]]]}
    plan = TrainPlan(make(compressions=(FOUR,), weights=(1.0,)), 1, state)
    assert [Ref(0, 5), Ref(0, 7)] in [row for step in range(3, 20) for row in plan[step].rows]


def test_lengths_of_one_compression_keep_their_digest(make):
    """So that runs of earlier versions resume."""
    lengths = make(compressions=(FOUR,), weights=(1.0,)).parts[0].lengths
    several = make(compressions=(FOUR, ONE), weights=(1.0, 1.0)).parts[0].lengths
    np.testing.assert_array_equal(lengths.tokens[:, 0], several.tokens[:, 0])
    assert lengths.digest != several.digest


def test_the_configuration_names_them(small_config):
    config = small_config(
        compression__temporal_sample=2,
        train__compressions=[{"temporal_pool": 2}, {"spatial_pool": 2, "weight": 0.5}],
    )
    pools = [(each.temporal_pool, each.spatial_pool) for each in config.trained_compressions]
    assert pools == [(2, 1), (2, 2)]
    assert all(c.num_frames == config.compression.num_frames for c in config.trained_compressions)
    (shape,) = {shape.visual.spatial_pools for shape in row_shapes(config)}
    assert shape == (1, 2)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
    alone = dataclasses.replace(config, train=dataclasses.replace(config.train, compressions=()))
    assert alone.trained_compressions == (alone.unsampled,)  # sampling is for test time only


@pytest.mark.parametrize(
    ("compressions", "problem"),
    [
        ([{"temporal_pool": -1}], r"compressions\[0\].temporal_pool"),
        ([{"weight": 0.0}], r"compressions\[0\].weight"),
        ([{"weight": float("inf")}], r"weight=inf must be finite"),
        ([{"frames": 4}], "frames"),
        ([{}, {"weight": 2.0}], "temporal_pool=2, spatial_pool=1, temporal_sample=1 twice"),
    ],
)
def test_wrong_compressions_are_refused(small_config, compressions, problem):
    with pytest.raises(ConfigError, match=problem):
        small_config(train__compressions=compressions)


def test_pooling_that_is_left_out_is_that_of_the_run(small_config):
    config = small_config(
        compression__temporal_pool=4,
        compression__temporal_sample=2,
        train__compressions=[{}, {"temporal_sample": 4}, {"temporal_pool": 1, "spatial_pool": 2}],
    )
    assert [
        (each.temporal_pool, each.spatial_pool, each.temporal_sample)
        for each in config.trained_compressions
    ] == [(4, 1, 1), (4, 1, 4), (1, 2, 1)]


def test_pooling_of_validation_has_to_be_trained(small_config):
    with pytest.raises(ConfigError, match=r"temporal_pool=4 with spatial_pool=1 is not in train"):
        small_config(compression__temporal_pool=4, train__compressions=[{"temporal_pool": 2}])
