"""The built-in task: files are reproducible, answers are correct and balanced, and ceilings match an
independent enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from storm_jax.config import CompressionConfig
from storm_jax.data.records import parse_record
from storm_jax.media.media import Media
from storm_jax.media.video import read_video, write_video
from storm_jax.tasks import shapes
from storm_jax.tasks.shapes.__main__ import main

FAMILIES = tuple(shapes.FAMILIES)
VIDEO_FAMILIES = tuple(name for name in FAMILIES if not shapes.FAMILIES[name].is_image)


def settings(**changes) -> shapes.Settings:
    fields = {"clips": 8, "seed": 3, "families": FAMILIES, "frames": 8, "eval_clips": 2}
    return shapes.Settings(**(fields | changes))


def content(folder: pathlib.Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of every file in a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def right_option(sample: shapes.Rendered) -> str:
    """The answer in words."""
    return sample.options[shapes.LETTERS.index(sample.answer)] if sample.options else sample.answer


def coloured(frames: np.ndarray) -> np.ndarray:
    """The name of the colour at each pixel, or "" if it is none of the four."""
    found = np.full(frames.shape[:-1], "", dtype=object)
    for name, rgb in shapes.COLOURS.items():
        found[(frames == rgb).all(-1)] = name
    return found


def samples(family: str, count: int = 12, **changes) -> list[shapes.Rendered]:
    one = settings(families=(family,), **changes)
    return [shapes.render(one, "train", i) for i in range(count)]


# Rendering is reproducible.


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_settings_and_seed_give_equal_samples(family: str):
    one = settings(families=(family,))
    first, second = (shapes.render(one, "val", 5) for _ in range(2))
    other_seed = shapes.render(dataclasses.replace(one, seed=4), "val", 5)
    other_split = shapes.render(one, "test", 5)
    np.testing.assert_array_equal(first.frames, second.frames)
    assert dataclasses.replace(first, frames=None) == dataclasses.replace(second, frames=None)
    assert (first.frames != other_seed.frames).any()
    assert (first.frames != other_split.frames).any()


@pytest.mark.parametrize("index", range(len(FAMILIES)))
def test_sample_does_not_depend_on_the_number_of_samples(index: int):
    few, many = settings(clips=8, eval_clips=1), settings(clips=10_000, eval_clips=500)
    first, second = shapes.render(few, "train", index), shapes.render(many, "train", index)
    np.testing.assert_array_equal(first.frames, second.frames)
    assert (first.question, first.answer) == (second.question, second.answer)


# Answers.


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_balanced_exactly(family: str):
    answers = shapes.FAMILIES[family].answers
    found = Counter(right_option(sample) for sample in samples(family, 3 * len(answers)))
    assert found == dict.fromkeys(answers, 3)


def test_families_take_turns():
    rendered = [shapes.render(settings(), "train", i) for i in range(2 * len(FAMILIES))]
    assert [sample.family for sample in rendered] == 2 * list(FAMILIES)


@pytest.mark.parametrize("family", ["count", "recall"])
def test_multiple_choice_letter_points_at_the_right_option(family: str):
    rendered = samples(family, 24)
    for sample in rendered:
        assert sorted(sample.options) == sorted(shapes.FAMILIES[family].answers)
        lines = sample.question.split("\n")[1:]
        listed = [f"{letter}. {o}" for letter, o in zip("ABCD", sample.options, strict=True)]
        assert lines == listed
    # `right_option` is compared with the pixels below; that would be vacuous if the letter were constant.
    assert len({sample.answer for sample in rendered}) == 4


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("count", "recall")])
def test_open_questions_list_no_options(family: str):
    for sample in samples(family, 4):
        assert sample.options == () and sample.answer in shapes.FAMILIES[family].answers
        assert "\n" not in sample.question


def flashes(sample: shapes.Rendered) -> list[str]:
    """The colour at the centre of each frame, which every flash covers."""
    middle = sample.frames.shape[1] // 2
    return coloured(sample.frames[:, middle, middle]).tolist()


def test_order_answer_is_the_first_of_two_consecutive_flashes():
    for sample in samples("order"):
        seen = flashes(sample)
        first, second = (t for t, colour in enumerate(seen) if colour)
        assert second == first + 1
        assert seen[first] == sample.answer != seen[second]


@pytest.mark.parametrize("frames", [8, 16, 33])
@pytest.mark.parametrize("length", [2, 3])
def test_flashes_far_apart_leave_a_quarter_of_the_clip_between_them(frames: int, length: int):
    for sample in samples("apart", frames=frames, event_frames=length):
        runs = [(colour, len(list(run))) for colour, run in itertools.groupby(flashes(sample))]
        (first, one), (nothing, gap), (second, two) = runs[not runs[0][0] :][:3]
        assert (one, two) == (length, length) and nothing == "" and gap >= frames // 4
        assert first == sample.answer != second


def test_the_event_of_a_sample_is_the_one_that_is_drawn():
    settings = shapes.Settings(clips=1, seed=5, families=("order", "needle", "motion"))
    for index in range(60):
        event, sample = (
            shapes.event_of(settings, "test", index),
            shapes.render(settings, "test", index),
        )
        assert event.answer == sample.answer
        if sample.family == "needle":
            (flash,) = (t for t, label in enumerate(event.labels) if label is not None)
            brightest = np.argmax(sample.frames.astype(int).max(axis=-1).mean(axis=(1, 2)))
            assert brightest == flash


def test_the_distractor_does_not_reveal_the_order_of_frames():
    """Its place must be independent of neighbouring frames; otherwise it would reveal their order."""
    kind, rng = shapes.FAMILIES["order"], np.random.default_rng(0)
    nothing = shapes.Event((None,) * 16, "red")
    near, far = [], []
    for _ in range(100):
        frames = np.zeros((16, 32, 32, 3), np.uint8)
        kind.draw(frames, nothing, rng)
        centre = np.array([np.argwhere(frame.any(-1)).mean(0) for frame in frames])
        near.append(np.abs(centre[1:] - centre[:-1]).mean())
        far.append(np.abs(centre[8:] - centre[:-8]).mean())
    assert np.mean(near) == pytest.approx(np.mean(far), rel=0.05)


def test_needle_answer_is_the_colour_of_the_only_flash():
    for sample in samples("needle"):
        assert [colour for colour in flashes(sample) if colour] == [sample.answer]


def test_count_answer_is_the_number_of_flashes_none_of_them_consecutive():
    colours = set()
    for sample in samples("count"):
        seen = [t for t, colour in enumerate(flashes(sample)) if colour]
        colours.update(flashes(sample))
        assert str(len(seen)) == right_option(sample)
        assert all(b - a > 1 for a, b in itertools.pairwise(seen))
    assert len(colours - {""}) > 1  # the colour is irrelevant


@pytest.mark.parametrize("event_frames", [2, 3])
def test_motion_answer_is_the_direction_of_the_shape(event_frames: int):
    for sample in samples("motion", event_frames=event_frames):
        shown = coloured(sample.frames) != ""
        times = np.flatnonzero(shown.any((1, 2)))
        assert len(times) == event_frames
        assert times[-1] - times[0] == event_frames - 1
        begin, end = (np.argwhere(shown[t]).mean(0)[::-1] for t in (times[0], times[-1]))
        moved = np.round((end - begin) / np.abs(end - begin).max())
        assert tuple(moved) == shapes.DIRECTIONS[sample.answer]


def test_recall_answer_is_the_colour_at_the_start_or_end_as_asked():
    asked = set()
    for sample in samples("recall", 24):
        begin, end = (set(coloured(sample.frames[t]).flat) - {""} for t in (0, -1))
        start = sample.question.startswith(shapes.FAMILIES["recall"].questions[0])
        asked.add(start)
        assert {right_option(sample)} == (begin if start else end)
        assert begin != end and not (coloured(sample.frames[2:-2]) != "").any()
    assert asked == {True, False}


def test_image_answers_are_what_the_image_shows():
    for sample in samples("colour"):
        assert set(coloured(sample.frames).flat) == {"", sample.answer}
    for sample in samples("place"):
        y, x = np.argwhere(coloured(sample.frames[0]) != "").mean(0) / len(sample.frames[0]) - 0.5
        assert (np.sign(x), np.sign(y)) == shapes.PLACES[sample.answer]
    for sample in samples("shape", 24, size=64):
        assert outline_of(coloured(sample.frames[0]) != "") == sample.answer


def outline_of(inside: np.ndarray) -> str:
    """Identifies an outline by how much of its bounding box, and of the last row of it, is filled."""
    spots = np.argwhere(inside)
    (top, left), (bottom, right) = spots.min(0), spots.max(0)
    box = inside[top : bottom + 1, left : right + 1]
    if box.mean() > 0.6:
        return "square" if box.mean() > 0.95 else "circle"
    return "triangle" if box[-1].mean() > 0.8 else "cross"


# Events and ceilings.


@pytest.mark.parametrize("frames", [8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_has_events_of_the_clip_length(family: str, frames: int):
    kind = shapes.FAMILIES[family]
    events = kind.events(settings(frames=frames))
    assert {event.answer for event in events} == set(kind.answers)
    assert {len(event.labels) for event in events} == {1 if kind.is_image else frames}
    assert {event.question for event in events} == set(range(len(kind.questions)))
    assert kind.chance == 1 / 4


@pytest.mark.parametrize("event_frames", [2, 3])
@pytest.mark.parametrize("frames", [8, 16])
@pytest.mark.parametrize("family", ["order", "motion"])
def test_reversed_time_is_an_event_with_another_answer(family: str, frames: int, event_frames: int):
    events = shapes.FAMILIES[family].events(settings(frames=frames, event_frames=event_frames))
    answers = {event.labels: event.answer for event in events}
    assert len(answers) == len(events)
    for labels, answer in answers.items():
        assert labels[::-1] in answers
        assert answers[labels[::-1]] != answer


def best(family: str, settings: shapes.Settings, pool: int, sample: int) -> float:
    """The ceiling if all frames are read."""
    compression = CompressionConfig(
        num_frames=settings.frames, temporal_pool=pool, temporal_sample=sample
    )
    return shapes.ceiling(family, settings, compression)


def reversible_ceiling(frames: int, length: int, pool: int) -> float:
    """An event of `length` frames whose reversal has another answer: decidable if it straddles groups."""
    starts = range(frames - length + 1)
    straddling = sum(start // pool != (start + length - 1) // pool for start in starts)
    return (straddling + (len(starts) - straddling) / 2) / len(starts)


@pytest.mark.parametrize("pool", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("frames", [8, 16])
def test_ceiling_of_order_and_motion_counts_events_that_straddle_groups(frames: int, pool: int):
    for length in (2, 3):
        one = settings(frames=frames, event_frames=length)
        assert best("order", one, pool, 1) == pytest.approx(reversible_ceiling(frames, 2, pool))
        assert best("motion", one, pool, 1) == pytest.approx(
            reversible_ceiling(frames, length, pool)
        )


def test_ceiling_of_order_at_16_frames_pooled_by_4_is_three_fifths():
    """3 of the 15 positions of the pair straddle two groups."""
    assert reversible_ceiling(16, 2, 4) == pytest.approx(3 / 15 + 12 / 15 / 2)
    assert best("order", settings(frames=16), 4, 1) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("family", "pool", "sample", "expected"),
    [
        ("needle", 4, 1, 1.0),
        ("needle", 16, 1, 1.0),
        ("count", 4, 1, 1.0),
        ("recall", 4, 1, 1.0),
        ("recall", 8, 1, 1.0),
        ("recall", 16, 1, 0.5),  # start and end are in the only group
        ("needle", 1, 4, 1 / 4 + 3 / 4 / 4),  # a quarter is seen, the rest guessed
        ("colour", 4, 4, 1.0),
        ("shape", 4, 4, 1.0),
        ("place", 4, 4, 1.0),
    ],
)
def test_ceiling_by_family(family: str, pool: int, sample: int, expected: float):
    assert best(family, settings(frames=16), pool, sample) == pytest.approx(expected)


def test_ceiling_of_order_under_sampling():
    """Frames 0, 4, 8 and 12 of 16 are seen: of 15 positions of the pair, the first flash in 4, the second in 3.

    A flash in frame 0 is certainly the first. In the others it may be either, and answering with its
    colour is correct for the 3 positions where it is the first. The other 8 positions are guessed.
    """
    expected = (1 + 3 + 8 / 4) / 15
    assert best("order", settings(frames=16), 1, 4) == pytest.approx(expected)


@pytest.mark.parametrize("split", ["val", "test"])
def test_ceiling_on_a_split_is_that_of_its_samples(split: str):
    """A pair in one group of 4 is a coin flip, one that straddles two is not; of flashes, a quarter is seen."""
    one = settings(frames=16, families=("needle", "order", "needle"), eval_clips=20)
    pairs, flashes = [], []
    for index in range(60):
        event = shapes.event_of(one, split, index)
        times = [time for time, label in enumerate(event.labels) if label is not None]
        if len(times) == 2:
            pairs.append(1 if times[0] // 4 != times[1] // 4 else 1 / 2)
        else:
            flashes.append(1 if times[0] % 4 == 0 else 1 / 4)
    assert (len(pairs), len(flashes)) == (20, 40)
    pooled = CompressionConfig(num_frames=16, temporal_pool=4)
    sampled = CompressionConfig(num_frames=16, temporal_sample=4)
    assert shapes.ceiling("order", one, pooled, split) == pytest.approx(np.mean(pairs))
    assert shapes.ceiling("needle", one, sampled, split) == pytest.approx(np.mean(flashes))


@pytest.mark.parametrize("frames", [2, 4, 8, 16, 32])
def test_ceiling_of_needle_is_the_share_of_frames_that_are_read(frames: int):
    read = min(frames, 16) / 16
    limit = shapes.ceiling("needle", settings(frames=16), CompressionConfig(num_frames=frames))
    assert limit == pytest.approx(read + (1 - read) / 4)


def test_ceiling_of_flashes_far_apart_needs_both():
    """Groups tell them apart; where only one is read, the other may have come first or second."""
    one = settings(frames=32)
    assert best("apart", one, 8, 1) == pytest.approx(1)  # the gap is a group
    assert best("apart", one, 32, 1) == pytest.approx(1 / 2)  # the colours are known
    assert 1 / 4 < best("apart", one, 4, 4) < 0.6


@pytest.mark.parametrize("family", FAMILIES)
def test_ceiling_without_pooling_is_one(family: str):
    assert best(family, settings(frames=16), 1, 1) == pytest.approx(1)


# Files.


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("rendered") / "data"
    shapes.write(folder, SMALL, workers=1)
    return folder


SMALL = settings(families=("recall", "colour"), clips=6, eval_clips=1)


@pytest.fixture
def folder(rendered: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy that a test may modify."""
    return pathlib.Path(shutil.copytree(rendered, tmp_path / "copy"))


