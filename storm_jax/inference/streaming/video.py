"""What is kept of a video that arrives.

RecurrentVideo   each frame is encoded once; a state of constant size, and the pooled groups, are kept
WindowVideo      the newest frames are kept, and encoded again before a question, as bidirectional models need
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from storm_jax.compression import (
    ClipPlan,
    Grid,
    VisualShape,
    index_of_groups,
    plan_clip,
    plan_groups,
    pooled_side,
)
from storm_jax.config import CompressionConfig
from storm_jax.data.rows import UsedSlots, empty_frames, place_clips
from storm_jax.inference.programs import Programs
from storm_jax.inference.streaming.groups import Frame, GroupMemory

# Frames of a block that is encoded at once; the rest of a push is encoded one by one. Each size is one program.
BLOCK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """A video as a prompt shows it.

    Attributes:
      table: visual table [1, V, D].
      entries: the positions of its tokens in the table, in order, int32.
      times: of its frames, float64 [T], in seconds.
      plan: their groups.
      seconds: model time of encoding that `shown` itself did.
    """

    table: jax.Array
    entries: np.ndarray
    times: np.ndarray
    plan: ClipPlan
    seconds: float = 0.0


class Video(Protocol):
    """The interface of both."""

    mode: str

    @property
    def lost(self) -> int:
        """Groups, or frames, that are not kept any more."""

    @property
    def device_bytes(self) -> int:
        """Of what is kept, on each device."""

    def plan(self) -> ClipPlan:
        """The groups that a prompt shows now. There is at least one frame."""

    def add(self, frames: np.ndarray, times: np.ndarray) -> None:
        """Adds frames uint8 [F, H, W, 3] that are shown at `times`, float64 [F]."""

    def shown(self) -> Shown:
        """What a prompt shows now; nothing changes. There is at least one frame."""

    def snapshot(self) -> dict[str, Any]:
        """Everything that `restore` needs, on the host."""

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Continues from a snapshot of a video with the same settings."""


