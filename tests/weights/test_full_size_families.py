"""Every tensor of a public video model of full size has its place and shape in our model. Only shapes are made."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import torch
import transformers
from families import vila_projector
from family_checks import run_config

from storm_jax.params import abstract_model, flat_params
from storm_jax.sharding import make_mesh
from storm_jax.weights import importer
from storm_jax.weights.importer import Sources
from storm_jax.weights.tensors import Tensor

SO400M = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
BASE_512 = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 512, "patch_size": 16,
}  # fmt: skip
QWEN2_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
QWEN2_HALF_B = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 152000, "tie_word_embeddings": True,
}  # fmt: skip


def llama(width: int, mlp: int, depth: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 64, "vocab_size": 49280, "pad_token_id": 2,
    }  # fmt: skip


def shapes_of(model: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    tied = model.config.tie_word_embeddings if hasattr(model, "lm_head") else False
    return {
        prefix + name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if not (tied and name == "lm_head.weight") and "position_ids" not in name
    }


def smolvlm(folder: pathlib.Path, tower: dict, text: dict, factor: int) -> dict:
    config = transformers.SmolVLMConfig(
        vision_config=tower, text_config={"model_type": "llama", **text}, scale_factor=factor
    )
    config.save_pretrained(folder)
    tokens = [{"content": name} for name in ("<fake_token_around_image>", "<global-img>")]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    return {"": shapes_of(transformers.SmolVLMForConditionalGeneration(config))}


def llava_onevision(folder: pathlib.Path, text: dict) -> dict:
    config = transformers.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **SO400M, "num_hidden_layers": 26},
        text_config={"model_type": "qwen2", **text},
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    config.save_pretrained(folder)
    return {"": shapes_of(transformers.LlavaOnevisionForConditionalGeneration(config))}


def llava_video(folder: pathlib.Path) -> dict:
    """The original layout: the tower's last layer is not stored."""
    tower = transformers.SiglipVisionConfig(**SO400M)
    tower.save_pretrained(folder / "tower")
    config = transformers.Qwen2Config(**QWEN2_7B)
    fields = config.to_diff_dict() | {
        "model_type": "llava_qwen", "mm_vision_tower": str(folder / "tower"), "mm_projector_type": "mlp2x_gelu",
        "mm_spatial_pool_mode": "average", "mm_newline_position": "grid", "mm_patch_merge_type": "spatial_unpad",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    names = shapes_of(transformers.Qwen2ForCausalLM(config))
    for name, shape in shapes_of(transformers.SiglipVisionModel(tower)).items():
        if ".layers.26." not in name:
            inner = name.removeprefix("vision_model.")
            names[f"model.vision_tower.vision_tower.vision_model.{inner}"] = shape
    names |= {
        "model.mm_projector.0.weight": (3584, 1152), "model.mm_projector.0.bias": (3584,),
        "model.mm_projector.2.weight": (3584, 3584), "model.mm_projector.2.bias": (3584,),
        "model.image_newline": (3584,),
    }  # fmt: skip
    return {"": names}


def nvila(folder: pathlib.Path, kind: str) -> dict:
    tower = transformers.SiglipVisionConfig(**SO400M | {"image_size": 448})
    decoder = transformers.Qwen2Config(**QWEN2_7B)
    tower.save_pretrained(folder / "vision_tower")
    decoder.save_pretrained(folder / "llm")
    (folder / "mm_projector").mkdir()
    fields = {
        "llm_cfg": {}, "vision_tower_cfg": {}, "mm_projector_cfg": {"mm_projector_type": kind},
        "video_encoder": json.dumps({"pool_sizes": [[8, 1, 1]]}), "num_video_frames": 256,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    projector = {
        f"layers.{name}": tuple(value.shape)
        for name, value in vila_projector(kind, 1152, 3584).state_dict().items()
    }
    return {
        "vision_tower": shapes_of(transformers.SiglipVisionModel(tower)),
        "llm": shapes_of(transformers.Qwen2ForCausalLM(decoder)),
        "mm_projector": projector,
    }


# The model, and the number of its parameters that ours has.
MODELS = {
    "SmolVLM2-256M": (lambda f: smolvlm(f, BASE_512, llama(576, 1536, 30, 9, 3), 4), 256e6),
    "SmolVLM2-500M": (lambda f: smolvlm(f, BASE_512, llama(960, 2560, 32, 15, 5), 4), 508e6),
    "SmolVLM2-2.2B": (lambda f: smolvlm(f, SO400M, llama(2048, 8192, 24, 32, 32), 3), 2.25e9),
    "LLaVA-OneVision-0.5B": (lambda f: llava_onevision(f, QWEN2_HALF_B), 0.89e9),
    "LLaVA-OneVision-7B": (lambda f: llava_onevision(f, QWEN2_7B), 8.03e9),
    "LLaVA-Video-7B": (llava_video, 8.03e9),
    "NVILA-8B-Video (2 x 2)": (lambda f: nvila(f, "mlp_downsample_2x2_fix"), 8.07e9),
    "NVILA-8B (3 x 3)": (lambda f: nvila(f, "mlp_downsample_3x3_fix"), 8.1e9),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_its_place_and_shape(name, tmp_path, monkeypatch):
    make, count = MODELS[name]
    with torch.device("meta"):
        stored = make(tmp_path)

    def listed(folder: pathlib.Path) -> dict[str, Tensor]:
        part = "" if folder == tmp_path else folder.name
        return {
            tensor: Tensor(file=folder / "x", name=tensor, shape=shape, dtype="BF16")
            for tensor, shape in stored[part].items()
        }

    for module in ("importer", "llava"):
        monkeypatch.setattr(f"storm_jax.weights.{module}.list_tensors", listed)
    whole = Sources(model=str(tmp_path)).whole()
    decoder, _ = importer.read_decoder(whole.folders["decoder"])
    config = importer._configuration_of(whole, decoder)
    model = importer._whole_model(config, whole, decoder, (), "")
    plan = importer._make_plan(
        dataclasses.replace(config, model=model),
        make_mesh(run_config().mesh),
        whole.folders,
        whole.vision.side,
        whole,
    )
    shapes = flat_params(abstract_model(model)[1])
    assert plan.pieces.keys() == shapes.keys()
    total = sum(leaf.size for leaf in shapes.values())
    assert total == sum(torch.Size(s).numel() for part in stored.values() for s in part.values())
    assert abs(total / count - 1) < 0.02, f"{total:,}"
