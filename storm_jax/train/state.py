"""What training changes: parameters (trained and frozen), optimizer state and step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from storm_jax.config import RunConfig
from storm_jax.params import abstract_model, compute_dtypes, flat_params, init_params
from storm_jax.sharding import param_shardings
from storm_jax.train.optim import is_trainable, make_optimizer


class TrainState(NamedTuple):
    """Arrays, their shapes or their shardings, with parameters as {path: array}.

    `trained` parameters are float32. `frozen` matrices have the compute dtype, which is all that
    the forward pass needs.
    """

    trained: dict[str, Any]
    frozen: dict[str, Any]
    opt_state: Any
    step: Any

    def params(self) -> dict[str, Any]:
        """All parameters by path."""
        return {**self.trained, **self.frozen}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateSpec:
    """Structure, shapes and shardings of the training state of one configuration on one mesh."""

    config: RunConfig
    mesh: Mesh
    graphdef: nnx.GraphDef
    shardings: TrainState
    shapes: TrainState

    @classmethod
    def make(cls, config: RunConfig, mesh: Mesh) -> StateSpec:
        graphdef, abstract = abstract_model(config.model, remat=config.train.remat)
        by_path = param_shardings(abstract, mesh)
        shapes = jax.eval_shape(lambda params: _split(params, config), flat_params(abstract))
        replicated = NamedSharding(mesh, PartitionSpec())
        trained = {name: by_path[name] for name in shapes.trained}
        opt_state = optax.tree_map_params(
            make_optimizer(config.optim, config.train.steps),
            lambda _, sharding: sharding,
            shapes.opt_state,
            trained,
            transform_non_params=lambda _: replicated,
        )
        frozen = {name: by_path[name] for name in shapes.frozen}
        shardings = TrainState(trained, frozen, opt_state, replicated)
        return cls(config=config, mesh=mesh, graphdef=graphdef, shardings=shardings, shapes=shapes)

    def replicated(self) -> list[tuple[str, int]]:
        """Path and bytes of the parameters that every device holds whole, largest first."""
        shardings = self.shardings.params()
        sizes = {
            name: leaf.size * leaf.dtype.itemsize
            for name, leaf in self.shapes.params().items()
            if shardings[name].is_fully_replicated
        }
        return sorted(sizes.items(), key=lambda item: -item[1])

    def init(self) -> TrainState:
        """A state at step 0 with random parameters from `train.seed`, created in shards."""

        def make() -> TrainState:
            return _split(init_params(self.config.model, self.config.train.seed), self.config)

        with jax.set_mesh(self.mesh):
            return jax.jit(make, out_shardings=self.shardings)()

    def from_params(self, params: Mapping[str, jax.Array]) -> TrainState:
        """A state at step 0 with the given parameters {path: array}."""
        with jax.set_mesh(self.mesh):
            split = jax.jit(
                lambda params: _split(params, self.config), out_shardings=self.shardings
            )
            return split(dict(params))


def _split(params: Mapping[str, jax.Array], config: RunConfig) -> TrainState:
    """Splits parameters into trained and frozen, in their dtypes, at step 0."""
    trained, frozen = {}, {}
    dtypes = compute_dtypes(params, config.model)
    for name, value in params.items():
        if is_trainable(name, config):
            trained[name] = value.astype(jnp.float32)
        else:
            frozen[name] = value.astype(dtypes[name].dtype)
    opt_state = make_optimizer(config.optim, config.train.steps).init(trained)
    return TrainState(trained, frozen, opt_state, jnp.zeros((), jnp.int32))
