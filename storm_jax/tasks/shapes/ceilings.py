"""The best accuracy of a model without temporal mixing."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from storm_jax.compression import Grid, plan_clip
from storm_jax.config import CompressionConfig
from storm_jax.media.frames import nearest_frames
from storm_jax.tasks.shapes.events import Event
from storm_jax.tasks.shapes.families import FAMILIES
from storm_jax.tasks.shapes.rendering import events_of
from storm_jax.tasks.shapes.settings import Settings

_View = tuple[int, tuple[Any, ...]]  # a question, and what a model sees of the clip


@functools.lru_cache
def ceiling(
    family: str, settings: Settings, compression: CompressionConfig, split: str = ""
) -> float:
    """Returns the best expected accuracy of a model that mixes no frames before averaging them.

    `compression.num_frames` evenly spaced frames of a clip are read. For each emitted group, such a model sees the
    labels of its frames but not their order. All events are enumerated, and the most likely answer for each view is
    chosen; ties are broken at random.

    Args:
      split: "val" or "test": on the samples of this split. By default, on all events that could be drawn.
    """
    kind = FAMILIES[family]
    if kind.is_image:
        return 1.0
    kept = _kept_frames(settings, compression)
    answers = _answers(kind.events(settings), kept)
    if not split:
        return min(1.0, sum(max(each.values()) for each in answers.values()))
    drawn = events_of(settings, split, family)
    return float(np.mean([_chance(answers[_view(each, kept)], each.answer) for each in drawn]))


def _kept_frames(settings: Settings, compression: CompressionConfig) -> list[tuple[int, int]]:
    """The group and the number of each frame that is read, without those of groups that are dropped."""
    every = np.arange(settings.frames, dtype=float)
    read = nearest_frames(every, np.linspace(0, settings.frames - 1, compression.num_frames))
    group = plan_clip(len(read), Grid.square(1), compression).frame_group
    return [(int(g), int(frame)) for g, frame in zip(group, read, strict=True) if g >= 0]


def _answers(
    events: Sequence[Event], kept: Sequence[tuple[int, int]]
) -> dict[_View, dict[str, float]]:
    """The probability of each answer together with each view: answers are equally likely, and so are the events of an
    answer."""
    events_per_answer = Counter(event.answer for event in events)
    found: dict[_View, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        share = 1 / events_per_answer[event.answer] / len(events_per_answer)
        found[_view(event, kept)][event.answer] += share
    return found


def _view(event: Event, kept: Sequence[tuple[int, int]]) -> _View:
    labels = sorted((g, event.labels[f]) for g, f in kept if event.labels[f] is not None)
    return event.question, tuple(labels)


def _chance(answers: Mapping[str, float], answer: str) -> float:
    """The probability that the best guess is this answer."""
    most = max(answers.values())
    best = [each for each, share in answers.items() if np.isclose(share, most)]
    return (answer in best) / len(best)
