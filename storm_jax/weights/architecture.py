"""Converts Hugging Face's config.json to our configuration, and back.

Only the fields of config.json decide what a model is. A field with an unsupported value is an error
that names it; fields that do not affect the forward pass are not read.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import transformers

from storm_jax.config import (
    DecoderConfig,
    LayoutConfig,
    ModelConfig,
    RopeScalingConfig,
    VisionConfig,
    from_dict,
    to_dict,
)
from storm_jax.old_runs import current_model
from storm_jax.weights import WeightsError
from storm_jax.weights.hf.configuration_storm import StormConfig
from storm_jax.weights.whole import unsupported

# SmolVLM gives patches positions by their fraction of the image, which is raster order for a full square.
VISION_TYPES = ("siglip_vision_model", "smolvlm_vision", "smolvlm", "idefics3_vision", "idefics3")
# What the family alone decides: biases of q, k and v; normalisation of q and k.
DECODER_TYPES: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen2_vl_text": {"qkv_bias": True, "qk_norm": False},
    "qwen2_5_vl_text": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
    "llama": {"qkv_bias": False, "qk_norm": False},
}
# Values that we support, by field of config.json.
_DECODER_SUPPORTS = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
}
_VISION_SUPPORTS = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "num_channels": (3,),
}

# {our field: field of config.json}, for both directions.
_VISION_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "norm_eps": "layer_norm_eps",
}
_DECODER_FIELDS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}
_PROJECTOR_FIELDS = ("stem", "mixer", "mixer_args", "mamba", "layout")


def read_vision(
    folder: pathlib.Path, *, feature_layer: int = -2, final_norm: bool = False
) -> VisionConfig:
    """Reads the tower in a folder's config.json, on its own or inside a larger model.

    Args:
      feature_layer, final_norm: our own fields, which config.json does not have.

    Raises:
      WeightsError: naming each unsupported field.
    """
    whole = _read(folder)
    config = getattr(whole, "vision_config", whole)
    _check_not_quantized(folder, whole)
    _check_supported(folder, config, VISION_TYPES, _VISION_SUPPORTS)
    fields = {name: getattr(config, hf_name) for name, hf_name in _VISION_FIELDS.items()}
    sizes = {name: fields[name] for name in ("image_size", "patch_size")}
    if wrong := [f"{k}={v!r} must be a number" for k, v in sizes.items() if not isinstance(v, int)]:
        raise WeightsError(f"{folder}/config.json:", wrong)
    return VisionConfig(**fields, feature_layer=feature_layer, final_norm=final_norm)


def read_decoder(folder: pathlib.Path) -> tuple[DecoderConfig, list[str]]:
    """Reads the decoder in a folder's config.json, on its own or inside a larger model.

    Returns:
      The decoder, and notes for the user.

    Raises:
      WeightsError: naming each unsupported field.
    """
    whole = _read(folder)
    config = whole.get_text_config(decoder=True)
    _check_not_quantized(folder, whole)
    _check_supported(folder, config, DECODER_TYPES, _DECODER_SUPPORTS)
    unsupported_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    scaling, problems, notes = _rope_scaling(config)
    if unsupported_layers:
        problems.append(
            f"layer_types has {', '.join(sorted(unsupported_layers))}: only full_attention is supported"
        )
    if problems:
        raise WeightsError(f"{folder}/config.json:", problems)
    heads = config.num_attention_heads
    return (
        DecoderConfig(
            **{name: getattr(config, hf_name) for name, hf_name in _DECODER_FIELDS.items()},
            num_kv_heads=config.num_key_value_heads or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            rope_theta=float(config.rope_parameters["rope_theta"]),
            tie_embeddings=bool(whole.tie_word_embeddings),
            rope_scaling=scaling,
            **DECODER_TYPES[config.model_type],
        ),
        notes,
    )


def read_projector(folder: pathlib.Path, model: ModelConfig) -> ModelConfig:
    """Returns `model` with the projector in a folder's config.json, as written by an export.

    A custom mixer is code. It is accepted only if `model` names the same one, so that a
    downloaded folder cannot choose what code runs.

    Raises:
      WeightsError: if the file is not an exported projector's, or names code that `model` does not.
    """
    path = folder / "config.json"
    try:
        found = current_model(json.loads(path.read_text()))
        found.setdefault("layout", to_dict(LayoutConfig()))  # version 0.1 had none
        fields = {name: found[name] for name in _PROJECTOR_FIELDS}
        merged = from_dict(ModelConfig, to_dict(model) | fields)
    except FileNotFoundError:
        raise WeightsError(f"{folder} has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path} is not the config.json of an exported projector: {error!r}"
        ) from error
    found_code, trusted_code = (
        (config.mixer, dict(config.mixer_args)) for config in (merged, model)
    )
    if ":" in merged.mixer and found_code != trusted_code:
        raise WeightsError(
            f"{path} would run mixer={found_code[0]!r} with mixer_args={found_code[1]!r}. If you trust that "
            f"code, set model.mixer and model.mixer_args to it in --config"
        )
    return merged


def projector_json(model: ModelConfig) -> dict[str, Any]:
    """The config.json of a projector: our own fields, and its input and output widths."""
    fields = to_dict(model)
    return {
        "model_type": "storm_projector",
        **{name: fields[name] for name in _PROJECTOR_FIELDS},
        "vision_width": model.vision.width,
        "decoder_width": model.decoder.width,
    }


def is_original_llava(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a LLaVA with a Qwen2 in the original layout; some say "llava"."""
    return fields.get("model_type") == "llava_qwen" or (
        fields.get("model_type") == "llava"
        and fields.get("architectures") == ["LlavaQwenForCausalLM"]
    )


