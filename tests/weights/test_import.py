"""Imported models compute the same as torch's; weights that do not match are refused."""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from reference_models import (
    BASE,
    DECODERS,
    config_for,
    edit_json,
    load_model,
    logits_of,
    make_decoder,
    make_tower,
    randomised,
    save,
    torch_logits,
)
from safetensors.torch import load_file, save_file

from storm_jax.checkpoints import Checkpoints
from storm_jax.compression import VisualShape
from storm_jax.config import ConfigError
from storm_jax.models.storm import Storm
from storm_jax.params import flat_params
from storm_jax.run import Run
from storm_jax.weights import WeightsError
from storm_jax.weights.importer import Sources, import_run
from storm_jax.weights.positions import resample

MAX_ERROR = 1e-4
TOKENS = np.random.default_rng(0).integers(0, BASE["vocab_size"], (2, 70))


def import_of(out: pathlib.Path, vision: pathlib.Path, decoder: pathlib.Path, **changes) -> Run:
    import_run(config_for(**changes), Sources(str(vision), str(decoder)), out)
    return Run(out)


def torch_features(model: torch.nn.Module, frames: np.ndarray, layer: int, resampled: bool):
    pixels = torch.from_numpy((frames / 255.0 - 0.5) / 0.5).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        found = model(pixels, output_hidden_states=True, interpolate_pos_encoding=resampled)
    return found.hidden_states[layer].numpy()


def some_frames(size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, size, size, 3)).astype(np.uint8)


# Decoders.


@pytest.mark.parametrize("family", DECODERS)
def test_logits_of_every_decoder_equal_transformers(family, tower, tmp_path):
    model = make_decoder(family)
    run = import_of(tmp_path / "run", tower, save(model, tmp_path / "hub", family))
    expected = torch_logits(model, TOKENS)
    assert np.abs(expected).max() > 1
    assert np.abs(np.asarray(logits_of(load_model(run.path), TOKENS)) - expected).max() < MAX_ERROR


def test_a_config_in_the_old_layout_is_supported(tower, tmp_path):
    """As Qwen2-VL on the Hub: flat, rope_scaling with a type, torch_dtype."""
    model = make_decoder("qwen2_vl")
    folder = save(model, tmp_path / "hub", "qwen2_vl")

    def flatten_text(content: dict) -> None:
        rope = content["text_config"].pop("rope_parameters")
        text = {k: v for k, v in content.pop("text_config").items() if k != "model_type"}
        text["rope_theta"] = rope["rope_theta"]
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        text.pop("layer_types")
        content.update(text | {"torch_dtype": content.pop("dtype")})

    edit_json(folder / "config.json", flatten_text)
    run = import_of(tmp_path / "run", tower, folder)
    found = np.asarray(logits_of(load_model(run.path), TOKENS))
    assert np.abs(found - torch_logits(model, TOKENS)).max() < MAX_ERROR


