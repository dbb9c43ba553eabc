"""Checks a mixture without training: unusable samples, missing media, lengths and packing."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import transformers

from storm_jax.compression import plan_clip
from storm_jax.config import CompressionConfig, RunConfig, SourceConfig
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.length_plot import choose_edges, draw_lengths
from storm_jax.data.mixture import Mixture, Part, open_mixture
from storm_jax.data.plan import TrainPlan
from storm_jax.data.skips import DataError, Skip, check_skips
from storm_jax.media.media import MediaError
from storm_jax.media.reader import MediaReader
from storm_jax.media.workers import WorkerPool
from storm_jax.progress import with_progress

_PRINTED_SKIPS = 5  # per source; skipped.jsonl has all
_BAR_WIDTH = 40


@dataclasses.dataclass
class Check:
    """Result of a check.

    Attributes:
      failures: errors that would stop training before its first step.
      skips: all unusable samples.
    """

    failures: list[str]
    skips: list[Skip]


def check(
    config: RunConfig,
    sources: Sequence[SourceConfig],
    tokenizer: transformers.PreTrainedTokenizerBase,
    out: pathlib.Path,
    read_media: int,
    compression: CompressionConfig | None = None,
) -> Check:
    """Prints a report on a mixture, and writes skipped.jsonl and lengths.png to `out`.

    Args:
      read_media: number of samples per source whose media are decoded; for all others, only the existence
        of the files is checked. -1 decodes all.
      compression: as in `open_mixture`.
    """
    found = Check([], [])
    lenient = dataclasses.replace(
        config, data=dataclasses.replace(config.data, max_skip_fraction=1.0)
    )
    with WorkerPool(config.data.num_workers) as pool:
        mixture = open_mixture(lenient, [], tokenizer, pool, compression)
        for source in sources:
            try:
                part = mixture.add(source)
            except DataError as error:
                found.failures.append(str(error))
                continue
            _check_source(config, part, pool, read_media, found)
        out.mkdir(parents=True, exist_ok=True)
        if mixture.parts:
            print(_lengths_report(mixture))
            print(_packing_report(mixture, config.train.batch_size))
            draw_lengths(mixture, out / "lengths.png")
            print(f"histograms of lengths: {out}/lengths.png")
    with (out / "skipped.jsonl").open("w") as file:
        file.writelines(json.dumps(dataclasses.asdict(skip)) + "\n" for skip in found.skips)
    if found.skips:
        print(f"all {len(found.skips):,} unusable samples: {out}/skipped.jsonl")
    for failure in found.failures:
        print(f"training would stop: {failure}")
    return found


def _check_source(
    config: RunConfig, part: Part, pool: WorkerPool, read_media: int, found: Check
) -> None:
    name, total = part.config.name, len(part.source)
    ignored = _Ignored()
    skips = [*part.skips, *_media_skips(config, part, pool, read_media, ignored)]
    found.skips += skips
    print(f"{name}: {total:,} samples, {len(part.usable):,} used, {len(skips):,} unusable")
    for cause, count in Counter(skip.cause for skip in skips).most_common():
        print(f"  {count:,} {cause}")
    for skip in skips[:_PRINTED_SKIPS]:
        print(f"    {skip.where}: {skip.message}")
    print(ignored.report(), end="")
    try:
        check_skips(skips, total, config.data.max_skip_fraction, f"data source {name!r} has")
    except DataError as error:
        found.failures.append(str(error))


class _Ignored:
    """Counts the fields of records that are not used, with an example of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, fields: Mapping[str, Any]) -> None:
        self.counts.update(fields.keys())
        for name in fields.keys() - self.examples.keys():
            example = repr(fields[name])
            self.examples[name] = example if len(example) <= 60 else f"{example[:60]}..."

    def report(self) -> str:
        lines = [
            f"    {name}: {count:,} samples, e.g. {self.examples[name]}\n"
            for name, count in self.counts.most_common()
        ]
        return "".join(["  fields that are not used:\n", *lines] if lines else [])


def _media_skips(
    config: RunConfig, part: Part, pool: WorkerPool, read_media: int, ignored: _Ignored
) -> list[Skip]:
    """Returns the samples whose media are missing or, if decoded, unreadable; counts unused fields."""
    name, source = part.config.name, part.source
    reader = MediaReader(pool, config.model.vision.image_size, config.data.frames)
    counting = threading.Lock()
    budget = itertools.count() if read_media < 0 else iter(range(read_media))

    def examine(index: int) -> Skip | None:
        sample = source.sample(index)
        with counting:
            ignored.add(sample.ignored)
        try:
            if sample.media and next(budget, None) is not None:
                reader.read_all(sample.media, part.lengths.counts_of(index))
            else:
                for medium in sample.media:
                    medium.check_exists()
        except MediaError as error:
            return Skip(
                source=name,
                sample=sample.id,
                where=source.where(index),
                cause=error.cause,
                message=str(error),
                file=error.medium.name,
            )
        return None

    with concurrent.futures.ThreadPoolExecutor(2 * max(1, pool.count)) as threads:
        results = threads.map(examine, part.usable.tolist())
        progress = with_progress(
            results, len(part.usable), f"checking media of {name}", unit="samples"
        )
        return [skip for skip in progress if skip is not None]


