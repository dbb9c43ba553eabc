"""The lengths index: the number of tokens and frames of every sample of a source, measured once.

Rows are planned from it before anything is decoded. It is computed by all workers, cached in the source's
index folder, and recomputed if the files, the tokenizer or settings that affect lengths change.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from storm_jax.compression import Grid
from storm_jax.config import CompressionConfig, FramesConfig, LayoutConfig, SourceConfig
from storm_jax.data.cache import cached_arrays
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.skips import Skip
from storm_jax.data.sources import Source, index_folder, open_source
from storm_jax.files import digest
from storm_jax.media.reader import LASTING
from storm_jax.media.workers import WorkerCrashError, WorkerPool, WorkerTimeoutError
from storm_jax.progress import with_progress
from storm_jax.text.conversation import ConversationEncoder
from storm_jax.text.sample import SampleError
from storm_jax.text.template import DATE
from storm_jax.text.tokenizer import load_tokenizer

_VERSION = 4
_CHUNK = 1024  # samples per call
_MIN_SPEED = 10.0  # samples a second
_START = 60.0  # seconds in which a worker loads the tokenizer and opens the source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of the M samples of a source in each of C compressions.

    Attributes:
      tokens: int32 [M, C], 0 for unusable samples.
      min_tokens: int32 [M, C], tokens that a row must have room for: all media and the start of an answer.
      frames: int32 [M], frames of all media of a sample.
      counts: int32 [K], frames of every medium, sample after sample.
      ends: int64 [M], where the media of each sample end in `counts`.
      skips: the unusable samples, by index.
      digest: changes with the samples, their order, texts or lengths, but not if media files move.
    """

    tokens: np.ndarray
    min_tokens: np.ndarray
    frames: np.ndarray
    counts: np.ndarray
    ends: np.ndarray
    skips: dict[int, Skip]
    digest: str

    def counts_of(self, index: int) -> list[int]:
        """Returns the number of frames of each medium of a sample."""
        start = self.ends[index - 1] if index else 0
        return self.counts[start : self.ends[index]].tolist()


def read_lengths(
    config: SourceConfig,
    source: Source,
    encoder: SampleEncoder,
    compressions: Sequence[CompressionConfig],
    index_dir: str,
    pool: WorkerPool,
) -> Lengths:
    """Returns the lengths of a source, measuring them if they are not cached.

    Args:
      compressions: with the same number of frames.

    Raises:
      DataError: the cache is not writable.
    """
    arrays = cached_arrays(
        index_folder(config, index_dir),
        "lengths",
        _key(source, encoder, compressions),
        lambda: _measure_all(config, source, encoder, compressions, index_dir, pool),
        keep=lambda arrays: not _has_hung(arrays),
    )
    skips = json.loads(arrays["skips"].tobytes())
    return Lengths(
        tokens=arrays["tokens"],
        min_tokens=arrays["min_tokens"],
        frames=arrays["frames"],
        counts=arrays["counts"],
        ends=arrays["ends"],
        skips={
            index: Skip(
                source=source.name, sample=sample, where=where, cause=cause, message=message
            )
            for index, sample, where, cause, message in skips
        },
        digest=arrays["digest"].tobytes().decode(),
    )


