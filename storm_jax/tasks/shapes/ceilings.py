"""The best accuracy of a model without temporal mixing."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from storm_jax.compression import Grid, plan_clip
from storm_jax.config import CompressionConfig
from storm_jax.media.frames import nearest_frames
from storm_jax.tasks.shapes.families import FAMILIES
from storm_jax.tasks.shapes.settings import Settings


@functools.lru_cache
def ceiling(family: str, settings: Settings, compression: CompressionConfig) -> float:
    """Returns the best accuracy of a model that mixes no frames before averaging them.

    `compression.num_frames` evenly spaced frames of a clip are read. For each emitted group, such a model
    sees the labels of its frames but not their order. All events are enumerated, and the most likely
    answer for each view is chosen.
    """
    kind = FAMILIES[family]
    if kind.is_image:
        return 1.0
    every = np.arange(settings.frames, dtype=float)
    read = nearest_frames(every, np.linspace(0, settings.frames - 1, compression.num_frames))
    group = plan_clip(len(read), Grid.square(1), compression).frame_group
    kept = [(int(g), int(frame)) for g, frame in zip(group, read, strict=True) if g >= 0]
    events = kind.events(settings)
    # Answers are equally likely, and so are the events of an answer.
    events_per_answer = Counter(event.answer for event in events)
    seen: dict[Any, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        labels = sorted((g, event.labels[f]) for g, f in kept if event.labels[f] is not None)
        seen[event.question, tuple(labels)][event.answer] += (
            1 / events_per_answer[event.answer] / len(events_per_answer)
        )
    return min(1.0, sum(max(answers.values()) for answers in seen.values()))