def test_json_and_media_on_disk_match_the_rendered_samples(shapes_folder: pathlib.Path):
    found = shapes.read_settings(shapes_folder)
    counts = {"train": found.clips, "val": 2 * len(FAMILIES), "test": 2 * len(FAMILIES)}
    for split, count in counts.items():
        records = json.loads((shapes_folder / f"{split}.json").read_text())
        indices = [int(record["id"].removeprefix(f"{split}-")) for record in records]
        assert sorted(indices) == list(range(count))
        on_disk = set((shapes_folder / "media" / split).iterdir())
        assert {parse_record(r, shapes_folder, 0).media[0].path for r in records} == on_disk
        for index, record in zip(indices[:16], records, strict=False):
            sample = shapes.render(found, split, index)
            kind = "image" if shapes.FAMILIES[sample.family].is_image else "video"
            human, gpt = record["conversations"]
            assert human == {"from": "human", "value": f"<{kind}>\n{sample.question}"}
            assert gpt == {"from": "gpt", "value": sample.answer}
            assert record["family"] == sample.family
            assert record.get("options", []) == list(sample.options)
            path = shapes_folder / record[kind]
            if kind == "image":
                np.testing.assert_array_equal(np.asarray(Image.open(path)), sample.frames[0])
            else:
                clip = read_video(Media.file("video", path), found.frames, found.size)
                error = np.abs(clip.frames.astype(int) - sample.frames).mean((1, 2, 3))
                assert error.max() < 12, error


