"""Damage to a stored checkpoint is noticed before anything is computed with it."""

from __future__ import annotations

import os
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.checkpoints import Checkpoints, RunError


@pytest.fixture
def stored(trained_run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of a run's checkpoints, to damage."""
    return shutil.copytree(trained_run / "checkpoints", tmp_path / "run/checkpoints")


def test_an_undamaged_checkpoint_is_read(stored):
    checkpoints = Checkpoints(stored)
    checkpoints.verify(2)
    shapes = checkpoints.shapes(2)
    restored = checkpoints.restore(shapes, 2)
    name = next(iter(shapes))
    np.testing.assert_array_equal(restored[name], checkpoints.read(2, name))


def test_files_are_compared_once(stored, monkeypatch):
    checkpoints = Checkpoints(stored)
    checkpoints.verify(2)
    monkeypatch.setattr("storm_jax.checkpoints.changed_files", None)
    checkpoints.verify(2, "params")  # as part of all items
    checkpoints.verify(2)


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_the_parameters_is_noticed(stored, seed):
    rng = np.random.default_rng(seed)
    files = sorted(path for path in (stored / "2/params").rglob("*") if path.stat().st_size)
    files = [path for path in files if path.is_file()]
    sizes = np.array([path.stat().st_size for path in files], float)
    file = files[rng.choice(len(files), p=sizes / sizes.sum())]
    data = bytearray(file.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)
    with pytest.raises(RunError, match="has changed since it was written") as caught:
        Checkpoints(stored).verify(2, "params")
    assert str(file.relative_to(stored / "2")) in str(caught.value)


@pytest.mark.parametrize("item", ["params", "opt_state", "data", "meta"])
def test_every_item_is_compared_before_training_resumes(stored, item):
    file = max((p for p in (stored / "2" / item).rglob("*") if p.is_file()), key=os.path.getsize)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match=f"{item}/"):
        Checkpoints(stored).verify(2)


def test_the_error_names_earlier_checkpoints(stored):
    shutil.copytree(stored / "2", stored / "5")
    file = next(p for p in (stored / "5/params").rglob("*") if p.is_file())
    file.unlink()
    with pytest.raises(RunError) as caught:
        Checkpoints(stored).read(5, "decoder/embedding")
    assert "Earlier ones: 2. Choose one with --step, or remove" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_comparison_can_be_skipped(stored, monkeypatch):
    (stored / "2/digests.json").write_text("{}x")
    with pytest.raises(RunError, match=r"digests.json has changed"):
        Checkpoints(stored).verify(2)
    monkeypatch.setenv("STORM_VERIFY", "0")
    Checkpoints(stored).verify(2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_not_finite_are_refused(tmp_path, value):
    params = {"a/kernel": jnp.ones((3, 2)), "b/kernel": jnp.array([1, value], jnp.bfloat16)}
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    checkpoints.write_params(params, {})
    with pytest.raises(RunError, match="contains b/kernel with values that are not finite"):
        checkpoints.restore(checkpoints.shapes(0), 0)
