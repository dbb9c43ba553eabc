"""The pooled groups of a video that arrives, within a fixed number of slots.

When all slots are taken and another group begins, a policy makes room:

    window   the oldest group is dropped
    stride   of the old groups, every second one is dropped
    merge    of the old groups, neighbours are averaged, weighted by their frames

The newest `recent` groups are not old. With stride and merge, the older a part of the video is, the fewer groups are left
of it, and none is forgotten altogether.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.config import STREAM_POLICIES


@dataclasses.dataclass(frozen=True)
class Frame:
    """When a frame is shown, in seconds, and whether it is in the average of its group or was dropped after it."""

    time: float
    is_pooled: bool = True


@dataclasses.dataclass(frozen=True)
class Group:
    """A pooled group.

    Attributes:
      slot: row of the table that holds its tokens.
      weight: how many frames it averages.
      frames: those that the prompt may name; of merged groups, every second one.
    """

    slot: int
    weight: int
    frames: tuple[Frame, ...]


class GroupMemory:
    """At most `capacity` groups of [N', D] on the devices.

    Attributes:
      table: [capacity + 1, N', D]; the last slot is free for a group that is not complete.
      groups: those that are kept, oldest first.
      lost: how many groups were dropped, or merged into others.
    """

    def __init__(
        self, capacity: int, table: jax.Array, policy: str = "window", recent: int = 0
    ) -> None:
        """Args:
          table: [capacity + 1, N', D]; it is overwritten.
          recent: how many of the newest groups stride and merge leave alone.

        Raises:
          ValueError: an unknown policy, or too few slots for it.
        """
        if policy not in STREAM_POLICIES:
            raise ValueError(f"policy={policy!r}: use one of {', '.join(STREAM_POLICIES)}")
        if capacity < 1:
            raise ValueError("budget_tokens holds no group: raise it, or pool more")
        if policy != "window" and not 0 <= recent <= capacity - 2:
            raise ValueError(
                f"recent={recent}: policy={policy!r} needs at least 2 older groups, and budget_tokens holds "
                f"{capacity}; lower recent, or raise budget_tokens"
            )
        self.capacity, self.policy, self.recent = capacity, policy, recent
        self.table, self.groups, self.lost = table, list[Group](), 0

    def add(self, block: jax.Array, number: int, frames: tuple[Frame, ...]) -> None:
        """Keeps group `number` of a block [G, N', D]."""
        self.make_room()
        taken = {group.slot for group in self.groups}
        slot = next(slot for slot in range(self.capacity) if slot not in taken)
        self.table = _copy(self.table, block, number, slot)
        self.groups.append(Group(slot, len(frames), frames))

    def extend_last(self, frame: Frame) -> None:
        """Adds a frame that was dropped after the newest group."""
        last = self.groups[-1]
        self.groups[-1] = dataclasses.replace(last, frames=(*last.frames, frame))

    def make_room(self) -> None:
        """Frees at least one slot, if none is free."""
        if len(self.groups) < self.capacity:
            return
        before = len(self.groups)
        if self.policy == "window":
            del self.groups[0]
        else:
            count = before - self.recent
            old, new = self.groups[:count], self.groups[count:]
            old = old[::2] if self.policy == "stride" else self._merged(old)
            self.groups = old + new
        self.lost += before - len(self.groups)

    def _merged(self, old: list[Group]) -> list[Group]:
        pairs = [old[i : i + 2] for i in range(0, len(old), 2)]
        return [self._merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]

    def _merge(self, first: Group, second: Group) -> Group:
        weight = first.weight + second.weight
        self.table = _average(self.table, first.slot, second.slot, second.weight / weight)
        return Group(first.slot, weight, (first.frames + second.frames)[::2])

    def snapshot(self) -> dict[str, Any]:
        """Everything that `restore` needs, on the host."""
        slots = [group.slot for group in self.groups]
        kept = np.asarray(self.table)[slots]
        return {"tokens": kept, "groups": list(self.groups), "lost": self.lost}

    def restore(self, snapshot: dict[str, Any]) -> None:
        groups: list[Group] = snapshot["groups"]
        host = np.array(self.table)
        host[[group.slot for group in groups]] = snapshot["tokens"]
        self.table = jax.device_put(host, self.table.sharding)
        self.groups, self.lost = list(groups), snapshot["lost"]


@functools.partial(jax.jit, donate_argnums=0)
def _copy(table: jax.Array, block: jax.Array, number: int, slot: int) -> jax.Array:
    return table.at[slot].set(block[number])


@functools.partial(jax.jit, donate_argnums=0)
def _average(table: jax.Array, first: int, second: int, share: float) -> jax.Array:
    """Replaces a slot by the mean of two, of which the second has this share."""
    a, b = table[first].astype(jnp.float32), table[second].astype(jnp.float32)
    return table.at[first].set((a + share * (b - a)).astype(table.dtype))
