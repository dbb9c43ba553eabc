"""Training and evaluation steps as jitted functions on a mesh."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from storm_jax.config import ConfigError, RunConfig
from storm_jax.data.rows import RowShape
from storm_jax.ops.cross_entropy import cross_entropy
from storm_jax.sharding import LocalRows, batch_sharding
from storm_jax.train.optim import make_optimizer, schedule
from storm_jax.train.state import StateSpec, TrainState

Sums = dict[str, jax.Array]


TrainStep = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Sums]]
EvalStep = Callable[[TrainState, dict[str, jax.Array]], Sums]


def place(arrays: Mapping[str, np.ndarray], mesh: Mesh, rows: LocalRows) -> dict[str, jax.Array]:
    """Puts the rows that this process holds on the mesh, as global arrays."""

    def place_one(array: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            wanted = range(rows.total)[index[0]]
            start = bisect.bisect_left(rows.held, wanted.start)
            return array[(slice(start, start + len(wanted)), *index[1:])]

        shape = (rows.total, *array.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh, shape), shard)

    return {name: place_one(array) for name, array in arrays.items()}


def check_batch(config: RunConfig, mesh: Mesh) -> None:
    """Raises a ConfigError if the microbatches do not divide over the mesh."""
    rows, parts = config.train.batch_size, config.train.accumulation
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows // parts % devices:
        raise ConfigError(
            f"train.batch_size={rows} in train.accumulation={parts} microbatches does not divide over "
            f"mesh.data * mesh.fsdp = {devices} devices. Make batch_size / accumulation a multiple of "
            f"{devices}"
        )


def make_train_step(spec: StateSpec, shape: RowShape) -> TrainStep:
    """The optimization step for rows of one shape; it donates the state.

    With accumulation, the batch is split into microbatches, whose losses are summed and
    differentiated one at a time. Dividing once by the summed weight makes the result equal to that
    of the large batch.
    """
    config = spec.config
    optimizer = make_optimizer(config.optim, config.train.steps)
    rate_factor = schedule(config.optim, config.train.steps)
    loss_sums = make_loss_sums(spec.graphdef, shape)

    def summed_loss(trained: dict, frozen: dict, batch: dict) -> tuple[jax.Array, Sums]:
        sums = loss_sums({**trained, **frozen}, batch)
        return sums["loss"], sums

    gradient = jax.grad(summed_loss, has_aux=True)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, Sums]:
        def accumulate(carry: tuple, microbatch: dict) -> tuple[tuple, None]:
            new = gradient(state.trained, state.frozen, microbatch)
            return jax.tree.map(jnp.add, carry, new), None

        microbatches = _microbatches(batch, config.train.accumulation)
        first = gradient(state.trained, state.frozen, jax.tree.map(lambda x: x[0], microbatches))
        rest = jax.tree.map(lambda x: x[1:], microbatches)
        (grads, sums), _ = jax.lax.scan(accumulate, first, rest)
        weight = jnp.maximum(sums["weight"], 1.0)  # 0 if every sample of the batch failed
        grads = jax.tree.map(lambda g: g / weight, grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
            trained = optax.apply_updates(state.trained, updates)
        metrics = {
            "loss": sums["loss"] / weight,
            "accuracy": sums["right"] / weight,
            "grad_norm": optax.global_norm(grads),
            "rate_factor": rate_factor(state.step),
            "tokens": sums["tokens"],
            "frames": sums["frames"],
        }
        return TrainState(trained, state.frozen, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(spec.shardings, None))


def make_eval_step(spec: StateSpec, shape: RowShape) -> EvalStep:
    """The evaluation step for rows of one shape: sums of loss, weight and right answers."""
    loss_sums = make_loss_sums(spec.graphdef, shape)
    return jax.jit(lambda state, batch: loss_sums(state.params(), batch))


def make_loss_sums(graphdef: nnx.GraphDef, shape: RowShape) -> Callable[[dict, dict], Sums]:
    """The forward pass: sums of loss, weight, right answers, tokens and frames over a batch."""

    def loss_sums(params: dict[str, Any], batch: dict[str, jax.Array]) -> Sums:
        model = nnx.merge(graphdef, unflatten_dict(params, sep="/"))
        hidden = model(batch, shape.visual)
        with jax.named_scope("loss"):
            loss, weight, right = cross_entropy(
                hidden, model.decoder.head(), batch["targets"], batch["loss_weights"]
            )
        return {
            "loss": loss,
            "weight": weight,
            "right": right,
            "tokens": jnp.sum(batch["segment_ids"] > 0),
            "frames": jnp.sum(batch["frame_clip"] > 0),
        }

    return loss_sums


def _microbatches(batch: dict[str, jax.Array], count: int) -> dict[str, jax.Array]:
    """[B, ...] -> [count, B / count, ...]; strided, so that every device keeps its own rows."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch
    )
