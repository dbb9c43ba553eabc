"""A trace is attributed to the parts of the model, and its time is counted once."""

from __future__ import annotations

import json
import time
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import profile
from benchmarks.xspace import scopes


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A folder with a trace of three steps, and the seconds that they took."""
    folder = tmp_path_factory.mktemp("profile")

    @jax.jit
    def traced_step(w, x):
        def loss(w):
            with jax.named_scope("vision"):
                y = jnp.tanh(x @ w)
            with jax.named_scope("decoder"):
                y, _ = jax.lax.scan(lambda y, _: (jnp.sin(y @ w), None), y, length=3)
            return (y**2).sum()

        grads = jax.grad(loss)(w)
        with jax.named_scope("optimizer"):
            return w - 1e-3 * grads

    w, x = jnp.eye(384), jnp.ones((256, 384))
    traced_step(w, x).block_until_ready()
    with jax.profiler.trace(folder):
        began = time.perf_counter()
        for _ in range(3):
            w = traced_step(w, x).block_until_ready()
        seconds = time.perf_counter() - began
    return folder, seconds


def test_parts_and_operations_of_a_trace(traced, tmp_path, capsys):
    folder, seconds = traced
    profile.main([str(folder), f"--out={tmp_path / 'found.json'}"])
    found = json.loads((tmp_path / "found.json").read_text())
    parts = found["parts"]
    expected = {
        f"{part} {way}" for part in ("vision", "decoder") for way in ("forward", "backward")
    }
    assert expected <= parts.keys() and "optimizer" in parts
    assert min(parts.values()) > 0
    assert 0 < sum(parts.values()) == pytest.approx(found["seconds"])
    assert found["seconds"] < seconds
    listed = [each["seconds"] for each in found["operations"]]
    assert listed == sorted(listed, reverse=True)
    assert "decoder backward" in capsys.readouterr().out


def test_operations_without_a_scope_have_that_of_their_loop(traced):
    """XLA's own copies and kernels are in no named scope."""
    found = scopes(profile.newest_trace(traced[0]).read_bytes())
    kernels = [
        scope
        for (program, name), scope in found.items()
        if program.startswith("jit_traced_step") and "fusion" in name
    ]
    assert kernels and all(scope.startswith("jit(traced_step)/") for scope in kernels)


def test_operations_that_run_at_the_same_time_share_it():
    """One that hands its work to other threads ends with an event that refers to it."""

    def event(name: str, start: float, end: float, **stats):
        stats |= {} if name.startswith("end") else {"hlo_module": "m", "program_id": 1}
        return types.SimpleNamespace(
            name=name, start_ns=start * 1e9, end_ns=end * 1e9, stats=list(stats.items())
        )

    events = [
        event("a", 0, 4, hlo_op="a", _p=7),
        event("b", 2, 3, hlo_op="b", _p=8),
        event("c", 2, 2, hlo_op="c"),
        event("while", 0, 9, hlo_op="while"),
        event("end: b", 6, 6, _c=8),
    ]
    lines = [types.SimpleNamespace(events=events)]
    trace = types.SimpleNamespace(planes=[types.SimpleNamespace(name="cpu", lines=lines)])
    known = {("m(1)", name): "" for name in "abc"}
    found = profile.busy_seconds(trace, known)
    assert [found[each] for each in known] == pytest.approx([3, 3, 0])


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(step)/jvp(vision)/while/body/dot_general", "vision forward"),
        ("jit(step)/transpose(jvp(decoder))/while/body/checkpoint/dot", "decoder backward"),
        ("jit(step)/optimizer/transpose", "optimizer"),
        ("jit(run)/while/body/decoder/while/body/reshape", "decoder"),
        ("jit(step)/jvp()/visionary/add", "other"),
        ("", "other"),
    ],
)
def test_the_part_of_a_scope(scope, part):
    assert profile.part_of(scope) == part


def test_a_folder_without_a_trace_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"has no trace .* --config.train.profile_steps=A:B"):
        profile.main([str(tmp_path)])
