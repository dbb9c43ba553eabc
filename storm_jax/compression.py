"""Token compression: temporal pooling (k), spatial pooling (p) and temporal sampling (s).

This module is the single source for the number and layout of a clip's visual tokens, for the row planner,
the model, the evaluator and the docs. It uses NumPy only.

    T frames --mean over k--> ceil(T/k) groups --every s-th--> emitted groups
    side x side tokens --mean over p x p--> ceil(side/p) x ceil(side/p) tokens per group

A partial last group averages the frames it has, and partial edge cells the tokens they have. An image is a
clip of one frame and is never pooled or sampled.

The visual table of a row has `G` group slots. It consists of `G * N'` pooled tokens, followed by `G * N`
spatially unpooled tokens if p > 1. Images index the latter.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from storm_jax.config import CompressionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipPlan:
    """The compression of one clip of T frames.

    Attributes:
      frame_group: int32 [T], the emitted group of each frame; -1 if its group is sampled out.
      num_groups: number of emitted groups.
      tokens_per_group: N' for a video, N for an image.
      pooled: whether the tokens are in the spatially pooled part of the visual table.
    """

    frame_group: np.ndarray
    num_groups: int
    tokens_per_group: int
    pooled: bool

    @property
    def num_tokens(self) -> int:
        return self.num_groups * self.tokens_per_group


def pooled_side(side: int, spatial_pool: int) -> int:
    """Returns the side of a square token grid after p x p pooling with partial edge cells."""
    return -(-side // spatial_pool)


def plan_clip(num_frames: int, side: int, compression: CompressionConfig) -> ClipPlan:
    """Plans the compression of `num_frames` frames of `side` x `side` tokens.

    Raises:
      ValueError: `num_frames` is less than 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: a clip needs at least one frame")
    if num_frames == 1:
        return ClipPlan(
            frame_group=np.zeros(1, np.int32),
            num_groups=1,
            tokens_per_group=side * side,
            pooled=compression.spatial_pool == 1,
        )
    group = np.arange(num_frames, dtype=np.int32) // compression.temporal_pool
    emitted = group % compression.temporal_sample == 0
    frame_group = np.where(emitted, group // compression.temporal_sample, -1).astype(np.int32)
    tokens_per_group = pooled_side(side, compression.spatial_pool) ** 2
    return ClipPlan(
        frame_group=frame_group,
        num_groups=int(frame_group.max()) + 1,
        tokens_per_group=tokens_per_group,
        pooled=True,
    )


def visual_index(
    plan: ClipPlan, first_group: int, num_group_slots: int, side: int, spatial_pool: int
) -> np.ndarray:
    """Returns the indices of a clip's tokens in its row's visual table, int32 [plan.num_tokens].

    Args:
      first_group: the group slot of the clip's first emitted group.
      num_group_slots: G, the number of group slots of the row.
    """
    start = first_group * plan.tokens_per_group
    if not plan.pooled:
        start += num_group_slots * pooled_side(side, spatial_pool) ** 2
    return np.arange(start, start + plan.num_tokens, dtype=np.int32)
