"""Arrays in memory that worker processes map too, so that frames are decoded to where they are used.

Memory that is no longer used is handed out again: on its first use, the kernel must clear every page.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Span:
    """Where an array lies: `start` bytes into the block of `size` bytes at `offset` of the file."""

    offset: int
    size: int
    start: int
    shape: tuple[int, ...]


class SharedMemory:
    """Allocates arrays in blocks of an anonymous file.

    A block is reused when nothing refers to its array any more: no view, and no JAX array that was placed
    without a copy.
    """

    def __init__(self) -> None:
        self.descriptor = _anonymous_file()
        weakref.finalize(self, os.close, self.descriptor)
        self._size = 0
        self._blocks: dict[int, mmap.mmap] = {}  # by offset
        self._free: dict[int, list[int]] = collections.defaultdict(list)  # offsets by size
        self._allocating = threading.Lock()

    def empty(self, shape: Sequence[int]) -> np.ndarray:
        """Returns a uint8 array whose contents are arbitrary."""
        needed = math.prod(shape)
        # Powers of two, so that few sizes serve all arrays. Pages that are never used take no memory.
        size = max(mmap.ALLOCATIONGRANULARITY, 1 << (needed - 1).bit_length())
        with self._allocating:
            free = self._free[size]
            offset = free.pop() if free else self._grow(size)
        block = np.frombuffer(self._blocks[offset], np.uint8)
        weakref.finalize(block, free.append, offset).atexit = False  # views refer to `block`
        return block[:needed].reshape(shape)

    def _grow(self, size: int) -> int:
        offset, self._size = self._size, self._size + size
        os.ftruncate(self.descriptor, self._size)
        self._blocks[offset] = mmap.mmap(self.descriptor, size, offset=offset)
        return offset

    def span(self, array: np.ndarray) -> Span:
        """Where a contiguous view of an array of this memory lies."""
        assert array.flags.c_contiguous and array.dtype == np.uint8
        for offset, block in list(self._blocks.items()):
            start = _address(array) - _address(np.frombuffer(block, np.uint8))
            if 0 <= start < len(block):
                return Span(offset, len(block), start, array.shape)
        raise ValueError("the array is not in shared memory")


class MappedMemory:
    """The arrays of another process's SharedMemory."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._blocks: dict[int, mmap.mmap] = {}  # by offset

    def array(self, span: Span) -> np.ndarray:
        if span.offset not in self._blocks:
            self._blocks[span.offset] = mmap.mmap(self._descriptor, span.size, offset=span.offset)
        count = math.prod(span.shape)
        flat = np.frombuffer(self._blocks[span.offset], np.uint8, count, span.start)
        return flat.reshape(span.shape)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _anonymous_file() -> int:
    # Unlike /dev/shm, which is small in containers, this has no size limit.
    if hasattr(os, "memfd_create"):
        return os.memfd_create("storm-frames")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
