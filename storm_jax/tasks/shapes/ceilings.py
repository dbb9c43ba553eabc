"""The best accuracy of a model without temporal mixing."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from typing import Any

from storm_jax.compression import Grid, plan_clip
from storm_jax.config import CompressionConfig
from storm_jax.tasks.shapes.families import FAMILIES
from storm_jax.tasks.shapes.settings import Settings


@functools.lru_cache
def ceiling(family: str, settings: Settings, temporal_pool: int, temporal_sample: int) -> float:
    """Returns the best accuracy of a model that mixes no frames before averaging `temporal_pool` of them.

    For each emitted group, such a model sees the labels of its frames but not their order. All events are
    enumerated, and the most likely answer for each view is chosen.
    """
    kind = FAMILIES[family]
    if kind.is_image:
        return 1.0
    compression = CompressionConfig(
        num_frames=settings.frames, temporal_pool=temporal_pool, temporal_sample=temporal_sample
    )
    group = plan_clip(settings.frames, Grid.square(1), compression).frame_group
    events = kind.events(settings)
    # Answers are equally likely, and so are the events of an answer.
    events_per_answer = Counter(event.answer for event in events)
    seen: dict[Any, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        labels: dict[int, list] = defaultdict(list)
        for g, label in zip(group, event.labels, strict=True):
            if g >= 0 and label is not None:
                labels[g].append(label)
        view = tuple((g, tuple(sorted(found))) for g, found in sorted(labels.items()))
        seen[event.question, view][event.answer] += (
            1 / events_per_answer[event.answer] / len(events_per_answer)
        )
    return min(1.0, sum(max(answers.values()) for answers in seen.values()))