def _has_hung(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether a sample timed out or crashed: next time, the disk may answer."""
    return any(skip[3] in LASTING for skip in json.loads(arrays["skips"].tobytes()))


def _key(source: Source, encoder: SampleEncoder, compressions: Sequence[CompressionConfig]) -> str:
    frames = encoder.frames
    inputs = (
        _VERSION, source.stamp, encoder.text.digest, encoder.text.system, DATE, encoder.grid,
        frames.fps, frames.time_text, tuple(compressions), encoder.layout,
    )  # fmt: skip
    return repr(inputs)


# Arrays by name, skips as (index, sample, where, cause, message), and a digest.
_Chunk = tuple[dict[str, np.ndarray], list[tuple], bytes]


def _measure_all(
    config: SourceConfig,
    source: Source,
    encoder: SampleEncoder,
    compressions: Sequence[CompressionConfig],
    index_dir: str,
    pool: WorkerPool,
) -> dict[str, np.ndarray]:
    count = len(source)
    parts = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    # Headers of videos are read where a hang or a crash costs one sample.
    if pool.count and (len(parts) > 2 or encoder.frames.fps):
        job = _Job(
            config=config, index_dir=index_dir, tokenizer=str(encoder.text.tokenizer.name_or_path), system=encoder.text.system,
            grid=encoder.grid, compressions=tuple(compressions), frames=encoder.frames, layout=encoder.layout,
        )  # fmt: skip
        with concurrent.futures.ThreadPoolExecutor(pool.count) as threads:
            chunks = threads.map(lambda part: _measure_in_worker(pool, job, source, part), parts)
            return _join([*_with_progress(chunks, source)])
    encoders = [encoder.compressed(each) for each in compressions]
    return _join([*_with_progress((_measure(source, encoders, part) for part in parts), source)])


def _measure_in_worker(pool: WorkerPool, job: _Job, source: Source, part: range) -> _Chunk:
    """Measures samples together, or one by one if one of them hangs or takes the worker down."""
    limit = job.frames.time_limit
    try:
        return pool.call(_measure_part, job, part, limit=_START + limit + len(part) / _MIN_SPEED)
    except (WorkerTimeoutError, WorkerCrashError) as error:
        if len(part) > 1:
            return _together(
                [_measure_in_worker(pool, job, source, part[i : i + 1]) for i in range(len(part))]
            )
        cause = "timeout" if isinstance(error, WorkerTimeoutError) else "crashed"
        message = f"its media's headers were not read within data.frames.time_limit={limit:g} s"
        skip = (part[0], "", source.where(part[0]), cause, str(error) or message)
        return _zeros(1, len(job.compressions)), [skip], b""


def _together(chunks: Sequence[_Chunk]) -> _Chunk:
    """The chunk of consecutive samples."""
    arrays = {name: np.concatenate([chunk[0][name] for chunk in chunks]) for name in chunks[0][0]}
    return arrays, [skip for chunk in chunks for skip in chunk[1]], b"".join(c[2] for c in chunks)


def _with_progress(chunks: Iterable[_Chunk], source: Source) -> Iterator[_Chunk]:
    total, description = len(source), f"measuring {source.name}"
    return with_progress(chunks, total, description, unit="samples", size=_CHUNK)


def _join(chunks: Sequence[_Chunk]) -> dict[str, np.ndarray]:
    arrays, skips, content = _together(chunks)
    return {
        **{name: arrays[name] for name in ("tokens", "min_tokens", "frames", "counts")},
        "ends": np.cumsum(arrays["media"], dtype=np.int64),
        "skips": np.frombuffer(json.dumps(skips).encode(), np.uint8),
        "digest": np.frombuffer(digest(content).encode(), np.uint8),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """What a worker process needs to measure samples."""

    config: SourceConfig
    index_dir: str
    tokenizer: str
    system: str
    grid: Grid
    compressions: tuple[CompressionConfig, ...]
    frames: FramesConfig
    layout: LayoutConfig


def _measure_part(job: _Job, part: range) -> _Chunk:
    return _measure(*_prepare(job), part)


@functools.lru_cache(4)
def _prepare(job: _Job) -> tuple[Source, list[SampleEncoder]]:
    text = ConversationEncoder(load_tokenizer(job.tokenizer), job.system)
    encoders = [
        SampleEncoder(
            text=text, grid=job.grid, compression=each, frames=job.frames, layout=job.layout
        )
        for each in job.compressions
    ]
    return open_source(job.config, job.index_dir), encoders


def _zeros(samples: int, compressions: int) -> dict[str, np.ndarray]:
    """The arrays of samples without media."""
    return {
        "tokens": np.zeros((samples, compressions), np.int32),
        "min_tokens": np.zeros((samples, compressions), np.int32),
        "frames": np.zeros(samples, np.int32),
        "media": np.zeros(samples, np.int32),
        "counts": np.zeros(0, np.int32),
    }


def _measure(source: Source, encoders: Sequence[SampleEncoder], indices: range) -> _Chunk:
    """Measures samples with encoders that differ in compression only."""
    arrays = _zeros(len(indices), len(encoders))
    counts: list[int] = []
    skips: list[tuple] = []
    content = hashlib.sha256()
    for row, index in enumerate(indices):
        try:
            sample = source.sample(index)
            content.update(repr((sample.id, sample.turns)).encode())
            frame_counts = encoders[0].frame_counts(sample.media)
            planned = [encoder.plan(sample, frame_counts) for encoder in encoders]
        except SampleError as error:
            skips.append((index, error.sample_id, source.where(index), error.cause, str(error)))
            continue
        arrays["tokens"][row] = [len(encoded) for encoded in planned]
        arrays["min_tokens"][row] = [encoded.min_tokens for encoded in planned]
        arrays["frames"][row] = sum(frame_counts)
        arrays["media"][row] = len(frame_counts)
        counts += frame_counts
    arrays["counts"] = np.array(counts, np.int32)
    content.update(arrays["tokens"].tobytes() + arrays["frames"].tobytes())
    return arrays, skips, content.digest()
