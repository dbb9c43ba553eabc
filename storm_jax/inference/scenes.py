"""Plans which media are encoded together.

A *scene* is the media of one conversation. Its visual tokens are computed once for all questions about
it. Scenes of one static shape form batches; shapes are rounded up, so that few programs are compiled
and little is padded.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence

from storm_jax.compression import plan_clip
from storm_jax.data.encoder import SampleEncoder
from storm_jax.media.media import Media

# The default batch: at most this many visual tokens per device, and at most this many rows.
_TOKENS_PER_DEVICE = 2**17
_MAX_ROWS = 32
# Small scenes are encoded together, up to this many frames per device.
_FRAMES_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class SceneShape:
    """Slots for the frames (F) and pooled groups (G) of a scene."""

    frames: int
    groups: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Media that are shown together.

    Attributes:
      counts: frames of each medium.
      visual_tokens: number of visual tokens in a prompt about the scene.
    """

    media: tuple[Media, ...]
    counts: tuple[int, ...]
    visual_tokens: int
    shape: SceneShape


def plan_scene(media: Sequence[Media], encoder: SampleEncoder) -> Scene:
    """Counts the frames and visual tokens of a scene; only headers are read."""
    return scene_of(media, encoder.frame_counts(media), encoder)


def scene_of(media: Sequence[Media], counts: Sequence[int], encoder: SampleEncoder) -> Scene:
    """The scene of media with `counts` frames."""
    plans = [plan_clip(count, encoder.grid, encoder.compression) for count in counts]
    return Scene(
        media=tuple(media),
        counts=tuple(counts),
        visual_tokens=sum(plan.num_tokens for plan in plans),
        shape=SceneShape(
            frames=round_up(max(1, sum(counts)), 3),
            groups=round_up(max(1, sum(plan.num_groups for plan in plans)), 3),
        ),
    )


def batch_scenes(scenes: Iterable[Scene], size: int) -> list[tuple[Scene, ...]]:
    """All scenes in batches of at most `size`, each of one shape."""
    by_shape: dict[SceneShape, list[Scene]] = defaultdict(list)
    for scene in scenes:
        by_shape[scene.shape].append(scene)
    return [
        tuple(same_shape[start : start + size])
        for same_shape in by_shape.values()
        for start in range(0, len(same_shape), size)
    ]


def default_rows(visual_tokens: int, devices: int) -> int:
    """How many prompts of at most `visual_tokens` are answered together, before rounding up to a multiple of the
    devices."""
    return min(_MAX_ROWS, max(1, _TOKENS_PER_DEVICE // max(1, visual_tokens)) * devices)


def scenes_per_call(shape: SceneShape, rows: int, devices: int) -> int:
    """How many scenes all devices encode together."""
    return min(rows, devices * max(1, _FRAMES_AT_ONCE // shape.frames))


def round_up(n: int, bits: int, multiple: int = 1) -> int:
    """The smallest multiple of a power of two, and of `multiple`, that is at least n, with at most
    2^(bits-1) steps between one power of two and the next."""
    step = max(multiple, 1 << max(0, (n - 1).bit_length() - bits))
    return -(-n // step) * step
