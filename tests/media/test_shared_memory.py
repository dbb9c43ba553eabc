"""Shared memory: arrays that are still in use are never handed out again, and others are."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys

import jax
import numpy as np
import pytest

from storm_jax.media.shared_memory import MappedMemory, SharedMemory

SHAPE = (4, 100, 100, 3)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_reused_when_nothing_refers_to_it():
    memory = SharedMemory()
    first = memory.empty(SHAPE)
    view = first[1, 20:, :, 0]  # neither contiguous nor at its start
    start = address(first)
    del first
    assert address(memory.empty(SHAPE)) != start
    del view
    assert address(memory.empty(SHAPE)) == start
    smaller = memory.empty((3, *SHAPE[1:]))
    assert address(smaller) == start and smaller.shape == (3, *SHAPE[1:])


def test_a_jax_array_keeps_the_memory_it_was_placed_from():
    """On CPU, JAX may use the memory of a NumPy array instead of a copy."""
    memory = SharedMemory()
    placed = []
    for value in range(8):
        array = memory.empty(SHAPE)
        array[:] = value
        placed.append(jax.device_put(array))
        del array
    for value, array in enumerate(placed):
        assert (np.asarray(array) == value).all()


def test_arrays_of_many_threads_never_overlap():
    memory = SharedMemory()

    def use(number: int) -> bool:
        array = memory.empty((1000 * (1 + number % 7),))
        array[:] = number % 256
        return bool((array == number % 256).all())

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(2000)))


WRITER = """
import sys
from storm_jax.media.shared_memory import MappedMemory, Span
memory = MappedMemory(int(sys.argv[1]))
for span in eval(sys.argv[2]):
    memory.array(span)[:] += 1
"""


def test_another_process_writes_to_exactly_the_array():
    memory = SharedMemory()
    memory.empty(SHAPE)
    arrays = [memory.empty(shape) for shape in (SHAPE, (5,), (300_000,))]
    for array in arrays:
        array[:] = 7
    parts = [arrays[0][1:3], arrays[1], arrays[2][10:20]]
    spans = [memory.span(part) for part in parts]
    command = [sys.executable, "-c", WRITER, str(memory.descriptor), repr(spans)]
    subprocess.run(command, check=True, pass_fds=[memory.descriptor])
    for array, part in zip(arrays, parts, strict=True):
        assert (part == 8).all() and (array == 8).sum() == part.size
    mapped = MappedMemory(memory.descriptor)
    assert all((mapped.array(span) == 8).all() for span in spans)


def test_arrays_from_elsewhere_have_no_place():
    with pytest.raises(ValueError, match="not in shared memory"):
        SharedMemory().span(np.zeros(10, np.uint8))
