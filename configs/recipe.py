"""From a recipe's stages to the ConfigDict that `--config=FILE.py:stage=STAGE` loads."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from storm_jax.config import ConfigError, MeshConfig, RunConfig, TrainedCompression, to_dict

Stages = Mapping[str, Callable[[], RunConfig]]

# As many visual tokens as pooling leaves, a half and a quarter: one model for every budget (docs/results.md).
BUDGETS = tuple(TrainedCompression(temporal_sample=sample) for sample in (1, 2, 4))


@dataclasses.dataclass(frozen=True)
class Setup:
    """Fields of a recipe that depend on the hardware: mesh, rows of a step and microbatches."""

    mesh: MeshConfig
    batch_size: int
    accumulation: int


def select_stage(
    arg: str | None, stages: Stages, setups: Mapping[str, Setup] = types.MappingProxyType({})
) -> ConfigDict:
    """Returns every field of the stage that `arg` ("stage=align" or "stage=align,on=v5p:4x4x8") selects.

    Raises:
      ConfigError: if `arg` selects no stage, or unknown hardware.
    """
    given = dict(part.partition("=")[::2] for part in (arg or "").split(",") if part)
    stage, hardware = given.pop("stage", ""), given.pop("on", None)
    if stage not in stages or given:
        problem = f"{arg!r} is not a stage" if arg else "the stage is missing"
        raise ConfigError(f"{problem}: append :stage=STAGE with one of {', '.join(stages)}")
    config = stages[stage]()
    if hardware is not None:
        if hardware not in setups:
            known = f"one of {', '.join(setups)}" if setups else "no on= for this recipe"
            raise ConfigError(f"on={hardware} is not known: {known}")
        setup = setups[hardware]
        train = dataclasses.replace(
            config.train, batch_size=setup.batch_size, accumulation=setup.accumulation
        )
        config = dataclasses.replace(config, train=train, mesh=setup.mesh)
    return ConfigDict(to_dict(config))