def test_shards_equal_one_file(tower, decoder, tmp_path):
    shards = save(make_decoder("qwen2"), tmp_path / "hub", "qwen2", shard="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    one, many = import_of(tmp_path / "1", tower, decoder), import_of(tmp_path / "n", tower, shards)
    for path in one.checkpoints.shapes(0):
        np.testing.assert_array_equal(one.checkpoints.read(0, path), many.checkpoints.read(0, path))


@pytest.mark.parametrize("devices", [2, 8])
def test_an_import_on_many_devices_equals_one_device(tower, decoder, tmp_path, devices):
    """With 7 heads and a vocabulary of 307, some parameters are split and others are not."""
    one = import_of(tmp_path / "one", tower, decoder)
    many = import_of(tmp_path / "many", tower, decoder, mesh__fsdp=devices, mesh__data=8 // devices)
    for path in one.checkpoints.shapes(0):
        np.testing.assert_array_equal(one.checkpoints.read(0, path), many.checkpoints.read(0, path))
    split = load_model(many.path, devices)
    kernels = (split.decoder.layers.gate_up.kernel[...], split.decoder.embedding[...])
    assert all(not kernel.sharding.is_fully_replicated for kernel in kernels)
    found = np.asarray(logits_of(split, TOKENS))
    assert np.abs(found - np.asarray(logits_of(load_model(one.path), TOKENS))).max() < MAX_ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_checkpoint_keeps_the_dtype_of_the_files(dtype, tower, tmp_path):
    folder = save(make_decoder("qwen2").to(dtype), tmp_path / "hub", "qwen2")
    run = import_of(tmp_path / "run", tower, folder)
    stored = run.checkpoints.shapes(0)
    name = str(dtype).removeprefix("torch.")
    assert stored["decoder/layers/gate_up/kernel"].dtype == name
    assert stored["vision/patch/kernel"].dtype == "float32"
    assert stored["projector/stem/linear1/kernel"].dtype == "float32"
    assert load_model(run.path).decoder.embedding[...].dtype == jnp.float32


def test_a_stack_of_two_dtypes_is_stored_in_float32(tower, tmp_path):
    model = make_decoder("qwen2").to(torch.bfloat16)
    model.model.layers[1].mlp.up_proj.float()
    run = import_of(tmp_path / "run", tower, save(model, tmp_path / "hub", "qwen2"))
    stored = run.checkpoints.shapes(0)
    assert stored["decoder/layers/gate_up/kernel"].dtype == "float32"
    assert stored["decoder/layers/down/kernel"].dtype == "bfloat16"
    kernel = run.checkpoints.read(0, "decoder/layers/gate_up/kernel")
    expected = model.model.layers[1].mlp.up_proj.weight.detach().T.numpy()
    np.testing.assert_array_equal(kernel[1, :, 1], expected)


# Towers.


@pytest.mark.parametrize(
    ("size", "asked", "layer"),
    [(384, 384, -2), (448, 448, -2), (384, 448, -2), (448, 384, -1), (64, 56, -2)],
    ids=["odd grid", "448", "384 to 448", "448 to 384", "small"],
)
def test_features_of_a_tower_equal_transformers(size, asked, layer, decoder, tmp_path):
    model = make_tower(image_size=size)
    run = import_of(
        tmp_path / "run",
        save(model, tmp_path / "hub"),
        decoder,
        model__vision__image_size=asked,
        model__vision__feature_layer=layer,
    )
    frames = some_frames(asked)
    found = nnx.jit(lambda model: model.vision(frames))(load_model(run.path))
    expected = torch_features(model, frames, layer, resampled=True)
    assert np.abs(expected).max() > 0.5
    assert np.abs(np.asarray(found) - expected).max() < MAX_ERROR


WRAPPED = {
    "SigLIP with its text tower": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(
            vision_config=make_tower().config.to_dict(),
            text_config={
                "hidden_size": 24,
                "num_attention_heads": 3,
                "num_hidden_layers": 1,
                "vocab_size": 40,
            },
        )
    ),
    "PaliGemma": lambda: transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            vision_config=make_tower().config.to_dict() | {"vision_use_head": False},
            text_config={**BASE, "model_type": "gemma"},
            projection_dim=56,
        )
    ),
}


# The prefix of a tower today, and the prefixes in older files.
SAVED_AS = {
    "alone": ("", ("", "vision_model.", "model.vision_tower.")),
    "SigLIP with its text tower": ("vision_model.", ("vision_model.",)),
    "PaliGemma": ("vision_tower.", ("vision_tower.", "vision_tower.vision_model.")),
}


@pytest.mark.parametrize(
    ("kind", "prefix"), [(kind, old) for kind, (_, all_) in SAVED_AS.items() for old in all_]
)
def test_a_tower_is_found_inside_larger_models_and_under_old_names(kind, prefix, decoder, tmp_path):
    """Fixed-size SigLIP2 is a SigLIP with another text tower; VILA's export has the old prefix."""
    whole = make_tower() if kind == "alone" else randomised(WRAPPED[kind]())
    folder = save(whole, tmp_path / "hub")
    now = SAVED_AS[kind][0]
    rename_tensors(folder, now, lambda name: prefix + name.removeprefix(now))
    run = import_of(tmp_path / "run", folder, decoder)
    frames = some_frames(56)
    found = nnx.jit(lambda model: model.vision(frames))(load_model(run.path))
    alone = {"alone": lambda: whole, "PaliGemma": lambda: whole.model.vision_tower}
    tower = alone.get(kind, lambda: whole.vision_model)()
    expected = torch_features(tower, frames, -2, resampled=False)
    assert np.abs(np.asarray(found) - expected).max() < MAX_ERROR


