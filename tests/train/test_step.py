"""The training step computes the same losses and updates however the work is split."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from storm_jax.data.mixture import open_mixture
from storm_jax.data.pipeline import batches
from storm_jax.data.plan import TrainPlan
from storm_jax.media.reader import MediaReader
from storm_jax.media.workers import WorkerPool
from storm_jax.sharding import local_rows, make_mesh
from storm_jax.text.tokenizer import load_tokenizer
from storm_jax.train.state import StateSpec
from storm_jax.train.step import make_train_step, place


@pytest.fixture(scope="module")
def train_steps(shapes_folder):
    """Takes two steps; returns their metrics and the final state."""

    def take_steps(config, devices: int):
        mesh = make_mesh(config.mesh, jax.devices()[:devices])
        pool, size = WorkerPool(0), config.train.batch_size
        tokenizer = load_tokenizer(shapes_folder / "tokenizer")
        mixture = open_mixture(config, config.data.train, tokenizer, pool)
        (shape,) = mixture.shapes
        spec = StateSpec.make(config, mesh)
        state = spec.init()
        step = make_train_step(spec, shape)
        history = []
        reader = MediaReader(pool, shape.image_size, config.data.frames)
        for batch in batches(mixture, TrainPlan(mixture, size), range(2), range(size), reader):
            with jax.set_mesh(mesh):
                state, metrics = step(state, place(batch.arrays, mesh, local_rows(mesh, size)))
            history.append({name: float(value) for name, value in metrics.items()})
        return history, state

    return take_steps


def assert_same_training(one, other, rtol=2e-4):
    (history, state), (other_history, other_state) = one, other
    for metrics, other_metrics in zip(history, other_history, strict=True):
        for name in metrics:
            np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=rtol, err_msg=name)
    for name, value in state.trained.items():
        np.testing.assert_allclose(value, other_state.trained[name], atol=2e-4, err_msg=name)


# Adam divides by the root of the squared gradient: with a small learning rate, the comparison is
# about gradients and not about the sign of rounding errors.
RATES = {f"optim__learning_rate__{part}": 1e-4 for part in ("vision", "projector", "decoder")}


@pytest.fixture(scope="module")
def plain(train_steps, small_config):
    """Two steps on one device."""
    return train_steps(small_config(**RATES), 1)


def test_eight_devices_train_as_one(small_config, train_steps, plain):
    """Gradients on other meshes: tests/distributed."""
    mesh = {"mesh__data": 1, "mesh__fsdp": 2, "mesh__context": 2, "mesh__tensor": 2}
    eight = train_steps(small_config(**RATES, **mesh), 8)
    assert_same_training(plain, eight)
    assert not eight[1].trained["decoder/layers/gate_up/kernel"].sharding.is_fully_replicated


def test_accumulation_equals_the_large_batch(small_config, train_steps, plain):
    assert_same_training(plain, train_steps(small_config(train__accumulation=4, **RATES), 1))


def test_remat_changes_nothing(small_config, train_steps, plain):
    assert_same_training(plain, train_steps(small_config(train__remat=True, **RATES), 1))


def test_a_part_with_rate_zero_is_frozen_and_has_no_optimizer_state(small_config, train_steps):
    config = small_config(optim__learning_rate__vision=0.0, optim__learning_rate__decoder=0.0)
    _, state = train_steps(config, 1)
    assert all(name.startswith("projector/") for name in state.trained)
    assert {name.split("/")[0] for name in state.frozen} == {"vision", "decoder"}
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    trained = sum(leaf.size for leaf in state.trained.values())
    assert moments <= 2 * trained + 10


def test_the_loss_falls(small_config, train_steps):
    history, _ = train_steps(small_config(), 1)  # the second batch is another
    assert history[1]["loss"] < history[0]["loss"] - 0.1
