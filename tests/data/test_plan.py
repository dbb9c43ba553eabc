"""Planned steps: each sample once per epoch, the same for every process and after resuming, and one shape
per step."""

from __future__ import annotations

import json
import pathlib
from collections import Counter

import numpy as np
import pytest

from storm_jax.compression import Grid
from storm_jax.config import CompressionConfig
from storm_jax.data import mixture as mixture_lib
from storm_jax.data.plan import EvalPlan, TrainPlan
from storm_jax.data.rows import RowShape

COMPRESSION = CompressionConfig(num_frames=8, temporal_pool=2, spatial_pool=2, temporal_sample=1)
SMALL, LARGE = (
    RowShape(
        tokens=160, frames=frames, image_size=32, grid=Grid.square(2), compressions=(COMPRESSION,)
    )
    for frames in (2, 24)
)
BATCH = 4


@pytest.fixture(params=[(LARGE,), (SMALL, LARGE)], ids=["one shape", "two shapes"])
def mixture(request, make_mixture, shapes_folder: pathlib.Path, write_texts, tmp_path):
    texts = write_texts(tmp_path / "texts.jsonl", 37)
    return make_mixture(shapes_folder / "train.json", texts, shapes=request.param)


def refs_of(plan, steps: range) -> list:
    return [ref for step in steps for row in plan[step].rows for ref in row]


def test_nothing_is_lost_between_windows(mixture):
    plan = TrainPlan(mixture, BATCH)
    last = plan._window_of(40)
    steps = range(last.first_step + len(last.steps))
    drawn = Counter(ref for window in range(last.number + 1) for ref in mixture.draw(window))
    left = Counter(ref for row in last.left for ref in row)
    assert Counter(refs_of(plan, steps)) + left == drawn
    assert len(last.left) < BATCH


def test_rows_of_a_step_fit_their_shape_and_all_shapes_are_used(mixture):
    plan = TrainPlan(mixture, BATCH)
    shapes = set()
    for step in range(30):
        planned = plan[step]
        shape = mixture.shapes[planned.shape]
        shapes.add(planned.shape)
        assert len(planned.rows) == BATCH
        for row in planned.rows:
            assert (mixture.lengths(row).sum(0) <= (shape.tokens, shape.frames)).all()
    assert shapes == set(range(len(mixture.shapes)))


def test_a_step_does_not_depend_on_earlier_accesses(mixture):
    forward, jumping, fresh = (TrainPlan(mixture, BATCH) for _ in range(3))
    want = [forward[i] for i in range(30)]
    order = np.random.default_rng(0).permutation(30)
    got = {int(i): jumping[int(i)] for i in order}
    assert [got[i] for i in range(30)] == want
    assert fresh[29] == want[29]


@pytest.mark.parametrize("window", [3, 50, 2**16])
def test_a_saved_state_resumes_with_the_same_steps(mixture, monkeypatch, window: int):
    monkeypatch.setattr(mixture_lib, "WINDOW", window)
    whole = TrainPlan(mixture, BATCH)
    want = [whole[i] for i in range(40)]
    for step in (0, 1, 7, 23):
        state = json.loads(json.dumps(whole.state(step)))
        resumed = TrainPlan(mixture, BATCH, state)
        assert [resumed[i] for i in range(step, 40)] == want[step:]
        assert resumed.state(step) == state
        with pytest.raises(IndexError):
            resumed[state["first_step"] - 1]


def test_windows_of_past_steps_are_freed(mixture):
    plan = TrainPlan(mixture, BATCH)
    want = [plan[i] for i in range(60)]
    plan.forget(50)
    assert len(plan._windows) <= 1 + 60 // len(plan._windows[-1].steps)
    assert [plan[i] for i in range(50, 60)] == want[50:]
    with pytest.raises(IndexError):
        plan[0]


def test_windows_smaller_than_a_step_make_steps(make_mixture, write_texts, tmp_path):
    mixture = make_mixture(write_texts(tmp_path / "a.jsonl", 3))
    plan = TrainPlan(mixture, 8)
    assert all(len(plan[step].rows) == 8 for step in range(5))
    assert set(refs_of(plan, range(5))) == set(mixture.draw(0))


def test_evaluation_has_each_sample_once_in_order(mixture):
    plan = EvalPlan(mixture, BATCH)
    steps = [plan[i] for i in range(len(plan))]
    refs = [ref for step in steps for row in step.rows for ref in row]
    assert sorted(refs) == sorted(mixture.draw(0))
    assert all(0 < len(step.rows) <= BATCH for step in steps)
    for shape in range(len(mixture.shapes)):
        first = [row[0] for step in steps if step.shape == shape for row in step.rows]
        assert first == sorted(first)
        assert sum(len(s.rows) < BATCH for s in steps if s.shape == shape) <= 1
