"""An exported run loads in transformers, and can be imported again unchanged."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from reference_models import (
    BASE,
    DECODERS,
    config_for,
    load_model,
    logits_of,
    make_decoder,
    make_tower,
    save,
    torch_logits,
)
from safetensors.torch import load_file

from storm_jax.models.lora import is_adapter
from storm_jax.params import abstract_model, flat_params
from storm_jax.run import Run, RunError
from storm_jax.weights import WeightsError, exporter, tensors
from storm_jax.weights.exporter import export_run
from storm_jax.weights.importer import Sources, import_run

MAX_ERROR = 1e-5
TOKENS = np.random.default_rng(0).integers(0, BASE["vocab_size"], (2, 40))


def read_all(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def random_run(path: pathlib.Path, tokenizer: pathlib.Path, **changes) -> Run:
    """A run of the tiny preset with random parameters, including adapters."""
    config = config_for(model__vision__image_size=32, **changes)
    _, abstract = abstract_model(config.model)
    rng = np.random.default_rng(0)
    flat = flat_params(abstract)
    drawn = {
        name: jnp.asarray(rng.standard_normal(leaf.shape) * 0.1, jnp.float32)
        for name, leaf in flat.items()
    }
    run = Run(path)
    run.prepare(config, tokenizer)
    run.checkpoints.write_params(drawn, {})
    return run


@pytest.fixture
def tokenizer(decoder, tmp_path) -> pathlib.Path:
    transformers.AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_loads_in_transformers_with_its_tokenizer(family, tower, tmp_path):
    model = make_decoder(family)
    folder = save(model, tmp_path / "hub", family)
    import_run(config_for(), Sources(str(tower), str(folder)), tmp_path / "run")
    export_run(Run(tmp_path / "run"), tmp_path / "out")
    out = tmp_path / "out/decoder"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert np.abs(torch_logits(loaded, TOKENS) - torch_logits(model, TOKENS)).max() < MAX_ERROR
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(f) for f in (out, folder))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    stops = loaded.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    assert {theirs.eos_token_id} <= set(stops)
    assert loaded.config.max_position_embeddings == 4096


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_in_the_imported_dtype_is_exact(dtype, tmp_path):
    vision = save(make_tower().to(getattr(torch, dtype)), tmp_path / "tower")
    decoder = save(make_decoder("qwen2").to(getattr(torch, dtype)), tmp_path / "hub", "qwen2")
    import_run(config_for(), Sources(str(vision), str(decoder)), tmp_path / "run")
    export_run(Run(tmp_path / "run"), tmp_path / "out", dtype=dtype)
    for part, source in (("vision", vision), ("decoder", decoder)):
        found, expected = read_all(tmp_path / "out" / part), read_all(source)
        expected = {k: v for k, v in expected.items() if not k.startswith("head.")}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name


def test_the_tower_loads_in_transformers_with_its_preprocessor(decoder, tmp_path):
    model = make_tower(image_size=64)
    folder = save(model, tmp_path / "tower")
    config = config_for(model__vision__image_size=64)
    import_run(config, Sources(str(folder), str(decoder)), tmp_path / "run")
    export_run(Run(tmp_path / "run"), tmp_path / "out")
    loaded = transformers.SiglipVisionModel.from_pretrained(tmp_path / "out/vision").eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    processor = transformers.SiglipImageProcessorPil.from_pretrained(tmp_path / "out/vision")
    pixels = torch.from_numpy(processor(image)["pixel_values"][0])[None].float()
    with torch.no_grad():
        found, expected = loaded(pixels), model(pixels)
    error = (found.last_hidden_state - expected.last_hidden_state).abs().max()
    assert error < MAX_ERROR < expected.last_hidden_state.abs().max()


@pytest.mark.parametrize(
    "mixer", ["mamba1", "forward", "mamba2", "none", "mlp_downsample", "reference_models:Mixer"]
)
def test_importing_an_export_restores_the_run(mixer, tokenizer, tmp_path):
    changes = {"model__mixer": mixer}
    if mixer == "forward":
        changes = {"model__mamba__direction": "forward"}
    if mixer == "mlp_downsample":
        changes = {"model__stem__kind": mixer, "model__stem__downsample": 3}
        changes |= {"model__layout__after_group": "\n"}
    if mixer == "mamba2":
        changes = {"model__mixer": "mamba2", "model__mamba__head_dim": 32}
    run = random_run(tmp_path / "run", tokenizer, **changes)
    out = tmp_path / "out"
    export_run(run, out)
    parts = [str(out / part) for part in ("vision", "decoder", "projector")]
    named = {"model__mixer": mixer} if ":" in mixer else {}
    config = config_for(model__vision__image_size=32, **named)
    again = import_run(config, Sources(*parts), tmp_path / "2")
    assert again.model == run.config.model
    if mixer == "reference_models:Mixer":
        kernel = load_model(tmp_path / "2").projector.mixer.layers[1].kernel[...]
        expected = run.checkpoints.read(0, "projector/mixer/layers/1/kernel")
        np.testing.assert_array_equal(kernel, expected)
    for path in run.checkpoints.shapes(0):
        np.testing.assert_array_equal(
            Run(tmp_path / "2").checkpoints.read(0, path), run.checkpoints.read(0, path)
        )


def test_the_projector_has_mamba_names_and_layouts(tokenizer, tmp_path):
    run = random_run(tmp_path / "run", tokenizer)
    export_run(run, tmp_path / "out")
    found = read_all(tmp_path / "out/projector")
    mixer = transformers.models.mamba.modeling_mamba.MambaMixer(
        transformers.MambaConfig(
            hidden_size=96,
            state_size=8,
            conv_kernel=4,
            expand=2,
            use_bias=False,
            num_hidden_layers=1,
        ),
        layer_idx=0,
    )
    for name, parameter in mixer.named_parameters():
        shared = name.split(".")[0] in ("in_proj", "out_proj")
        for direction in ("",) if shared else ("forward.", "backward."):
            assert found[f"layers.0.mixer.{direction}{name}"].shape == parameter.shape
    config = json.loads((tmp_path / "out/projector/config.json").read_text())
    assert config["mamba"]["d_state"] == 8
    assert (config["vision_width"], config["decoder_width"]) == (64, 96)


def test_adapters_are_merged(tokenizer, tmp_path):
    lora = {
        "model__decoder__lora__rank": 3,
        "model__decoder__lora__targets": "query|out|gate_up",
        "optim__learning_rate__decoder": 1e-4,
    }
    run = random_run(tmp_path / "run", tokenizer, **lora)
    assert any(is_adapter(path) for path in run.checkpoints.shapes(0))
    export_run(run, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/decoder")
    expected = np.asarray(logits_of(load_model(run.path), TOKENS))
    without = random_run(tmp_path / "without", tokenizer)
    assert np.abs(np.asarray(logits_of(load_model(without.path), TOKENS)) - expected).max() > 0.1
    assert (
        np.abs(torch_logits(loaded, TOKENS) - expected).max() < MAX_ERROR * np.abs(expected).max()
    )


def test_large_exports_are_sharded(decoder, tower, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "SHARD_BYTES", 50_000)
    import_run(config_for(), Sources(str(tower), str(decoder)), tmp_path / "run")
    export_run(Run(tmp_path / "run"), tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out/decoder").glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/decoder")
    assert (
        np.abs(torch_logits(loaded, TOKENS) - torch_logits(make_decoder("qwen2"), TOKENS)).max()
        < MAX_ERROR
    )
    assert not list((tmp_path / "out").rglob("*.part"))


def test_a_trained_run_is_exported_in_its_dtype(trained_run, tmp_path):
    export_run(Run(trained_run), tmp_path / "out", dtype="bfloat16")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/decoder")
    assert loaded.dtype == torch.bfloat16
    expected = Run(trained_run).checkpoints.read(2, "decoder/embedding")
    found = loaded.get_input_embeddings().weight.detach().float().numpy()
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16).astype(np.float32))


@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_a_model_folder_as_tokenizer_leaves_no_trace(shard, small_config, tmp_path, monkeypatch):
    """Its weights and config.json would be loaded instead of the trained ones."""
    other = save(make_decoder("llama3"), tmp_path / "other", "llama3", shard=shard)
    run = random_run(tmp_path / "run", other)
    names = {path.name for path in run.tokenizer_path.iterdir()}
    assert names == {
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "digests.json",
    }  # fmt: skip
    (run.tokenizer_path / "config.json").write_text("{}")  # as in older runs
    (run.tokenizer_path / "model.safetensors").write_bytes(b"stale")
    monkeypatch.setattr(tensors, "SHARD_BYTES", 50_000)
    export_run(run, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/decoder")
    expected = np.asarray(logits_of(load_model(run.path), TOKENS))
    assert (
        np.abs(torch_logits(loaded, TOKENS) - expected).max() < MAX_ERROR * np.abs(expected).max()
    )


def test_merging_into_bfloat16_kernels_rounds_once(tokenizer, tmp_path):
    lora = {"model__decoder__lora__rank": 2, "optim__learning_rate__decoder": 1e-4}
    run = random_run(tmp_path / "run", tokenizer, **lora)
    params = {path: run.checkpoints.read(0, path) for path in run.checkpoints.shapes(0)}
    path = "decoder/layers/down/kernel"
    params[path] = params[path].astype(jnp.bfloat16)
    for name in (name for name in params if name.endswith("lora/b")):
        params[name] *= 1e-3  # far below the kernel's rounding
    shutil.rmtree(run.checkpoints.path)
    run.checkpoints.write_params({name: jnp.asarray(v) for name, v in params.items()}, {})
    export_run(run, tmp_path / "out", dtype="float32")
    found = read_all(tmp_path / "out/decoder")["model.layers.1.mlp.down_proj.weight"].numpy().T
    a, b = (params[f"decoder/layers/down/lora/{m}"][1].astype(np.float64) for m in "ab")
    update = a @ b * run.config.model.decoder.lora.alpha / 2
    expected = params[path][1].astype(np.float64) + update
    np.testing.assert_allclose(found, expected, atol=np.abs(update).max() / 1000)


def test_values_beyond_float16_are_refused(tokenizer, tmp_path):
    run = random_run(tmp_path / "run", tokenizer)
    params = {
        path: jnp.asarray(run.checkpoints.read(0, path)) for path in run.checkpoints.shapes(0)
    }
    params["decoder/norm/scale"] = params["decoder/norm/scale"].at[0].set(1e5)
    shutil.rmtree(run.checkpoints.path)
    run.checkpoints.write_params(params, {})
    with pytest.raises(
        WeightsError, match=r"model.norm.weight has values beyond the range of float16"
    ):
        export_run(run, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    export_run(run, tmp_path / "out", dtype="bfloat16")


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(trained_run, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("")
    with pytest.raises(WeightsError, match="exists; nothing is overwritten"):
        export_run(Run(trained_run), tmp_path / "out")
    with pytest.raises(RunError, match="no checkpoint of step 7"):
        export_run(Run(trained_run), tmp_path / "other", step=7)

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(exporter.ShardWriter, "close", fail)
    with pytest.raises(OSError, match="No space left"):
        export_run(Run(trained_run), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_decoder_unknown_to_transformers_is_refused(tokenizer, tmp_path):
    run = random_run(tmp_path / "run", tokenizer, model__decoder__qk_norm=True)
    with pytest.raises(WeightsError, match="qkv_bias=True and qk_norm=True"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_projector_is_refused(tower, decoder, tmp_path):
    with pytest.raises(WeightsError, match=r"is not the config.json of an exported projector"):
        import_run(config_for(), Sources(str(tower), str(decoder), str(tower)), tmp_path / "run")
    assert jax.device_count() == 8 and not (tmp_path / "run").exists()
