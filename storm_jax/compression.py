"""Token compression: temporal pooling (k), spatial pooling (p) and temporal sampling (s).

This module is the single source for the number and layout of a clip's visual tokens, for the row planner,
the model, the evaluator and the docs. It uses NumPy only.

    T frames --mean over k--> ceil(T/k) groups --every s-th--> emitted groups
    side x side tokens --mean over p x p--> ceil(side/p) x ceil(side/p) tokens per group

A partial last group averages the frames it has, and partial edge cells the tokens they have. An image is a
clip of one frame and is never pooled or sampled.

The visual table of a row has `G` group slots. It consists of `G * N'` pooled tokens; `G * N` tokens that images
index, if those differ (p > 1, or another grid); and the newline, if the layout has one.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from storm_jax.config import CompressionConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class Grid:
    """Tokens along one side of a frame before spatial pooling, and where the newline goes.

    Attributes:
      image, video: sides of the grid of an image, and of a video's frame.
      image_newline, video_newline: see `LayoutConfig`.
    """

    image: int
    video: int
    image_newline: bool = False
    video_newline: str = "none"

    @classmethod
    def of(cls, model: ModelConfig) -> Grid:
        layout = model.layout
        return cls(model.side, model.video_side, layout.image_newline, layout.video_newline)

    @classmethod
    def square(cls, side: int) -> Grid:
        """The same grid for images and videos, without a newline."""
        return cls(side, side)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipPlan:
    """The compression of one clip of T frames.

    Attributes:
      frame_group: int32 [T], the emitted group of each frame; -1 if its group is sampled out.
      num_groups: number of emitted groups.
      side: tokens along one side of a group; that of an image is not pooled.
      newline: where the newline goes: "none", or after each "row", "group" or "clip".
      pooled: whether the tokens are in the spatially pooled part of the visual table.
    """

    frame_group: np.ndarray
    num_groups: int
    side: int
    newline: str
    pooled: bool

    @property
    def tokens_per_group(self) -> int:
        """Tokens of a group that is not the last, with its newlines."""
        newlines = {"row": self.side, "group": 1}.get(self.newline, 0)
        return self.side**2 + newlines

    @property
    def tokens_of_groups(self) -> list[int]:
        """Tokens of each group, with its newlines."""
        counts = [self.tokens_per_group] * self.num_groups
        counts[-1] += self.newline == "clip"
        return counts

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens_of_groups)


def pooled_side(side: int, spatial_pool: int) -> int:
    """Returns the side of a square token grid after p x p pooling with partial edge cells."""
    return -(-side // spatial_pool)


def plan_clip(num_frames: int, grid: Grid, compression: CompressionConfig) -> ClipPlan:
    """Plans the compression of `num_frames` frames.

    Raises:
      ValueError: `num_frames` is less than 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: a clip needs at least one frame")
    if num_frames == 1:
        return ClipPlan(
            frame_group=np.zeros(1, np.int32),
            num_groups=1,
            side=grid.image,
            newline="clip" if grid.image_newline else "none",
            pooled=not _has_images_apart(grid, compression.spatial_pool),
        )
    group = np.arange(num_frames, dtype=np.int32) // compression.temporal_pool
    emitted = group % compression.temporal_sample == 0
    frame_group = np.where(emitted, group // compression.temporal_sample, -1).astype(np.int32)
    return plan_groups(frame_group, grid, compression)


def plan_groups(frame_group: np.ndarray, grid: Grid, compression: CompressionConfig) -> ClipPlan:
    """The plan of a video whose frames have these groups, int32 [T], ascending from 0; -1 drops a frame."""
    return ClipPlan(
        frame_group=frame_group,
        num_groups=int(frame_group.max()) + 1,
        side=pooled_side(grid.video, compression.spatial_pool),
        newline=grid.video_newline,
        pooled=True,
    )


def visual_index(
    plan: ClipPlan, first_group: int, num_group_slots: int, grid: Grid, spatial_pool: int
) -> np.ndarray:
    """Returns the indices of a clip's tokens in its row's visual table, int32 [plan.num_tokens].

    Args:
      first_group: the group slot of the clip's first emitted group.
      num_group_slots: G, the number of group slots of the row.
    """
    pooled = num_group_slots * pooled_side(grid.video, spatial_pool) ** 2
    images = num_group_slots * grid.image**2 if _has_images_apart(grid, spatial_pool) else 0
    first = first_group * plan.side**2 + (0 if plan.pooled else pooled)
    starts = first + np.arange(plan.num_groups) * plan.side**2
    return index_of_groups(plan, starts, pooled + images)


def index_of_groups(plan: ClipPlan, starts: np.ndarray, newline: int) -> np.ndarray:
    """Returns the indices of a clip's tokens in a visual table, int32 [plan.num_tokens].

    Args:
      starts: int [G], the index of the first token of each group.
      newline: the index of the newline.
    """
    tokens = np.arange(plan.side**2).reshape(plan.side, plan.side)
    table = (starts[:, None, None] + tokens[None]).astype(np.int32)  # [G, side, side]
    if plan.newline == "row":
        table = np.pad(table, ((0, 0), (0, 0), (0, 1)), constant_values=newline)
    groups = table.reshape(plan.num_groups, -1)
    if plan.newline == "group":
        groups = np.pad(groups, ((0, 0), (0, 1)), constant_values=newline)
    index = groups.reshape(-1)
    return np.append(index, np.int32(newline)) if plan.newline == "clip" else index


def _has_images_apart(grid: Grid, spatial_pool: int) -> bool:
    """Whether the visual table has separate tokens for images."""
    return spatial_pool > 1 or grid.image != grid.video
