"""What training changes: parameters, split into trained and frozen, optimizer state and step."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from storm_jax.config import RunConfig
from storm_jax.params import abstract_model, compute_dtypes, flatten, init_params, unflatten
from storm_jax.sharding import param_shardings
from storm_jax.train.optim import is_trainable, make_optimizer


class TrainState(NamedTuple):
    """A pytree of flat dicts {path: array, its shape or its sharding}. `trained` is fp32; `frozen` matrices have the compute
    dtype, which is all that the forward pass reads of them."""

    trained: dict[str, Any]
    frozen: dict[str, Any]
    opt_state: Any
    step: Any

    def params(self) -> dict[str, Any]:
        """All parameters as the nested dict that is saved and merged into a model."""
        return unflatten({**self.trained, **self.frozen})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateSpec:
    """How to make, place and split the state of one configuration on one mesh."""

    config: RunConfig
    mesh: Mesh
    graphdef: nnx.GraphDef
    shardings: TrainState
    shapes: TrainState

    @classmethod
    def make(cls, config: RunConfig, mesh: Mesh) -> StateSpec:
        graphdef, params = abstract_model(config.model, remat=config.train.remat)
        flat = flatten(param_shardings(params, mesh))
        shapes = jax.eval_shape(
            lambda tree: _split(flatten(tree), config), nnx.to_pure_dict(params)
        )
        whole = NamedSharding(mesh, PartitionSpec())
        trained = {name: flat[name] for name in shapes.trained}
        opt_state = optax.tree_map_params(
            make_optimizer(config.optim, config.train.steps),
            lambda _, sharding: sharding,
            shapes.opt_state,
            trained,
            transform_non_params=lambda _: whole,
        )
        frozen = {name: flat[name] for name in shapes.frozen}
        state = TrainState(trained, frozen, opt_state, whole)
        return cls(config=config, mesh=mesh, graphdef=graphdef, shardings=state, shapes=shapes)

    def init(self) -> TrainState:
        """Random parameters from `train.seed`, born where they belong."""

        def make() -> TrainState:
            return _split(init_params(self.config.model, self.config.train.seed), self.config)

        with jax.set_mesh(self.mesh):
            return jax.jit(make, out_shardings=self.shardings)()

    def from_params(self, params: dict[str, Any]) -> TrainState:
        """A state at step 0 with given parameters."""
        with jax.set_mesh(self.mesh):
            split = jax.jit(
                lambda tree: _split(flatten(tree), self.config), out_shardings=self.shardings
            )
            return split(params)


def _split(flat: dict[str, jax.Array], config: RunConfig) -> TrainState:
    trained, frozen = {}, {}
    dtypes = compute_dtypes(flat, config.model)
    for name, value in flat.items():
        if is_trainable(name, config):
            trained[name] = value.astype(jnp.float32)
        else:
            frozen[name] = value.astype(dtypes[name].dtype)
    opt_state = make_optimizer(config.optim, config.train.steps).init(trained)
    return TrainState(trained, frozen, opt_state, jnp.zeros((), jnp.int32))