@pytest.mark.parametrize("side", [4, 9])
def test_tower_and_decoder_of_smolvlm_equal_transformers(side, tmp_path):
    """Its features are those after the final norm; its positions are raster order for a full square."""
    size = side * 14
    model = randomised(
        transformers.SmolVLMForConditionalGeneration(
            transformers.SmolVLMConfig(
                text_config={**BASE, "model_type": "llama", "pad_token_id": 0},
                vision_config={
                    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
                    "num_attention_heads": 3, "image_size": size, "patch_size": 14,
                },
                scale_factor=2, image_token_id=300, tie_word_embeddings=False,
            )
        )
    )  # fmt: skip
    folder = save(model, tmp_path / "hub", "llama3")
    run = import_of(
        tmp_path / "run", folder, folder, model__vision__image_size=size,
        model__vision__feature_layer=-1, model__vision__final_norm=True,
    )  # fmt: skip
    frames = some_frames(size)
    found = nnx.jit(lambda model: model.vision(frames))(load_model(run.path))
    pixels = torch.from_numpy((frames / 255.0 - 0.5) / 0.5).float().permute(0, 3, 1, 2)
    mask = torch.ones(len(frames), side, side, dtype=torch.bool)
    with torch.no_grad():
        tower = model.model.vision_model(pixel_values=pixels, patch_attention_mask=mask)
        tokens = np.random.default_rng(0).integers(0, 290, (2, 20))
        expected = model(input_ids=torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(np.asarray(found) - tower.last_hidden_state.numpy()).max() < MAX_ERROR
    logits = np.asarray(logits_of(load_model(run.path), tokens))
    assert np.abs(logits - expected).max() < MAX_ERROR * np.abs(expected).max()


def rename_tensors(folder: pathlib.Path, start: str, rename) -> None:
    """Renames the tensors whose name starts with `start`."""
    path = folder / "model.safetensors"
    tensors = {rename(k) if k.startswith(start) else k: v for k, v in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def test_position_embeddings_are_resampled_as_torch_does():
    rng = np.random.default_rng(0)
    for old, new in ((27, 32), (32, 27), (16, 32), (3, 8), (8, 3), (1, 4), (5, 5)):
        embeddings = rng.standard_normal((old * old, 3)).astype(np.float32)
        grid = torch.from_numpy(embeddings.reshape(1, old, old, 3)).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic")
        expected = resized.permute(0, 2, 3, 1).reshape(new * new, 3).numpy()
        assert np.abs(resample(embeddings, new) - expected).max() < 1e-5
    with pytest.raises(ValueError, match="not a square grid"):
        resample(np.zeros((6, 3)), 4)


# The run.


def test_the_projector_is_initialised_as_in_a_new_model(tower, decoder, tmp_path):
    run = import_of(tmp_path / "run", tower, decoder)
    fresh = nnx.split(Storm(run.config.model, rngs=nnx.Rngs(run.config.train.seed)))[1]
    flat = flat_params(fresh)
    for path in (path for path in flat if path.startswith("projector/")):
        np.testing.assert_allclose(run.checkpoints.read(0, path), flat[path], rtol=1e-5, atol=1e-6)


def test_sizes_come_from_config_json_and_the_rest_from_our_configuration(
    tower, decoder, tmp_path, capsys
):
    run = import_of(tmp_path / "run", tower, decoder, model__vision__image_size=42)
    model = run.config.model
    assert (model.decoder.num_heads, model.decoder.num_kv_heads, model.decoder.depth) == (7, 1, 3)
    assert (model.vision.image_size, model.vision.patch_size, model.vision.width) == (42, 14, 24)
    assert model.mamba.depth == 1 and model.decoder.max_positions == 4096
    printed = capsys.readouterr().out
    assert "model.decoder.width=56 of config.json replaces 96" in printed
    assert "resampled from 4 x 4 to 3 x 3" in printed
    assert "not needed: head.* (11)" in printed


def test_a_field_set_by_hand_that_the_weights_contradict_is_refused(tower, decoder, tmp_path):
    config = config_for(model__decoder__width=64)
    with pytest.raises(ConfigError, match=r"model.decoder.width=64, not 56"):
        import_run(
            config,
            Sources(str(tower), str(decoder)),
            tmp_path / "run",
            ["model.decoder.width", "train.steps"],
        )
    assert not (tmp_path / "run").exists()


def test_the_tokenizer_and_its_end_tokens_are_copied(tower, tmp_path):
    folder = save(make_decoder("qwen2"), tmp_path / "hub", "qwen2")
    original = transformers.AutoTokenizer.from_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    run = import_of(tmp_path / "run", tower, folder)
    copied = run.tokenizer()
    assert copied.get_vocab() == original.get_vocab()
    assert (copied.chat_template, copied.eos_token) == (original.chat_template, original.eos_token)
    assert json.loads((run.tokenizer_path / "generation_config.json").read_text()) == {
        "eos_token_id": [0, 7]
    }


@pytest.mark.parametrize(
    "content",
    ["{", "[]", *(f'{{"eos_token_id": {i}}}' for i in ('["a"]', '"a"', "true", "-1", "1e400"))],
)
def test_a_damaged_generation_config_is_named(content, tower, tmp_path):
    folder = save(make_decoder("qwen2"), tmp_path / "hub", "qwen2")
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(
        ConfigError, match=rf"{folder}/generation_config.json(: eos_token_id contains| is damaged)"
    ):
        import_of(tmp_path / "run", tower, folder)
    assert not (tmp_path / "run").exists()


def test_an_import_initialises_adapters(tower, decoder, tmp_path):
    run = import_of(
        tmp_path / "run",
        tower,
        decoder,
        model__decoder__lora__rank=4,
        optim__learning_rate__decoder=1e-4,
    )
    stored = run.checkpoints.shapes(0)
    assert stored["decoder/layers/query/lora/a"].shape == (3, 56, 4)
    assert not run.checkpoints.read(0, "decoder/layers/query/lora/b").any()
    found = np.asarray(logits_of(load_model(run.path), TOKENS))
    assert np.abs(found - torch_logits(make_decoder("qwen2"), TOKENS)).max() < MAX_ERROR


def test_the_whole_model_runs_on_imported_weights(tower, decoder, tmp_path):
    model = load_model(import_of(tmp_path / "run", tower, decoder).path)
    frames = some_frames(56)[None]
    clip, group = jnp.ones((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.int32)
    table = nnx.jit(lambda m: m.encode(frames, clip, group, VisualShape(1, (1,))))(model)
    assert table.shape == (1, 4, 56) and bool(jnp.isfinite(table).all())


# Weights that do not match.


def delete(name: str):
    return lambda tensors: tensors.pop(name)


def rename(name: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(name)})


def change(name: str, function):
    return lambda tensors: tensors.update({name: function(tensors[name]).contiguous()})


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "deleted": (delete(UP), [f"{UP} is missing"]),
    "renamed": (rename(UP, "model.layers.1.mlp.upp.weight"), ["upp.weight is unknown", f"{UP} is missing"]),
    "transposed": (change(UP, torch.t), [f"{UP} is (56, 48), not (48, 56)"]),
    "truncated": (change(UP, lambda t: t[:40]), [f"{UP} is (40, 56), not (48, 56)"]),
    "quantised": (change(UP, lambda t: t.to(torch.int8)), [f"{UP} is I8, not one of F32"]),
    "another layer": (lambda t: t.update({UP.replace("1", "3"): t[UP].clone()}), ["layers.3.mlp.up_proj.weight is unknown"]),
    "several": (
        lambda t: (t.pop(UP), t.pop("lm_head.weight"), t.pop("model.norm.weight")),
        [UP, "lm_head.weight", "model.norm.weight"],
    ),
    "all": (lambda t: (t.clear(), t.update(a=torch.zeros(1))), ["and 19 more"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_do_not_match_are_all_listed_and_nothing_is_written(damage, tower, tmp_path):
    folder = save(make_decoder("qwen2"), tmp_path / "hub", "qwen2")
    tensors = load_file(folder / "model.safetensors")
    apply, expected = DAMAGES[damage]
    apply(tensors)
    save_file(tensors, folder / "model.safetensors")
    refuse(tower, folder, tmp_path / "out" / "run", *expected)


def refuse(vision, decoder, out, *expected: str, **changes) -> None:
    with pytest.raises(WeightsError) as caught:
        import_of(out, vision, decoder, **changes)
    for text in expected:
        assert text in str(caught.value), str(caught.value)
    assert not out.exists()
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_problems_of_both_components_are_listed_together(tmp_path):
    vision = save(make_tower(), tmp_path / "vision")
    decoder = save(make_decoder("qwen2"), tmp_path / "decoder", "qwen2")
    for folder, name in ((vision, "post_layernorm.bias"), (decoder, "model.norm.weight")):
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(name)
        save_file(tensors, folder / "model.safetensors")
    refuse(vision, decoder, tmp_path / "out" / "run", "post_layernorm.bias", "model.norm.weight")


FILES = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "missing shard": (lambda f: sorted(f.glob("model-*"))[1].unlink(), "00002-of-"),
    "truncated shard": (
        lambda f: (p := sorted(f.glob("model-*"))[1]).write_bytes(p.read_bytes()[:-100]),
        "is damaged or truncated",
    ),
    "empty shard": (
        lambda f: sorted(f.glob("model-*"))[1].write_bytes(b""),
        "is damaged or truncated",
    ),
    "broken index": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        "index.json is damaged",
    ),
    "contradicting index": (
        lambda f: edit_json(
            f / "model.safetensors.index.json",
            lambda c: c["weight_map"].update({"a": next(iter(c["weight_map"].values()))}),
        ),
        "a is listed in model.safetensors.index.json but is not in",
    ),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "no safetensors file"),
    "no index": (
        lambda f: (f / "model.safetensors.index.json").unlink(),
        "safetensors files and no model.safetensors.index.json",
    ),
}


@pytest.mark.parametrize("damage", FILES)
def test_damaged_files_are_reported_and_nothing_is_written(damage, tower, tmp_path):
    folder = save(make_decoder("qwen2"), tmp_path / "hub", "qwen2", shard="150KB")
    FILES[damage][0](folder)
    refuse(tower, folder, tmp_path / "out" / "run", str(folder), FILES[damage][1])


FIELDS = {
    "hidden_act": ("gelu", "hidden_act='gelu' is not supported, only 'silu'"),
    "use_sliding_window": (True, "use_sliding_window=True is not supported"),
    "layer_types": (
        ["full_attention", "sliding_attention", "full_attention"],
        "layer_types has sliding_attention",
    ),
    "rope_parameters": (
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
        "rope_type='yarn' is not supported",
    ),
    "model_type": ("mistral", "is not supported, only qwen2"),
    "num_hidden_layers": (4, "`num_hidden_layers` (4) must be equal"),
    "intermediate_size": (40, "up_proj.weight is (48, 56), not (40, 56)"),
    "hidden_size": (64, "embed_tokens.weight is (307, 56), not (307, 64)"),
    "vocab_size": (300, "embed_tokens.weight is (307, 56), not (300, 56)"),
    "quantization_config": (
        {"quant_method": "fp8"},
        "quantization_config (fp8): quantized weights are not",
    ),
}


@pytest.mark.parametrize("field", FIELDS)
def test_an_unsupported_config_is_reported_by_field_or_tensor(field, tower, tmp_path):
    folder = save(make_decoder("qwen2"), tmp_path / "hub", "qwen2")
    value, message = FIELDS[field]
    edit_json(folder / "config.json", lambda content: content.update({field: value}))
    refuse(tower, folder, tmp_path / "out" / "run", message)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_with_tied_embeddings_is_used_if_it_differs(same, tower, tmp_path, capsys):
    """As in transformers, which ties two matrices only if they are equal."""
    folder = save(make_decoder("qwen2"), tmp_path / "hub", "qwen2")
    tensors = load_file(folder / "model.safetensors")
    if same:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", lambda c: c.update(tie_word_embeddings=True))
    run = import_of(tmp_path / "run", tower, folder)
    assert run.config.model.decoder.tie_embeddings == same
    assert ("lm_head.weight differs" in capsys.readouterr().out) != same
    expected = torch_logits(transformers.AutoModelForCausalLM.from_pretrained(folder), TOKENS)
    found = np.asarray(logits_of(load_model(run.path), TOKENS))
    assert np.abs(found - expected).max() < MAX_ERROR


def test_no_code_from_a_folder_runs(tower, decoder, tmp_path):
    folder = save(make_decoder("qwen2"), tmp_path / "hub", "qwen2")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    entry = {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "foo"}
    edit_json(folder / "config.json", lambda c: c.update(entry))
    refuse(tower, folder, tmp_path / "out" / "run", "config.json cannot be read")
    code = tmp_path / "projector"
    code.mkdir()
    fields = {"stem": {}, "mixer": "evil:Class", "mixer_args": {}, "mamba": {}}
    (code / "config.json").write_text(json.dumps(fields))
    sources = Sources(str(tower), str(decoder), str(code))
    with pytest.raises(WeightsError, match=r"would run mixer='evil:Class'.*If you trust"):
        import_run(config_for(), sources, tmp_path / "out" / "run")
    assert not (tmp_path / "ran").exists()


def test_a_system_text_that_the_template_rejects_is_reported(tower, tmp_path):
    folder = save(make_decoder("qwen2"), tmp_path / "hub", "qwen2")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + template
    )
    with pytest.raises(ConfigError, match=r"data.system='Hi'.*no system"):
        import_of(tmp_path / "run", tower, folder, data__system="Hi")
    import_of(tmp_path / "run", tower, folder, data__system="")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tower, tmp_path):
    folder = save(make_decoder("qwen2", vocab_size=200), tmp_path / "hub", "qwen2")
    refuse(tower, folder, tmp_path / "out" / "run", str(folder), "290 entries", "vocab_size=200")


