"""From planned steps to batches.

Each step is one element of a Grain dataset, whose value is the step's batch. Grain prefetches steps; the rows
of a step are read in parallel by threads, and workers decode frames straight into the batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np

from storm_jax.data.accounting import Outcome
from storm_jax.data.mixture import Mixture, Ref
from storm_jax.data.plan import Plan
from storm_jax.data.rows import RowSample, RowShape, empty_rows, fill_row
from storm_jax.data.skips import Skip
from storm_jax.media.media import MediaError
from storm_jax.media.reader import MediaReader
from storm_jax.text.sample import SampleError


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one step on this process.

    Attributes:
      arrays: see `storm_jax.data.rows`.
      shape: index of the rows' shape in `data.rows`.
      rows: by number of the row, one outcome per sample of it, in order.
    """

    arrays: dict[str, np.ndarray]
    shape: int
    rows: dict[int, list[Outcome]]

    @property
    def outcomes(self) -> list[Outcome]:
        return list(itertools.chain(*self.rows.values()))

    @property
    def sample_ids(self) -> list[str]:
        return [outcome.sample for outcome in self.outcomes]

    @property
    def skips(self) -> list[Skip]:
        return [outcome.skip for outcome in self.outcomes if outcome.skip is not None]


def batches(
    mixture: Mixture,
    plan: Plan,
    steps: range,
    rows: Sequence[int],
    reader: MediaReader,
) -> Iterator[Batch]:
    """Yields the batches of `steps`: this process's rows, prefetched in threads.

    The rows of a step do not depend on the number of processes and workers.

    Args:
      rows: numbers of the rows of each step that this process reads.
    """
    local, threads = len(rows), reader.num_threads
    executor = ThreadPoolExecutor(max(1, threads))

    def load_batch(step: int) -> Batch:
        planned = plan[step]
        shape = mixture.shapes[planned.shape]
        pad_id = mixture.tokenizer.pad_token_id
        arrays = empty_rows(local, pad_id, shape, reader.empty(local, shape.frames))

        def load_row(number: int) -> list[Outcome]:
            refs = planned.rows[rows[number]] if rows[number] < len(planned.rows) else []
            row = {name: array[number] for name, array in arrays.items()}
            return _load_row(mixture, refs, reader, row, shape)

        outcomes = (executor.map if threads else map)(load_row, range(local))
        return Batch(arrays, planned.shape, dict(zip(rows, outcomes, strict=True)))

    ahead = max(2, -(-threads // local)) if threads else 0
    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    try:
        yield from grain.MapDataset.source(steps).map(load_batch).to_iter_dataset(options)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _load_row(
    mixture: Mixture,
    refs: Sequence[Ref],
    reader: MediaReader,
    row: dict[str, np.ndarray],
    shape: RowShape,
) -> list[Outcome]:
    """Reads the samples of a row into its arrays, in place."""
    samples: list[RowSample | None] = []
    outcomes = []
    free_frames = row["frames"]
    for ref in refs:
        sample, outcome = read_sample(mixture, ref, reader, free_frames)
        free_frames = free_frames[outcome.frames :]
        samples.append(sample)
        outcomes.append(outcome)
    free_frames[:] = 0  # of an earlier batch, or of a sample that failed
    fill_row(row, samples, shape)
    return outcomes


def read_sample(
    mixture: Mixture, ref: Ref, reader: MediaReader, out: np.ndarray
) -> tuple[RowSample | None, Outcome]:
    """Parses, reads and encodes one sample; returns None for a sample that must be skipped.

    Args:
      out: uint8 [F, H, W, 3], the row's free frame slots. Frames are written to its start.
    """
    part = mixture.parts[ref.source]
    largest = mixture.shapes[-1].tokens
    planned = min(int(part.lengths.tokens[ref.item, ref.compression]), largest)
    name, began = str(ref.item), time.monotonic()
    try:
        sample = mixture.sample(ref)
        name = sample.id
        counts = part.lengths.counts_of(ref.item)
        clips = reader.read_all(sample.media, counts, out)
        seconds = time.monotonic() - began
        encoder = mixture.encoders[ref.compression]
        encoded = encoder.encode(sample, [clip.times for clip in clips])
        is_truncated = len(encoded) > planned
        if is_truncated and planned < largest:
            raise SampleError(
                name, "too_long", f"{len(encoded)} tokens, but {planned} were planned"
            )
    except (MediaError, SampleError) as error:
        skip = Skip(
            source=part.config.name,
            sample=name,
            where=part.source.where(ref.item),
            cause=error.cause,
            message=str(error),
            file=error.medium.name if isinstance(error, MediaError) else "",
        )
        return None, Outcome(
            source=part.config.name, sample=name, skip=skip, seconds=time.monotonic() - began
        )
    encoded = encoded.truncated(planned)
    outcome = Outcome(
        source=part.config.name,
        sample=name,
        skip=None,
        tokens=len(encoded),
        frames=sum(counts),
        is_truncated=is_truncated,
        damaged=sum(clip.damaged for clip in clips),
        seconds=seconds,
    )
    frames = [clip.frames for clip in clips]
    return RowSample(encoded, frames, encoder.compression), outcome
