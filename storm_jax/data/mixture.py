"""Several sources as one endless, seeded stream of samples in exact proportions.

    samples of a source in the first n windows = floor(n * window * share)
    position p in a source's own sequence      = sample p mod M of its epoch p div M

so every sample of a source comes once before any comes again, and the stream is a function of the seed:
the same for every number of processes and workers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import transformers

from storm_jax.config import RunConfig, SourceConfig
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.lengths import Lengths, read_lengths
from storm_jax.data.rows import RowShape
from storm_jax.data.skips import DataError, Skip, check_skips
from storm_jax.data.sources import Source, open_source
from storm_jax.media.workers import WorkerPool
from storm_jax.text.conversation import ConversationEncoder
from storm_jax.text.sample import Sample

# Samples whose rows are planned together, at most; an epoch when it is shorter.
WINDOW = 2**16


def open_mixture(
    config: RunConfig,
    sources: Sequence[SourceConfig],
    tokenizer: transformers.PreTrainedTokenizerBase,
    pool: WorkerPool,
) -> Mixture:
    """The mixture of `sources` for a run's model; temporal sampling is for test time only."""
    data, side = config.data, config.model.side
    compression = dataclasses.replace(config.compression, temporal_sample=1)
    size = config.model.vision.image_size
    return Mixture(
        sources,
        SampleEncoder(
            text=ConversationEncoder(tokenizer, data.system),
            side=side,
            compression=compression,
            frames=data.frames,
        ),
        [
            RowShape(
                tokens=row.tokens,
                frames=row.frames,
                image_size=size,
                side=side,
                compression=compression,
            )
            for row in data.rows
        ],
        seed=config.train.seed,
        index_dir=data.index_dir,
        max_skip_fraction=data.max_skip_fraction,
        pool=pool,
    )


class Ref(NamedTuple):
    """A sample of a mixture: number of its source, and its number in it."""

    source: int
    item: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A source of a mixture, measured.

    Attributes:
      usable: indices of the samples that the mixture draws from, sorted.
      amount: how many samples it gives relative to the other sources.
    """

    config: SourceConfig
    source: Source
    lengths: Lengths
    skips: list[Skip]
    usable: np.ndarray
    amount: Fraction


class Mixture:
    """The sources of `data.train` or `data.val`, opened and measured.

    Raises:
      DataError: when a source is missing, has no usable sample, or too many that are not.
    """

    def __init__(
        self,
        configs: Sequence[SourceConfig],
        encoder: SampleEncoder,
        shapes: Sequence[RowShape],
        *,
        seed: int,
        index_dir: str,
        max_skip_fraction: float,
        pool: WorkerPool,
    ):
        self.encoder, self.shapes, self.seed = encoder, list(shapes), seed
        self._index_dir, self._max_skip_fraction = index_dir, max_skip_fraction
        self._pool = pool
        self.parts: list[Part] = []
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        for config in configs:
            self.add(config)

    def add(self, config: SourceConfig) -> Part:
        """Opens and measures one more source.

        Raises:
          DataError: as the mixture does; it stays as it was.
        """
        number, index_dir = len(self.parts), self._index_dir
        source = open_source(config, index_dir)
        lengths = read_lengths(config, source, self.encoder, index_dir, self._pool)
        largest = self.shapes[-1]
        fits = (lengths.least <= largest.tokens) & (lengths.frames <= largest.frames)
        too_long = np.flatnonzero(~fits)
        skips = [*lengths.skips.values()]
        for index in too_long.tolist():
            skips.append(self._too_long(config, source, lengths, index))
        check_skips(skips, len(source), self._max_skip_fraction, f"{config.path} has")
        usable = np.flatnonzero(fits & (lengths.tokens > 0))
        if not len(usable):
            raise DataError(
                f"{config.path}: data source {config.name!r} has no usable sample; the first: "
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

    def _too_long(self, config: SourceConfig, source: Source, lengths: Lengths, index: int) -> Skip:
        largest = self.shapes[-1]
        name = source.sample(index).id
        return Skip(
            source=config.name, sample=name, where=source.where(index), cause="too_long",
            message=f"sample {name!r}: {lengths.least[index]} tokens of media and prompt and "
            f"{lengths.frames[index]} frames exceed the {largest.tokens} and {largest.frames} of the "
            f"largest row (data.rows)",
        )  # fmt: skip

    def __len__(self) -> int:
        """Usable samples of all sources."""
        return sum(len(part.usable) for part in self.parts)

    @property
    def skips(self) -> list[Skip]:
        """Samples that can never be used."""
        return [skip for part in self.parts for skip in part.skips]

    def sample(self, ref: Ref) -> Sample:
        return self.parts[ref.source].source.sample(ref.item)

    def lengths(self, refs: Sequence[Ref]) -> np.ndarray:
        """Token and frame slots of samples, int64 [n, 2]; what exceeds a row is cut."""
        table = np.array(refs, np.int64).reshape(-1, 2)
        found = np.zeros((len(table), 2), np.int64)
        for number, part in enumerate(self.parts):
            mine = table[:, 0] == number
            indices = table[mine, 1]
            found[mine, 0] = np.minimum(part.lengths.tokens[indices], self.shapes[-1].tokens)
            found[mine, 1] = part.lengths.frames[indices]
        return found

    def fingerprint(self) -> dict[str, str]:
        """By source; changes when its samples, their order, texts or lengths do."""
        return {part.config.name: part.lengths.digest for part in self.parts}

    @functools.cached_property
    def _window(self) -> int:
        return max(1, min(WINDOW, round(sum(self._epoch_amounts()))))

    def _epoch_amounts(self) -> list[Fraction]:
        weighted = bool(self.parts[0].config.weight)
        return [Fraction(len(p.usable)) if weighted else p.amount for p in self.parts]

    def draw(self, window: int) -> list[Ref]:
        """The samples of one window of the stream, in order."""
        total = sum(part.amount for part in self.parts)
        refs: list[Ref] = []
        for number, part in enumerate(self.parts):
            per_window = self._window * part.amount / total
            first, last = int(window * per_window), int((window + 1) * per_window)
            refs += [Ref(number, int(i)) for i in self._sequence(number, first, last)]
        order = np.random.default_rng([self.seed, window, len(self.parts)]).permutation(len(refs))
        return [refs[i] for i in order]

    def _sequence(self, number: int, first: int, last: int) -> np.ndarray:
        """Positions `first` up to `last` of a source's own sequence of samples."""
        size = len(self.parts[number].usable)
        taken = [np.zeros(0, np.int64)]
        while first < last:
            epoch, offset = divmod(first, size)
            stop = min(size, offset + last - first)
            taken.append(self._epoch(number, epoch)[offset:stop])
            first += stop - offset
        return np.concatenate(taken)

    def _epoch(self, number: int, epoch: int) -> np.ndarray:
        """The order of a source's samples in one epoch; that of the last one asked for is kept."""
        kept = self._orders.get(number)
        if kept is None or kept[0] != epoch:
            rng = np.random.default_rng([self.seed, number, epoch, 1])
            kept = self._orders[number] = (epoch, rng.permutation(self.parts[number].usable))
        return kept[1]