def test_out_may_be_a_symlink_and_must_be_a_folder(tower, decoder, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    import_of(tmp_path / "link", tower, decoder)
    assert (tmp_path / "big/config.json").exists()
    (tmp_path / "file").write_text("")
    for out in ("file", "file/run"):
        with pytest.raises(WeightsError, match=rf"--out={tmp_path}/{out} cannot be a folder"):
            import_of(tmp_path / out, tower, decoder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"model_type": "siglip2_vision_model"}, "model_type='siglip2_vision_model'"),
        ({"image_size": [56, 42]}, "image_size=[56, 42] must be a number"),
        ({"patch_size": 7}, "patch_embedding.weight is (24, 3, 14, 14), not (24, 3, 7, 7)"),
        ({"image_size": 112}, "position_embedding.weight is (16, 24), not (64, 24)"),
    ],
)
def test_a_tower_that_is_not_supported_is_refused_by_field(changes, message, decoder, tmp_path):
    folder = save(make_tower(), tmp_path / "hub")
    edit_json(folder / "config.json", lambda content: content.update(changes))
    refuse(folder, decoder, tmp_path / "out" / "run", message)


def test_a_template_that_changes_earlier_answers_is_replaced_by_chatml(tower, tmp_path, capsys):
    """Qwen3's drops the thoughts of earlier answers."""
    folder = save(make_decoder("qwen3"), tmp_path / "hub", "qwen3")
    thinking = (folder / "chat_template.jinja").read_text().replace(
        "m['content']", "('<think></think>' if loop.last else '') + m['content']"
    )  # fmt: skip
    (folder / "chat_template.jinja").write_text(thinking)
    run = import_of(tmp_path / "run", tower, folder)
    assert "the chat template is replaced by ChatML" in capsys.readouterr().out
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    text = run.tokenizer().apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n" * 2


