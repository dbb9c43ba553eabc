"""The slots of a stream's memory hold what each policy says, by a model of it in NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storm_jax.config import STREAM_POLICIES
from storm_jax.inference.streaming.groups import Frame, GroupMemory


class Model:
    """Groups as a list of (mean, weight, times)."""

    def __init__(self, capacity: int, policy: str, recent: int):
        self.capacity, self.policy, self.recent = capacity, policy, recent
        self.groups: list[tuple[np.ndarray, int, list[float]]] = []

    def add(self, mean: np.ndarray, times: list[float]) -> None:
        if len(self.groups) == self.capacity:
            self.make_room()
        self.groups.append((mean, len(times), times))

    def make_room(self) -> None:
        if self.policy == "window":
            self.groups.pop(0)
            return
        count = self.capacity - self.recent
        old, new = self.groups[:count], self.groups[count:]
        if self.policy == "stride":
            self.groups = old[::2] + new
            return
        merged = []
        for i in range(0, count - 1, 2):
            (a, wa, ta), (b, wb, tb) = old[i], old[i + 1]
            merged.append(((wa * a + wb * b) / (wa + wb), wa + wb, (ta + tb)[::2]))
        self.groups = merged + old[count - count % 2 :] + new


@st.composite
def memories(draw) -> tuple[int, str, int]:
    policy = draw(st.sampled_from(STREAM_POLICIES))
    capacity = draw(st.integers(1 if policy == "window" else 2, 9))
    return capacity, policy, draw(st.integers(0, max(0, capacity - 2)))


@settings(max_examples=60)
@given(memories(), st.lists(st.integers(1, 4), min_size=1, max_size=40), st.integers(0, 2**16))
def test_memory_holds_what_its_policy_says(memory, sizes, seed):
    capacity, policy, recent = memory
    rng = np.random.default_rng(seed)
    model = Model(capacity, policy, recent)
    found = GroupMemory(capacity, jnp.zeros((10, 2, 3)), policy, recent)
    found.capacity = capacity
    time = 0
    for size in sizes:
        block = rng.standard_normal((3, 2, 3)).astype(np.float32)
        times = [float(time + i) for i in range(size)]
        time += size
        model.add(block[1], times)
        found.add(jnp.asarray(block), 1, tuple(map(Frame, times)))
        assert len(found.groups) <= capacity
    assert found.lost == len(sizes) - len(model.groups)
    table = np.asarray(found.table)
    assert len({group.slot for group in found.groups}) == len(model.groups)
    for group, (mean, weight, times) in zip(found.groups, model.groups, strict=True):
        np.testing.assert_allclose(table[group.slot], mean, rtol=1e-5, atol=1e-6)
        assert group.weight == weight
        assert [frame.time for frame in group.frames] == times


def test_merging_forgets_no_part_of_the_video():
    """After a thousand groups in eight slots, the first and the last one are still in an average."""
    memory = GroupMemory(8, jnp.zeros((9, 1, 1)), "merge", recent=2)
    for number in range(1000):
        memory.add(jnp.full((1, 1, 1), float(number)), 0, (Frame(float(number)),))
    assert sum(group.weight for group in memory.groups) == 1000
    means = np.asarray(memory.table)[[group.slot for group in memory.groups], 0, 0]
    weights = np.array([group.weight for group in memory.groups])
    assert (means * weights).sum() == pytest.approx(999 * 500, rel=1e-3)
    assert (np.diff(means) > 0).all()
    assert memory.groups[0].frames[0].time == 0


@pytest.mark.parametrize(
    ("capacity", "policy", "recent", "message"),
    [
        (4, "newest", 0, "policy='newest': use one of window, stride, merge"),
        (0, "window", 0, "budget_tokens holds no group"),
        (4, "merge", 3, "recent=3: .* needs at least 2 older groups, and budget_tokens holds 4"),
        (1, "stride", 0, "recent=0: .* holds 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(capacity, policy, recent, message):
    with pytest.raises(ValueError, match=message):
        GroupMemory(capacity, jnp.zeros((capacity + 1, 1, 1)), policy, recent)
