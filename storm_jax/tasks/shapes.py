"""The built-in task: questions about moving shapes that pooling without memory cannot answer.

    python -m storm_jax.tasks.shapes --out=DIR --clips=N --seed=S

renders textured clips with events in them to H.264 files (PNG for image questions) and writes LLaVA
JSON for train, val and test. Families:

    order    two flashes in neighbouring frames: which came first
    motion   a shape shows for two or three frames only and moves: which way
    needle   one frame flashes: in what colour
    count    how many frames flash (multiple choice)
    recall   the colour of the shape at the start or at the end (multiple choice)
    colour, shape, place    about an image

Reversing the time of an `order` or `motion` clip gives a clip with another answer. So a model that
encodes frames apart and averages them over k frames cannot tell the two, unless the event straddles
two groups. `ceiling` computes how far such a model can get, by enumerating each family's events.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from storm_jax.compression import plan_clip
from storm_jax.config import CompressionConfig
from storm_jax.media.video import write_video
from storm_jax.progress import with_progress

COLOURS = {
    "red": (230, 30, 30), "green": (30, 200, 50), "blue": (40, 60, 235), "yellow": (235, 220, 40),
}  # fmt: skip
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OUTLINES = ("circle", "square", "triangle", "cross")
PLACES = {
    "top left": (-1, -1), "top right": (1, -1), "bottom left": (-1, 1), "bottom right": (1, 1),
}  # fmt: skip
LETTERS = "ABCD"
SPLITS = ("train", "val", "test")
FPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a data set is rendered from; equal settings give equal files."""

    clips: int
    seed: int
    families: tuple[str, ...]
    frames: int = 16
    size: int = 32
    noise: int = 16
    event_frames: int = 2
    eval_clips: int = 100


