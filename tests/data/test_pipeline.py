"""Protects the way from a JSON file to batches: what is left out and why, that row i is one row
whoever asks, and that threads, restarts and processes change nothing."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from storm_jax.config import CompressionConfig
from storm_jax.data.conversation import ConversationEncoder
from storm_jax.data.image import read_image
from storm_jax.data.pipeline import (
    Batch,
    Dataset,
    EvalRows,
    Skip,
    TrainRows,
    batches,
    check_skips,
    decode,
)
from storm_jax.data.rows import RowShape
from storm_jax.data.sources import DataError, read_records
from storm_jax.data.video import read_video

SHAPE = RowShape(
    tokens=160, frames=24, image_size=32, side=2, compression=CompressionConfig(8, 2, 2, 1)
)
BATCH, STEPS = 4, 5

MakeDataset = Callable[..., Dataset]


@pytest.fixture(scope="module")
def make_dataset(tokenizer) -> MakeDataset:
    def make(path: pathlib.Path, shape: RowShape = SHAPE, skip: float = 0.1, root: str = ""):
        return Dataset(str(path), root, ConversationEncoder(tokenizer, ""), shape, skip)

    return make


@pytest.fixture(scope="module")
def dataset(make_dataset: MakeDataset, shapes_folder: pathlib.Path) -> Dataset:
    return make_dataset(shapes_folder / "train.json")


@pytest.fixture(scope="module")
def expected(dataset: Dataset) -> list[Batch]:
    """The batches of one process and one thread."""
    return list(batches(dataset, TrainRows(dataset, 0), range(STEPS), BATCH, num_threads=1))


def assert_same(got: list[Batch], want: list[Batch]) -> None:
    assert [b.sample_ids for b in got] == [b.sample_ids for b in want]
    assert [b.skips for b in got] == [b.skips for b in want]
    for mine, other in zip(got, want, strict=True):
        assert mine.arrays.keys() == other.arrays.keys()
        for name in mine.arrays:
            np.testing.assert_array_equal(mine.arrays[name], other.arrays[name], err_msg=name)


def record(name: str, question: str = "Why?", answer: str = "So.", **fields) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, **fields}


def write_json(folder: pathlib.Path, records: list) -> pathlib.Path:
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return path


# Samples.


BAD = {
    "malformed": [{"id": "malformed", "conversations": [{"from": "bird", "value": "?"}] * 2}],
    "empty_conversation": [
        {"id": "empty_conversation", "conversations": []},
        record("empty_conversation", answer=" "),
    ],
    "placeholder": [record("placeholder", "<image>"), record("placeholder", image="a.png")],
    "too_long": [
        record("too_long", "why " * SHAPE.tokens),
        record("too_long", "<video>" * 4, video=["a.mp4"] * 4),  # 32 frames of 24
    ],
}


def test_unusable_samples_are_skipped_by_cause(make_dataset: MakeDataset, tmp_path: pathlib.Path):
    bad = [entry for entries in BAD.values() for entry in entries]
    good = [record(f"good {i}") for i in range(len(bad))]
    mixed = [entry for pair in zip(good, bad, strict=True) for entry in pair]
    made = make_dataset(write_json(tmp_path, mixed))
    assert [sample.id for sample in made.samples] == [entry["id"] for entry in good]
    assert [skip.cause for skip in made.skips] == [entry["id"] for entry in bad]
    assert all(skip.sample_id == skip.cause and skip.message for skip in made.skips)
    assert made.lengths.shape == (len(good), 2)


@pytest.mark.parametrize(
    "odd", [record("odd", "<image>", image=5), record("odd", "Why \ud83d?")], ids=["image", "text"]
)
def test_one_odd_record_does_not_end_the_run(
    make_dataset: MakeDataset, tmp_path: pathlib.Path, odd: dict
):
    made = make_dataset(write_json(tmp_path, [record("good"), odd]))
    assert [skip.sample_id for skip in made.skips] == ["odd"]


@pytest.mark.parametrize(("bad", "fails"), [(10, False), (11, True)])
def test_too_many_skips_are_a_data_error(
    make_dataset: MakeDataset, tmp_path: pathlib.Path, bad: int, fails: bool
):
    """The fraction is of 100 samples at least, so that a few bad ones of a few do not matter."""
    records = [record("good")] * 20 + [record("bad", "<image>")] * bad
    path = write_json(tmp_path, records)
    if not fails:
        assert len(make_dataset(path).skips) == bad
        return
    with pytest.raises(DataError, match=f"{bad} unusable samples of {len(records)}") as caught:
        make_dataset(path)
    assert f"{bad} placeholder" in str(caught.value)
    assert "max_skip_fraction=0.1" in str(caught.value) and "'bad'" in str(caught.value)


@pytest.mark.parametrize(
    ("skips", "read", "fraction", "fails"),
    [
        (20, 200, 0.1, False),
        (21, 200, 0.1, True),
        (1, 200, 0.0, True),
        (0, 0, 0.0, False),
        (200, 200, 1.0, False),
    ],
)
def test_skip_fraction_counts_what_was_read(skips: int, read: int, fraction: float, fails: bool):
    found = [Skip("a", "missing", "gone")] * skips
    if fails:
        with pytest.raises(DataError, match=f"eval had {skips} unusable samples of {read}"):
            check_skips(found, read, fraction, "eval had")
    else:
        check_skips(found, read, fraction, "eval had")


def test_file_without_usable_samples_is_a_data_error(
    make_dataset: MakeDataset, tmp_path: pathlib.Path
):
    path = write_json(tmp_path, [record("bad", "<image>")] * 3)
    with pytest.raises(DataError, match="no usable sample: 3 placeholder"):
        make_dataset(path)


def test_lengths_are_those_of_the_encoded_samples(dataset: Dataset):
    kinds = set()
    for sample, (tokens, frames) in zip(dataset.samples, dataset.lengths, strict=True):
        kind = sample.media[0].kind
        kinds.add(kind)
        encoded = dataset.encode(sample)
        assert len(encoded) == tokens
        # 8 frames by 2 are 4 groups of 1 token (side 2 pooled by 2); an image keeps 2 x 2.
        assert (encoded.media == 0).sum() == 4
        assert frames == (1 if kind == "image" else 8)
    assert kinds == {"image", "video"}


@pytest.mark.parametrize("less", [0, 1])
def test_sample_that_just_fits_a_row_is_kept(
    make_dataset: MakeDataset, dataset: Dataset, tmp_path: pathlib.Path, less: int
):
    one = record("one", "why " * 20)
    size = len(dataset.encode(make_dataset(write_json(tmp_path, [one])).samples[0]))
    shape = RowShape(size - less, 24, 32, 2, SHAPE.compression)
    path = write_json(tmp_path, [one, record("short")])
    assert [skip.cause for skip in make_dataset(path, shape).skips] == ["too_long"] * less


def test_media_root_replaces_the_folder_of_the_file(make_dataset: MakeDataset, tmp_path):
    path = write_json(tmp_path, [record("a", "<image>", image="x/a.png")])
    assert make_dataset(path).samples[0].media[0].path == tmp_path / "x/a.png"
    assert make_dataset(path, root="/other").samples[0].media[0].path == pathlib.Path(
        "/other/x/a.png"
    )


def test_fingerprint_is_of_samples_their_order_and_lengths(
    make_dataset: MakeDataset, tmp_path: pathlib.Path
):
    records = [record("a"), record("b", "Why is it so?"), record("c")]
    changed = {
        "same": records,
        "order": [records[2], records[1], records[0]],
        "fewer": records[:2],
        "name": [record("z"), *records[1:]],
        "length": [record("a", "Why, why, why?"), *records[1:]],
    }
    prints = {
        name: make_dataset(write_json(tmp_path, entries)).fingerprint()
        for name, entries in changed.items()
    }
    assert prints["same"] == make_dataset(write_json(tmp_path, records)).fingerprint()
    assert len(set(prints.values())) == len(prints)


def test_fingerprint_tells_where_an_id_ends(make_dataset: MakeDataset, tmp_path: pathlib.Path):
    first = make_dataset(write_json(tmp_path, [record("a1"), record("1b")])).fingerprint()
    second = make_dataset(write_json(tmp_path, [record("a"), record("11b")])).fingerprint()
    assert first != second


def test_decode_reads_every_medium_with_its_times(dataset: Dataset):
    for sample in dataset.samples[:16]:
        path = sample.media[0].path
        ready, times = decode(sample, dataset.encode(sample), 8, 32)
        if sample.media[0].kind == "image":
            np.testing.assert_array_equal(ready.clips[0], read_image(path, 32)[None])
            assert times[0].tolist() == [0]
        else:
            clip = read_video(path, 8, 32)
            np.testing.assert_array_equal(ready.clips[0], clip.frames)
            np.testing.assert_array_equal(times[0], clip.times)
        assert len(ready.clips) == len(times) == 1


# Rows.


def epochs_of(plan: TrainRows, dataset: Dataset, count: int) -> list[list[list[int]]]:
    """Rows by epoch: an epoch is complete when as many samples as there are have come."""
    made, row = [], 0
    for _ in range(count):
        epoch: list[list[int]] = []
        while sum(map(len, epoch)) < len(dataset.samples):
            epoch.append(list(plan[row]))
            row += 1
        made.append(epoch)
    return made


def test_every_sample_comes_once_per_epoch(dataset: Dataset):
    for epoch in epochs_of(TrainRows(dataset, 0), dataset, 3):
        assert sorted(i for row in epoch for i in row) == list(range(len(dataset.samples)))
        for row in epoch:
            assert (dataset.lengths[row].sum(0) <= (SHAPE.tokens, SHAPE.frames)).all()


def test_epochs_and_seeds_differ(dataset: Dataset):
    first, second = epochs_of(TrainRows(dataset, 0), dataset, 2)
    assert first != second
    assert epochs_of(TrainRows(dataset, 1), dataset, 1) != [first]


def test_row_does_not_depend_on_what_was_asked_before(dataset: Dataset):
    forward, jumping, fresh = (TrainRows(dataset, 0) for _ in range(3))
    want = [list(forward[i]) for i in range(60)]
    order = np.random.default_rng(0).permutation(60)
    got = {int(i): list(jumping[i]) for i in order}
    assert [got[i] for i in range(60)] == want
    assert list(fresh[59]) == want[59]


def test_eval_rows_cover_each_sample_once_and_end(dataset: Dataset):
    plan = EvalRows(dataset)
    rows = [list(plan[i]) for i in range(len(plan))]
    assert all(rows)
    assert sorted(i for row in rows for i in row) == list(range(len(dataset.samples)))
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert list(plan[len(plan)]) == list(plan[10 * len(plan)]) == []


# Batches.


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_nothing(dataset: Dataset, expected: list[Batch], threads: int):
    plan = TrainRows(dataset, 0)
    assert_same(list(batches(dataset, plan, range(STEPS), BATCH, num_threads=threads)), expected)


@pytest.mark.parametrize("start", [1, 3, STEPS])
def test_resuming_gives_the_tail(dataset: Dataset, expected: list[Batch], start: int):
    plan = TrainRows(dataset, 0)
    got = list(batches(dataset, plan, range(start, STEPS), BATCH, num_threads=2))
    assert_same(got, expected[start:])


def test_shares_of_two_processes_are_the_batch_of_one(dataset: Dataset, expected: list[Batch]):
    first, second = (
        list(
            batches(
                dataset, TrainRows(dataset, 0), range(STEPS), BATCH,
                num_threads=2, process_index=index, process_count=2,
            )
        )
        for index in range(2)
    )  # fmt: skip
    joined = [
        Batch(
            {name: np.concatenate([a.arrays[name], b.arrays[name]]) for name in a.arrays},
            a.sample_ids + b.sample_ids,
            a.skips + b.skips,
        )
        for a, b in zip(first, second, strict=True)
    ]
    assert_same(joined, expected)


def test_batches_hold_the_planned_samples(dataset: Dataset, expected: list[Batch]):
    plan = TrainRows(dataset, 0)
    for step, batch in enumerate(expected):
        rows = [plan[step * BATCH + i] for i in range(BATCH)]
        assert batch.sample_ids == [dataset.samples[i].id for row in rows for i in row]
        assert batch.skips == []
        segments = batch.arrays["segment_ids"]
        assert [row.max() for row in segments] == [len(row) for row in rows]
        for b, row in enumerate(rows):
            for segment, index in enumerate(row, start=1):
                tokens = batch.arrays["tokens"][b][segments[b] == segment]
                np.testing.assert_array_equal(tokens, dataset.encode(dataset.samples[index]).tokens)


def test_evaluation_pads_the_last_batch_with_empty_rows(dataset: Dataset):
    plan = EvalRows(dataset)
    size = len(plan) - 1
    got = list(batches(dataset, plan, range(2), size, num_threads=2))
    ids = [name for batch in got for name in batch.sample_ids]
    assert ids == [dataset.samples[i].id for row in range(len(plan)) for i in plan[row]]
    assert sorted(ids) == sorted(sample.id for sample in dataset.samples)
    assert got[0].arrays["segment_ids"].any(1).all()
    assert got[1].arrays["segment_ids"].any(1).tolist() == [True] + [False] * (size - 1)
    assert not got[1].arrays["loss_weights"][1:].any()


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
        path.write_text("no media")


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("missing", "missing"),
        ("text", "unreadable"),
        ("truncated", "unreadable"),
        ("directory", "unreadable"),
    ],
)
def test_broken_media_are_skips_and_the_rest_of_the_row_is_intact(
    make_dataset: MakeDataset,
    dataset: Dataset,
    shapes_folder: pathlib.Path,
    tmp_path: pathlib.Path,
    kind: str,
    how: str,
    cause: str,
):
    folder = pathlib.Path(shutil.copytree(shapes_folder, tmp_path / "copy"))
    plan = EvalRows(dataset)
    row = next(
        r
        for r in map(plan.__getitem__, range(len(plan)))
        if len(r) > 2 and dataset.samples[r[1]].media[0].kind == kind
    )
    broken = dataset.samples[row[1]]
    _break(folder / broken.media[0].path.relative_to(shapes_folder), how)
    damaged = make_dataset(folder / "train.json")
    assert damaged.skips == []  # found when it is read, not before

    one_row = {0: row}
    (got,) = batches(damaged, one_row, range(1), 1, num_threads=1)
    (want,) = batches(dataset, one_row, range(1), 1, num_threads=1)
    assert [(skip.sample_id, skip.cause) for skip in got.skips] == [(broken.id, cause)]
    assert broken.media[0].path.name in got.skips[0].message
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
    # One clip per sample here, so clip n of the whole row is that of segment n.
    for clip, segment in enumerate(rest, start=1):
        frames = mine["frames"][mine["frame_clip"] == clip]
        np.testing.assert_array_equal(frames, other["frames"][other["frame_clip"] == segment])
    assert mine["frame_clip"].max() == len(rest)


def test_skips_stay_with_their_step(
    make_dataset: MakeDataset, shapes_folder: pathlib.Path, tmp_path: pathlib.Path
):
    folder = pathlib.Path(shutil.copytree(shapes_folder, tmp_path / "copy"))
    gone = {entry["id"] for entry in read_records(folder / "train.json")[::9]}
    for entry in read_records(folder / "train.json")[::9]:
        (folder / (entry.get("image") or entry["video"])).unlink()
    made = make_dataset(folder / "train.json")
    got = list(batches(made, TrainRows(made, 0), range(STEPS), BATCH, num_threads=4))
    assert sum(bool(batch.skips) for batch in got) > 1
    for batch in got:
        expected_gone = [name for name in batch.sample_ids if name in gone]
        assert [skip.sample_id for skip in batch.skips] == expected_gone
        assert {skip.cause for skip in batch.skips} <= {"missing"}
