"""A kernel that fails or lies on its device is not used, and the warning has both numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from storm_jax.ops import selective_scan as selective_scan_module
from storm_jax.ops.guard import agrees
from storm_jax.ops.selective_scan import gpu


def ones() -> dict[str, jax.Array]:
    return {"y": jnp.ones((3, 5)), "dx": jnp.full(4, 100.0)}


def check(kernel, reference=ones) -> bool:
    return agrees("the kernel k", kernel, reference, tolerance=1e-4, instead="chunked")


def test_small_differences_are_rounding(caplog):
    assert check(lambda: {"y": jnp.ones((3, 5)) + 9e-5, "dx": jnp.full(4, 100.009)})
    assert not caplog.records


@pytest.mark.parametrize("lie", [1.001, np.nan, np.inf])
def test_a_wrong_value_is_shown_next_to_the_right_one(caplog, lie):
    assert not check(lambda: {"y": jnp.ones((3, 5)).at[1, 2].set(lie), "dx": jnp.full(4, 100.0)})
    (record,) = caplog.records
    assert "the kernel k is wrong" in record.message
    assert f"output['y'] has {lie:g}, the reference 1: using 'chunked'" in record.message


def test_a_kernel_that_does_not_run_is_described_in_one_line(caplog):
    def fail():
        raise RuntimeError("ptxas died\nof something\nlong")

    assert not check(fail)
    (record,) = caplog.records
    assert "the kernel k fails" in record.message and "(ptxas died): using" in record.message


def test_it_computes_while_another_program_is_traced():
    @jax.jit
    def traced(x):
        assert check(lambda: jax.jit(ones)())
        return x + 1

    assert traced(1.0) == 2


def test_the_scan_uses_a_kernel_that_is_right_and_not_one_that_lies(monkeypatch, caplog):
    """In the interpreter, on the same input as on a chip."""
    is_right = selective_scan_module._is_right.__wrapped__
    assert is_right("pallas_gpu") and not caplog.records
    real = gpu.backward
    monkeypatch.setattr(gpu, "backward", lambda *args, **how: _doubled(real(*args, **how)))
    assert not is_right("pallas_gpu")
    assert "pallas_gpu is wrong on" in caplog.text and "using 'chunked'" in caplog.text


def _doubled(gradients):
    return jax.tree.map(lambda leaf: 2 * leaf, gradients)