def _read(folder: pathlib.Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise WeightsError(
                f"{folder} is a LoRA adapter, not a model: merge it into its base model and pass the "
                f"folder of the result (PEFT: merge_and_unload, save_pretrained)"
            )
        raise WeightsError(f"{folder} has no config.json")
    try:
        fields = json.loads(path.read_text())
        if is_original_llava(fields):  # the fields of a Qwen2, and more
            return transformers.Qwen2Config(**fields | {"model_type": "qwen2"})
        if fields.get("model_type") == StormConfig.model_type:
            return StormConfig(**fields)
        return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # configuration classes raise anything
        raise WeightsError(f"{path} cannot be read: {error}") from error


def _check_not_quantized(folder: pathlib.Path, config: Any) -> None:
    for part in (config, *(getattr(config, n, None) for n in ("vision_config", "text_config"))):
        if found := getattr(part, "quantization_config", None):
            method = found.get("quant_method", found) if isinstance(found, dict) else found
            raise WeightsError(
                f"{folder}/config.json: quantization_config ({method}): quantized weights are not supported; use "
                f"the model in float32, float16 or bfloat16"
            )


def _check_supported(
    folder: pathlib.Path,
    config: Any,
    model_types: Collection[str],
    supported: Mapping[str, tuple[Any, ...]],
) -> None:
    """Raises WeightsError for an unknown model type or unsupported values of fields."""
    if config.model_type not in model_types:
        raise WeightsError(
            f"{folder}/config.json: model_type={config.model_type!r} is not supported, only "
            f"{', '.join(model_types)}"
        )
    values = {name: getattr(config, name) for name in supported if hasattr(config, name)}
    if wrong := unsupported(values, supported):
        raise WeightsError(f"{folder}/config.json:", wrong)


def _rope_scaling(config: Any) -> tuple[RopeScalingConfig, list[str], list[str]]:
    """Returns the scaling of rotary frequencies, problems, and notes for the user."""
    rope, notes, problems = config.rope_parameters, [], []
    if rope.get("mrope_section"):
        notes.append(
            "mrope is replaced by plain RoPE: visual tokens have one-dimensional positions"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported")
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        scaling = RopeScalingConfig(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_positions=int(original),
        )
        return scaling, problems, notes
    if kind != "default" and not (kind == "mrope" and notes):
        problems.append(f"rope_type={kind!r} is not supported, only 'default' and 'llama3'")
    return RopeScalingConfig(), problems, notes


def vision_json(config: VisionConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a tower, for transformers' SiglipVisionModel."""
    return transformers.SiglipVisionConfig(
        architectures=["SiglipVisionModel"],
        dtype=dtype,
        vision_use_head=False,
        **{hf_name: getattr(config, name) for name, hf_name in _VISION_FIELDS.items()},
    ).to_diff_dict()


def preprocessor_json(config: VisionConfig) -> dict[str, Any]:
    """The preprocessor_config.json of a tower: how we preprocess frames."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def decoder_json(config: DecoderConfig, dtype: str, **token_ids: Any) -> dict[str, Any]:
    """The config.json of a decoder, for transformers' Qwen2, Qwen3 or Llama.

    Args:
      token_ids: bos_token_id, eos_token_id and pad_token_id.

    Raises:
      WeightsError: if transformers has no such decoder.
    """
    families = {
        (True, False): (transformers.Qwen2Config, "Qwen2ForCausalLM"),
        (False, True): (transformers.Qwen3Config, "Qwen3ForCausalLM"),
        (False, False): (transformers.LlamaConfig, "LlamaForCausalLM"),
    }
    try:
        config_class, architecture = families[config.qkv_bias, config.qk_norm]
    except KeyError:
        raise WeightsError(
            f"transformers has no model with qkv_bias={config.qkv_bias} and qk_norm={config.qk_norm}"
        ) from None
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling.factor != 1:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    fields = dict(
        architectures=[architecture],
        dtype=dtype,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope,
        **{hf_name: getattr(config, name) for name, hf_name in _DECODER_FIELDS.items()},
        **token_ids,
    )
    try:
        return config_class(**fields).to_diff_dict()
    except Exception as error:  # from transformers' own checks
        raise WeightsError(f"transformers rejects this {architecture}: {error}") from error
