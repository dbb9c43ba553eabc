"""What is compared: each row is a model and a way to train it; a table is a list of rows and the compressions to test.

budgets    one model for all budgets of tokens, against specialists and against a projector without mixing
mixers     other ways to mix frames in place of the Mamba layers, each with three learning rates
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from configs import tiny
from storm_jax.config import (
    CompressionConfig,
    RowConfig,
    RunConfig,
    SourceConfig,
    TrainedCompression,
    from_dict,
)

STEPS, CLIPS, EVAL_CLIPS, FRAMES = 600, 10_000, 200, 16
# Images of places teach the tower positions.
FAMILIES = ("order", "motion", "needle", "place")
# Token budgets: factor by which the visual tokens of a video are reduced.
BUDGETS = {
    "1x": TrainedCompression(),
    "2x": TrainedCompression(temporal_pool=2),
    "4x": TrainedCompression(temporal_pool=4),
    "spatial 4x": TrainedCompression(spatial_pool=2),
    "8x": TrainedCompression(temporal_pool=4, temporal_sample=2),
    "16x": TrainedCompression(temporal_pool=4, temporal_sample=4),
    "16x, half spatial": TrainedCompression(temporal_pool=4, spatial_pool=2),
    "32x": TrainedCompression(temporal_pool=4, spatial_pool=2, temporal_sample=2),
    "64x": TrainedCompression(temporal_pool=4, spatial_pool=2, temporal_sample=4),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A model that is trained once for every seed.

    Attributes:
      name: of its records and run folders.
      title: in print.
      model: overrides of `configs.tiny`, by path within the model.
      budgets: names of the compressions that it trains with.
      tests: names of the compressions that it is tested with.
      rate: peak learning rate of the projector.
    """

    name: str
    title: str
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    budgets: Sequence[str]
    tests: Sequence[str]
    rate: float = 1e-3

    def config(self, data: str, seed: int, steps: int) -> RunConfig:
        """The configuration of a training on the rendered task in a folder."""
        config = tiny.get_config("stage=sft")
        config.update_from_flattened_dict({f"model.{k}": v for k, v in self.model.items()})
        run = from_dict(RunConfig, config)
        trained = tuple(BUDGETS[name] for name in self.budgets)
        # A row of 64 frames holds four clips. Most take few tokens; the longer rows have room for 64 visual ones each.
        rows = (RowConfig(tokens=224, frames=64), RowConfig(tokens=416, frames=64))
        rates = dataclasses.replace(run.optim.learning_rate, projector=self.rate)
        return dataclasses.replace(
            run,
            optim=dataclasses.replace(run.optim, learning_rate=rates),
            data=dataclasses.replace(
                run.data,
                train=(SourceConfig(name="shapes", path=f"{data}/train.json"),),
                val=(SourceConfig(name="shapes", path=f"{data}/val.json"),),
                rows=rows,
            ),
            train=dataclasses.replace(
                run.train, seed=seed, steps=steps, keep_best=0, compressions=trained
            ),
        )


def compression(budget: str) -> CompressionConfig:
    """The compression of a test."""
    return CompressionConfig(num_frames=FRAMES, **BUDGETS[budget].factors)


MLP = {"stem.kind": "mlp_downsample", "mixer": "none"}
# With the same stem; parameters are within 5 % of those of Mamba-1.
MIXERS: dict[str, dict[str, Any]] = {
    "Mamba-1": {},
    "Mamba-2": {"mixer": "mamba2", "mamba.head_dim": 16, "mamba.d_state": 16},
    "attention over frames": {"mixer": "benchmarks.evidence.mixers:FrameAttention"},
    "attention in windows": {"mixer": "benchmarks.evidence.mixers:WindowAttention"},
    "convolution over frames": {"mixer": "benchmarks.evidence.mixers:TemporalConv"},
}
RATES = (1e-3, 5e-4, 2e-3)
MIXER_TESTS = ("1x", "4x", "16x", "64x")


def mixer_row(mixer: str, rate: float) -> str:
    """The name of the row of a mixer and a rate; Mamba-1 with 1e-3 is STORM."""
    return "storm" if (mixer, rate) == ("Mamba-1", 1e-3) else f"{mixer} at {rate:g}"


TABLES: dict[str, list[Row]] = {
    "budgets": [
        Row(
            name="storm", title="STORM, every budget", budgets=tuple(BUDGETS), tests=tuple(BUDGETS)
        ),
        Row(
            name="mlp",
            title="MLP, every budget",
            model=MLP,
            budgets=tuple(BUDGETS),
            tests=tuple(BUDGETS),
        ),
        *(
            Row(
                name=f"storm {budget} only",
                title=f"STORM, {budget} only",
                budgets=(budget,),
                tests=(budget,),
            )
            for budget in (
                "4x",
                "8x",
                "16x",
                "1x",
                "spatial 4x",
                "64x",
                "2x",
                "16x, half spatial",
                "32x",
            )
        ),
    ],
    "mixers": [
        Row(
            name=mixer_row(mixer, rate),
            title=f"{mixer}, rate {rate:g}",
            model=model,
            budgets=tuple(BUDGETS),
            tests=MIXER_TESTS,
            rate=rate,
        )
        for rate in RATES
        for mixer, model in MIXERS.items()
        if mixer_row(mixer, rate) != "storm"
    ],
}
