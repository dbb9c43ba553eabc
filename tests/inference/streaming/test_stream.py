"""A stream keeps of a video what a prompt about it needs, however its frames arrive."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import pickle
import re
import time

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storm_jax
from benchmarks import stream as benchmark
from storm_jax.inference.generate import Sampling
from storm_jax.inference.streaming.video import WindowVideo
from storm_jax.media.media import Media
from storm_jax.media.video import read_video
from storm_jax.params import abstract_model, flat_params

SHORT = Sampling(max_new_tokens=12)
QUESTION = "Which flash came first?"


@pytest.fixture(scope="module")
def storm(trained_run):
    """A model with unidirectional Mamba layers, whose output, near zero after two steps, is made random."""
    storm = storm_jax.load(trained_run)
    mamba = dataclasses.replace(storm.config.model.mamba, direction="forward")
    model = dataclasses.replace(storm.config.model, mamba=mamba)
    storm.config = dataclasses.replace(storm.config, model=model)
    graphdef, abstract = abstract_model(model)
    trained = flatten_dict(storm._programs._params, sep="/")
    params = {name: trained[name] for name in flat_params(abstract)}
    name = "projector/mixer/layers/mixer/out_proj/kernel"
    noise = np.random.default_rng(1).standard_normal(params[name].shape).astype(np.float32)
    params[name] = jax.device_put(0.3 * noise, params[name].sharding)
    storm._programs._graphdef, storm._programs._params = graphdef, unflatten_dict(params, sep="/")
    return storm


@pytest.fixture(scope="module")
def frames(storm) -> np.ndarray:
    size, rng = storm.config.model.vision.image_size, np.random.default_rng(0)
    return rng.integers(0, 256, (40, size, size, 3)).astype(np.uint8)


def pushed(stream, frames, cuts=()):
    times = np.arange(len(frames), dtype=float)
    for part in np.split(np.arange(len(frames)), cuts):
        stream.push(frames[part], times[part])
    return stream


def tokens_of(stream) -> np.ndarray:
    """The visual tokens of a prompt, [n, D]."""
    shown = stream._video.shown()
    return np.asarray(shown.table)[0, shown.entries]


def one_pass(storm, frames, compression=None):
    """A stream that encodes all of its frames together, before a question."""
    stream = storm.stream(fps=0, compression=compression)
    video = stream._video
    stream._video = WindowVideo(
        video._programs, video._grid, video._compression, 40, frames.shape[1]
    )
    return pushed(stream, frames)


def test_the_stream_mixes_frames(storm, frames):
    """Otherwise the other tests would prove nothing."""
    changed = frames.copy()
    changed[0] = 255 - changed[0]
    first, second = (tokens_of(pushed(storm.stream(fps=0), each)) for each in (frames, changed))
    assert np.abs(first - second)[-1].max() > 1e-4


@pytest.mark.parametrize(
    "compression",
    [
        {},
        {"temporal_pool": 3, "temporal_sample": 2},
        {"temporal_pool": 1, "spatial_pool": 2},
    ],
)
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(2, 40), cuts=st.lists(st.integers(0, 40), max_size=4))
def test_any_cuts_give_what_one_pass_gives(storm, frames, compression, length, cuts):
    chosen = dataclasses.replace(storm.compression, **compression)
    stream = pushed(storm.stream(fps=0, compression=chosen), frames[:length], sorted(cuts))
    expected = one_pass(storm, frames[:length], chosen)
    np.testing.assert_allclose(tokens_of(stream), tokens_of(expected), rtol=1e-4, atol=1e-5)
    shown, reference = stream._video.shown(), expected._video.shown()
    np.testing.assert_array_equal(shown.times, reference.times)
    np.testing.assert_array_equal(shown.plan.frame_group, reference.plan.frame_group)


def test_answers_are_those_about_the_file(storm, shapes_folder):
    path = next((shapes_folder / "media/test").glob("*.mp4"))
    count, size = storm.compression.num_frames, storm.config.model.vision.image_size
    clip = read_video(Media.file("video", path), count, size)
    stream = storm.stream(fps=0)
    stream.push(clip.frames, clip.times)
    pieces = list(stream.ask(QUESTION, sampling=SHORT))
    assert "".join(pieces) == storm.watch(path).answer(QUESTION, sampling=SHORT)
    warm = Sampling(12, temperature=1.0)
    assert "".join(stream.ask(QUESTION, sampling=warm, seed=3)) == storm.watch(path).answer(
        QUESTION, sampling=warm, seed=3
    )


def test_a_question_changes_nothing(storm, frames):
    stream = pushed(storm.stream(fps=0), frames[:9])
    before = stream.snapshot()
    first = "".join(stream.ask(QUESTION, sampling=SHORT))
    abandoned = stream.ask("What?", sampling=SHORT)
    next(abandoned, None)
    assert "".join(stream.ask(QUESTION, sampling=SHORT)) == first
    jax.tree.map(
        np.testing.assert_array_equal, before["video"]["state"], stream.snapshot()["video"]["state"]
    )
    plain = pushed(storm.stream(fps=0), frames[:9])
    for each in (stream, plain):
        each.push(frames[9:], np.arange(9.0, 40))
    np.testing.assert_array_equal(tokens_of(stream), tokens_of(plain))


def test_an_answer_is_about_the_frames_before_the_question(storm, frames):
    """Also if others arrive while it is written."""
    stream = pushed(storm.stream(fps=0), frames[:9])
    expected = "".join(stream.ask(QUESTION, sampling=SHORT))
    answer = stream.ask(QUESTION, sampling=SHORT)
    first = next(answer, "")
    stream.push(frames[9:], np.arange(9.0, 40))
    assert first + "".join(answer) == expected


def test_two_streams_never_mix(storm, frames):
    other = frames[::-1]
    alone = [tokens_of(pushed(storm.stream(fps=0), each)) for each in (frames, other)]
    streams = [storm.stream(fps=0) for _ in alone]
    for number in range(len(frames)):
        for stream, each in zip(streams, (frames, other), strict=True):
            stream.push(each[number], float(number))
    for stream, tokens in zip(streams, alone, strict=True):
        np.testing.assert_allclose(tokens_of(stream), tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["window", "stride", "merge"])
def test_a_restored_snapshot_continues_bit_for_bit(storm, frames, policy):
    def stream():
        return storm.stream(
            fps=1, budget_tokens=6 * tokens_per_group(storm), policy=policy, recent=2
        )

    whole, first, second = stream(), stream(), stream()
    for start, end in ((0, 7), (7, 24), (24, 29), (29, 40)):
        times = np.arange(float(start), end)
        whole.push(frames[start:end], times)
        if start < 24:
            first.push(frames[start:end], times)
        else:
            if start == 24:
                second.restore(pickle.loads(pickle.dumps(first.snapshot())))
            second.push(frames[start:end], times)
    np.testing.assert_array_equal(tokens_of(second), tokens_of(whole))
    assert second.stats == whole.stats
    assert "".join(second.ask(QUESTION, sampling=SHORT)) == "".join(
        whole.ask(QUESTION, sampling=SHORT)
    )


def test_a_snapshot_of_other_settings_is_refused(storm, frames):
    snapshot = pushed(storm.stream(fps=0), frames[:3]).snapshot()
    with pytest.raises(ValueError, match=r"the snapshot has fps=0, and this stream 1.0"):
        storm.stream(fps=1.0).restore(snapshot)
    with pytest.raises(ValueError, match=r"budget_tokens"):
        storm.stream(fps=0, budget_tokens=64).restore(snapshot)


@pytest.mark.parametrize("policy", ["window", "stride", "merge"])
def test_past_the_budget_memory_and_programs_stay_constant(storm, frames, policy):
    check_constant(storm, frames, policy, pushes=90)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 36,000 pushes on 8 devices
def test_ten_hours_in_constant_memory(storm, frames):
    seconds = check_constant(storm, frames, "merge", pushes=36_000)
    assert np.median(seconds[-1000:]) < 2 * np.median(seconds[1000:2000])


def check_constant(storm, frames, policy, pushes) -> list[float]:
    """Compares two moments after the budget is used up; returns the seconds of each push."""
    budget = 8 * tokens_per_group(storm)
    stream = storm.stream(budget_tokens=budget, policy=policy, recent=3)
    seen, seconds = [], []
    for number in range(pushes):
        began = time.perf_counter()
        stream.push(frames[number % len(frames)], float(number))
        seconds.append(time.perf_counter() - began)
        if number in (pushes // 3, pushes - 1):
            assert "".join(stream.ask(QUESTION, sampling=SHORT)) is not None
            arrays = sum(array.nbytes for array in jax.live_arrays())
            seen.append((stream.stats.device_bytes, arrays, storm.num_programs))
            assert stream.stats.visual_tokens <= budget
    assert seen[0] == seen[1]
    assert np.isfinite(tokens_of(stream)).all()
    return seconds


def tokens_per_group(storm) -> int:
    stream = storm.stream(fps=0)
    size = storm.config.model.vision.image_size
    stream.push(np.zeros((size, size, 3), np.uint8), 0.0)
    return stream.stats.visual_tokens


def test_a_rate_selects_frames_by_their_times(storm, frames):
    stream = storm.stream(fps=2)
    times = 5 + np.arange(40) / 8  # 8 frames a second
    used = sum(stream.push(frames[i : i + 3], times[i : i + 3]) for i in range(0, 40, 3))
    assert used == 10
    np.testing.assert_allclose(stream._video.shown().times, 5 + np.arange(10) / 2)
    stats = stream.stats
    assert (stats.received, stats.used, stats.seconds) == (40, 10, times[-1] - times[0])
    late = storm.stream(fps=1)  # after a gap, the grid is still that of the first frame
    assert [late.push(frames[0], each) for each in (0.0, 0.9, 3.7, 3.9, 4.0)] == [1, 0, 1, 0, 1]


def test_frames_of_any_size_are_resized(storm):
    stream = storm.stream(fps=0)
    assert stream.push(np.full((2, 30, 50, 3), 7, np.uint8), [0.0, 0.5]) == 2
    assert stream.push(np.zeros((0, 8, 8, 3), np.uint8), []) == 0


@pytest.mark.parametrize(
    ("frames", "times", "message"),
    [
        (
            np.zeros((2, 8, 8, 3), np.float32),
            [0, 1],
            r"frames are float32 \[2, 8, 8, 3\]: use uint8",
        ),
        (np.zeros((2, 3, 8, 8), np.uint8), [0, 1], r"frames are uint8 \[2, 3, 8, 8\]"),
        (np.zeros((2, 0, 8, 3), np.uint8), [0, 1], r"frames of 8 x 0 pixels are empty"),
        (np.zeros((2, 8, 8, 3), np.uint8), [6.0], r"2 frames have 1 times"),
        (np.zeros((2, 8, 8, 3), np.uint8), [6.0, 5.5], r"times\[1\]=5.5 does not follow 6.0"),
        (np.zeros((2, 8, 8, 3), np.uint8), [3.0, 5.5], r"times\[0\]=3.0 does not follow 4.0"),
        (np.zeros((2, 8, 8, 3), np.uint8), [np.nan, 9], r"times\[0\]=nan does not follow 4.0"),
    ],
)
def test_frames_that_cannot_be_used_change_nothing(storm, frames, times, message):
    stream = storm.stream(fps=0)
    size = storm.config.model.vision.image_size
    stream.push(np.zeros((3, size, size, 3), np.uint8), [0.0, 1.0, 4.0])
    before = stream.stats
    with pytest.raises(ValueError, match=message):
        stream.push(frames, times)
    assert stream.stats == before


def test_settings_and_questions_that_cannot_work_are_refused(storm, trained_run, frames):
    for fields, message in (
        ({"fps": -1}, "fps=-1 must be at least 0"),
        ({"budget_tokens": 1}, "budget_tokens holds no group"),
        ({"budget_tokens": 10**6}, "1,000,000 visual tokens exceed the decoder's"),
    ):
        with pytest.raises(ValueError, match=message):
            storm.stream(**fields)
    with pytest.raises(ValueError, match="nothing has been pushed yet"):
        storm.stream().ask("What?")
    with pytest.raises(ValueError, match=r"exceed the decoder's .* positions"):
        pushed(storm.stream(fps=0), frames[:2]).ask("why " * 80_000, sampling=SHORT)
    both = storm_jax.load(trained_run)
    with pytest.raises(
        ValueError, match=r"policy='merge' needs a model with mamba.direction='forward'"
    ):
        both.stream(policy="merge")


def test_bidirectional_models_encode_a_window_of_frames_again(trained_run, frames):
    """Its answers are those about a file with just these frames."""
    storm = storm_jax.load(trained_run)
    size, pool = storm.config.model.vision.image_size, storm.compression.temporal_pool
    frames = np.repeat(np.repeat(frames[:, :1, :1], size, 1), size, 2)
    stream = storm.stream(fps=0, budget_tokens=4 * tokens_per_group(storm))
    assert stream.stats.mode == "window, encoded again"
    pushed(stream, frames[:30], [3, 4, 25])
    assert stream.stats.lost == 30 - 4 * pool
    kept = stream._video.snapshot()["frames"]
    np.testing.assert_array_equal(kept, frames[30 - 4 * pool : 30])
    other = storm.stream(fps=0, budget_tokens=4 * tokens_per_group(storm))
    other.push(kept, np.arange(30.0 - 4 * pool, 30))
    np.testing.assert_array_equal(tokens_of(stream), tokens_of(other))
    restored = storm.stream(fps=0, budget_tokens=4 * tokens_per_group(storm))
    restored.restore(stream.snapshot())
    answers = {"".join(each.ask(QUESTION, sampling=SHORT)) for each in (stream, other, restored)}
    assert len(answers) == 1


def test_the_example_of_the_guide(trained_run, capsys):
    guide = pathlib.Path(__file__).parents[3] / "docs/streaming.md"
    (code,) = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    exec(code.replace("runs/sft", str(trained_run)), {})
    assert capsys.readouterr().out


def test_the_benchmark_of_long_streams(trained_run, tmp_path, capsys):
    arguments = [f"--workdir={trained_run}", f"--out={tmp_path}", "--policy=window"]
    benchmark.main([*arguments, "--hours=0.01", "--budget_tokens=64"])
    rows = json.loads((tmp_path / "stream.json").read_text())["rows"]
    assert [row["frames"] for row in rows] == list(range(3, 37, 3))
    assert rows[-1]["visual_tokens"] <= 64 and rows[-1]["lost"] > 0
    assert capsys.readouterr().out.count("\n|") >= 12
