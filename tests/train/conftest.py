"""Training loops of these tests share their programs and initial parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import pytest

from storm_jax.train import loop
from storm_jax.train.state import StateSpec
from storm_jax.train.step import make_train_step


@pytest.fixture(scope="session", autouse=True)
def shared_programs() -> Iterator[None]:
    """Traces, compiles and initialises once per model, optimizer, mesh and row shape; most loops of
    these tests have the same ones."""
    specs, inits, steps = {}, {}, {}
    make_spec, init = StateSpec.make, StateSpec.init

    def key(config, mesh) -> tuple:
        train = config.train
        return (
            repr((config.model, config.optim)),
            (train.seed, train.steps, train.accumulation, train.remat),
            mesh,
        )

    def shared_spec(config, mesh):
        if key(config, mesh) not in specs:
            specs[key(config, mesh)] = make_spec(config, mesh)
        return dataclasses.replace(specs[key(config, mesh)], config=config)

    def shared_init(spec):
        name = key(spec.config, spec.mesh)
        if name not in inits:
            inits[name] = jax.device_get(init(spec))
        return jax.device_put(inits[name], spec.shardings)

    def shared_step(spec, shape):
        name = (*key(spec.config, spec.mesh), repr(shape))
        if name not in steps:
            steps[name] = make_train_step(spec, shape)
        return steps[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateSpec, "make", shared_spec)
        patch.setattr(StateSpec, "init", shared_init)
        patch.setattr(loop, "make_train_step", shared_step)
        yield