@dataclasses.dataclass(frozen=True)
class Event:
    """One way a clip of a family can be, without its pixels.

    Attributes:
      labels: what each frame shows, None where nothing happens.
      answer: the right answer.
      question: index of the question that is asked.
    """

    labels: tuple[Any, ...]
    answer: str
    question: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of question.

    Attributes:
      answers: all possible answers, equally likely.
      questions: wordings for each question index.
      events: all equally likely events of a clip, by answer.
      draw: paints an event into background frames uint8 [F, S, S, 3].
      multiple_choice: whether options are listed and the answer is a letter.
      is_image: whether the sample is one image.
    """

    answers: tuple[str, ...]
    questions: tuple[tuple[str, ...], ...]
    events: Callable[[Settings], list[Event]]
    draw: Callable[[np.ndarray, Event, np.random.Generator], None]
    multiple_choice: bool = False
    is_image: bool = False

    @property
    def chance(self) -> float:
        return 1 / len(self.answers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendered:
    """A sample in memory: frames uint8 [F, S, S, 3] and its question."""

    family: str
    frames: np.ndarray
    question: str
    answer: str
    options: tuple[str, ...]


# Events of each family.


def _order_events(settings: Settings) -> list[Event]:
    pairs = itertools.permutations(COLOURS, 2)
    starts = range(settings.frames - 1)
    return [Event(_at(settings, t, pair), pair[0]) for pair in pairs for t in starts]


def _motion_events(settings: Settings) -> list[Event]:
    length = settings.event_frames
    events = []
    for direction, (dx, dy) in DIRECTIONS.items():
        path = [("horizontal" if dx else "vertical", i) for i in range(length)]
        path = path if dx + dy > 0 else path[::-1]
        for t in range(settings.frames - length + 1):
            events.append(Event(_at(settings, t, path), direction))
    return events


def _needle_events(settings: Settings) -> list[Event]:
    return [Event(_at(settings, t, [c]), c) for c in COLOURS for t in range(settings.frames)]


def _count_events(settings: Settings) -> list[Event]:
    events = []
    for count in range(1, 5):
        for chosen in itertools.combinations(range(settings.frames), count):
            if all(b - a > 1 for a, b in itertools.pairwise(chosen)):
                labels = tuple("flash" if t in chosen else None for t in range(settings.frames))
                events.append(Event(labels, str(count)))
    return events


def _recall_events(settings: Settings) -> list[Event]:
    quarter = max(1, settings.frames // 4)
    events = []
    for first, last in itertools.permutations(COLOURS, 2):
        gap = [None] * (settings.frames - 2 * quarter)
        labels = (*[first] * quarter, *gap, *[last] * quarter)
        events += [Event(labels, first, 0), Event(labels, last, 1)]
    return events


def _still(answers: Sequence[str]) -> Callable[[Settings], list[Event]]:
    return lambda settings: [Event((answer,), answer) for answer in answers]


def _at(settings: Settings, start: int, labels: Sequence[Any]) -> tuple[Any, ...]:
    after = settings.frames - start - len(labels)
    return (*[None] * start, *labels, *[None] * after)


# Painting.


def _draw_flashes(frames: np.ndarray, event: Event, rng: np.random.Generator) -> None:
    _paint_distractor(frames, rng)
    colour = rng.choice(list(COLOURS))
    for frame, label in zip(frames, event.labels, strict=True):
        if label is not None:
            rgb = COLOURS[colour if label == "flash" else label]
            centre = rng.uniform(0.4, 0.6, 2)
            _paint(frame, "circle", centre, 0.42, rgb)


def _draw_motion(frames: np.ndarray, event: Event, rng: np.random.Generator) -> None:
    outline, rgb = rng.choice(OUTLINES), COLOURS[rng.choice(list(COLOURS))]
    across = rng.uniform(0.3, 0.7)
    steps = sum(label is not None for label in event.labels) - 1
    for frame, label in zip(frames, event.labels, strict=True):
        if label is not None:
            axis, i = label
            along = 0.25 + 0.5 * i / max(1, steps)
            centre = (along, across) if axis == "horizontal" else (across, along)
            _paint(frame, outline, np.array(centre), 0.2, rgb)


def _draw_recall(frames: np.ndarray, event: Event, rng: np.random.Generator) -> None:
    outline = rng.choice(OUTLINES)
    path = np.linspace(rng.uniform(0.3, 0.7, 2), rng.uniform(0.3, 0.7, 2), len(frames))
    for frame, label, centre in zip(frames, event.labels, path, strict=True):
        if label is not None:
            _paint(frame, outline, centre, 0.25, COLOURS[label])


def _draw_colour(frames: np.ndarray, event: Event, rng: np.random.Generator) -> None:
    _paint(frames[0], rng.choice(OUTLINES), rng.uniform(0.3, 0.7, 2), 0.28, COLOURS[event.answer])


def _draw_shape(frames: np.ndarray, event: Event, rng: np.random.Generator) -> None:
    rgb = COLOURS[rng.choice(list(COLOURS))]
    _paint(frames[0], event.answer, rng.uniform(0.42, 0.58, 2), 0.36, rgb)


def _draw_place(frames: np.ndarray, event: Event, rng: np.random.Generator) -> None:
    centre = 0.5 + 0.24 * np.array(PLACES[event.answer]) + rng.uniform(-0.04, 0.04, 2)
    rgb = COLOURS[rng.choice(list(COLOURS))]
    _paint(frames[0], rng.choice(OUTLINES), centre, 0.2, rgb)


def _paint_distractor(frames: np.ndarray, rng: np.random.Generator) -> None:
    """A grey shape, in each frame anywhere: one that moved smoothly would tell a frame its time."""
    outline, grey = rng.choice(OUTLINES), int(rng.integers(170, 215))
    for frame in frames:
        _paint(frame, outline, rng.uniform(0.1, 0.9, 2), 0.13, (grey,) * 3)


def _paint(
    frame: np.ndarray, outline: str, centre: np.ndarray, radius: float, rgb: tuple[int, ...]
) -> None:
    """Paints a filled shape; centre (x, y) and radius are fractions of the frame's side."""
    size = len(frame)
    y, x = (np.mgrid[:size, :size] + 0.5) / size - np.asarray(centre)[::-1, None, None]
    x, y = x / radius, y / radius
    inside = {
        "circle": x**2 + y**2 <= 1,
        "square": np.maximum(abs(x), abs(y)) <= 0.85,
        "triangle": (y <= 0.8) & (y >= 2 * abs(x) - 1),
        "cross": (np.maximum(abs(x), abs(y)) <= 1) & (np.minimum(abs(x), abs(y)) <= 0.3),
    }[outline]
    frame[inside] = rgb


