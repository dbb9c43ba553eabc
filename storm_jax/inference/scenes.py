"""Samples by what they show, so that visual tokens are computed once for all questions about them.

    samples -> scenes (the same media)  -> waves (as many scenes of one static shape as are encoded and
                                           asked about together)

Static shapes are rounded up, so that few programs are compiled and little is padded.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from storm_jax.compression import plan_clip
from storm_jax.data.encoder import SampleEncoder
from storm_jax.media.media import Media
from storm_jax.text.sample import Sample

_FINEST_PROMPT = 32


@dataclasses.dataclass(frozen=True)
class SceneShape:
    """Slots for the frames (F) and pooled groups (G) of a scene."""

    frames: int
    groups: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Media, and the samples that ask about them.

    Attributes:
      counts: frames of each medium.
      members: indices of the samples.
      visual_tokens: how many of them the decoder reads.
    """

    media: tuple[Media, ...]
    counts: tuple[int, ...]
    members: tuple[int, ...]
    visual_tokens: int
    shape: SceneShape


@dataclasses.dataclass(frozen=True)
class Wave:
    """Scenes of one shape."""

    shape: SceneShape
    scenes: tuple[Scene, ...]


def group_scenes(samples: Sequence[Sample], encoder: SampleEncoder) -> list[Scene]:
    """Samples with the same media together, in the order of the first of each."""
    members: dict[tuple[Media, ...], list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        members[sample.media].append(index)
    scenes = []
    for media, indices in members.items():
        counts = tuple(encoder.frame_counts(samples[indices[0]]))
        plans = [plan_clip(count, encoder.side, encoder.compression) for count in counts]
        shape = SceneShape(
            round_up(max(1, sum(counts)), 3), round_up(max(1, sum(p.num_groups for p in plans)), 3)
        )
        tokens = sum(plan.num_tokens for plan in plans)
        scenes.append(
            Scene(
                media=media,
                counts=counts,
                members=tuple(indices),
                visual_tokens=tokens,
                shape=shape,
            )
        )
    return scenes


def plan_waves(scenes: Sequence[Scene], size: int) -> list[Wave]:
    """All scenes, shape by shape, in waves of at most `size`."""
    by_shape: dict[SceneShape, list[Scene]] = defaultdict(list)
    for scene in scenes:
        by_shape[scene.shape].append(scene)
    return [
        Wave(shape, tuple(alike[start : start + size]))
        for shape, alike in by_shape.items()
        for start in range(0, len(alike), size)
    ]


def prompt_slots(length: int) -> int:
    """Token slots of a batch whose longest prompt has `length` tokens."""
    return max(_FINEST_PROMPT, round_up(length, 5, _FINEST_PROMPT))


def round_up(n: int, bits: int, finest: int = 1) -> int:
    """The smallest multiple of a power of two, and of `finest`, that is at least n, with at most
    2^(bits-1) steps between one power of two and the next."""
    step = max(finest, 1 << max(0, (n - 1).bit_length() - bits))
    return -(-n // step) * step