def test_a_tokenizer_without_template_or_markers_is_refused(tower, tmp_path):
    folder = save(make_decoder("llama3"), tmp_path / "hub", "llama3")
    made = transformers.AutoTokenizer.from_pretrained(folder)
    assert "<|im_start|>" in made.get_added_vocab()  # from the tokenizer it was built from
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|other|>"))
    edit_json(folder / "tokenizer_config.json", lambda c: c.pop("extra_special_tokens", None))
    (folder / "chat_template.jinja").unlink()
    refuse(tower, folder, tmp_path / "out" / "run", "chat template cannot be used")


def test_a_folder_without_a_tokenizer_is_reported(tower, tmp_path):
    folder = save(make_decoder("qwen2"), tmp_path / "hub")
    with pytest.raises(ConfigError, match=f"{folder} contains no tokenizer"):
        import_of(tmp_path / "run", tower, folder)


def test_nothing_is_overwritten(tower, decoder, tmp_path):
    (tmp_path / "run").mkdir()
    import_of(tmp_path / "run", tower, decoder)  # an empty folder is accepted
    before = (tmp_path / "run/config.json").stat().st_mtime_ns
    with pytest.raises(WeightsError, match="exists; nothing is overwritten"):
        import_of(tmp_path / "run", tower, decoder)
    assert (tmp_path / "run/config.json").stat().st_mtime_ns == before


def test_a_failed_write_leaves_nothing(tower, decoder, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(Checkpoints, "write_params", fail)
    with pytest.raises(OSError, match="No space left"):
        import_of(tmp_path / "out" / "run", tower, decoder)
    assert list((tmp_path / "out").iterdir()) == []


def test_folders_that_killed_imports_left_are_deleted(tower, decoder, tmp_path):
    killed, running = tmp_path / "run.storm-a1.tmp", tmp_path / "run.storm-b2.tmp"
    for folder in (killed, running):
        (folder / "checkpoints").mkdir(parents=True)
        os.utime(folder, (0, 0))
    lock = os.open(running, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    import_of(tmp_path / "run", tower, decoder)
    os.close(lock)
    assert {path.name for path in tmp_path.iterdir()} >= {"run", running.name}
    assert not killed.exists()


def test_a_full_disk_is_reported_before_reading(tower, decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    refuse(tower, decoder, tmp_path / "out" / "run", "GB free, but the run needs")


assert jax.device_count() == 8
