"""AdamW with one learning rate per part of the model.

The first name of a parameter's path is its part: vision, projector or decoder. A part with learning
rate 0 is frozen: it has no gradient and no optimizer state. Also frozen are `vision/unused` (the
layers after the feature layer, which no output depends on) and, with LoRA, all of the decoder except
its adapters.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import optax

from storm_jax.config import OptimConfig, RunConfig
from storm_jax.models.lora import is_adapter

NEVER_TRAINED = "vision/unused/"


def is_trainable(name: str, config: RunConfig) -> bool:
    """Whether the parameter with this path is trained.

    Raises:
      ValueError: if the path starts with no part that has a learning rate.
    """
    rates = dataclasses.asdict(config.optim.learning_rate)
    part = part_of(name)
    if part not in rates:
        raise ValueError(f"parameter {name}: optim.learning_rate has no field {part!r}")
    if part == "decoder" and config.model.decoder.lora.rank and not is_adapter(name):
        return False
    return rates[part] > 0 and not name.startswith(NEVER_TRAINED)


def part_of(name: str) -> str:
    """The part of the model that a parameter path belongs to."""
    return name.split("/", 1)[0]


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Returns the factor of the peak learning rate: linear warm-up, then cosine decay to zero."""
    warmup = round(config.warmup_fraction * steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else 1.0, peak_value=1.0, warmup_steps=warmup, decay_steps=steps
    )


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of flat parameters {path: array}."""
    rates = dataclasses.asdict(config.learning_rate)

    def decay_mask(params: Mapping[str, jax.Array]) -> dict[str, bool]:
        return {name: bool(re.search(config.decay_pattern, name)) for name in params}

    def part_mask(part: str) -> Callable[[Mapping[str, jax.Array]], dict[str, bool]]:
        return lambda params: {name: part_of(name) == part for name in params}

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        *(optax.masked(optax.scale(-rate), part_mask(part)) for part, rate in rates.items()),
        optax.scale_by_schedule(schedule(config, steps)),
    )