def test_records_are_shuffled_across_families(shapes_folder: pathlib.Path):
    families = [
        record["family"] for record in json.loads((shapes_folder / "train.json").read_text())
    ]
    assert Counter(families) == dict.fromkeys(FAMILIES, 8)
    assert families != 8 * list(FAMILIES)


def test_equal_settings_produce_equal_files(rendered: pathlib.Path, tmp_path: pathlib.Path):
    shapes.write(tmp_path / "again", SMALL, workers=2)
    first, second = content(rendered), content(tmp_path / "again")
    assert {name: data for name, (data, _) in first.items()} == {
        name: data for name, (data, _) in second.items()
    }


def test_writing_again_leaves_a_complete_folder_unchanged(folder: pathlib.Path, capsys):
    before = content(folder)
    shapes.write(folder, SMALL, workers=1)
    assert content(folder) == before
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"clips": 7}, {"seed": 4}, {"families": ("recall",)}, {"frames": 16}, {"noise": 0}]
)
def test_other_settings_raise_and_change_nothing(folder: pathlib.Path, change: dict):
    before = content(folder)
    with pytest.raises(ValueError, match=next(iter(change))):
        shapes.write(folder, dataclasses.replace(SMALL, **change), workers=1)
    assert content(folder) == before


def test_folder_with_other_files_raises_and_is_unchanged(tmp_path: pathlib.Path):
    (tmp_path / "thesis.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"no shapes\.json"):
        shapes.write(tmp_path, SMALL, workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_interrupted_rendering_resumes(folder: pathlib.Path, rendered: pathlib.Path):
    (folder / "test.json").unlink()  # written last
    (folder / "val.json").unlink()
    half_written = next((folder / "media" / "train").iterdir())
    half_written.write_bytes(half_written.read_bytes()[:99])
    shapes.write(folder, SMALL, workers=1)
    assert {k: v for k, (v, _) in content(folder).items()} == {
        k: v for k, (v, _) in content(rendered).items()
    }


def test_settings_are_read_back(folder: pathlib.Path):
    assert shapes.read_settings(folder) == SMALL


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"families": 3}', '{"families": ["a"]}'])
def test_folder_without_settings_is_a_value_error_that_names_it(tmp_path: pathlib.Path, text):
    if text is not None:
        (tmp_path / "shapes.json").write_text(text)
    with pytest.raises(ValueError, match=r"shapes\.json") as caught:
        shapes.read_settings(tmp_path)
    assert str(tmp_path) in str(caught.value)


# Command line.


def run_main(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr("sys.argv", ["shapes", *args])
    main()


@pytest.mark.parametrize(
    "wrong",
    [
        "--families=nonsense",
        "--families=order,nonsense",
        "--families=",
        "--clips=0",
        "--frames=4",
        "--size=33",
        "--size=8",
        "--noise=256",
        "--noise=-1",
        "--event_frames=4",
        "--eval_clips=0",
        "--workers=0",
        "--seed=-1",
    ],
)
def test_cli_names_a_wrong_argument_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys, wrong: str
):
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, f"--out={tmp_path / 'out'}", "--clips=8", "--workers=1", wrong)
    assert caught.value.code == 2
    assert wrong in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_many_frames_to_count_are_refused_before_anything_is_written(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match="frames=33 are too many for the family `count`"):
        shapes.write(tmp_path / "data", settings(families=("order", "count"), frames=33), 1)
    assert not (tmp_path / "data").exists()


