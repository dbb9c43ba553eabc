"""Reads media in worker processes, with a time limit for each file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import grain
import numpy as np

from storm_jax.config import FramesConfig
from storm_jax.media.frames import Clip
from storm_jax.media.media import Media, MediaError
from storm_jax.media.read import read_media
from storm_jax.media.workers import WorkerCrashError, WorkerPool, WorkerTimeoutError

# Causes of what is not tried again in this run or in one that continues it.
LASTING = ("timeout", "crashed")


class MediaReader:
    """Reads media in the processes of a pool. What hung or crashed once is not tried again.

    Args:
      size: height and width of the frames in pixels.
      lasting: causes by name, of media that hung or crashed before.
    """

    def __init__(
        self,
        pool: WorkerPool,
        size: int,
        config: FramesConfig,
        lasting: Mapping[str, str] | None = None,
    ):
        self._pool, self._size, self._config = pool, size, config
        before = "as it did before (skipped.jsonl)"
        self._lasting = {name: (cause, before) for name, cause in (lasting or {}).items()}

    def read_options(self, ahead: int) -> grain.ReadOptions:
        """How Grain reads `ahead` items through this reader. Twice as many threads as processes keep
        these busy: a thread prepares text while its process rests. With none, nothing is read ahead."""
        threads = 2 * self._pool.count
        return grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=max(ahead, threads) if threads else 0
        )

    def read_all(
        self, media: Sequence[Media], counts: Sequence[int], room: np.ndarray | None = None
    ) -> list[Clip]:
        """Clips of `counts[n]` frames of the n-th medium, one after another in `room` as in `read`."""
        ends = np.cumsum(counts, dtype=int)
        return [
            self.read(medium, count, None if room is None else room[end - count : end])
            for medium, count, end in zip(media, counts, ends, strict=True)
        ]

    def read(self, medium: Media, num_frames: int, room: np.ndarray | None = None) -> Clip:
        """As `read_media`; frames from another process are written into `room` uint8 [F, H, W, 3].

        Raises:
          MediaError: also with cause "timeout" or "crashed".
        """
        if medium.name in self._lasting:
            raise MediaError(medium, *self._lasting[medium.name])
        limit, max_damage = self._config.time_limit, self._config.max_damage
        try:
            return self._pool.call(
                read_media, medium, num_frames, self._size, max_damage, limit=limit, room=room
            )
        except WorkerTimeoutError:
            problem = "timeout", f"not read in data.frames.time_limit={limit:g} s"
        except WorkerCrashError as error:
            problem = "crashed", str(error)
        self._lasting[medium.name] = problem
        raise MediaError(medium, *problem)
