"""Token compression: temporal pooling (k), spatial pooling (p) and temporal sampling (s).

This module is the single source for the number and layout of a clip's visual tokens, for the row planner,
the model, the evaluator and the docs. It uses NumPy only.

    T frames --mean over k--> ceil(T/k) groups --every s-th--> emitted groups
    side x side tokens --mean over p x p--> ceil(side/p) x ceil(side/p) tokens per group

A partial last group averages the frames it has, and partial edge cells the tokens they have. An image is a
clip of one frame and is never pooled or sampled.

The visual table of a row has `G` group slots. It consists of `G * N'` pooled tokens for each spatial pooling factor that
the row's clips use; `G * N` tokens that images index, if none of those are theirs (p > 1, or another grid); and the
newline, if the layout has one.
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
      part: the part of the visual table that the tokens are in (see `VisualShape.parts`).
    """

    frame_group: np.ndarray
    num_groups: int
    side: int
    newline: str
    part: int

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


@dataclasses.dataclass(frozen=True)
class VisualShape:
    """Static shape of a row's visual table: number of groups (G) and spatial pooling factors (p)."""

    num_groups: int
    spatial_pools: tuple[int, ...]

    def parts(self, grid: Grid) -> dict[int, int]:
        """The parts of the table in order: by spatial pooling factor, the tokens along one side of a group. 0 is the
        part of images with another grid."""
        sides = {pool: pooled_side(grid.video, pool) for pool in self.spatial_pools}
        image = _image_part(grid)
        return sides if image in sides else {**sides, image: grid.image}


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
            part=_image_part(grid),
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
        part=compression.spatial_pool,
    )


def visual_index(plan: ClipPlan, first_group: int, shape: VisualShape, grid: Grid) -> np.ndarray:
    """Returns the indices of a clip's tokens in its row's visual table, int32 [plan.num_tokens].

    Args:
      first_group: the group slot of the clip's first emitted group.
    """
    firsts, end = {}, 0
    for part, side in shape.parts(grid).items():
        firsts[part] = end
        end += shape.num_groups * side**2
    groups = first_group + np.arange(plan.num_groups)
    return index_of_groups(plan, firsts[plan.part] + groups * plan.side**2, end)


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


def _image_part(grid: Grid) -> int:
    """The part of the visual table with the tokens of images, which are not pooled."""
    return 1 if grid.image == grid.video else 0
