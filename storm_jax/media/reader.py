"""Reads media in worker processes, with a time limit per file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import grain
import numpy as np

from storm_jax.config import FramesConfig
from storm_jax.media.frames import Clip
from storm_jax.media.media import Media, MediaError
from storm_jax.media.read import fill_from
from storm_jax.media.workers import WorkerCrashError, WorkerPool, WorkerTimeoutError

# Media that failed for these causes are not retried, not even after a run is resumed.
LASTING = ("timeout", "crashed")


class MediaReader:
    """Reads media in the processes of a pool. A file that timed out or crashed is not retried.

    Args:
      size: height and width of the frames in pixels.
      lasting_failures: media that timed out or crashed before, here or elsewhere: cause by name. Entries
        that are added later count too.
    """

    def __init__(
        self,
        pool: WorkerPool,
        size: int,
        config: FramesConfig,
        lasting_failures: Mapping[str, str] | None = None,
    ):
        self._pool, self._size, self._config = pool, size, config
        self._before = {} if lasting_failures is None else lasting_failures
        self._failures: dict[str, tuple[str, str]] = {}

    @property
    def num_threads(self) -> int:
        """Threads that keep the processes busy; 0 if media are read in the calling thread.

        There are two per process: one prepares text while the other waits for its process.
        """
        return 2 * self._pool.count

    def read_options(self, ahead: int) -> grain.ReadOptions:
        """Returns Grain's options to prefetch `ahead` items; without processes nothing is prefetched."""
        threads = self.num_threads
        return grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=max(ahead, threads) if threads else 0
        )

    def empty(self, *shape: int) -> np.ndarray:
        """Returns a uint8 array [*shape, H, W, 3] for frames, whose contents are arbitrary."""
        return self._pool.memory.empty((*shape, self._size, self._size, 3))

    def read_all(
        self, media: Sequence[Media], counts: Sequence[int], out: np.ndarray | None = None
    ) -> list[Clip]:
        """Reads `counts[n]` frames of the n-th medium.

        If `out` is given, the clips are written to it one after another, as in `read`.
        """
        ends = np.cumsum(counts, dtype=int)
        return [
            self.read(medium, count, None if out is None else out[end - count : end])
            for medium, count, end in zip(media, counts, ends, strict=True)
        ]

    def read(self, medium: Media, num_frames: int, out: np.ndarray | None = None) -> Clip:
        """Reads a medium as `read_media` does, in a worker process.

        Args:
          out: uint8 [F, H, W, 3] to write the frames to: a part of an array from `empty`.

        Raises:
          MediaError: as `read_media`, or with cause "timeout" or "crashed".
        """
        if medium.name in self._failures:
            raise MediaError(medium, *self._failures[medium.name])
        if medium.name in self._before:
            problem = "it failed before and is not retried (skipped.jsonl)"
            raise MediaError(medium, self._before[medium.name], problem)
        limit, max_damage = self._config.time_limit, self._config.max_damage
        frames = self.empty(num_frames) if out is None else out
        try:
            return Clip(
                frames, *self._pool.call(fill_from, medium, max_damage, limit=limit, out=frames)
            )
        except WorkerTimeoutError:
            failure = "timeout", f"not decoded within data.frames.time_limit={limit:g} s"
        except WorkerCrashError as error:
            failure = "crashed", str(error)
        self._failures[medium.name] = failure
        raise MediaError(medium, *failure)
