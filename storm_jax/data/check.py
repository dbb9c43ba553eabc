"""What a mixture holds, what is wrong with it and how it would be packed, without training."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import transformers

from storm_jax.compression import plan_clip
from storm_jax.config import RunConfig, SourceConfig
from storm_jax.data.mixture import Mixture, Part, open_mixture
from storm_jax.data.plan import TrainPlan
from storm_jax.data.skips import DataError, Skip, check_skips
from storm_jax.media.media import Media, MediaError
from storm_jax.media.reader import MediaReader
from storm_jax.media.workers import WorkerPool
from storm_jax.progress import with_progress

_SHOWN = 5  # problems of a source that are printed; the file has all
_BARS = 40


@dataclasses.dataclass
class Check:
    """What was found.

    Attributes:
      failures: what would stop training before its first step.
      skips: every sample that cannot be used.
    """

    failures: list[str]
    skips: list[Skip]


def check(
    config: RunConfig,
    sources: Sequence[SourceConfig],
    tokenizer: transformers.PreTrainedTokenizerBase,
    out: pathlib.Path,
    read_media: int,
) -> Check:
    """Prints a report on a mixture; writes skipped.jsonl and lengths.png into `out`.

    Args:
      read_media: media files to read of each source, beside looking whether every one exists; -1 = all.
    """
    found = Check([], [])
    lenient = dataclasses.replace(
        config, data=dataclasses.replace(config.data, max_skip_fraction=1.0)
    )
    with WorkerPool(config.data.num_workers) as pool:
        mixture = open_mixture(lenient, [], tokenizer, pool)
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
            _draw_lengths(mixture, out / "lengths.png")
            print(f"picture: {out}/lengths.png")
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
    skips = [*part.skips, *_media_skips(config, part, pool, read_media)]
    found.skips += skips
    print(f"{name}: {total:,} samples, {len(part.usable):,} used, {len(skips):,} unusable")
    for cause, count in Counter(skip.cause for skip in skips).most_common():
        print(f"  {count:,} {cause}")
    for skip in skips[:_SHOWN]:
        print(f"    {skip.where}: {skip.message}")
    try:
        check_skips(skips, total, config.data.max_skip_fraction, f"data source {name!r} has")
    except DataError as error:
        found.failures.append(str(error))


def _media_skips(config: RunConfig, part: Part, pool: WorkerPool, read_media: int) -> list[Skip]:
    """Samples with a medium that is missing, or that cannot be read."""
    name, source = part.config.name, part.source
    reader = MediaReader(pool, config.model.vision.image_size, config.data.frames)
    budget = itertools.count() if read_media < 0 else iter(range(read_media))

    def examine(index: int) -> Skip | None:
        sample = source.sample(index)
        try:
            if sample.media and next(budget, None) is not None:
                reader.read_all(sample.media, part.lengths.counts_of(index))
            else:
                for medium in sample.media:
                    _look(medium)
        except MediaError as error:
            where, file = source.where(index), error.medium.name
            return Skip(
                source=name,
                sample=sample.id,
                where=where,
                cause=error.cause,
                message=str(error),
                file=file,
            )
        return None

    line = f"looking at media of {name}: {{done:,}} of {{total:,}}, {{left:.0f}} s left"
    with concurrent.futures.ThreadPoolExecutor(2 * max(1, pool.count)) as threads:
        results = threads.map(examine, part.usable.tolist())
        found = with_progress(results, len(part.usable), line)
        return [skip for skip in found if skip is not None]


def _look(medium: Media) -> None:
    """Raises MediaError when there is no such file."""
    if medium.data is None and medium.path is not None and not medium.path.exists():
        raise MediaError(medium, "missing", "no such file")


def visual_tokens(mixture: Mixture, part: Part) -> np.ndarray:
    """Visual tokens of every sample of a source, int64 [M]."""
    side, compression = mixture.encoder.side, mixture.encoder.compression
    counts, inverse = np.unique(part.lengths.counts, return_inverse=True)
    of_count = np.array([plan_clip(int(n), side, compression).num_tokens for n in counts], np.int64)
    sums = np.concatenate([[0], np.cumsum(of_count[inverse])])
    ends = np.asarray(part.lengths.ends)
    return sums[ends] - sums[np.concatenate([[0], ends[:-1]])]


def _lengths_report(mixture: Mixture) -> str:
    lines = ["", f"{'':<20}{'samples':>9}{'tokens: mean':>14}{'median':>8}{'max':>8}"
             f"{'visual: mean':>14}{'frames: mean':>14}{'cut':>6}{'share':>8}"]  # fmt: skip
    total = sum(part.amount for part in mixture.parts)
    largest = mixture.shapes[-1].tokens
    for part in mixture.parts:
        tokens, frames = part.lengths.tokens[part.usable], part.lengths.frames[part.usable]
        visual = visual_tokens(mixture, part)[part.usable]
        cut = int((tokens > largest).sum())
        lines.append(
            f"{part.config.name:<20}{len(tokens):>9,}{tokens.mean():>14,.1f}{np.median(tokens):>8,.0f}"
            f"{tokens.max():>8,}{visual.mean():>14,.1f}{frames.mean():>14,.1f}{cut:>6,}"
            f"{float(part.amount / total):>8.1%}"
        )
    lines += ["", f"tokens of a sample (rows hold at most {largest:,}):", *_histogram(mixture)]
    return "\n".join(lines)


def _all_tokens(mixture: Mixture) -> np.ndarray:
    return np.concatenate([part.lengths.tokens[part.usable] for part in mixture.parts])


def _histogram(mixture: Mixture) -> list[str]:
    tokens = _all_tokens(mixture)
    counts, edges = np.histogram(tokens, bins=min(12, int(tokens.max() - tokens.min()) + 1))
    width = max(1, int(counts.max()))
    return [
        f"  {low:>8,.0f} to {high:>8,.0f}  {'#' * round(_BARS * count / width):<{_BARS}} {count:,}"
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    ]


def _packing_report(mixture: Mixture, batch_size: int) -> str:
    """Rows of the first window."""
    plan = TrainPlan(mixture, batch_size)
    steps = plan.first_window()
    lines = ["", f"packed into steps of {batch_size} rows:"]
    for number, shape in enumerate(mixture.shapes):
        rows = [row for step in steps if step.shape == number for row in step.rows]
        lines.append(f"  rows of {shape.tokens:,} tokens and {shape.frames} frames: {len(rows):,}")
        if rows:
            totals = np.array([mixture.lengths(row).sum(0) for row in rows])
            empty = 1 - totals.mean(0) / (shape.tokens, shape.frames)
            lines[-1] += (
                f", {sum(map(len, rows)) / len(rows):.1f} samples each; empty: {empty[0]:.1%} of token "
                f"slots, {empty[1]:.1%} of frame slots"
            )
    samples = sum(len(row) for step in steps for row in step.rows)
    lines.append(
        f"  {samples / len(steps):,.1f} samples a step; an epoch of {len(mixture):,} samples is about "
        f"{len(mixture) * len(steps) / samples:,.0f} steps"
    )
    return "\n".join(lines)


def _draw_lengths(mixture: Mixture, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = [part.config.name for part in mixture.parts]
    values = {
        "tokens of a sample": [part.lengths.tokens[part.usable] for part in mixture.parts],
        "frames of a sample": [part.lengths.frames[part.usable] for part in mixture.parts],
    }
    for axis, (title, of_sources) in zip(axes, values.items(), strict=True):
        axis.hist(of_sources, bins=40, stacked=True, label=names)
        axis.set(xlabel=title, ylabel="samples")
    for shape in mixture.shapes:
        axes[0].axvline(shape.tokens, color="black", linestyle=":")
        axes[1].axvline(shape.frames, color="black", linestyle=":")
    axes[0].set_title("dotted: rows", fontsize=9)
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
