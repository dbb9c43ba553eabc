"""How far a model can get that mixes nothing in time."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from typing import Any

from storm_jax.compression import plan_clip
from storm_jax.config import CompressionConfig
from storm_jax.tasks.shapes.families import FAMILIES
from storm_jax.tasks.shapes.settings import Settings


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
