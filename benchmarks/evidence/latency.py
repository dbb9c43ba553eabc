"""Time to the first token of trained runs, and the plot of accuracy against it.

One clip does not fill a machine with a model this small, so a call answers 32, and its time is divided by 32. All runs
take turns in every round.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.evidence.panels import panels
from benchmarks.evidence.rows import COMPRESSIONS
from benchmarks.timing import seconds_by_round
from storm_jax.compression import Grid, VisualShape, plan_clip
from storm_jax.config import CompressionConfig, SourceConfig
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.rows import UsedSlots, empty_frames, place_clips
from storm_jax.data.sources import open_source
from storm_jax.inference.engine import Engine, EngineShape, Request
from storm_jax.inference.generate import Sampling
from storm_jax.inference.programs import Programs
from storm_jax.media.read import read_media
from storm_jax.run import Run
from storm_jax.text.conversation import ConversationEncoder
from storm_jax.text.sample import Sample
from storm_jax.text.tokenizer import stop_ids

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCH, ROUNDS = 32, 30  # clips of a call, and how often each run is timed


def time_clips(
    workdirs: Mapping[str, pathlib.Path], data: pathlib.Path, budgets: Sequence[str]
) -> dict[tuple[str, str], list[float]]:
    """Seconds of a clip in each round, by row and budget."""
    samples = video_questions(data, BATCH)
    calls = {
        (row, budget): FirstTokens(workdir, samples, COMPRESSIONS[budget])
        for row, workdir in workdirs.items()
        for budget in budgets
    }
    timed = seconds_by_round(calls, ROUNDS)
    return {key: [each / BATCH for each in found] for key, found in timed.items()}


def video_questions(data: pathlib.Path, count: int) -> list[Sample]:
    """The first questions about videos of the test split; fewer than `count` are repeated."""
    source = open_source(SourceConfig(name="shapes", path=str(data / "test.json")))
    samples = (source.sample(index) for index in range(len(source)))
    videos = [each.prompt() for each in samples if each.media[0].kind == "video"]
    return list(itertools.islice(itertools.cycle(videos), count))


class FirstTokens:
    """The first token of each answer about a batch of decoded videos, by the last checkpoint of a run."""

    def __init__(self, workdir: pathlib.Path, samples: Sequence[Sample], tested: CompressionConfig):
        """Reads the videos.

        Args:
          samples: questions, each about one video with at least `tested.num_frames` frames.

        Raises:
          MediaError: a video cannot be read.
        """
        run = Run(workdir)
        config = run.config
        text = ConversationEncoder(run.tokenizer(), config.data.system)
        stops = stop_ids(run.tokenizer_path, text.tokenizer)
        step = run.checkpoints.resolve(None)
        self._programs = Programs.load(run, step, stops)
        grid, size = Grid.of(config.model), config.model.vision.image_size
        encoder = SampleEncoder.of(config, text, tested)
        plan = plan_clip(tested.num_frames, grid, tested)
        self._visual = VisualShape(plan.num_groups, (tested.spatial_pool,))
        self._rows = empty_frames(len(samples), tested.num_frames, size)
        self._prompts: list[tuple[np.ndarray, np.ndarray]] = []
        for slot, sample in enumerate(samples):
            (medium,) = sample.media
            clip = read_media(medium, tested.num_frames, size, max_damage=0.0)
            row = {name: array[slot] for name, array in self._rows.items()}
            entries = place_clips(row, [clip.frames], self._visual, grid, tested, UsedSlots())
            encoded = encoder.encode(sample, [clip.times])
            self._prompts.append((encoded.tokens, encoded.visual_index(entries)))
        count, longest = len(samples), max(len(tokens) for tokens, _ in self._prompts)
        shape = EngineShape.for_batch(count, longest, 1, self._programs.mesh.size)
        self._shape = dataclasses.replace(shape, prompts=count)
        self._pad_id = text.tokenizer.pad_token_id

    def __call__(self) -> np.ndarray:
        """Encodes all clips and returns the first tokens, int [B]; compiles on the first call."""
        table, _ = self._programs.encode(self._rows, self._visual)
        requests = [
            Request(
                tokens=tokens, visual_index=index, table=table, scene=scene, sampling=Sampling(1)
            )
            for scene, (tokens, index) in enumerate(self._prompts)
        ]
        engine = Engine(self._programs, self._shape, pad_id=self._pad_id)
        for _ in engine.run(requests):
            pass
        return np.array([request.written[0] for request in requests])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One projector at one compression.

    Attributes:
      visual_tokens: of a clip.
      is_spatial: it pools within frames; only points that do not are joined by the projector's line.
      seconds: of a clip, in each round.
      accuracies: by family, of each seed.
      ceilings: by family, without temporal mixing.
    """

    projector: str
    setting: str
    visual_tokens: int
    is_spatial: bool
    seconds: Sequence[float]
    accuracies: Mapping[str, Sequence[float]]
    ceilings: Mapping[str, float]

    def milliseconds(self) -> tuple[float, float, float]:
        """The first quartile, the median and the third quartile."""
        low, middle, high = np.percentile(self.seconds, (25, 50, 75)) * 1e3
        return float(low), float(middle), float(high)


def plot(points: Sequence[Point], path: pathlib.Path) -> None:
    """Accuracy over milliseconds, a panel for each family."""
    families = list(points[0].accuracies)
    figure, axes = panels(families)
    for axis, family in zip(axes, families, strict=True):
        for number, projector in enumerate(dict.fromkeys(point.projector for point in points)):
            own = [point for point in points if point.projector == projector]
            _draw_projector(axis, own, family, f"C{number}")
        for setting in dict.fromkeys(point.setting for point in points):
            _draw_ceiling(axis, [point for point in points if point.setting == setting], family)
        axis.plot([], [], color="0.6", linewidth=1, label="ceiling without temporal mixing")
        axis.set(xlabel="milliseconds a clip, to the first token", ylim=(0, 1.1))
        axis.margins(x=0.12)
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)


def _draw_projector(axis: Axes, points: Sequence[Point], family: str, colour: str) -> None:
    """A line through the points that pool over time, and hollow marks for those that do not."""
    line = []
    for point in sorted(points, key=lambda point: point.visual_tokens):
        low, x, high = point.milliseconds()
        values = point.accuracies[family]
        y = statistics.fmean(values)
        axis.errorbar(
            x,
            y,
            xerr=[[x - low], [high - x]],
            yerr=[[y - min(values)], [max(values) - y]],
            fmt="o",
            color=colour,
            markerfacecolor="white" if point.is_spatial else colour,
        )
        axis.annotate(
            point.setting,
            (x, y),
            xytext=(0, -14 if point.is_spatial else 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=colour,
        )
        if not point.is_spatial:
            line.append((x, y))
    axis.plot([x for x, _ in line], [y for _, y in line], color=colour, label=points[0].projector)


def _draw_ceiling(axis: Axes, points: Sequence[Point], family: str) -> None:
    """A thin mark across the points of one compression."""
    middles = [point.milliseconds()[1] for point in points]
    span = 0.98 * min(middles), 1.02 * max(middles)
    axis.hlines(points[0].ceilings[family], *span, color="0.6", linewidth=1)
