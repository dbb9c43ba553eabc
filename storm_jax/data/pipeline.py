"""From planned rows to batches, decoded ahead of the consumer and served through Grain."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator

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
      shape: number of their shape among `data.rows`.
      outcomes: what became of each of their samples.
    """

    arrays: dict[str, np.ndarray]
    shape: int
    outcomes: list[Outcome]

    @property
    def sample_ids(self) -> list[str]:
        return [outcome.sample for outcome in self.outcomes]

    @property
    def skips(self) -> list[Skip]:
        return [outcome.skip for outcome in self.outcomes if outcome.skip is not None]

    def waste(self) -> dict[str, float]:
        """Fractions of the token and frame slots that nothing fills."""
        return {
            "token_waste": float((self.arrays["segment_ids"] == 0).mean()),
            "frame_waste": float((self.arrays["frame_clip"] == 0).mean()),
        }


def batches(
    mixture: Mixture,
    plan: Plan,
    steps: range,
    batch_size: int,
    reader: MediaReader,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This process's share of the rows of `steps`, decoded ahead.

    `batch_size` is global: rows of all processes together. Whatever the number of workers, a step has
    the same rows.
    """
    local = batch_size // process_count
    source = _RowSource(mixture, plan, steps, local, process_index, reader)
    options = reader.read_options(2 * local)
    rows = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    for step in steps:
        outcomes = list(itertools.chain(*itertools.islice(rows, local)))
        yield Batch(source.take(step), plan[step].shape, outcomes)


class _RowSource:
    """Random access to this process's rows, as Grain wants it: each is written into the batch of its
    step, and what became of its samples is returned."""

    def __init__(
        self,
        mixture: Mixture,
        plan: Plan,
        steps: range,
        local: int,
        process_index: int,
        reader: MediaReader,
    ):
        self._mixture, self._plan, self._steps = mixture, plan, steps
        self._local, self._process_index, self._reader = local, process_index, reader
        self._batches: dict[int, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._steps) * self._local

    def __getitem__(self, index: int) -> list[Outcome]:
        position, offset = divmod(int(index), self._local)
        step = self._steps[position]
        planned = self._plan[step]
        number = self._process_index * self._local + offset
        refs = planned.rows[number] if number < len(planned.rows) else []
        shape = self._mixture.shapes[planned.shape]
        batch = self._batch(step, shape)
        samples, outcomes = [], []
        out = batch["frames"][offset]  # that no sample has filled yet
        for ref in refs:
            sample, outcome = read_sample(self._mixture, ref, self._reader, out)
            out = out[outcome.frames :]
            samples.append(sample)
            outcomes.append(outcome)
        if None in samples:
            out[:] = 0  # some of its frames may have been read
        fill_row(batch, offset, samples, shape)
        return outcomes

    def _batch(self, step: int, shape: RowShape) -> dict[str, np.ndarray]:
        pad_id = self._mixture.encoder.text.tokenizer.pad_token_id
        with self._lock:
            if step not in self._batches:
                self._batches[step] = empty_rows(self._local, pad_id, shape)
            return self._batches[step]

    def take(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step, whose rows were all read."""
        with self._lock:
            return self._batches.pop(step)


def read_sample(
    mixture: Mixture, ref: Ref, reader: MediaReader, out: np.ndarray
) -> tuple[RowSample | None, Outcome]:
    """Parses, reads and encodes one sample; None when it has to be left out.

    Args:
      out: uint8 [F, H, W, 3], where its frames belong: they are written there when a process read
        them.
    """
    part = mixture.parts[ref.source]
    largest = mixture.shapes[-1].tokens
    planned = min(int(part.lengths.tokens[ref.item]), largest)
    name, began = str(ref.item), time.monotonic()
    try:
        sample = mixture.sample(ref)
        name = sample.id
        counts = part.lengths.counts_of(ref.item)
        clips = reader.read_all(sample.media, counts, out)
        seconds = time.monotonic() - began
        encoded = mixture.encoder.encode(sample, [clip.times for clip in clips])
        is_truncated = len(encoded) > planned
        if is_truncated and planned < largest:
            raise SampleError(
                name, "too_long", f"{len(encoded)} tokens, where {planned} were planned"
            )
    except (MediaError, SampleError) as error:
        where = part.source.where(ref.item)
        file = error.medium.name if isinstance(error, MediaError) else ""
        skip = Skip(
            source=part.config.name,
            sample=name,
            where=where,
            cause=error.cause,
            message=str(error),
            file=file,
        )
        return None, Outcome(
            source=part.config.name, sample=name, skip=skip, seconds=time.monotonic() - began
        )
    encoded = encoded.truncated(planned)
    outcome = Outcome(
        source=part.config.name, sample=name, skip=None, tokens=len(encoded), frames=sum(counts), is_truncated=is_truncated,
        damaged=sum(clip.damaged for clip in clips), seconds=seconds,
    )  # fmt: skip
    return RowSample(encoded, [clip.frames for clip in clips]), outcome