def visual_tokens(part: Part, encoder: SampleEncoder) -> np.ndarray:
    """Returns the number of visual tokens of every sample of a source, int64 [M]."""
    grid, compression = encoder.grid, encoder.compression
    counts, inverse = np.unique(part.lengths.counts, return_inverse=True)
    of_count = np.array([plan_clip(int(n), grid, compression).num_tokens for n in counts], np.int64)
    sums = np.concatenate([[0], np.cumsum(of_count[inverse])])
    ends = np.asarray(part.lengths.ends)
    return sums[ends] - sums[np.concatenate([[0], ends[:-1]])]


def _lengths_report(mixture: Mixture) -> str:
    lines = []
    for number, encoder in enumerate(mixture.encoders):
        if len(mixture.encoders) > 1:
            share = _share(mixture, number)
            lines += ["", f"{describe(encoder.compression)}: {share:.1%} of samples"]
        lines += _lengths_table(mixture, number)
    largest = mixture.shapes[-1].tokens
    lines += ["", f"tokens per sample (the largest row has {largest:,}):", *_histogram(mixture)]
    return "\n".join(lines)


def _share(mixture: Mixture, number: int) -> float:
    """How much of the mixture has a compression."""
    total = sum(part.amount for part in mixture.parts)
    return sum(
        float(part.amount / total) * mixture.probabilities(part, part.usable)[:, number].mean()
        for part in mixture.parts
    )


def describe(compression: CompressionConfig) -> str:
    """E.g. "temporal_pool=4, spatial_pool=1, temporal_sample=2"."""
    fields = dataclasses.asdict(compression)
    del fields["num_frames"]
    return ", ".join(f"{name}={value}" for name, value in fields.items())


def _lengths_table(mixture: Mixture, number: int) -> list[str]:
    """The lengths of every source in compression `number`."""
    lines = ["", f"{'':<20}{'samples':>9}{'tokens: mean':>14}{'median':>8}{'max':>8}"
             f"{'visual: mean':>14}{'frames: mean':>14}{'truncated':>11}{'of mixture':>12}"]  # fmt: skip
    total = sum(part.amount for part in mixture.parts)
    largest = mixture.shapes[-1].tokens
    for part in mixture.parts:
        drawn = part.usable[mixture.probabilities(part, part.usable)[:, number] > 0]
        if not len(drawn):
            lines.append(f"{part.config.name:<20}{'no sample fits':>23}")
            continue
        tokens, frames = part.lengths.tokens[drawn, number], part.lengths.frames[drawn]
        visual = visual_tokens(part, mixture.encoders[number])[drawn]
        truncated = int((tokens > largest).sum())
        lines.append(
            f"{part.config.name:<20}{len(tokens):>9,}{tokens.mean():>14,.1f}{np.median(tokens):>8,.0f}"
            f"{tokens.max():>8,}{visual.mean():>14,.1f}{frames.mean():>14,.1f}{truncated:>11,}"
            f"{float(part.amount / total):>12.1%}"
        )
    return lines


def _histogram(mixture: Mixture) -> list[str]:
    tokens = np.concatenate([part.lengths.tokens[part.usable] for part in mixture.parts])
    edges = choose_edges(np.unique(tokens), 12)
    weights = np.concatenate([mixture.probabilities(p, p.usable) for p in mixture.parts])
    counts, _ = np.histogram(tokens, bins=edges, weights=weights)
    width = max(1.0, float(counts.max()))
    return [
        f"  {low + 0.5:>8,.0f} to {high - 0.5:>8,.0f}  {'#' * round(_BAR_WIDTH * count / width):<{_BAR_WIDTH}} {count:,.0f}"
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    ]


def _packing_report(mixture: Mixture, batch_size: int) -> str:
    """Describes the packing of the first window."""
    plan = TrainPlan(mixture, batch_size)
    steps = plan.first_window()
    lines = ["", f"packing into steps of {batch_size} rows:"]
    for number, shape in enumerate(mixture.shapes):
        rows = [row for step in steps if step.shape == number for row in step.rows]
        lines.append(f"  rows of {shape.tokens:,} tokens and {shape.frames} frames: {len(rows):,}")
        if rows:
            totals = np.array([mixture.lengths(row).sum(0) for row in rows])
            padding = 1 - totals.mean(0) / (shape.tokens, shape.frames)
            lines[-1] += (
                f", {sum(map(len, rows)) / len(rows):.1f} samples each; padding: {padding[0]:.1%} of token "
                f"slots, {padding[1]:.1%} of frame slots"
            )
    samples = sum(len(row) for step in steps for row in step.rows)
    lines.append(
        f"  {samples / len(steps):,.1f} samples per step; an epoch of {len(mixture):,} samples is about "
        f"{len(mixture) * len(steps) / samples:,.0f} steps"
    )
    return "\n".join(lines)
