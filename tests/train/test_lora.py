"""LoRA: a new adapter changes nothing, only adapters of the decoder are trained, and merging them gives
the same model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from flax.traverse_util import unflatten_dict
from reference_models import load_model, logits_of, torch_logits

from storm_jax.config import ConfigError, LoraConfig
from storm_jax.inference.weights import load
from storm_jax.models.decoder import Decoder
from storm_jax.models.lora import is_adapter, merge
from storm_jax.params import flat_params
from storm_jax.run import Run
from storm_jax.sharding import make_mesh
from storm_jax.train import loop
from storm_jax.train.initialisation import load_params
from storm_jax.train.state import StateSpec
from storm_jax.weights.exporter import export_run

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 24))
LORA = {
    "model__decoder__lora__rank": 4,
    "model__decoder__lora__alpha": 8.0,
    "train__eval_every": 0,
    "optim__warmup_fraction": 0.0,
    "optim__learning_rate__decoder": 1e-2,
}


def hidden_of(model: Decoder) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1])[None], TOKENS.shape)
    return nnx.jit(lambda m: m(m.embed(jnp.asarray(TOKENS)), positions)[0])(model)


@pytest.mark.parametrize("targets", ["query|value", "key|out", "gate_up|down", ".*"])
def test_a_new_adapter_changes_nothing_and_merging_preserves_the_output(
    targets, small_model, randomise
):
    plain = small_model.decoder
    config = dataclasses.replace(plain, lora=LoraConfig(rank=3, alpha=7.0, targets=targets))

    def make(config) -> tuple[nnx.GraphDef, dict]:
        model = Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=False)
        graphdef, params = nnx.split(model)
        return graphdef, flat_params(params)

    (base_def, base), (graphdef, adapted) = make(plain), make(config)
    names = {name for name in adapted if is_adapter(name)}
    matched = 6 if targets == ".*" else 2
    assert len(names) == 2 * matched and adapted.keys() - names == base.keys()
    fresh = {**base, **{name: adapted[name] for name in names}}
    before = hidden_of(nnx.merge(base_def, unflatten_dict(base, sep="/")))
    np.testing.assert_array_equal(
        hidden_of(nnx.merge(graphdef, unflatten_dict(fresh, sep="/"))), before
    )

    rng = np.random.default_rng(0)
    moved = fresh | {
        name: jnp.asarray(rng.standard_normal(fresh[name].shape) * 0.15, jnp.float32)
        for name in sorted(names)  # an update about as large as the kernel
    }
    after = hidden_of(nnx.merge(graphdef, unflatten_dict(moved, sep="/")))
    assert jnp.abs(after - before).max() > 0.05
    merged = merge(moved, config.lora)
    assert merged.keys() == base.keys()
    found = hidden_of(nnx.merge(base_def, unflatten_dict(merged, sep="/")))
    assert jnp.abs(found - after).max() < 1e-5


def values(run: Run) -> dict[str, np.ndarray]:
    step = run.checkpoints.resolve(None)
    return {path: run.checkpoints.read(step, path) for path in run.checkpoints.shapes(step)}


@pytest.fixture(scope="module")
def tuned(trained_run, small_config, shapes_folder, tmp_path_factory) -> Run:
    config = small_config(**LORA, train__steps=4, init_from=str(trained_run))
    run = Run(tmp_path_factory.mktemp("runs") / "tuned")
    run.prepare(config, shapes_folder / "tokenizer")
    loop.train(run, make_mesh(config.mesh, jax.devices()[:1]), lambda spec, pool: {})
    return run


def test_only_adapters_of_the_decoder_are_trained(tuned, trained_run):
    before, after = values(Run(trained_run)), values(tuned)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved and all(path.startswith(("vision/", "projector/")) for path in moved)
    assert all(after[path].any() for path in after if is_adapter(path))
    spec = StateSpec.make(tuned.config, make_mesh(tuned.config.mesh, jax.devices()[:1]))
    assert {path for path in spec.shapes.trained if path.startswith("decoder/")} == {
        path for path in after if is_adapter(path)
    }


def test_a_merged_export_equals_the_trained_model(tuned, tmp_path):
    ours = np.asarray(logits_of(load_model(tuned.path), TOKENS))
    export_run(tuned, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/decoder")
    assert np.abs(torch_logits(model, TOKENS) - ours).max() < 1e-5


def test_adapters_are_merged_before_kernels_are_stored_in_int8(tuned):
    mesh = make_mesh(tuned.config.mesh, jax.devices()[:1])
    step = tuned.checkpoints.resolve(None)
    _, params = load(tuned, step, mesh, "int8")
    assert not any(map(is_adapter, params))
    merged = merge(values(tuned), tuned.config.model.decoder.lora)
    kernel, scale = (
        np.asarray(params[f"decoder/layers/down/{name}"]) for name in ("kernel", "scale")
    )
    error = np.abs(kernel * scale[:, None] - merged["decoder/layers/down/kernel"])
    assert (error <= 0.501 * scale[:, None]).all()


def test_equal_adapters_are_loaded_and_others_merged(tuned, small_config):
    def start(**changes) -> dict[str, np.ndarray]:
        config = small_config(**{**LORA, **changes}, init_from=str(tuned.path))
        spec = StateSpec.make(config, make_mesh(config.mesh, jax.devices()[:1]))
        return jax.device_get(load_params(tuned, spec))

    old = values(tuned)
    same = start()
    assert all(np.array_equal(same[path], old[path]) for path in old)
    for changes in ({"model__decoder__lora__rank": 2}, {"model__decoder__lora__rank": 0}):
        new = start(**changes)
        merged = merge(old, tuned.config.model.decoder.lora)
        for path, value in merged.items():
            np.testing.assert_allclose(new[path], value, atol=1e-6)
        adapters = {path for path in new if is_adapter(path)}
        assert len(adapters) == (12 if changes["model__decoder__lora__rank"] else 0)
        assert not any(new[path].any() for path in adapters if path.endswith("/b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__learning_rate__decoder": 0.0}, r"lora.rank=4 with optim.learning_rate.decoder=0"),
        ({"model__decoder__lora__targets": "nothing"}, r"targets='nothing' matches none of query"),
        ({"model__decoder__lora__targets": "("}, r"targets='\(' is not a valid regular expression"),
        ({"model__decoder__lora__rank": -1}, r"rank=-1 must be at least 0"),
    ],
)
def test_impossible_adapters_are_refused(changes, message, small_config):
    with pytest.raises(ConfigError, match=message):
        small_config(**{**LORA, **changes})