def test_cli_renders_the_same_files_as_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, rendered: pathlib.Path
):
    fields = {**dataclasses.asdict(SMALL), "families": ",".join(SMALL.families)}
    arguments = [f"--{name}={value}" for name, value in fields.items() if value is not None]
    run_main(monkeypatch, f"--out={tmp_path / 'out'}", "--workers=1", *arguments)
    assert json.loads((tmp_path / "out" / "shapes.json").read_text())["seed"] == 3
    assert content(tmp_path / "out").keys() == content(rendered).keys()


def test_cli_reports_other_settings_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path
):
    before = content(folder)
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, f"--out={folder}", "--clips=9", "--workers=1")
    assert str(folder) in caught.value.code
    assert content(folder) == before


def test_a_family_listed_twice_has_twice_as_many_samples():
    settings = dataclasses.replace(SMALL, families=("colour", "colour", "needle"))
    families = [shapes.render(settings, "train", index).family for index in range(24)]
    assert (families.count("colour"), families.count("needle")) == (16, 8)


# Real footage as background.


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A video that is grey in its first three quarters, and white in the last one."""
    folder = tmp_path_factory.mktemp("videos")
    frames = np.full((100, 48, 64, 3), 100, np.uint8)
    frames[75:] = 255
    write_video(folder / "a.mp4", frames, 25)
    (folder / "notes.txt").write_text("not a video")
    return folder


@pytest.mark.parametrize("frames", [8, 16, 60])  # the last quarter has 25 frames
def test_footage_of_test_clips_is_not_that_of_training_clips(videos: pathlib.Path, frames: int):
    one = settings(families=("needle", "colour"), footage=str(videos), frames=frames)
    for split, level in (("train", 100), ("test", 255)):
        for index in range(6):
            sample = shapes.render(one, split, index)
            corner = sample.frames[:, :2, :2].astype(int).mean(axis=(1, 2, 3))
            assert (corner >= 0.35 * level).all() and (corner <= 0.95 * level).all()
            assert sample.frames.shape[1:] == (32, 32, 3)


@pytest.mark.parametrize("family", ["order", "apart", "needle", "count"])
def test_footage_changes_the_background_and_not_the_event(videos: pathlib.Path, family: str):
    one = settings(families=(family,))
    for index in range(4):
        on_footage = shapes.render(dataclasses.replace(one, footage=str(videos)), "val", index)
        event = shapes.event_of(one, "val", index)
        shown = [colour != "" for colour in flashes(on_footage)]
        assert shown == [label is not None for label in event.labels]
        assert right_option(on_footage) == event.answer


def test_footage_moves_and_changes_in_light(tmp_path: pathlib.Path):
    frames = np.zeros((40, 64, 64, 3), np.uint8)
    frames[:, :, 32:] = 200  # an edge
    write_video(tmp_path / "edge.mp4", frames, 25)
    one = settings(families=("motion",), footage=str(tmp_path), frames=16)
    for index in range(4):
        row = shapes.render(one, "train", index).frames[:, 0, :, 0].astype(int)
        edges = {int(np.argmax(line > 40)) for line in row}
        assert len(edges) > 2 and len({int(line.max()) for line in row}) > 2


def test_folder_without_videos_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    (tmp_path / "a.txt").touch()
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=f"footage={str(tmp_path)!r} has no videos"):
        run_main(monkeypatch, f"--out={out}", "--clips=1", f"--footage={tmp_path}")
    assert not out.exists()


def test_footage_has_to_be_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    with pytest.raises(SystemExit, match="is not a folder"):
        run_main(
            monkeypatch, f"--out={tmp_path / 'out'}", "--clips=1", f"--footage={tmp_path / 'no'}"
        )


def test_unreadable_footage_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit, match=r"broken\.mp4 is unreadable"):
        run_main(monkeypatch, f"--out={tmp_path / 'out'}", "--clips=1", f"--footage={tmp_path}")


def test_short_footage_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    write_video(tmp_path / "short.mp4", np.zeros((5, 32, 32, 3), np.uint8), 25)
    with pytest.raises(SystemExit, match=r"short\.mp4 has 0\.16 s of footage, less than 1 s"):
        run_main(monkeypatch, f"--out={tmp_path / 'out'}", "--clips=1", f"--footage={tmp_path}")
