"""From a LLaVA JSON file to batches of packed rows, served through Grain.

Dataset    parses and measures every sample once; unusable ones become `Skip`s by cause
TrainRows  rows of endless epochs: row i is the same for every process and thread count
EvalRows   every sample once, in file order
batches    decodes rows ahead of the consumer; what failed to decode travels with the batch
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pathlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

import grain
import numpy as np

from storm_jax.data.conversation import ConversationEncoder, Encoded
from storm_jax.data.image import ImageError, read_image
from storm_jax.data.rows import RowSample, RowShape, build_row, plan_rows, stack_rows
from storm_jax.data.sources import DataError, Sample, SampleError, parse_record, read_records
from storm_jax.data.video import VideoError, read_video


@dataclasses.dataclass(frozen=True)
class Skip:
    """A sample that was left out and why."""

    sample_id: str
    cause: str
    message: str


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one step on this process, the samples in them and those that failed to decode."""

    arrays: dict[str, np.ndarray]
    sample_ids: list[str]
    skips: list[Skip]


class Dataset:
    """The samples of one file. `skips` lists those that can never be used."""

    def __init__(
        self,
        path: str,
        media_root: str,
        encoder: ConversationEncoder,
        shape: RowShape,
        max_skip_fraction: float,
    ):
        self.encoder, self.shape = encoder, shape
        self.samples: list[Sample] = []
        self.skips: list[Skip] = []
        lengths = []
        root = pathlib.Path(media_root or pathlib.Path(path).parent)
        records = read_records(path)
        for index, record in enumerate(records):
            try:
                sample = parse_record(record, root, index)
                lengths.append(self._measure(sample))
                self.samples.append(sample)
            except SampleError as error:
                self.skips.append(Skip(error.sample_id, error.cause, str(error)))
        self.lengths = np.array(lengths, np.int64).reshape(-1, 2)
        check_skips(self.skips, len(records), max_skip_fraction, f"{path} has")
        if not self.samples:
            raise DataError(f"{path} has no usable sample: {_causes(self.skips)}")

    def encode(self, sample: Sample) -> Encoded:
        frames = [medium.num_frames(self.num_frames) for medium in sample.media]
        return self.encoder.encode(sample, [self.shape.clip_tokens(count) for count in frames])

    @property
    def num_frames(self) -> int:
        return self.shape.compression.num_frames

    def fingerprint(self) -> str:
        """Changes when the samples, their order, texts or lengths do; media may move."""
        digest = hashlib.sha256(self.lengths.tobytes())
        for sample in self.samples:
            digest.update(repr((sample.id, sample.turns)).encode())
        return digest.hexdigest()[:16]

    def _measure(self, sample: Sample) -> tuple[int, int]:
        tokens = len(self.encode(sample))
        frames = sum(medium.num_frames(self.num_frames) for medium in sample.media)
        if tokens > self.shape.tokens or frames > self.shape.frames:
            raise SampleError(
                sample.id,
                "too_long",
                f"{tokens} tokens and {frames} frames exceed a row's {self.shape.tokens} and "
                f"{self.shape.frames} (data.row_tokens, data.row_frames)",
            )
        return tokens, frames


def check_skips(skips: Sequence[Skip], read: int, max_fraction: float, subject: str) -> None:
    """Raises DataError when more than the fraction (of at least 100 samples) was skipped."""
    if len(skips) > max_fraction * max(read, 100):
        raise DataError(
            f"{subject} {len(skips)} unusable samples of {read} ({_causes(skips)}), over "
            f"data.max_skip_fraction={max_fraction}; the first: {skips[0].message}"
        )


def _causes(skips: Sequence[Skip]) -> str:
    return ", ".join(f"{n} {cause}" for cause, n in Counter(s.cause for s in skips).most_common())


def decode(
    sample: Sample, encoded: Encoded, num_frames: int, image_size: int
) -> tuple[RowSample, list[np.ndarray]]:
    """Reads a sample's media.

    Returns:
      The sample ready for a row, and each medium's frame times in seconds.

    Raises:
      VideoError, ImageError: when a file cannot be read.
    """
    clips, times = [], []
    for medium in sample.media:
        if medium.kind == "image":
            clips.append(read_image(medium.path, image_size)[None])
            times.append(np.zeros(1))
        else:
            clip = read_video(medium.path, num_frames, image_size)
            clips.append(clip.frames)
            times.append(clip.times)
    return RowSample(encoded, clips), times


class RowPlan(Protocol):
    """Which samples stand in global row i."""

    def __getitem__(self, row: int) -> Sequence[int]: ...


class TrainRows:
    """Rows of one epoch after another, each in its own seeded order."""

    def __init__(self, dataset: Dataset, seed: int):
        self._dataset, self._seed = dataset, seed
        self._rows: list[list[int]] = []
        self._epochs = 0
        self._lock = threading.Lock()

    def __getitem__(self, row: int) -> Sequence[int]:
        with self._lock:
            while row >= len(self._rows):
                self._rows += self._plan_epoch(self._epochs)
                self._epochs += 1
        return self._rows[row]

    def _plan_epoch(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self._seed, epoch])
        shape = self._dataset.shape
        order = rng.permutation(len(self._dataset.samples))
        rows = plan_rows(self._dataset.lengths, order, shape.tokens, shape.frames)
        # First fit closes rows of long samples early: without this they would come first.
        return [rows[i] for i in rng.permutation(len(rows))]


class EvalRows:
    """Every sample once in file order, then empty rows."""

    def __init__(self, dataset: Dataset):
        shape = dataset.shape
        order = range(len(dataset.samples))
        self._rows = plan_rows(dataset.lengths, order, shape.tokens, shape.frames)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sequence[int]:
        return self._rows[row] if row < len(self._rows) else []


def batches(
    dataset: Dataset,
    plan: RowPlan,
    steps: range,
    batch_size: int,
    *,
    num_threads: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This process's share of the rows of `steps`, decoded ahead by threads.

    Step t of all processes together is rows t * batch_size and on; `batch_size` is global.
    """
    local = batch_size // process_count
    source = _RowSource(dataset, plan, steps, batch_size, local, process_index)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * local)
    rows = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    for _ in steps:
        parts = list(itertools.islice(rows, local))
        yield Batch(
            stack_rows([part.arrays for part in parts]),
            [sample_id for part in parts for sample_id in part.sample_ids],
            [skip for part in parts for skip in part.skips],
        )


@dataclasses.dataclass(frozen=True)
class _RowSource:
    """Random access to this process's rows, as Grain wants it; items are one-row Batches."""

    dataset: Dataset
    plan: RowPlan
    steps: range
    batch_size: int
    local: int
    process_index: int

    def __len__(self) -> int:
        return len(self.steps) * self.local

    def __getitem__(self, index: int) -> Batch:
        step, offset = divmod(int(index), self.local)
        row = self.steps[step] * self.batch_size + self.process_index * self.local + offset
        return self._build(self.plan[row])

    def _build(self, indices: Sequence[int]) -> Batch:
        dataset = self.dataset
        pad_id = dataset.encoder.tokenizer.pad_token_id
        samples: list[RowSample | None] = []
        skips = []
        for sample in (dataset.samples[index] for index in indices):
            try:
                encoded = dataset.encode(sample)
                decoded = decode(sample, encoded, dataset.num_frames, dataset.shape.image_size)
                samples.append(decoded[0])
            except (VideoError, ImageError) as error:
                samples.append(None)
                skips.append(Skip(sample.id, error.cause, str(error)))
        arrays = build_row(samples, pad_id, dataset.shape)
        return Batch(arrays, [dataset.samples[index].id for index in indices], skips)
