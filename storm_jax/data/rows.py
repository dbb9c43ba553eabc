"""The arrays of a row: several samples in S token slots and F frame slots.

A batch of B rows is a dict of

    tokens, targets            int32 [B, S]    ids; the pad id at visual tokens
    loss_weights               float32 [B, S]  1 if the target is an answer token or end marker, else 0
    positions, segment_ids     int32 [B, S]    position in the sample; sample in the row, 0 = padding
    visual_index               int32 [B, S]    entry of the visual table, -1 = text
    frames                     uint8 [B, F, H, W, 3]
    frame_clip, frame_group    int32 [B, F]    clip id, 0 = padding; group slot, -1 = padding or dropped
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from storm_jax.compression import Grid, VisualShape, plan_clip, pooled_side, visual_index
from storm_jax.config import CompressionConfig, RunConfig
from storm_jax.text.conversation import Encoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShape:
    """Static shape of a row.

    Attributes:
      tokens, frames: slots S and F.
      image_size: H = W in pixels.
      grid: tokens of a frame before spatial pooling.
      compressions: those that the clips of a row may have.
    """

    tokens: int
    frames: int
    image_size: int
    grid: Grid
    compressions: tuple[CompressionConfig, ...]

    @property
    def visual(self) -> VisualShape:
        """Shape of the visual table. Group slots G are bounded by the frame slots and by S / N' (a group fills N' token
        slots or more)."""
        pools = tuple(dict.fromkeys(each.spatial_pool for each in self.compressions))
        per_group = min(pooled_side(self.grid.video, pool) ** 2 for pool in pools)
        return VisualShape(max(1, min(self.frames, self.tokens // per_group)), pools)


def row_shapes(
    config: RunConfig, compressions: tuple[CompressionConfig, ...] | None = None
) -> list[RowShape]:
    """The shapes of a run's rows, by default those of training."""
    return [
        RowShape(
            tokens=row.tokens,
            frames=row.frames,
            image_size=config.model.vision.image_size,
            grid=Grid.of(config.model),
            compressions=compressions or config.trained_compressions,
        )
        for row in config.data.rows
    ]


@dataclasses.dataclass(frozen=True)
class RowSample:
    """A sample ready for a row: its tokens, per medium its frames uint8 [T, H, W, 3], and their compression."""

    encoded: Encoded
    clips: Sequence[np.ndarray]
    compression: CompressionConfig


def empty_rows(
    count: int, pad_id: int, shape: RowShape, frames: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Returns a batch of `count` rows of padding.

    Args:
      frames: uint8 [B, F, H, W, 3] to be used as its `frames`, as it is.
    """
    tokens = (count, shape.tokens)
    return {
        "tokens": np.full(tokens, pad_id, np.int32),
        "targets": np.full(tokens, pad_id, np.int32),
        "loss_weights": np.zeros(tokens, np.float32),
        "positions": np.zeros(tokens, np.int32),
        "segment_ids": np.zeros(tokens, np.int32),
        "visual_index": np.full(tokens, -1, np.int32),
        **empty_frames(count, shape.frames, shape.image_size, frames),
    }


def empty_frames(
    count: int, slots: int, size: int, frames: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Returns `frames`, `frame_clip` and `frame_group` of `count` rows, as `empty_rows` does."""
    if frames is None:
        frames = np.zeros((count, slots, size, size, 3), np.uint8)
    return {
        "frames": frames,
        "frame_clip": np.zeros((count, slots), np.int32),
        "frame_group": np.full((count, slots), -1, np.int32),
    }


def fill_row(
    row: Mapping[str, np.ndarray], samples: Sequence[RowSample | None], shape: RowShape
) -> None:
    """Fills a row of padding with samples, in place.

    None is a sample that could not be read: its segment id is skipped, and it takes no slots.

    Args:
      row: the row's arrays, without the batch axis.
    """
    token, used = 0, UsedSlots()
    for segment, sample in enumerate(samples, start=1):
        if sample is None:
            continue
        indices = place_clips(row, sample.clips, shape.visual, shape.grid, sample.compression, used)
        _fill_text(row, sample.encoded, token, segment, indices)
        token += len(sample.encoded)


@dataclasses.dataclass
class UsedSlots:
    """Frame slots, group slots and clip ids of a row that are already used."""

    frames: int = 0
    groups: int = 0
    clips: int = 0


def place_clips(
    row: Mapping[str, np.ndarray],
    clips: Sequence[np.ndarray],
    visual: VisualShape,
    grid: Grid,
    compression: CompressionConfig,
    used: UsedSlots,
) -> list[np.ndarray]:
    """Appends clips to a row, in place, and adds them to `used`.

    Args:
      row: `frames`, `frame_clip` and `frame_group` of the row.
      clips: frames uint8 [T, H, W, 3] of each clip. Frames that are already in their slots of `row`
        are not copied.
      visual: shape of the row's visual table.

    Returns:
      The `visual_index` of each clip's tokens: their entries in the row's visual table.
    """
    indices = []
    for frames in clips:
        plan = plan_clip(len(frames), grid, compression)
        used.clips += 1
        slots = slice(used.frames, used.frames + len(frames))
        if not np.may_share_memory(row["frames"][slots], frames):
            row["frames"][slots] = frames
        row["frame_clip"][slots] = used.clips
        row["frame_group"][slots] = np.where(
            plan.frame_group < 0, -1, plan.frame_group + used.groups
        )
        indices.append(visual_index(plan, used.groups, visual, grid))
        used.frames += len(frames)
        used.groups += plan.num_groups
    return indices


def _fill_text(
    row: Mapping[str, np.ndarray],
    encoded: Encoded,
    start: int,
    segment: int,
    indices: list[np.ndarray],
) -> None:
    size = len(encoded)
    slots = slice(start, start + size)
    row["tokens"][slots] = encoded.tokens
    row["targets"][start : start + size - 1] = encoded.tokens[1:]
    row["loss_weights"][start : start + size - 1] = encoded.answer[1:]
    row["positions"][slots] = np.arange(size)
    row["segment_ids"][slots] = segment
    row["visual_index"][slots] = encoded.visual_index(indices)
