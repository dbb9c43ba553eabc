"""FLOPs: the formula agrees with XLA, and XLA's count includes every iteration of every loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from configs import storm_qwen2_7b
from storm_jax.config import MeshConfig, RunConfig, from_dict
from storm_jax.data.rows import row_shapes
from storm_jax.ops.attention import xla
from storm_jax.preflight.cost import count_flops
from storm_jax.preflight.programs import (
    Program,
    decode_program,
    encode_program,
    prefill_program,
    train_program,
)
from storm_jax.sharding import make_mesh

ONE_LAYER = {
    "model.vision.depth": 1,
    "model.vision.feature_layer": -1,
    "model.vision.image_size": 224,
    "model.decoder.depth": 1,
    "model.mixer": "none",
    "data.rows": [{"tokens": 1024, "frames": 1}],
    "compression.num_frames": 1,
    "train.batch_size": 1,
}

MAMBA2 = {"model.mixer": "mamba2", "model.mamba.d_state": 128, "train.remat": False}
LORA = {"model.decoder.lora.rank": 64, "model.stem.kind": "mlp_downsample_3x3_fix"}


def config_of(stage: str, **changes) -> RunConfig:
    """The 7B recipe with a batch of two rows; shapes this large cost nothing before compilation."""
    config = storm_qwen2_7b.get_config(f"stage={stage}")
    config.update_from_flattened_dict({"train.batch_size": 2, **changes})
    return from_dict(RunConfig, config)


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def count(program: Program, mesh) -> float:
    with jax.set_mesh(mesh):
        return count_flops(program.traced.jaxpr)


def formula(program: Program) -> float:
    return sum(part.program for part in program.work.values())


def test_without_loops_the_formula_is_what_xla_counts(mesh, monkeypatch):
    """One layer, row, frame and block: every loop has one iteration, so XLA's own count is complete."""
    monkeypatch.setattr(xla, "BLOCK", 1024)
    config = config_of("sft", **ONE_LAYER)
    program = train_program(config, mesh, row_shapes(config)[-1])
    counted = program.lowered.cost_analysis()["flops"]
    assert count(program, mesh) == pytest.approx(counted, rel=1e-3)
    assert formula(program) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("sft", {}),
        ("align", {"train.accumulation": 2, "train.remat": False}),
        pytest.param("sft", MAMBA2, marks=pytest.mark.slow),
        pytest.param("sft", LORA, marks=pytest.mark.slow),
    ],
    ids=["everything", "projector only", "mamba2", "lora"],
)
def test_the_formula_agrees_with_xla_over_all_layers(stage, changes, mesh):
    config = config_of(stage, **changes)
    program = train_program(config, mesh, row_shapes(config)[-1])
    assert formula(program) == pytest.approx(count(program, mesh), rel=0.01)
    model = sum(part.model for part in program.work.values())
    assert model < formula(program)


@pytest.mark.parametrize("build", [encode_program, prefill_program, decode_program])
def test_the_formula_agrees_for_evaluation(build, mesh):
    program = build(config_of("sft"), mesh)
    assert formula(program) == pytest.approx(count(program, mesh), rel=0.02)


def test_loops_and_branches_count_as_often_as_they_run():
    def layer(x, w):
        return jnp.tanh(x @ w)

    def looped(x, ws):
        def outer(x, w):
            x = jax.lax.cond(x[0, 0] > 0, lambda x: layer(x, w), lambda x: x, x)
            x = jax.lax.fori_loop(0, 3, lambda _, x: jax.checkpoint(layer)(x, w), x)
            return x, None

        return jax.lax.scan(outer, x, ws)[0].sum()

    def unrolled(x, ws):
        for w in ws:
            for _ in range(4):
                x = layer(x, w)
        return x.sum()

    x, ws = jnp.zeros((16, 64)), jnp.zeros((5, 64, 64))
    plain = jax.jit(unrolled).lower(x, ws).cost_analysis()["flops"]
    assert count_flops(jax.make_jaxpr(looped)(x, ws)) == pytest.approx(plain, rel=0.01)
    once = jax.jit(looped).lower(x, ws).cost_analysis()["flops"]
    assert once < plain / 4
