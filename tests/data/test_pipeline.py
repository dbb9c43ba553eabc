"""Batches do not depend on workers, restarts or processes, and an unreadable sample leaves the rest of its
row unchanged."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import time
from collections import Counter

import numpy as np
import pytest
from media_files import barcode, numbers, write_numbered
from PIL import Image
from source_files import record

from storm_jax.compression import Grid
from storm_jax.config import CompressionConfig, FramesConfig
from storm_jax.data.mixture import Mixture
from storm_jax.data.pipeline import Batch, batches
from storm_jax.data.plan import EvalPlan, StepPlan, TrainPlan
from storm_jax.data.rows import RowShape
from storm_jax.media.media import MediaError
from storm_jax.media.reader import MediaReader
from storm_jax.media.workers import WorkerPool

BATCH, STEPS = 4, 5


def read(
    mixture: Mixture,
    plan=None,
    steps: range = range(STEPS),
    workers: int = 0,
    size: int = BATCH,
    frames: FramesConfig | None = None,
    rows: range | None = None,
) -> list[Batch]:
    with WorkerPool(workers) as pool:
        reader = MediaReader(pool, 32, frames or mixture.encoders[0].frames)
        plan = plan or TrainPlan(mixture, size)
        return list(batches(mixture, plan, steps, rows or range(size), reader))


@pytest.fixture(scope="module")
def mixture(make_mixture, shapes_folder, write_texts, tmp_path_factory) -> Mixture:
    texts = write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl", 20)
    return make_mixture(shapes_folder / "train.json", texts)


@pytest.fixture(scope="module")
def expected(mixture: Mixture) -> list[Batch]:
    """The batches of one process without workers."""
    return read(mixture)


def facts(batch: Batch) -> list[tuple]:
    """The outcomes of a batch, without their durations."""
    return [(o.source, o.sample, o.skip, o.tokens, o.frames, o.damaged) for o in batch.outcomes]


def assert_same(got: list[Batch], want: list[Batch]) -> None:
    assert [facts(batch) for batch in got] == [facts(batch) for batch in want]
    for mine, other in zip(got, want, strict=True):
        assert mine.arrays.keys() == other.arrays.keys()
        for name in mine.arrays:
            np.testing.assert_array_equal(mine.arrays[name], other.arrays[name], err_msg=name)


def write(folder: pathlib.Path, records: list) -> pathlib.Path:
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


# Batches.


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(mixture: Mixture, expected: list[Batch], workers: int):
    assert_same(read(mixture, workers=workers), expected)


@pytest.mark.parametrize("start", [1, 3, STEPS])
def test_resuming_returns_the_remaining_batches(
    mixture: Mixture, expected: list[Batch], start: int
):
    state = json.loads(json.dumps(TrainPlan(mixture, BATCH).state(start)))
    got = read(mixture, TrainPlan(mixture, BATCH, state), range(start, STEPS), workers=2)
    assert_same(got, expected[start:])


def test_rows_of_two_processes_are_the_batch_of_one(mixture: Mixture, expected: list[Batch]):
    first, second = (
        read(mixture, workers=index, rows=rows)
        for index, rows in enumerate((range(2), range(2, 4)))
    )
    joined = [
        Batch(
            {name: np.concatenate([a.arrays[name], b.arrays[name]]) for name in a.arrays},
            a.shape,
            a.rows | b.rows,
        )
        for a, b in zip(first, second, strict=True)
    ]
    assert_same(joined, expected)


def test_batches_contain_the_planned_samples(mixture: Mixture, expected: list[Batch]):
    plan = TrainPlan(mixture, BATCH)
    for step, batch in enumerate(expected):
        rows = plan[step].rows
        samples = [[mixture.sample(ref) for ref in row] for row in rows]
        assert batch.sample_ids == [sample.id for row in samples for sample in row]
        assert batch.skips == []
        assert list(map(len, batch.rows.values())) == list(map(len, rows))
        segments = batch.arrays["segment_ids"]
        assert [row.max() for row in segments] == [len(row) for row in rows]
        for b, row in enumerate(samples):
            for segment, sample in enumerate(row, start=1):
                tokens = batch.arrays["tokens"][b][segments[b] == segment]
                times = [np.zeros(1 if m.kind == "image" else 8) for m in sample.media]
                np.testing.assert_array_equal(
                    tokens, mixture.encoders[0].encode(sample, times).tokens
                )


def test_evaluation_pads_the_last_batch_with_empty_rows(mixture: Mixture):
    rows = sum(len(EvalPlan(mixture, 1)[i].rows) for i in range(len(EvalPlan(mixture, 1))))
    size = rows - 1
    got = read(mixture, EvalPlan(mixture, size), range(2), workers=2, size=size)
    ids = [name for batch in got for name in batch.sample_ids]
    assert sorted(ids) == sorted(mixture.sample(ref).id for ref in mixture.draw(0))
    assert got[0].arrays["segment_ids"].any(1).all()
    assert got[1].arrays["segment_ids"].any(1).tolist() == [True] + [False] * (size - 1)
    assert not got[1].arrays["loss_weights"][1:].any()


def test_a_truncated_answer_fills_its_row_and_is_counted(make_mixture, tmp_path: pathlib.Path):
    mixture = make_mixture(write(tmp_path, [record("long", answer="so " * 500)]))
    (batch,) = read(mixture, steps=range(1), size=1)
    assert batch.outcomes[0].is_truncated and batch.outcomes[0].tokens == mixture.shapes[0].tokens
    arrays = batch.arrays
    assert (arrays["segment_ids"] == 1).all()
    trained = arrays["targets"][arrays["loss_weights"] > 0]
    assert mixture.tokenizer.eos_token_id not in trained and len(trained) > 100
    assert arrays["loss_weights"][0, -1] == 0


def test_timestamps_are_in_the_text(make_mixture, tmp_path: pathlib.Path):
    write_numbered(tmp_path / "a.mp4", 30)
    path = write(tmp_path, [record("a", "<video>Why?", video="a.mp4")])
    mixture = make_mixture(path, frames=FramesConfig(time_text="per_group"))
    (batch,) = read(mixture, steps=range(1), size=1)
    shown = batch.arrays["tokens"][0][batch.arrays["segment_ids"][0] == 1]
    text = mixture.tokenizer.decode(shown)
    assert [f"{t} s: " in text for t in ("0.0", "0.8", "1.7", "2.5")] == [True] * 4
    assert (batch.arrays["visual_index"] >= 0).sum() == 4
    assert batch.outcomes[0].tokens <= mixture.lengths(mixture.draw(0))[0, 0]


# Memory.


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_held_are_never_overwritten(
    mixture: Mixture, expected: list[Batch], workers: int
):
    """A training holds two batches, JAX arrays that share their memory, and a batch that it saves."""
    held, places = {}, Counter()
    with WorkerPool(workers) as pool:
        reader = MediaReader(pool, 32, mixture.encoders[0].frames)
        stream = batches(mixture, TrainPlan(mixture, BATCH), range(40), range(BATCH), reader)
        for step, batch in enumerate(stream):
            frames = batch.arrays["frames"]
            places[frames.__array_interface__["data"][0]] += 1
            assert not frames[batch.arrays["frame_clip"] == 0].any()
            if step < STEPS:
                np.testing.assert_array_equal(frames, expected[step].arrays["frames"])
            if step % 10 == 0:
                held[step] = frames[1], frames[1].copy()
    for view, copy in held.values():
        np.testing.assert_array_equal(view, copy)
    assert max(places.values()) > 1 and len(places) < 20  # the memory of the others is reused


def test_frames_of_earlier_batches_and_failed_samples_do_not_stay(
    mixture: Mixture, expected: list[Batch]
):
    """A process may die after it wrote some frames, to memory that was used before."""

    class Fails(MediaReader):
        def read(self, medium, num_frames, out=None):
            super().read(medium, num_frames, out)
            out[:] = 255
            raise MediaError(medium, "crashed", "signal SIGKILL")

    with WorkerPool(0) as pool:
        shape = expected[0].arrays["frames"].shape
        pool.memory.empty(shape)[:] = 255
        reader = Fails(pool, 32, mixture.encoders[0].frames)
        (batch,) = batches(mixture, TrainPlan(mixture, BATCH), range(1), range(BATCH), reader)
    assert {skip.cause for skip in batch.skips} == {"crashed"}
    assert not batch.arrays["frames"].any() and not batch.arrays["frame_clip"].any()


# Broken media.


def _break(path: pathlib.Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "directory":
        path.unlink()
        path.mkdir()
    else:
        path.write_text("not media")


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    ("how", "causes"),
    [
        ("missing", {"missing"}),
        ("text", {"unreadable"}),
        ("truncated", {"unreadable"}),
        ("directory", {"unreadable", "empty"}),  # as a video it is an empty folder of frames
    ],
)
def test_broken_media_are_skips_and_the_rest_of_the_row_is_intact(
    make_mixture, shapes_folder, tmp_path: pathlib.Path, kind: str, how: str, causes: set[str]
):
    source = shapes_folder / "train.json"
    whole = make_mixture(source)
    folder = pathlib.Path(shutil.copytree(shapes_folder, tmp_path / "copy"))
    plan = EvalPlan(whole, 1)
    row = next(
        row
        for row in (plan[i].rows[0] for i in range(len(plan)))
        if len(row) > 2 and whole.sample(row[1]).media[0].kind == kind
    )
    broken = whole.sample(row[1])
    _break(folder / broken.media[0].path.relative_to(shapes_folder), how)
    damaged = make_mixture(folder / "train.json")
    assert damaged.skips == []  # detected when it is read

    one_row = {0: StepPlan(0, [row])}
    (got,) = read(damaged, one_row, range(1), size=1)
    (want,) = read(whole, one_row, range(1), size=1)
    (skip,) = got.skips
    assert skip.sample == broken.id and skip.cause in causes
    assert skip.file.endswith(broken.media[0].path.name) and skip.file in skip.message
    assert skip.where.startswith(f"{folder}/train.json line ")
    assert got.sample_ids == want.sample_ids

    mine, other = ({k: v[0] for k, v in batch.arrays.items()} for batch in (got, want))
    rest = [segment for segment in range(1, len(row) + 1) if segment != 2]
    assert sorted(set(mine["segment_ids"].tolist()) - {0}) == rest
    for segment in rest:
        for name in ("tokens", "targets", "loss_weights", "positions"):
            np.testing.assert_array_equal(
                mine[name][mine["segment_ids"] == segment],
                other[name][other["segment_ids"] == segment],
            )
    clips = [clip for clip in range(1, other["frame_clip"].max() + 1) if clip != 2]
    assert mine["frame_clip"].max() == len(clips)
    for new, old in enumerate(clips, start=1):
        np.testing.assert_array_equal(
            mine["frames"][mine["frame_clip"] == new], other["frames"][other["frame_clip"] == old]
        )


def test_a_file_that_hangs_is_skipped_and_not_retried(make_mixture, tmp_path: pathlib.Path):
    """Opening a pipe without a writer blocks forever."""
    os.mkfifo(tmp_path / "hang.mp4")
    write_numbered(tmp_path / "a.mp4", 8)
    path = write(
        tmp_path,
        [record(name, "<video>", video=f"{name}.mp4") for name in ("a", "hang")],
    )
    frames = FramesConfig(time_limit=1.0)
    mixture = make_mixture(path, frames=frames)
    began = time.monotonic()
    got = read(mixture, workers=2, steps=range(6), size=1, frames=frames)
    assert time.monotonic() - began < 20
    causes = Counter(skip.cause for batch in got for skip in batch.skips)
    used = [o for batch in got for o in batch.outcomes if o.skip is None]
    assert causes["timeout"] >= 2 and len(used) >= 2 and set(causes) == {"timeout"}
    assert all(o.sample == "a" for o in used)


@pytest.mark.parametrize("fps", [0.0, 2.0])
def test_every_frame_is_where_it_was_planned(make_mixture, tmp_path: pathlib.Path, fps: float):
    """Barcodes through the whole pipeline: videos, parts of them, folders, images, in one row."""
    write_numbered(tmp_path / "a.mp4", 30)
    (tmp_path / "frames").mkdir()
    for i in range(5):
        Image.fromarray(barcode(200 + i)).save(tmp_path / f"frames/{i}.png")
    Image.fromarray(barcode(77)).save(tmp_path / "i.png")
    videos = ["a.mp4", {"path": "a.mp4", "start": 1, "end": 2}, {"path": "frames", "fps": 1}]
    records = [record("a", "<image><video><video><video>", video=videos, image="i.png")]
    shape = RowShape(
        tokens=400,
        frames=32,
        image_size=32,
        grid=Grid.square(2),
        compressions=(
            CompressionConfig(num_frames=8, temporal_pool=2, spatial_pool=2, temporal_sample=1),
        ),
    )
    mixture = make_mixture(write(tmp_path, records), shapes=[shape], frames=FramesConfig(fps=fps))
    (batch,) = read(mixture, steps=range(1), size=1)
    clip, frames = batch.arrays["frame_clip"][0], batch.arrays["frames"][0]
    got = [numbers(frames[clip == i]) for i in range(1, 5)]
    counts = mixture.parts[0].lengths.counts_of(0)
    assert counts == ([1, 8, 8, 8] if not fps else [1, 7, 3, 8])
    spans = [(77, 77), (0, 29), (10, 20), (200, 204)]
    for shown, (first, last), count in zip(got, spans, counts, strict=True):
        assert len(shown) == count
        off = np.abs(np.array(shown) - np.linspace(first, last, count))
        assert off.max() <= 0.5 + 1e-6
