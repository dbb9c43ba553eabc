"""The models of transformers with our weights, to compare with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionModel

from storm_jax.config import DecoderConfig, VisionConfig
from storm_jax.models.siglip import FRAME_CHUNK
from storm_jax.weights.architecture import decoder_json, vision_json
from storm_jax.weights.mapping import Table, decoder_table, vision_table


def torch_tower(config: VisionConfig, params: Mapping[str, Any]) -> torch.nn.Module:
    """SigLIP; `params` by path ("vision/patch/kernel")."""
    fields: Any = AutoConfig.for_model(**vision_json(config, "float32"))
    model = SiglipVisionModel(fields).eval()
    weights = _weights(vision_table(config), params)
    if any(name.startswith("vision_model.") for name in model.state_dict()):  # before 5.8
        weights = {f"vision_model.{name}": value for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert [name for name in missing if "position_ids" not in name] == []
    assert unexpected == []
    return model


def feature_tower(config: VisionConfig, params: Mapping[str, Any]) -> torch.nn.Module:
    """SigLIP with as many layers as ours runs."""
    depth = config.depth + 1 + config.feature_layer
    used = {name: array for name, array in params.items() if "/unused/layers" not in name}
    return torch_tower(dataclasses.replace(config, depth=depth, feature_layer=-1), used)


def features(tower: Any, frames: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The features [F, P, D] of uint8 frames [F, H, W, 3], in chunks as large as ours."""
    pixels = frames.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1
    chunks = pixels.split(FRAME_CHUNK)
    return torch.cat([tower(each, output_hidden_states=True).hidden_states[-1] for each in chunks])


def torch_decoder(config: DecoderConfig, params: Mapping[str, Any]) -> torch.nn.Module:
    """A decoder of the same family; `params` by path ("decoder/embedding")."""
    fields = decoder_json(config, "float32")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).eval()
    missing, unexpected = model.load_state_dict(
        _weights(decoder_table(config), params), strict=False
    )
    assert (missing, unexpected) == (["lm_head.weight"] if config.tie_embeddings else [], [])
    return model


def _weights(table: Table, params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """In float32: torch does not take NumPy's bfloat16."""
    tensors = ((rule.tensor, rule.to_tensor(np.asarray(params[rule.path]))) for rule in table.rules)
    return {name: torch.from_numpy(np.array(tensor, np.float32)) for name, tensor in tensors}