def _background(settings: Settings, frames: int, rng: np.random.Generator) -> np.ndarray:
    """A dim texture that stays, with a little noise that does not: uint8 [F, S, S, 3]."""
    size = settings.size
    cells = -(-size // 4)
    texture = rng.integers(40, 100, (cells, cells, 1)).repeat(4, 0).repeat(4, 1)[:size, :size]
    texture = texture + rng.integers(-12, 13, 3)
    noise = rng.normal(0, settings.noise / 2, (frames, size, size, 1))
    return (texture[None] + noise).clip(0, 255).astype(np.uint8)


_COLOUR_NAMES = tuple(COLOURS)
FAMILIES: dict[str, Family] = {
    "order": Family(
        answers=_COLOUR_NAMES,
        questions=(
            ("Which flash came first?", "Two flashes follow each other. Which came first?"),
        ),
        events=_order_events,
        draw=_draw_flashes,
    ),
    "motion": Family(
        answers=tuple(DIRECTIONS),
        questions=(("Which way did the shape move?", "In which direction did the shape move?"),),
        events=_motion_events,
        draw=_draw_motion,
    ),
    "needle": Family(
        answers=_COLOUR_NAMES,
        questions=(("What colour was the flash?", "One frame flashes. In what colour?"),),
        events=_needle_events,
        draw=_draw_flashes,
    ),
    "count": Family(
        answers=tuple("1234"),
        questions=(("How many flashes are there?", "How often did it flash?"),),
        events=_count_events,
        draw=_draw_flashes,
        multiple_choice=True,
    ),
    "recall": Family(
        answers=_COLOUR_NAMES,
        questions=(
            ("What colour was the shape at the start?", "How did the clip begin: what colour?"),
            ("What colour was the shape at the end?", "How did the clip end: what colour?"),
        ),
        events=_recall_events,
        draw=_draw_recall,
        multiple_choice=True,
    ),
    "colour": Family(
        answers=_COLOUR_NAMES,
        questions=(("What colour is the shape?", "Which colour do you see?"),),
        events=_still(_COLOUR_NAMES),
        draw=_draw_colour,
        is_image=True,
    ),
    "shape": Family(
        answers=OUTLINES,
        questions=(("What shape is it?", "Which shape do you see?"),),
        events=_still(OUTLINES),
        draw=_draw_shape,
        is_image=True,
    ),
    "place": Family(
        answers=tuple(PLACES),
        questions=(("Where is the shape?", "In which corner is the shape?"),),
        events=_still(tuple(PLACES)),
        draw=_draw_place,
        is_image=True,
    ),
}


@functools.lru_cache
def ceiling(family: str, settings: Settings, temporal_pool: int, temporal_sample: int) -> float:
    """Best accuracy of a model that mixes nothing in time before the mean over `temporal_pool`.

    Such a model sees, of each group that is emitted, which labels its frames have but not their
    order. Every event is enumerated and the answer most likely for what is seen is guessed.
    """
    kind = FAMILIES[family]
    if kind.is_image:
        return 1.0
    compression = CompressionConfig(
        num_frames=settings.frames, temporal_pool=temporal_pool, temporal_sample=temporal_sample
    )
    group = plan_clip(settings.frames, 1, compression).frame_group
    events = kind.events(settings)
    share = Counter(event.answer for event in events)  # answers are balanced, events within them
    seen: dict[Any, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        labels: dict[int, list] = defaultdict(list)
        for g, label in zip(group, event.labels, strict=True):
            if g >= 0 and label is not None:
                labels[g].append(label)
        view = tuple((g, tuple(sorted(found))) for g, found in sorted(labels.items()))
        seen[event.question, view][event.answer] += 1 / share[event.answer] / len(share)
    return min(1.0, sum(max(answers.values()) for answers in seen.values()))


def render(settings: Settings, split: str, index: int) -> Rendered:
    """Sample `index` of a split; it does not depend on how many others there are."""
    rng = np.random.default_rng([settings.seed, SPLITS.index(split), index])
    turn, which = divmod(index, len(settings.families))
    name = settings.families[which]
    family = FAMILIES[name]
    answer = family.answers[turn % len(family.answers)]  # balanced exactly
    events = _events_by_answer(name, settings)[answer]
    event = events[rng.integers(len(events))]
    frames = _background(settings, 1 if family.is_image else settings.frames, rng)
    family.draw(frames, event, rng)
    question = str(rng.choice(family.questions[event.question]))
    options: tuple[str, ...] = ()
    if family.multiple_choice:
        options = tuple(str(option) for option in rng.permutation(family.answers))
        listed = "\n".join(f"{letter}. {o}" for letter, o in zip(LETTERS, options, strict=True))
        question, answer = f"{question}\n{listed}", LETTERS[options.index(answer)]
    return Rendered(family=name, frames=frames, question=question, answer=answer, options=options)


@functools.lru_cache
def _events_by_answer(family: str, settings: Settings) -> dict[str, list[Event]]:
    by_answer = defaultdict(list)
    for event in FAMILIES[family].events(settings):
        by_answer[event.answer].append(event)
    return dict(by_answer)


# Files.


def read_settings(folder: str | pathlib.Path) -> Settings:
    """The settings that a folder was rendered with.

    Raises:
      ValueError: when it holds no data set of this module.
    """
    path = pathlib.Path(folder) / "shapes.json"
    try:
        fields = json.loads(path.read_text())
        return Settings(**{**fields, "families": tuple(fields["families"])})
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: render the task with python -m storm_jax.tasks.shapes --out={folder}"
        ) from None
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a shapes.json: {error}") from None


def write(folder: str | pathlib.Path, settings: Settings, workers: int) -> None:
    """Renders a data set; a complete one with equal settings is left as it is.

    Raises:
      ValueError: when the folder holds other settings or other files.
    """
    folder = pathlib.Path(folder)
    complete = folder / "test.json"  # written last
    if (folder / "shapes.json").exists():
        found = read_settings(folder)
        for field in dataclasses.fields(Settings):
            there, here = getattr(found, field.name), getattr(settings, field.name)
            if there != here:
                raise ValueError(
                    f"{folder} was rendered with {field.name}={there!r}, not {here!r}: "
                    f"use another --out, or remove the folder"
                )
        if complete.exists():
            print(f"{folder} is complete already")
            return
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no shapes.json: use another --out")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "shapes.json", dataclasses.asdict(settings))
    counts = {split: settings.eval_clips * len(settings.families) for split in SPLITS}
    counts["train"] = settings.clips
    jobs = [(split, i) for split, count in counts.items() for i in range(count)]
    records: dict[str, list] = {split: [] for split in SPLITS}
    for split in SPLITS:
        (folder / "media" / split).mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        made = pool.map(functools.partial(_write_sample, folder, settings), jobs, chunksize=32)
        line = "rendered {done:,} of {total:,} samples, {left:.0f} s left"
        shown = with_progress(made, len(jobs), line, every=1.0, tells_end=True)
        for (split, _), record in zip(jobs, shown, strict=True):
            records[split].append(record)
    for split in SPLITS:
        order = np.random.default_rng([settings.seed, SPLITS.index(split)]).permutation(
            counts[split]
        )
        _write_json(folder / f"{split}.json", [records[split][i] for i in order])


def _write_sample(folder: pathlib.Path, settings: Settings, job: tuple[str, int]) -> dict[str, Any]:
    split, index = job
    sample = render(settings, split, index)
    kind = "image" if FAMILIES[sample.family].is_image else "video"
    name = f"media/{split}/{index:06}{'.png' if kind == 'image' else '.mp4'}"
    if kind == "image":
        Image.fromarray(sample.frames[0]).save(folder / name)
    else:
        write_video(folder / name, sample.frames, FPS)
    record = {
        "id": f"{split}-{index:06}",
        kind: name,
        "conversations": [
            {"from": "human", "value": f"<{kind}>\n{sample.question}"},
            {"from": "gpt", "value": sample.answer},
        ],
        "family": sample.family,
    }
    return record | ({"options": list(sample.options)} if sample.options else {})


def _write_json(path: pathlib.Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m storm_jax.tasks.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    every = ",".join(FAMILIES)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--clips", type=int, required=True, help="training samples, images included"
    )
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--families",
        default=every,
        help=f"comma-separated, twice for twice as many; default {every}",
    )
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip (8 at least)")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels (even)")
    parser.add_argument("--noise", type=int, default=16, help="background noise, 0 to 255")
    parser.add_argument("--event_frames", type=int, default=2, help="frames of a motion: 2 or 3")
    parser.add_argument(
        "--eval_clips", type=int, default=100, help="val and test samples per family each"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    families = tuple(args.families.split(","))
    for name, problem in {
        "families": not set(families) <= set(FAMILIES),
        "clips": args.clips < 1,
        "seed": args.seed < 0,
        "frames": args.frames < 8,
        "size": args.size < 16 or args.size % 2,
        "noise": not 0 <= args.noise <= 255,
        "event_frames": args.event_frames not in (2, 3),
        "eval_clips": args.eval_clips < 1,
        "workers": args.workers < 1,
    }.items():
        if problem:
            parser.error(f"--{name}={getattr(args, name)} is out of range (see --help)")
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)}
    try:
        write(args.out, Settings(**{**fields, "families": families}), args.workers)
    except (ValueError, OSError) as error:
        sys.exit(f"shapes: {error}")


if __name__ == "__main__":
    main()
