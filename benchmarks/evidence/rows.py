"""What is compared: each row is a model, a way to train it, and the compressions that it is tested with.

budgets    one model for all budgets of tokens, against specialists and against a projector without mixing
direction  Mamba layers that scan forwards only
footage    the same on real footage
frames     clips of 128 frames, read at 8, 32 and 128 frames with equal numbers of tokens
mixers     other ways to mix frames in place of the Mamba layers, or none, each with three learning rates
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from configs import tiny
from storm_jax.config import (
    CompressionConfig,
    LearningRateConfig,
    RowConfig,
    RunConfig,
    SourceConfig,
    TrainedCompression,
    from_dict,
)
from storm_jax.tasks import shapes

EVAL_CLIPS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A rendering of the built-in task.

    Attributes:
      clips: training samples, including images.
      families: of its questions; `place`, about images, teaches the tower positions.
      on_footage: whether the backgrounds are real.
    """

    clips: int
    frames: int
    families: tuple[str, ...]
    on_footage: bool = False

    @property
    def videos(self) -> list[str]:
        return [family for family in self.families if not shapes.FAMILIES[family].is_image]


SHORT = Task(clips=10_000, frames=16, families=("order", "motion", "needle", "place"))
TASKS = {
    "short": SHORT,
    "footage": dataclasses.replace(SHORT, on_footage=True),
    "long": Task(clips=3_000, frames=128, families=("apart", "needle")),
}


def _frames(num_frames: int, pool: int = 1, space: int = 1, sample: int = 1) -> CompressionConfig:
    return CompressionConfig(
        num_frames=num_frames, temporal_pool=pool, spatial_pool=space, temporal_sample=sample
    )


