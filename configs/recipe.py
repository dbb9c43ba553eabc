"""From a recipe's stages to the ConfigDict that `--config=FILE.py:stage=STAGE` loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from storm_jax.config import ConfigError, RunConfig, to_dict

Stages = Mapping[str, Callable[[], RunConfig]]


def select_stage(arg: str | None, stages: Stages) -> ConfigDict:
    """Returns every field of the stage that `arg` ("stage=align") selects.

    Raises:
      ConfigError: if `arg` selects no stage.
    """
    key, _, stage = (arg or "").partition("=")
    if key != "stage" or stage not in stages:
        given = f"{arg!r} is not a stage" if arg else "the stage is missing"
        raise ConfigError(f"{given}: append :stage=STAGE with one of {', '.join(stages)}")
    return ConfigDict(to_dict(stages[stage]()))
