"""Packing: several samples share a row of S token slots and F frame slots.

`plan_rows` decides on lengths alone, before anything is decoded, so that row i of a run is the same
for every process and worker. `build_row` fills one row; the arrays of a batch are

    tokens, targets            int32 [B, S]    ids; the pad id where a visual token stands
    loss_weights               float32 [B, S]  1 where the target is an answer token or end marker
    positions, segment_ids     int32 [B, S]    position within its sample; sample in the row, 0 = pad
    visual_index               int32 [B, S]    entry of the visual table that stands here, -1 = text
    frames                     uint8 [B, F, H, W, 3]
    frame_clip, frame_group    int32 [B, F]    clip id, 0 = pad; group slot, -1 = pad or sampled out
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from storm_jax.compression import plan_clip, pooled_side, visual_index
from storm_jax.config import CompressionConfig
from storm_jax.data.conversation import Encoded

OPEN_ROWS = 64


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Static shape of a row.

    Attributes:
      tokens, frames: slots S and F.
      image_size: H = W in pixels.
      side: tokens along one edge of a frame before spatial pooling.
      compression: k, p and s that the row is planned with.
    """

    tokens: int
    frames: int
    image_size: int
    side: int
    compression: CompressionConfig

    @property
    def num_groups(self) -> int:
        """Group slots G: no more than frames, and each group fills N' token slots."""
        per_group = pooled_side(self.side, self.compression.spatial_pool) ** 2
        return max(1, min(self.frames, self.tokens // per_group))

    def clip_tokens(self, num_frames: int) -> int:
        """Visual tokens that a clip of `num_frames` frames puts into the text."""
        return plan_clip(num_frames, self.side, self.compression).num_tokens


@dataclasses.dataclass(frozen=True)
class RowSample:
    """A sample ready for a row: its tokens and, per medium, its frames uint8 [T, H, W, 3]."""

    encoded: Encoded
    clips: Sequence[np.ndarray]


def plan_rows(
    lengths: np.ndarray, order: Iterable[int], row_tokens: int, row_frames: int
) -> list[list[int]]:
    """First fit of samples, taken in `order`, into rows of which `OPEN_ROWS` are open at a time.

    Args:
      lengths: int [M, 2], token and frame slots of each sample; none exceeds a row.

    Returns:
      Sample indices of each row. Each sample of `order` is in exactly one row, and rows close in
      the order in which they opened.
    """
    rows: list[list[int]] = []
    free = np.zeros((0, 2), np.int64)  # of the open rows, oldest first
    for index in order:
        need = lengths[index]
        fits = np.flatnonzero((free >= need).all(axis=1))
        if len(fits):
            slot = int(fits[0])
        else:
            rows.append([])
            free = np.concatenate([free, [[row_tokens, row_frames]]])[-OPEN_ROWS:]
            slot = len(free) - 1
        free[slot] -= need
        rows[len(rows) - len(free) + slot].append(int(index))
    return rows


def build_row(samples: Sequence[RowSample | None], pad_id: int, shape: RowShape) -> dict:
    """Fills one row. None is a sample that failed to decode: it leaves nothing behind.

    Returns:
      The arrays above without their batch axis.
    """
    row = empty_row(pad_id, shape)
    token, frame, group, clip = 0, 0, 0, 0
    for segment, sample in enumerate(samples, start=1):
        if sample is None:
            continue
        indices = []
        for frames in sample.clips:
            plan = plan_clip(len(frames), shape.side, shape.compression)
            clip += 1
            slots = slice(frame, frame + len(frames))
            row["frames"][slots] = frames
            row["frame_clip"][slots] = clip
            row["frame_group"][slots] = np.where(plan.frame_group < 0, -1, plan.frame_group + group)
            indices.append(
                visual_index(
                    plan, group, shape.num_groups, shape.side, shape.compression.spatial_pool
                )
            )
            frame, group = frame + len(frames), group + plan.num_groups
        _fill_text(row, sample.encoded, token, segment, indices)
        token += len(sample.encoded)
    return row


def _fill_text(
    row: dict, encoded: Encoded, start: int, segment: int, indices: list[np.ndarray]
) -> None:
    size = len(encoded)
    slots = slice(start, start + size)
    row["tokens"][slots] = encoded.tokens
    row["targets"][start : start + size - 1] = encoded.tokens[1:]
    row["loss_weights"][start : start + size - 1] = encoded.answer[1:]
    row["positions"][slots] = np.arange(size)
    row["segment_ids"][slots] = segment
    for medium, index in enumerate(indices):
        row["visual_index"][slots][encoded.media == medium] = index


def empty_row(pad_id: int, shape: RowShape) -> dict:
    """A row of padding."""
    size = shape.image_size
    return {
        "tokens": np.full(shape.tokens, pad_id, np.int32),
        "targets": np.full(shape.tokens, pad_id, np.int32),
        "loss_weights": np.zeros(shape.tokens, np.float32),
        "positions": np.zeros(shape.tokens, np.int32),
        "segment_ids": np.zeros(shape.tokens, np.int32),
        "visual_index": np.full(shape.tokens, -1, np.int32),
        "frames": np.zeros((shape.frames, size, size, 3), np.uint8),
        "frame_clip": np.zeros(shape.frames, np.int32),
        "frame_group": np.full(shape.frames, -1, np.int32),
    }


def stack_rows(rows: Sequence[dict]) -> dict:
    """Rows to a batch: a leading B on every array."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
