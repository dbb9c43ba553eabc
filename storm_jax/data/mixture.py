"""Mixes several sources into one endless, seeded stream of samples in exact proportions.

    samples of a source in the first n windows = floor(n * window * proportion)
    position p in a source's own sequence      = sample p mod M of its epoch p div M

Every sample of a source is used once before any is repeated. With `train.compressions`, one of them is drawn for each
sample, each time it comes. The stream depends only on the seed, not on the number of processes and workers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import transformers

from storm_jax.config import CompressionConfig, RunConfig, SourceConfig
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.lengths import Lengths, read_lengths
from storm_jax.data.rows import RowShape, row_shapes
from storm_jax.data.skips import DataError, Skip, check_skips
from storm_jax.data.sources import Source, open_source
from storm_jax.media.workers import WorkerPool
from storm_jax.text.conversation import ConversationEncoder
from storm_jax.text.sample import Sample

# Rows are planned in windows of this many samples, or of an epoch if that is shorter.
WINDOW = 2**16
_DRAW = 3  # seed word of the draws of compressions, as no other draw has


def open_mixture(
    config: RunConfig,
    sources: Sequence[SourceConfig],
    tokenizer: transformers.PreTrainedTokenizerBase,
    pool: WorkerPool,
    compression: CompressionConfig | None = None,
) -> Mixture:
    """Opens the mixture of `sources` for a run's model.

    Args:
      compression: that of all samples; by default, one of those of training is drawn for each.
    """
    data = config.data
    compressions = (compression,) if compression else config.trained_compressions
    weights = [1.0] if compression else [each.weight for each in config.train.compressions] or [1.0]
    return Mixture(
        sources,
        SampleEncoder.of(config, ConversationEncoder(tokenizer, data.system), compressions[0]),
        row_shapes(config, compressions),
        weights=weights,
        seed=config.train.seed,
        index_dir=data.index_dir,
        max_skip_fraction=data.max_skip_fraction,
        pool=pool,
    )


class Ref(NamedTuple):
    """A sample of a mixture: the index of its source, its index in the source, and that of its compression."""

    source: int
    item: int
    compression: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """An opened and measured source of a mixture.

    Attributes:
      skips: samples that can never be used.
      usable: sorted indices of the samples that the mixture draws from.
      amount: number of samples relative to the other sources.
    """

    config: SourceConfig
    source: Source
    lengths: Lengths
    skips: list[Skip]
    usable: np.ndarray
    amount: Fraction


class Mixture:
    """The opened and measured sources of `data.train` or `data.val`.

    Attributes:
      shapes: of rows.
      encoders: one for each compression.
      weights: of the compressions.

    Args:
      shapes: with the same compressions.

    Raises:
      DataError: a source is missing, or has no usable or too many unusable samples.
    """

    def __init__(
        self,
        configs: Sequence[SourceConfig],
        encoder: SampleEncoder,
        shapes: Sequence[RowShape],
        *,
        weights: Sequence[float] = (1.0,),
        seed: int,
        index_dir: str,
        max_skip_fraction: float,
        pool: WorkerPool,
    ):
        self.shapes, self.seed = list(shapes), seed
        self.compressions = self.shapes[0].compressions
        self.encoders = [encoder.compressed(each) for each in self.compressions]
        self.weights = np.array(weights)
        self._index_dir, self._max_skip_fraction = index_dir, max_skip_fraction
        self._pool = pool
        self.parts: list[Part] = []
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        for config in configs:
            self.add(config)

    def add(self, config: SourceConfig) -> Part:
        """Opens, measures and adds a source.

        Raises:
          DataError: as for the mixture, which is then unchanged.
        """
        number, index_dir = len(self.parts), self._index_dir
        source = open_source(config, index_dir)
        lengths = read_lengths(
            config, source, self.encoders[0], self.compressions, index_dir, self._pool
        )
        fits = self._fits(lengths, slice(None)).any(axis=1)
        too_long = np.flatnonzero(~fits)
        skips = [*lengths.skips.values()]
        for index in too_long.tolist():
            skips.append(self._too_long(config, source, lengths, index))
        check_skips(skips, len(source), self._max_skip_fraction, f"{config.path} has")
        usable = np.flatnonzero(fits & (lengths.tokens[:, 0] > 0))
        if not len(usable):
            raise DataError(
                f"{config.path}: data source {config.name!r} has no usable samples; the first error: "
                f"{skips[0].message}"
            )
        chosen = len(usable)
        if config.percent:
            chosen = max(1, round(len(usable) * config.percent / 100))
        elif config.cap:
            chosen = min(config.cap, len(usable))
        if chosen < len(usable):
            order = np.random.default_rng([self.seed, number]).permutation(usable)
            usable = np.sort(order[:chosen])
        amount = Fraction(str(config.weight or (config.repeat or 1.0) * len(usable)))
        self.parts.append(
            Part(
                config=config,
                source=source,
                lengths=lengths,
                skips=skips,
                usable=usable,
                amount=amount,
            )
        )
        return self.parts[-1]

    def _fits(self, lengths: Lengths, indices: slice | np.ndarray) -> np.ndarray:
        """Whether samples fit the largest row in each compression, bool [n, C]."""
        largest = self.shapes[-1]
        tokens, frames = lengths.min_tokens[indices], lengths.frames[indices]
        return (tokens <= largest.tokens) & (frames <= largest.frames)[:, None]

    def _too_long(self, config: SourceConfig, source: Source, lengths: Lengths, index: int) -> Skip:
        largest = self.shapes[-1]
        name = source.sample(index).id
        return Skip(
            source=config.name, sample=name, where=source.where(index), cause="too_long",
            message=f"sample {name!r}: {lengths.min_tokens[index].min()} tokens of media and prompt and "
            f"{lengths.frames[index]} frames do not fit the largest row of data.rows "
            f"({largest.tokens} tokens, {largest.frames} frames)",
        )  # fmt: skip

    def __len__(self) -> int:
        """Number of usable samples of all sources."""
        return sum(len(part.usable) for part in self.parts)

    @property
    def skips(self) -> list[Skip]:
        """Samples that can never be used."""
        return [skip for part in self.parts for skip in part.skips]

    @property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        return self.encoders[0].text.tokenizer

    def sample(self, ref: Ref) -> Sample:
        return self.parts[ref.source].source.sample(ref.item)

    def lengths(self, refs: Sequence[Ref]) -> np.ndarray:
        """Returns the (token, frame) slots of samples, int64 [n, 2], truncated to the largest row."""
        table = np.array(refs, np.int64).reshape(-1, 3)
        found = np.zeros((len(table), 2), np.int64)
        for number, part in enumerate(self.parts):
            mine = table[:, 0] == number
            indices, chosen = table[mine, 1], table[mine, 2]
            tokens = part.lengths.tokens[indices, chosen]
            found[mine, 0] = np.minimum(tokens, self.shapes[-1].tokens)
            found[mine, 1] = part.lengths.frames[indices]
        return found

    def fingerprint(self) -> dict[str, str]:
        """Returns a digest by source, which changes with its samples, their order, texts or lengths."""
        return {part.config.name: part.lengths.digest for part in self.parts}

    @functools.cached_property
    def _window(self) -> int:
        return max(1, min(WINDOW, round(sum(self._epoch_amounts()))))

    def _epoch_amounts(self) -> list[Fraction]:
        weighted = bool(self.parts[0].config.weight)
        return [Fraction(len(p.usable)) if weighted else p.amount for p in self.parts]

    def draw(self, window: int) -> list[Ref]:
        """Returns the samples of one window of the stream, in order."""
        total = sum(part.amount for part in self.parts)
        refs: list[Ref] = []
        for number, part in enumerate(self.parts):
            per_window = self._window * part.amount / total
            first, last = int(window * per_window), int((window + 1) * per_window)
            items = self._sequence(number, first, last)
            chosen = self._choose(number, items, window)
            refs += [
                Ref(number, *each) for each in zip(items.tolist(), chosen.tolist(), strict=True)
            ]
        order = np.random.default_rng([self.seed, window, len(self.parts)]).permutation(len(refs))
        return [refs[i] for i in order]

    def _choose(self, number: int, items: np.ndarray, window: int) -> np.ndarray:
        """Draws the compression of each sample, of those in which it fits the largest row, int [n]."""
        if len(self.compressions) == 1:
            return np.zeros(len(items), np.int64)
        rng = np.random.default_rng([self.seed, window, number, _DRAW])
        edges = np.cumsum(self.probabilities(self.parts[number], items), axis=1)
        drawn = rng.random(len(items)) * edges[:, -1]
        return (drawn[:, None] >= edges[:, :-1]).sum(axis=1)

    def probabilities(self, part: Part, items: np.ndarray) -> np.ndarray:
        """How often a sample has each of the compressions in which it fits the largest row, float [n, C]."""
        weights = self.weights * self._fits(part.lengths, items)
        return weights / weights.sum(axis=1, keepdims=True)

    def _sequence(self, number: int, first: int, last: int) -> np.ndarray:
        """Returns positions `first` to `last` (exclusive) of a source's own sequence of samples."""
        size = len(self.parts[number].usable)
        pieces = [np.zeros(0, np.int64)]
        while first < last:
            epoch, offset = divmod(first, size)
            stop = min(size, offset + last - first)
            pieces.append(self._epoch(number, epoch)[offset:stop])
            first += stop - offset
        return np.concatenate(pieces)

    def _epoch(self, number: int, epoch: int) -> np.ndarray:
        """Returns the order of a source's samples in an epoch, and caches the last one."""
        cached = self._orders.get(number)
        if cached is None or cached[0] != epoch:
            rng = np.random.default_rng([self.seed, number, epoch, 1])
            cached = self._orders[number] = (epoch, rng.permutation(self.parts[number].usable))
        return cached[1]
