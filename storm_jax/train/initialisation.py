"""Where a new run starts from: another run, or random parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from storm_jax.config import RunConfig, replace_model
from storm_jax.run import Run


def inherit_model(
    config: RunConfig, source: Run, explicit: Collection[str]
) -> tuple[RunConfig, dict[str, tuple[Any, Any]]]:
    """`config` with the vision tower and the decoder of the run whose weights it starts from.

    The projector stays as configured, and so do the adapters of the decoder.

    Args:
      explicit: dotted names of the fields that were set by hand.

    Returns:
      The configuration, and {field: (before, now)} of what it changed.

    Raises:
      ConfigError: when a field that was set by hand is not what the weights need.
    """
    theirs = source.config.model
    decoder = dataclasses.replace(theirs.decoder, lora=config.model.decoder.lora)
    return replace_model(
        config,
        dataclasses.replace(config.model, vision=theirs.vision, decoder=decoder),
        explicit,
        str(source.path),
    )
