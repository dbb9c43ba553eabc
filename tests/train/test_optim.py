"""Every parameter has one learning rate and one decay rule."""

from __future__ import annotations

import dataclasses
import importlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tiny
from storm_jax.config import LearningRateConfig, OptimConfig, RunConfig, from_dict
from storm_jax.params import abstract_model, flat_params
from storm_jax.train.optim import is_trainable, make_optimizer, schedule

CONFIG = OptimConfig(
    learning_rate=LearningRateConfig(vision=1e-3, projector=2e-3, decoder=4e-3),
    warmup_fraction=0.0,
    weight_decay=0.5,
    clip_norm=1e9,
)


def run_config(**changes) -> RunConfig:
    config = tiny.get_config("stage=sft")
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return from_dict(RunConfig, config)


def test_every_parameter_falls_under_one_rule():
    config = run_config()
    for preset in ("tiny", "storm_qwen2_7b"):
        model = importlib.import_module(f"configs.{preset}").MODEL
        names = flat_params(abstract_model(model)[1])
        trained = [name for name in names if is_trainable(name, config)]
        assert {name.split("/")[0] for name in trained} == {"vision", "projector", "decoder"}
        assert all("vision/unused" in name for name in set(names) - set(trained))


def test_with_adapters_nothing_else_of_the_decoder_is_trained():
    config = run_config(model__decoder__lora__rank=4, model__decoder__lora__targets="query|down")
    names = flat_params(abstract_model(config.model)[1])
    decoder = {name for name in names if name.startswith("decoder/") and is_trainable(name, config)}
    assert decoder == {f"decoder/layers/{n}/lora/{m}" for n in ("query", "down") for m in "ab"}
    assert is_trainable("projector/stem/linear1/kernel", config)


def test_a_parameter_of_an_unknown_part_is_an_error():
    with pytest.raises(ValueError, match="adapter/kernel"):
        is_trainable("adapter/kernel", run_config())


def test_parts_use_their_learning_rates_and_only_kernels_decay():
    params = {
        "vision/a/kernel": jnp.ones(3),
        "projector/a/kernel": jnp.ones(3),
        "decoder/a/bias": jnp.ones(3),
    }
    grads = {name: jnp.full(3, 0.1) for name in params}
    optimizer = make_optimizer(CONFIG, steps=10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # Adam's first update is the sign of the gradient.
    np.testing.assert_allclose(updates["vision/a/kernel"], -1e-3 * 1.5, rtol=1e-4)
    np.testing.assert_allclose(updates["projector/a/kernel"], -2e-3 * 1.5, rtol=1e-4)
    np.testing.assert_allclose(updates["decoder/a/bias"], -4e-3, rtol=1e-4)


def test_gradients_are_clipped_by_their_global_norm():
    config = dataclasses.replace(CONFIG, clip_norm=1.0)
    params = {"vision/kernel": jnp.zeros(4), "decoder/kernel": jnp.zeros(4)}
    grads = {name: jnp.full(4, 3.0) for name in params}
    clipped = optax.clip_by_global_norm(config.clip_norm).update(grads, optax.EmptyState())[0]
    optimizer = make_optimizer(config, steps=10)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = optax.tree_utils.tree_get(state, "mu")
    for name in params:
        np.testing.assert_allclose(moments[name], 0.1 * clipped[name], rtol=1e-5)


def test_schedule_warms_up_and_decays_to_zero():
    rate = schedule(dataclasses.replace(CONFIG, warmup_fraction=0.1), steps=100)
    values = np.array([rate(step) for step in range(101)])
    assert values[0] == 0
    assert values.argmax() == 10
    assert values[10] == 1
    assert values[100] == pytest.approx(0, abs=1e-6)
    assert (np.diff(values[:11]) > 0).all()
    assert (np.diff(values[10:]) < 0).all()
