"""The events that can happen in a clip, as labels per frame, without pixels."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from storm_jax.tasks.shapes.settings import Settings

COLOURS = {
    "red": (230, 30, 30), "green": (30, 200, 50), "blue": (40, 60, 235), "yellow": (235, 220, 40),
}  # fmt: skip
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OUTLINES = ("circle", "square", "triangle", "cross")
PLACES = {
    "top left": (-1, -1), "top right": (1, -1), "bottom left": (-1, 1), "bottom right": (1, 1),
}  # fmt: skip

MOST_COUNTED = 32  # frames of a clip whose flashes are counted


@dataclasses.dataclass(frozen=True)
class Event:
    """One possible content of a clip.

    Attributes:
      labels: what each frame shows; None if nothing happens in it.
      answer: the correct answer.
      question: index of the question that is asked.
    """

    labels: tuple[Any, ...]
    answer: str
    question: int = 0


def order_events(settings: Settings) -> list[Event]:
    pairs = itertools.permutations(COLOURS, 2)
    starts = range(settings.frames - 1)
    return [Event(_at(settings, t, pair), pair[0]) for pair in pairs for t in starts]


def apart_events(settings: Settings) -> list[Event]:
    length = settings.event_frames
    gap = settings.frames // 4
    times = [
        (first, second)
        for first in range(settings.frames - 2 * length - gap + 1)
        for second in range(first + length + gap, settings.frames - length + 1)
    ]
    events = []
    for one, other in itertools.permutations(COLOURS, 2):
        for first, second in times:
            between = [None] * (second - first - length)
            labels = (*[one] * length, *between, *[other] * length)
            events.append(Event(_at(settings, first, labels), one))
    return events


def motion_events(settings: Settings) -> list[Event]:
    length = settings.event_frames
    events = []
    for direction, (dx, dy) in DIRECTIONS.items():
        path = [("horizontal" if dx else "vertical", i) for i in range(length)]
        path = path if dx + dy > 0 else path[::-1]
        for t in range(settings.frames - length + 1):
            events.append(Event(_at(settings, t, path), direction))
    return events


def needle_events(settings: Settings) -> list[Event]:
    return [Event(_at(settings, t, [c]), c) for c in COLOURS for t in range(settings.frames)]


def count_events(settings: Settings) -> list[Event]:
    if settings.frames > MOST_COUNTED:
        raise ValueError(
            f"frames={settings.frames} are too many for the family `count`, which has millions of possible events: use "
            f"at most {MOST_COUNTED} frames, or other families"
        )
    events = []
    for count in range(1, 5):
        for chosen in itertools.combinations(range(settings.frames), count):
            if all(b - a > 1 for a, b in itertools.pairwise(chosen)):
                labels = tuple("flash" if t in chosen else None for t in range(settings.frames))
                events.append(Event(labels, str(count)))
    return events


def recall_events(settings: Settings) -> list[Event]:
    quarter = max(1, settings.frames // 4)
    events = []
    for first, last in itertools.permutations(COLOURS, 2):
        gap = [None] * (settings.frames - 2 * quarter)
        labels = (*[first] * quarter, *gap, *[last] * quarter)
        events += [Event(labels, first, 0), Event(labels, last, 1)]
    return events


def still(answers: Sequence[str]) -> Callable[[Settings], list[Event]]:
    return lambda settings: [Event((answer,), answer) for answer in answers]


def _at(settings: Settings, start: int, labels: Sequence[Any]) -> tuple[Any, ...]:
    after = settings.frames - start - len(labels)
    return (*[None] * start, *labels, *[None] * after)
