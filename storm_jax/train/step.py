"""One optimization step and one evaluation step, as jitted functions on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from storm_jax.models.storm import VisualShape
from storm_jax.ops.cross_entropy import cross_entropy
from storm_jax.params import unflatten
from storm_jax.train.optim import make_optimizer, schedule
from storm_jax.train.state import StateSpec, TrainState

Sums = dict[str, jax.Array]


def make_train_step(
    spec: StateSpec, shape: VisualShape
) -> Callable[[TrainState, dict], tuple[TrainState, Sums]]:
    """`(state, batch) -> (state, metrics)`; the state is donated.

    With accumulation, the batch is cut into microbatches whose summed losses are differentiated one
    after another; dividing once by the summed weight makes that equal to the large batch.
    """
    config = spec.config
    optimizer = make_optimizer(config.optim, config.train.steps)
    factor = schedule(config.optim, config.train.steps)
    sums = _loss_sums(spec.graphdef, shape)

    def summed_loss(trained: dict, frozen: dict, batch: dict) -> tuple[jax.Array, Sums]:
        totals = sums({**trained, **frozen}, batch)
        return totals["loss"], totals

    gradient = jax.grad(summed_loss, has_aux=True)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, Sums]:
        def accumulate(carry: tuple, microbatch: dict) -> tuple[tuple, None]:
            new = gradient(state.trained, state.frozen, microbatch)
            return jax.tree.map(jnp.add, carry, new), None

        microbatches = _microbatches(batch, config.train.accumulation)
        first = gradient(state.trained, state.frozen, jax.tree.map(lambda x: x[0], microbatches))
        rest = jax.tree.map(lambda x: x[1:], microbatches)
        (grads, totals), _ = jax.lax.scan(accumulate, first, rest)
        weight = jnp.maximum(totals["weight"], 1.0)  # a batch whose samples all failed
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics = {
            "loss": totals["loss"] / weight,
            "accuracy": totals["right"] / weight,
            "grad_norm": optax.global_norm(grads),
            "rate_factor": factor(state.step),
            "tokens": totals["tokens"],
        }
        return TrainState(trained, state.frozen, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(spec.shardings, None))


def make_eval_step(spec: StateSpec, shape: VisualShape) -> Callable[[TrainState, dict], Sums]:
    """`(state, batch) -> sums` of loss, weight and right answers over a batch."""
    sums = _loss_sums(spec.graphdef, shape)
    return jax.jit(lambda state, batch: sums({**state.trained, **state.frozen}, batch))


def _loss_sums(graphdef: nnx.GraphDef, shape: VisualShape) -> Callable[[dict, dict], Sums]:
    def sums(params: dict[str, Any], batch: dict) -> Sums:
        model = nnx.merge(graphdef, unflatten(params))
        hidden = model(batch, shape)
        loss, weight, right = cross_entropy(
            hidden, model.decoder.head(), batch["targets"], batch["loss_weights"]
        )
        tokens = jnp.sum(batch["segment_ids"] > 0)
        return {"loss": loss, "weight": weight, "right": right, "tokens": tokens}

    return sums


def _microbatches(batch: dict, count: int) -> dict:
    """[B, ...] -> [count, B / count, ...]; strided, so that every device keeps its own rows."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch
    )
