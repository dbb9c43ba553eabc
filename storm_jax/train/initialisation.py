"""Where a new run starts from: another run, or random parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
from flax import nnx

from storm_jax import config as config_lib
from storm_jax.config import RunConfig, replace_model
from storm_jax.data.mixture import Mixture
from storm_jax.data.skips import DataError
from storm_jax.models.lora import is_adapter, merge
from storm_jax.params import abstract_model, flatten, random_params, unflatten, with_sharding
from storm_jax.run import Run, RunError
from storm_jax.sharding import param_shardings
from storm_jax.train.checkpoint import Checkpointer
from storm_jax.train.state import StateSpec, TrainState


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


def begin(
    run: Run, spec: StateSpec, checkpointer: Checkpointer, mixture: Mixture
) -> tuple[TrainState, int, dict[str, Any]]:
    """State, step and data position of the last checkpoint; else the parameters of `init_from`; else
    random ones."""
    restored = checkpointer.restore_latest()
    if restored is not None:
        state, data = restored
        now = mixture.fingerprint()
        changed = [name for name, told in data["sources"].items() if now.get(name) != told]
        if changed:
            raise DataError(
                f"data source {', '.join(changed)} is not what {run.path} began with: samples were "
                f"added, removed, reordered or changed in text or length. Restore it, or start a new "
                f"run with --config.init_from={run.path}"
            )
        return state, int(state.step), data
    if run.config.init_from:
        return spec.from_params(load_params(Run(run.config.init_from), spec)), 0, {}
    return spec.init(), 0, {}


def load_params(source: Run, spec: StateSpec) -> dict:
    """Another run's parameters on this mesh.

    Adapters go on when they are the same in both; else those of the source are merged into its
    decoder, and new ones begin.

    Raises:
      RunError: when its model is another one.
    """
    theirs, ours = source.config.model.decoder, spec.config.model.decoder
    changed = config_lib.differences(
        config_lib.to_dict(source.config.model), config_lib.to_dict(spec.config.model)
    )
    mine = ("decoder.lora.", "dtype")  # what weights do not depend on
    changed = {name: values for name, values in changed.items() if not name.startswith(mine)}
    if changed:
        listed = "\n  ".join(f"model.{k}: {a!r} there, {b!r} here" for k, (a, b) in changed.items())
        raise RunError(f"init_from={source.path} has another model:\n  {listed}")
    step = source.checkpoint_step()
    target = flatten(with_sharding(spec.shapes, spec.shardings).params())
    if theirs.lora == ours.lora:
        return source.restore_params(unflatten(target), step)
    fresh = {name: leaf.sharding for name, leaf in target.items() if is_adapter(name)}
    wanted = {name: leaf for name, leaf in target.items() if name not in fresh}
    _, abstract = abstract_model(source.config.model)
    places = flatten(param_shardings(abstract, spec.mesh))
    adapters = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])
        for name, leaf in flatten(nnx.to_pure_dict(abstract)).items()
        if is_adapter(name)
    }
    restored = flatten(source.restore_params(unflatten(wanted | adapters), step))
    with jax.set_mesh(spec.mesh):
        merged = jax.jit(
            lambda base, adapters: merge(base | adapters, theirs.lora),
            out_shardings={name: leaf.sharding for name, leaf in wanted.items()},
            donate_argnums=0,
        )({n: restored[n] for n in wanted}, {n: restored[n] for n in adapters})
        new = random_params(spec.config.model, spec.config.train.seed, fresh)
    return unflatten(merged | new)
