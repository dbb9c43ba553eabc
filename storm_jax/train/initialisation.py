"""Where a run starts: its latest checkpoint, another run's parameters, or random ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax

from storm_jax.config import RunConfig, differences, replace_model, to_dict
from storm_jax.data.mixture import Mixture
from storm_jax.data.skips import DataError
from storm_jax.models.lora import is_adapter, merge
from storm_jax.params import abstract_model, flat_params, random_params, with_sharding
from storm_jax.run import Run, RunError
from storm_jax.sharding import param_shardings
from storm_jax.train.checkpoint import Checkpointer
from storm_jax.train.state import StateSpec, TrainState

# Fields of the model that may differ between a run and the run it starts from.
_NOT_IN_WEIGHTS = ("decoder.lora.", "dtype")
_MIXER = "projector/mixer/"


class Start(NamedTuple):
    """State, step and data position that training starts from; a new run has no data position."""

    state: TrainState
    step: int
    data: Mapping[str, Any]


def inherit_model(
    config: RunConfig, source: Run, explicit: Collection[str]
) -> tuple[RunConfig, dict[str, tuple[Any, Any]]]:
    """`config` with the tower, stem, layout and decoder of the run whose weights it starts from.

    Mixer and LoRA adapters stay as configured.

    Args:
      explicit: dotted names of the fields that the user set.

    Returns:
      The configuration, and {field: (before, after)} of the changes.

    Raises:
      ConfigError: if a field in `explicit` contradicts the weights.
    """
    inherited = source.config.model
    decoder = dataclasses.replace(inherited.decoder, lora=config.model.decoder.lora)
    return replace_model(
        config,
        dataclasses.replace(
            config.model,
            vision=inherited.vision,
            stem=inherited.stem,
            layout=inherited.layout,
            decoder=decoder,
        ),
        explicit,
        str(source.path),
    )


def find_start(run: Run, spec: StateSpec, checkpointer: Checkpointer, mixture: Mixture) -> Start:
    """Restores the latest checkpoint; without one, loads `init_from`, or draws random parameters.

    Raises:
      DataError: if the data is not the data of the checkpoint.
      RunError: if a checkpoint is damaged or has other parameters.
    """
    restored = checkpointer.restore_latest()
    if restored is not None:
        state, data = restored
        _check_sources(data["sources"], mixture.fingerprint(), run)
        return Start(state, int(state.step), data)
    if run.config.init_from:
        params = load_params(Run(run.config.init_from), spec)
        return Start(spec.from_params(params), 0, {})
    return Start(spec.init(), 0, {})


def _check_sources(stored: Mapping[str, str], current: Mapping[str, str], run: Run) -> None:
    """Compares fingerprints of the data sources by name."""
    changed = [name for name in stored if current.get(name) != stored[name]]
    if changed:
        raise DataError(
            f"data source {', '.join(changed)} is not what {run.path} was trained on: samples were "
            f"added, removed, reordered or changed in text or length. Restore the data, or start a "
            f"new run with --config.init_from={run.path}"
        )


def load_params(source: Run, spec: StateSpec) -> dict[str, jax.Array]:
    """Another run's parameters {path: array} on this mesh.

    Adapters of the same LoRA configuration are loaded. Others are merged into the decoder, and the
    new ones start fresh. So does a mixer that the other run does not have; Mamba layers start as the identity.

    Raises:
      RunError: if the models differ.
    """
    _check_same_model(source, spec)
    step = source.checkpoints.resolve(None)
    target = with_sharding(spec.shapes, spec.shardings).params()
    mixer: dict[str, jax.Array] = {}
    if _adds_mixer(source, spec):
        added = {k: leaf.sharding for k, leaf in target.items() if k.startswith(_MIXER)}
        target = {name: leaf for name, leaf in target.items() if name not in added}
        with jax.set_mesh(spec.mesh):
            mixer = random_params(spec.config.model, spec.config.train.seed, added)
        print(f"model.mixer={spec.config.model.mixer!r} is new: {source.path} has none")
    if source.config.model.decoder.lora == spec.config.model.decoder.lora:
        return source.checkpoints.restore(target, step) | mixer
    base = {name: leaf for name, leaf in target.items() if not is_adapter(name)}
    adapters = _adapter_shapes(source, spec)
    restored = source.checkpoints.restore(base | adapters, step)
    with jax.set_mesh(spec.mesh):
        merged = jax.jit(
            lambda base, adapters: merge(base | adapters, source.config.model.decoder.lora),
            out_shardings={name: leaf.sharding for name, leaf in base.items()},
            donate_argnums=0,
        )({name: restored[name] for name in base}, {name: restored[name] for name in adapters})
        fresh = {name: leaf.sharding for name, leaf in target.items() if is_adapter(name)}
        return merged | random_params(spec.config.model, spec.config.train.seed, fresh) | mixer


def _adds_mixer(source: Run, spec: StateSpec) -> bool:
    return source.config.model.mixer == "none" != spec.config.model.mixer


def _check_same_model(source: Run, spec: StateSpec) -> None:
    ignored: tuple[str, ...] = _NOT_IN_WEIGHTS
    if source.config.model.mixer == "none":
        ignored = (*ignored, "mixer", "mamba.")
    changed = {
        name: values
        for name, values in differences(
            to_dict(source.config.model), to_dict(spec.config.model)
        ).items()
        if not name.startswith(ignored)
    }
    if changed:
        listed = "\n  ".join(f"model.{k}: {a!r} there, {b!r} here" for k, (a, b) in changed.items())
        raise RunError(f"init_from={source.path} has a different model:\n  {listed}")


def _adapter_shapes(source: Run, spec: StateSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """The adapters of `source` {path: shape}, sharded over the mesh of `spec`."""
    _, abstract = abstract_model(source.config.model)
    shardings = param_shardings(abstract, spec.mesh)
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
        for name, leaf in flat_params(abstract).items()
        if is_adapter(name)
    }