# By what they reduce the visual tokens of a clip.
BUDGETS = {
    "1x": _frames(16),
    "2x": _frames(16, pool=2),
    "4x": _frames(16, pool=4),
    "spatial 4x": _frames(16, space=2),
    "8x": _frames(16, pool=4, sample=2),
    "16x": _frames(16, pool=4, sample=4),
    "16x, half spatial": _frames(16, pool=4, space=2),
    "32x": _frames(16, pool=4, space=2, sample=2),
    "64x": _frames(16, pool=4, space=2, sample=4),
}
# Never trained with.
COMBINATIONS = {
    "sampled 2x": _frames(16, sample=2),
    "spatial 4x, sampled 2x": _frames(16, space=2, sample=2),
}
# Of clips of 128 frames, with the 32 tokens of 8 frames.
READS = {
    "8 frames": _frames(8),
    "32 frames, 4x": _frames(32, pool=4),
    "128 frames, 16x": _frames(128, pool=4, sample=4),
}
LONG = {
    "128 frames, 4x": _frames(128, pool=4),
    "128 frames, spatial 4x": _frames(128, space=2),
    "64 frames, 4x": _frames(64, pool=4),
    "16 frames, 4x": _frames(16, pool=4),
}
COMPRESSIONS = BUDGETS | COMBINATIONS | READS | LONG
# Rows of a step by the frames that are read of a clip: visual and text tokens of a row, and its frames.
# Most clips of 16 frames take few tokens; the longer rows have room for 64 visual ones each.
PACKING = {8: ((480,), 64), 16: ((224, 416), 64), 32: ((256,), 128), 128: ((160,), 128)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A model that is trained once for every seed.

    Attributes:
      name: of its records and run folders.
      title: in print.
      task: name of what it trains and is tested on.
      start: name of the row whose weights it starts from; "" is random.
      model: overrides of `configs.tiny`, by path within the model.
      trained: names of the compressions that it trains with, of as many frames each.
      tests: names of the compressions that it is tested with.
      rate: peak learning rate. With twice this rate, the MLP and one of three seeds of STORM failed to learn.
      batch_size: rows of a step.
    """

    name: str
    title: str
    task: str = "short"
    start: str = ""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trained: Sequence[str] = tuple(BUDGETS)
    tests: Sequence[str] = tuple(BUDGETS)
    rate: float = 5e-4
    steps: int = 1200
    batch_size: int = 8

    def config(self, data: pathlib.Path, seed: int, start: pathlib.Path | None = None) -> RunConfig:
        """The configuration of a training on the task rendered in a folder, from the last weights of a run."""
        config = tiny.get_config("stage=sft")
        config.update_from_flattened_dict({f"model.{k}": v for k, v in self.model.items()})
        run = from_dict(RunConfig, config)
        trained = [COMPRESSIONS[name] for name in self.trained]
        (read,) = {compression.num_frames for compression in trained}
        tokens, frames = PACKING[read]
        rates = LearningRateConfig(vision=self.rate, projector=self.rate, decoder=self.rate)
        return dataclasses.replace(
            run,
            init_from=str(start) if start else "",
            compression=trained[0],
            optim=dataclasses.replace(run.optim, learning_rate=rates),
            data=dataclasses.replace(
                run.data,
                train=(SourceConfig(name="shapes", path=str(data / "train.json")),),
                val=(SourceConfig(name="shapes", path=str(data / "val.json")),),
                rows=tuple(RowConfig(tokens=each, frames=frames) for each in tokens),
            ),
            train=dataclasses.replace(
                run.train,
                seed=seed,
                steps=self.steps,
                batch_size=self.batch_size,
                keep_best=0,
                compressions=tuple(_trained(compression) for compression in trained),
            ),
        )


def _trained(compression: CompressionConfig) -> TrainedCompression:
    fields = dataclasses.asdict(compression)
    del fields["num_frames"]
    return TrainedCompression(**fields)


MLP = {"stem.kind": "mlp_downsample", "mixer": "none"}
STORM = Row(name="storm", title="STORM, every budget", tests=tuple(BUDGETS | COMBINATIONS))
# With the compressions that the recipes draw.
DRAWN = Row(name="storm 4x to 16x", title="STORM, 4x to 16x", trained=("4x", "8x", "16x"))
BASELINE = Row(name="mlp", title="MLP, every budget", model=MLP)


def specialist(budget: str, row: Row = STORM) -> Row:
    """Trained for one budget of tokens only. Those for 4x are tested with sampling too, as in the paper."""
    return dataclasses.replace(
        row,
        name=f"{row.name} {budget} only",
        title=f"{_model(row)}, {budget} only",
        trained=(budget,),
        tests=("4x", "8x", "16x") if budget == "4x" else (budget,),
    )


def _model(row: Row) -> str:
    """The part of the title that names the model."""
    return row.title.partition(",")[0]


def reader(start: Row, read: str) -> Row:
    """A model that continues on long clips, read in one way, as in the third stage of a training."""
    trained: tuple[str, ...] = (read,)
    tests = trained
    if read == "128 frames, 16x":
        trained = (read, "128 frames, 4x", "128 frames, spatial 4x")
        tests = (*trained, "64 frames, 4x", "16 frames, 4x")
    frames = COMPRESSIONS[read].num_frames
    _, frames_of_a_row = PACKING[frames]
    return Row(
        name=f"{start.name}, {read}",
        title=f"{_model(start)}, {read}",
        task="long",
        start=start.name,
        model=start.model,
        trained=trained,
        tests=tests,
        steps=300,
        batch_size=8 * frames // frames_of_a_row,  # 8 clips a step
    )


# With the same stem; parameters are within 5 % of those of Mamba-1.
MIXERS: dict[str, dict[str, Any]] = {
    "Mamba-1": {},
    "Mamba-2": {"mixer": "mamba2", "mamba.head_dim": 16, "mamba.d_state": 16},
    "attention over frames": {"mixer": "benchmarks.evidence.mixers:FrameAttention"},
    "attention in windows": {"mixer": "benchmarks.evidence.mixers:WindowAttention"},
    "convolution over frames": {"mixer": "benchmarks.evidence.mixers:TemporalConv"},
    "no mixing": {"mixer": "benchmarks.evidence.mixers:GatedMLP"},
}
RATES = (5e-4, 2.5e-4, 1e-3)
MIXER_TESTS = ("1x", "4x", "16x", "64x")


def mixer_row(mixer: str, rate: float) -> Row:
    """A model with another mixer or rate."""
    if (mixer, rate) == ("Mamba-1", STORM.rate):
        return STORM
    return Row(
        name=f"{mixer} at {rate:g}",
        title=f"{mixer}, rate {rate:g}",
        model=MIXERS[mixer],
        tests=MIXER_TESTS,
        rate=rate,
    )


FORWARD = Row(
    name="storm forward", title="STORM, forwards only", model={"mamba.direction": "forward"}
)
ON_FOOTAGE = [
    dataclasses.replace(
        row,
        name=f"{row.name} on footage",
        title=f"{row.title}, on footage",
        task="footage",
        tests=tuple(BUDGETS),
    )
    for row in (STORM, BASELINE)
]
TABLES: dict[str, list[Row]] = {
    "budgets": [
        STORM,
        DRAWN,
        BASELINE,
        *(specialist(budget) for budget in ("8x", "4x", "16x", "1x", "64x")),
        specialist("4x", BASELINE),
    ],
    "direction": [FORWARD],
    "footage": ON_FOOTAGE,
    "frames": [reader(row, read) for read in READS for row in (STORM, BASELINE)],
    "mixers": [
        row
        for rate in RATES
        for row in (mixer_row(mixer, rate) for mixer in MIXERS)
        if row is not STORM
    ],
}
ROWS = {row.name: row for table in TABLES.values() for row in table}