class RecurrentVideo:
    """For Mamba layers with direction="forward": memory and time for each frame are constant."""

    mode = "recurrent"

    def __init__(
        self,
        programs: Programs,
        grid: Grid,
        compression: CompressionConfig,
        capacity: int,
        policy: str,
        recent: int,
    ):
        self._programs, self._grid, self._compression = programs, grid, compression
        self._side = pooled_side(grid.video, compression.spatial_pool)
        table = programs.empty_groups(capacity + 1, self._side**2)
        self._memory = GroupMemory(capacity, table, policy, recent)
        self._state = programs.start_stream()
        # The group that is not complete: the mean of its frames [N', D], their times, and its number in the stream.
        self._partial = table[-1]
        self._waiting: list[float] = []
        self._number = 0

    @property
    def lost(self) -> int:
        return self._memory.lost

    @property
    def device_bytes(self) -> int:
        arrays = jax.tree.leaves((self._state, self._memory.table, self._partial))
        return sum(array.nbytes for array in arrays)

    @property
    def _is_kept(self) -> bool:
        """Whether the group that is not complete is one that temporal sampling keeps."""
        return self._number % self._compression.temporal_sample == 0

    def add(self, frames: np.ndarray, times: np.ndarray) -> None:
        start = 0
        while start < len(frames):
            size = BLOCK if len(frames) - start >= BLOCK else 1
            block = slice(start, start + size)
            self._add_block(frames[block], times[block])
            start += size

    def _add_block(self, frames: np.ndarray, times: np.ndarray) -> None:
        groups, self._partial, self._state = self._programs.extend_stream(
            frames, self._state, self._compression
        )
        completed = 0
        for time in times.tolist():
            self._waiting.append(time)
            if len(self._waiting) < self._compression.temporal_pool:
                continue
            if self._is_kept:
                pooled = tuple(map(Frame, self._waiting))
                self._memory.add(groups, completed, pooled)
            else:
                for each in self._waiting:
                    self._memory.extend_last(Frame(each, is_pooled=False))
            completed += 1
            self._number += 1
            self._waiting = []
        if self._waiting and self._is_kept:  # as when it will be complete
            self._memory.make_room()

    def plan(self) -> ClipPlan:
        frame_group = [number if frame.is_pooled else -1 for frame, number in self._frames()]
        return plan_groups(np.array(frame_group, np.int32), self._grid, self._compression)

    def shown(self) -> Shown:
        memory, tokens, plan = self._memory, self._side**2, self.plan()
        # The group that is not complete is in the last slot.
        slots = [*(group.slot for group in memory.groups), memory.capacity][: plan.num_groups]
        newline = (memory.capacity + 1) * tokens
        return Shown(
            table=self._programs.stream_table(memory.table, self._partial),
            entries=index_of_groups(plan, np.array(slots) * tokens, newline),
            times=np.array([frame.time for frame, _ in self._frames()]),
            plan=plan,
        )

    def _frames(self) -> list[tuple[Frame, int]]:
        """The frames that a prompt may name, and the numbers of their groups."""
        groups = self._memory.groups
        kept = [(frame, number) for number, group in enumerate(groups) for frame in group.frames]
        return kept + [(Frame(time, self._is_kept), len(groups)) for time in self._waiting]

    def snapshot(self) -> dict[str, Any]:
        state, partial = jax.device_get((self._state, self._partial))
        return {
            "memory": self._memory.snapshot(),
            "state": state,
            "partial": partial,
            "waiting": list(self._waiting),
            "number": self._number,
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        self._memory.restore(snapshot["memory"])
        place = self._memory.table.sharding
        self._state = jax.device_put(snapshot["state"], place)
        self._partial = jax.device_put(snapshot["partial"], place)
        self._waiting, self._number = list(snapshot["waiting"]), snapshot["number"]


class WindowVideo:
    """For all other models: the frames whose groups fit into the budget."""

    mode = "window, encoded again"

    def __init__(
        self,
        programs: Programs,
        grid: Grid,
        compression: CompressionConfig,
        capacity: int,
        image_size: int,
    ):
        if capacity < 1:
            raise ValueError("budget_tokens holds no group: raise it, or pool more")
        self._programs, self._grid, self._compression = programs, grid, compression
        self._groups = capacity
        length = capacity * compression.temporal_pool * compression.temporal_sample
        self._arrays = empty_frames(1, length, image_size)
        self._times = np.zeros(0)
        self._encoded: jax.Array | None = None
        self._lost = 0

    @property
    def lost(self) -> int:
        return self._lost

    @property
    def device_bytes(self) -> int:
        return 0 if self._encoded is None else self._encoded.nbytes

    def add(self, frames: np.ndarray, times: np.ndarray) -> None:
        ring = self._arrays["frames"][0]
        self._lost += max(0, len(self._times) + len(frames) - len(ring))
        frames, times = frames[-len(ring) :], times[-len(ring) :]
        kept = min(len(self._times), len(ring) - len(frames))
        ring[:kept] = ring[len(self._times) - kept : len(self._times)].copy()
        ring[kept : kept + len(frames)] = frames
        self._times = np.concatenate([self._times[len(self._times) - kept :], times])
        self._encoded = None

    def plan(self) -> ClipPlan:
        return plan_clip(len(self._times), self._grid, self._compression)

    def shown(self) -> Shown:
        row = {name: array[0] for name, array in self._arrays.items()}
        row["frame_clip"][:], row["frame_group"][:] = 0, -1
        clip = row["frames"][: len(self._times)]
        visual = VisualShape(self._groups, (self._compression.spatial_pool,))
        (entries,) = place_clips(row, [clip], visual, self._grid, self._compression, UsedSlots())
        seconds = 0.0
        if self._encoded is None:
            self._encoded, seconds = self._programs.encode(self._arrays, visual)
        return Shown(
            table=self._encoded,
            entries=entries,
            times=self._times,
            plan=self.plan(),
            seconds=seconds,
        )

    def snapshot(self) -> dict[str, Any]:
        frames = self._arrays["frames"][0, : len(self._times)].copy()
        return {"frames": frames, "times": self._times, "lost": self._lost}

    def restore(self, snapshot: dict[str, Any]) -> None:
        self._times = np.zeros(0)
        self.add(snapshot["frames"], snapshot["times"])
        self._lost = snapshot["lost"]
