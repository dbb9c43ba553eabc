"""Small random transformers models, saved in the Hub's format with tokenizer and chat template."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from flax.traverse_util import unflatten_dict
from rows_by_hand import build_rows

from configs import tiny
from storm_jax.compression import Grid
from storm_jax.config import RunConfig, from_dict
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.rows import RowSample, RowShape
from storm_jax.models.storm import Storm
from storm_jax.params import abstract_model, flat_params, with_sharding
from storm_jax.run import Run
from storm_jax.sharding import make_mesh, param_shardings
from storm_jax.text.bpe import train_tokenizer
from storm_jax.text.conversation import ConversationEncoder

torch.set_num_threads(1)  # on busy cores, several threads wait for each other

TEXTS = ["What colour was the flash? red, green or blue.", "You are a helpful assistant"]
# Like Qwen2's template, it adds a default system turn.
QWEN = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe Qwen.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
BASE = {
    "vocab_size": 307,
    "hidden_size": 56,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,  # short wavelengths, so that 60 tokens reach every branch
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# The class and configuration fields of every decoder that can be imported.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"rope_parameters": PLAIN_ROPE}),
    "qwen2_tied": ("Qwen2", {"rope_parameters": PLAIN_ROPE, "tie_word_embeddings": True}),
    "qwen2.5": ("Qwen2", {"num_key_value_heads": 7, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"rope_parameters": LLAMA_ROPE, "rms_norm_eps": 1e-5}),
    "qwen3": ("Qwen3", {"rope_parameters": PLAIN_ROPE, "head_dim": 10}),
    "qwen2_vl": ("Qwen2VL", {}),
}


def make_tokenizer(family: str) -> transformers.PreTrainedTokenizerBase:
    """Creates a small tokenizer with the special tokens and chat template of a family."""
    tokenizer = train_tokenizer(TEXTS, 290)
    if family != "llama3":
        tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", QWEN  # as in base Qwen2
        return tokenizer
    tokenizer.add_special_tokens(
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "extra_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
        }
    )
    tokenizer.pad_token, tokenizer.chat_template = None, LLAMA
    return tokenizer


def make_decoder(family: str, **changes: Any) -> torch.nn.Module:
    """Creates a model with random parameters; norms are around one."""
    name, fields = DECODERS[family]
    fields = {**BASE, **fields, **changes}
    if name == "Qwen2VL":
        tie = fields.pop("tie_word_embeddings")
        rope = {**PLAIN_ROPE, "mrope_section": [1, 1, 2]}
        config = transformers.Qwen2VLConfig(
            text_config={**fields, "rope_parameters": rope},
            vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 56, "num_heads": 2},
            tie_word_embeddings=tie,
        )
        return randomised(transformers.Qwen2VLForConditionalGeneration(config))
    config = getattr(transformers, f"{name}Config")(**fields)
    return randomised(getattr(transformers, f"{name}ForCausalLM")(config))


def make_tower(**changes: Any) -> transformers.SiglipVisionModel:
    fields = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 56,
        "patch_size": 14,
    }
    return randomised(
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**fields | changes))
    )


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1 if "norm" in name and "weight" in name else noise)
    return model.eval()


def save(
    model: torch.nn.Module, folder: pathlib.Path, tokenizer: str = "", shard: str = "5GB"
) -> pathlib.Path:
    """Saves a model and, if given, the tokenizer of a family."""
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if tokenizer:
        make_tokenizer(tokenizer).save_pretrained(folder)
    return folder


def config_for(**changes: Any) -> RunConfig:
    """Returns a configuration whose sizes differ from all models here; keywords are dotted fields."""
    config = tiny.get_config("stage=align")
    fields = {
        "model__vision__image_size": 56,
        "model__vision__feature_layer": -2,
        "model__mamba__depth": 1,
        **changes,
    }
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return from_dict(RunConfig, config)


def load_model(path: pathlib.Path, devices: int = 1) -> Storm:
    """Loads the model of a run from its latest checkpoint, in fp32."""
    run = Run(path)
    config = dataclasses.replace(run.config.mesh, data=1, fsdp=devices)
    graphdef, abstract = abstract_model(run.config.model)
    mesh = make_mesh(config, jax.devices()[:devices])
    target = with_sharding(flat_params(abstract), param_shardings(abstract, mesh))
    params = run.checkpoints.restore(target, run.checkpoints.resolve(None))
    return nnx.merge(graphdef, unflatten_dict(params, sep="/"))


def encoder_of(run: Run) -> SampleEncoder:
    """The encoder of a run's samples."""
    config = run.config
    return SampleEncoder(
        text=ConversationEncoder(run.tokenizer(), config.data.system), grid=Grid.of(config.model),
        compression=config.compression, frames=config.data.frames, layout=config.model.layout,
    )  # fmt: skip


def packed_logits(run: Run, rows: Sequence[RowSample]) -> list[np.ndarray]:
    """Logits [S, V] of each sample, all packed into one row."""
    config, lengths = run.config, [len(row.encoded) for row in rows]
    shape = RowShape(
        tokens=-(-sum(lengths) // 256) * 256, frames=40, image_size=config.model.vision.image_size,
        grid=Grid.of(config.model), compressions=(config.compression,),
    )  # fmt: skip
    batch = {k: jnp.asarray(v) for k, v in build_rows([rows], 0, shape).items()}
    visual = shape.visual
    logits = nnx.jit(lambda model, batch: model(batch, visual) @ model.decoder.head())
    found = np.asarray(logits(load_model(run.path), batch)[0, : sum(lengths)])
    return np.split(found, np.cumsum(lengths)[:-1])


def logits_of(model: Storm, tokens: Any) -> jax.Array:
    """Returns fp32 logits [B, S, V] of text."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)

    @nnx.jit
    def logits(model: Storm) -> jax.Array:
        hidden, _ = model.decode(model.decoder.embed(jnp.asarray(tokens)), positions)
        return hidden @ model.decoder.head()

    return logits(model)


def torch_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Returns fp32 logits [B, S, V] of a transformers model."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def edit_json(path: pathlib.Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class Mixer(nnx.Module):
    """A custom projector with parameters in several layouts, some of them in a list."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.layers = nnx.List([nnx.Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(2)])
        self.scale = nnx.Param(jnp.ones((2, 3, width)))

    def __call__(self, x: jax.Array, frame_clip: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = x + layer(x) * self.scale[...].sum((0, 1))
        return x
