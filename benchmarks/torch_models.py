"""The models of transformers with our weights, to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionModel

from storm_jax.config import DecoderConfig, VisionConfig
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
