"""Which tensor of a safetensors file is which parameter of ours: one table for import and export.

A rule pairs the name of a tensor with the path of a parameter, and maps the axes of one to those of
the other with an einops pattern:

    "self_attn.q_proj.weight"  "query/kernel"  "(h k) d -> d h k"

Import reads the pattern from left to right, export from right to left. Our layers are stacked, those
in the files are separate, so the rule of a layer fills one entry of the stack.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from storm_jax.config import DecoderConfig, ModelConfig, VisionConfig
from storm_jax.models.lora import is_adapter

Index = tuple[int | slice, ...]
_ALL = slice(None)
# Parameters whose tensors have a row per token.
VOCABULARY = ("decoder/embedding", "decoder/lm_head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRule:
    """Maps one tensor to a parameter, or to a part of it.

    Attributes:
      tensor: name in the file.
      path: path of the parameter.
      pattern: einops pattern from the tensor's axes to those of the (part of the) parameter.
      index: the part of the parameter, such as a layer; () = all of it.
      sizes: sizes of axes that a tensor merges, such as heads ("h").
    """

    tensor: str
    path: str
    pattern: str
    index: Index = ()
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def to_parameter(self, tensor: np.ndarray) -> np.ndarray:
        """Returns `parameter[index]` from the tensor; a view where possible."""
        sizes = {axis: n for axis, n in self.sizes.items() if axis in self.pattern}
        return rearrange(tensor, self.pattern, **sizes)

    def to_tensor(self, parameter: np.ndarray) -> np.ndarray:
        """Returns the tensor from the whole parameter; a view where possible."""
        tensor_axes, parameter_axes = self.pattern.split(" -> ")
        merged = "".join(re.findall(r"\(.*?\)", parameter_axes))
        sizes = {axis: n for axis, n in self.sizes.items() if axis in merged}
        return rearrange(parameter[self.index], f"{parameter_axes} -> {tensor_axes}", **sizes)

    def tensor_shape(self, parameter_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that the tensor must have."""
        return self.to_tensor(np.broadcast_to(np.int8(0), tuple(parameter_shape))).shape


@dataclasses.dataclass(frozen=True)
class Table:
    """All tensors of one component.

    Attributes:
      rules: one per tensor that is read or written.
      ignored: patterns of tensor names that a file may have and that are not imported.
      layouts: prefixes that checkpoints use, {prefix in the rules: prefix in the file}.
    """

    rules: tuple[TensorRule, ...]
    ignored: tuple[str, ...] = ()
    layouts: tuple[Mapping[str, str], ...] = ({"": ""},)


def vision_table(config: VisionConfig) -> Table:
    """A SigLIP tower, with the tensor names of transformers' SiglipVisionModel."""
    sizes = {"h": config.num_heads, "a": config.patch_size, "b": config.patch_size, "c": 3}
    embeddings = [
        ("embeddings.patch_embedding.weight", "patch/kernel", "d c a b -> (a b c) d"),
        ("embeddings.patch_embedding.bias", "patch/bias", "d -> d"),
        ("embeddings.position_embedding.weight", "position", "p d -> p d"),
        *_norm("post_layernorm", "norm" if config.final_norm else "unused/norm"),
    ]
    layer = [
        *_norm("layer_norm1", "attn_norm"),
        *_norm("layer_norm2", "mlp_norm"),
        *(
            rule
            for name in ("query", "key", "value")
            for rule in (
                (f"self_attn.{name[0]}_proj.weight", f"{name}/kernel", "(h k) d -> d h k"),
                (f"self_attn.{name[0]}_proj.bias", f"{name}/bias", "(h k) -> h k"),
            )
        ),
        ("self_attn.out_proj.weight", "out/kernel", "d (h k) -> h k d"),
        ("self_attn.out_proj.bias", "out/bias", "d -> d"),
        *_linear("mlp.fc1", "up"),
        *_linear("mlp.fc2", "down"),
    ]
    rules = [
        TensorRule(tensor=tensor, path=f"vision/{path}", pattern=pattern, sizes=sizes)
        for tensor, path, pattern in embeddings
    ]
    used_layers = config.depth + 1 + config.feature_layer
    for i in range(config.depth):
        stack, entry = ("layers", i) if i < used_layers else ("unused/layers", i - used_layers)
        rules += [
            TensorRule(
                tensor=f"encoder.layers.{i}.{tensor}",
                path=f"vision/{stack}/{path}",
                pattern=pattern,
                index=(entry,),
                sizes=sizes,
            )
            for tensor, path, pattern in layer
        ]
    prefixes = ("", "vision_model.", "vision_tower.", "vision_tower.vision_model.")
    return Table(
        tuple(rules),
        ignored=(r"head\..*", r"embeddings\.position_ids"),
        layouts=(
            *({"": prefix} for prefix in prefixes),
            *({"": f"model.{prefix}"} for prefix in prefixes[1:]),
            {"": "model.vision_tower.vision_tower.vision_model."},  # the original LLaVA
        ),
    )


def decoder_table(config: DecoderConfig) -> Table:
    """A decoder, with the tensor names of transformers' Qwen2, Qwen3 and Llama."""
    sizes = {"h": config.num_heads, "g": config.num_kv_heads}
    heads = {"query": "h", "key": "g", "value": "g"}
    layer: list[tuple[str, str, str, Index]] = [
        ("input_layernorm.weight", "attn_norm/scale", "d -> d", ()),
        ("post_attention_layernorm.weight", "mlp_norm/scale", "d -> d", ()),
        ("self_attn.o_proj.weight", "out/kernel", "d (h k) -> h k d", ()),
        ("mlp.gate_proj.weight", "gate_up/kernel", "m d -> d m", (_ALL, 0)),
        ("mlp.up_proj.weight", "gate_up/kernel", "m d -> d m", (_ALL, 1)),
        ("mlp.down_proj.weight", "down/kernel", "d m -> m d", ()),
    ]
    for name, h in heads.items():
        proj = f"self_attn.{name[0]}_proj"
        layer.append((f"{proj}.weight", f"{name}/kernel", f"({h} k) d -> d {h} k", ()))
        if config.qkv_bias:
            layer.append((f"{proj}.bias", f"{name}/bias", f"({h} k) -> {h} k", ()))
        if config.qk_norm and name != "value":
            layer.append((f"self_attn.{name[0]}_norm.weight", f"{name}_norm/scale", "k -> k", ()))
    rules = [
        TensorRule(
            tensor="model.embed_tokens.weight", path="decoder/embedding", pattern="v d -> v d"
        ),
        TensorRule(tensor="model.norm.weight", path="decoder/norm/scale", pattern="d -> d"),
    ]
    if not config.tie_embeddings:
        rules.append(
            TensorRule(tensor="lm_head.weight", path="decoder/lm_head", pattern="v d -> d v")
        )
    rules += [
        TensorRule(
            tensor=f"model.layers.{i}.{tensor}",
            path=f"decoder/layers/{path}",
            pattern=pattern,
            index=(i, *index),
            sizes=sizes,
        )
        for i in range(config.depth)
        for tensor, path, pattern, index in layer
    ]
    ignored = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
    if config.tie_embeddings:
        ignored.append(r"lm_head\.weight")
    return Table(
        tuple(rules),
        tuple(ignored),
        layouts=(
            {"model.": "model.", "lm_head.": "lm_head."},
            {"model.": "model.language_model.", "lm_head.": "lm_head."},
            {"model.": "model.text_model.", "lm_head.": "lm_head."},
            {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
            {"model.": "", "lm_head.": "lm_head."},
        ),
    )


# The stem "mlp_downsample" in exports of version 0.1.
_OLD_MLP = {
    "stem.norm1.": "norm.", "stem.linear1.": "linear.", "stem.linear2.": "mixer.linear.", "": "",
}  # fmt: skip
# The stems in the mm_projector folder of VILA.
_VILA = {
    "linear": {"stem.linear1.": "layers.", "": ""},
    "mlp2x_gelu": {"stem.linear1.": "layers.0.", "stem.linear2.": "layers.2.", "": ""},
    "mlp_downsample": {
        "stem.norm1.": "layers.1.", "stem.linear1.": "layers.2.", "stem.linear2.": "layers.4.", "": "",
    },
    "mlp_downsample_3x3_fix": {
        "stem.norm1.": "layers.1.", "stem.linear1.": "layers.2.", "stem.norm2.": "layers.4.",
        "stem.linear2.": "layers.5.", "stem.linear3.": "layers.7.", "": "",
    },
}  # fmt: skip
# Projectors in the files of whole models.
_WHOLE = (
    {"stem.linear1.": "model.connector.modality_projection.proj."},  # SmolVLM
    *(
        {
            "stem.linear1.": f"{prefix}multi_modal_projector.linear_1.",
            "stem.linear2.": f"{prefix}multi_modal_projector.linear_2.",
            "newline": f"{prefix}image_newline",
        }
        for prefix in ("model.", "")  # LLaVA in transformers
    ),
    {
        "stem.linear1.": "model.mm_projector.0.", "stem.linear2.": "model.mm_projector.2.",
        "newline": "model.image_newline",
    },  # the original LLaVA
)  # fmt: skip
# One direction of a Mamba layer.
_DIRECTION = {
    "mamba1": (
        ("conv1d.weight", "conv_kernel", "e 1 t -> t e"),
        ("conv1d.bias", "conv_bias", "e -> e"),
        ("x_proj.weight", "x_proj/kernel", "r e -> e r"),
        ("dt_proj.weight", "dt_proj/kernel", "e r -> r e"),
        ("dt_proj.bias", "dt_bias", "e -> e"),
        ("A_log", "A_log", "e n -> e n"),
        ("D", "D", "e -> e"),
    ),
    "mamba2": (
        ("conv_x.weight", "conv_x_kernel", "e 1 t -> t e"),
        ("conv_x.bias", "conv_x_bias", "e -> e"),
        ("conv_bc.weight", "conv_bc_kernel", "n 1 t -> t n"),
        ("conv_bc.bias", "conv_bc_bias", "n -> n"),
        ("bc_proj.weight", "bc_proj/kernel", "n d -> d n"),
        ("dt_proj.weight", "dt_proj/kernel", "h d -> d h"),
        ("dt_bias", "dt_bias", "h -> h"),
        ("A_log", "A_log", "h -> h"),
        ("D", "D", "h -> h"),
    ),
}


def projector_table(config: ModelConfig, shapes: Mapping[str, Any]) -> Table:
    """The projector, with our own tensor names and torch's layouts (docs/weights.md).

    Mamba layers have the names of mamba_ssm, one set per direction. A custom mixer keeps its paths and layouts.

    Args:
      shapes: the model's parameters {path: shape}.
    """
    norms = [_norm(f"stem.{name}", f"stem/{name}") for name in ("norm1", "norm2")]
    linears = [
        _linear(f"stem.{name}", f"stem/{name}") for name in ("linear1", "linear2", "linear3")
    ]
    newline = [("newline", "newline", "d -> d")]
    rules = [
        TensorRule(tensor=tensor, path=f"projector/{path}", pattern=pattern)
        for layer in (*norms, *linears, newline)
        for tensor, path, pattern in layer
        if f"projector/{path}" in shapes  # those of this stem and layout
    ]
    old = {"stem.linear1.": "linear.", "": ""}
    layouts = (
        {"": ""},
        old,
        _OLD_MLP,
        _VILA[config.stem.kind],
        *_WHOLE,
        one_folder(config)["projector"],
    )
    if config.mixer not in ("mamba1", "mamba2"):
        paths = [path for path in shapes if path.startswith("projector/mixer/")]
        rules += [_unchanged(path, len(shapes[path].shape)) for path in paths]
        return Table(tuple(rules), layouts=layouts)
    layer = [
        *_norm("norm", "norm"),
        ("mixer.in_proj.weight", "mixer/in_proj/kernel", "(j e) d -> d j e"),
        ("mixer.out_proj.weight", "mixer/out_proj/kernel", "d e -> e d"),
    ]
    if config.mixer == "mamba2":
        layer.append(("mixer.norm.weight", "mixer/norm/scale", "e -> e"))
    directions = ("forward", "backward") if config.mamba.direction == "both" else ("forward",)
    for name in directions:
        for tensor, path, pattern in _DIRECTION[config.mixer]:
            layer.append((f"mixer.{name}.{tensor}", f"mixer/{name}/{path}", pattern))
    rules += [
        TensorRule(
            tensor=f"layers.{i}.{tensor}",
            path=f"projector/mixer/layers/{path}",
            pattern=pattern,
            index=(i,),
            sizes={"j": 2},
        )
        for i in range(config.mamba.depth)
        for tensor, path, pattern in layer
    ]
    return Table(tuple(rules), layouts=layouts)


def one_folder(config: ModelConfig) -> dict[str, dict[str, str]]:
    """The prefixes of each component in our one folder for PyTorch, {prefix in the rules: prefix in the file}."""
    directions = {"forward": 0, "backward": 1}  # a torch module has no child named "forward"
    layers = {
        f"layers.{i}.mixer.{name}.": f"model.projector.layers.{i}.mixer.directions.{number}."
        for i in range(config.mamba.depth)
        for name, number in directions.items()
    }
    return {
        "vision": {"": "model.vision_tower."},
        "projector": {**layers, "": "model.projector."},
        "decoder": {"model.": "model.language_model.", "lm_head.": "lm_head."},
    }


def tables(config: ModelConfig, shapes: Mapping[str, Any]) -> dict[str, Table]:
    """The table of each component. Together they cover every parameter except adapters once."""
    return {
        "vision": vision_table(config.vision),
        "projector": projector_table(config, shapes),
        "decoder": decoder_table(config.decoder),
    }


def coverage_problems(rules: Sequence[TensorRule], shapes: Mapping[str, Any]) -> list[str]:
    """Lists the parameters (except adapters) that the rules do not fill exactly once."""
    filled = dict.fromkeys((path for path in shapes if not is_adapter(path)), 0)
    places = Counter((rule.path, repr(rule.index)) for rule in rules)
    problems = [
        f"{path}{index} is filled {n} times" for (path, index), n in places.items() if n > 1
    ]
    for rule in rules:
        if rule.path in filled:
            parameter = np.broadcast_to(np.int8(0), shapes[rule.path].shape)
            filled[rule.path] += parameter[rule.index].size
        else:
            problems.append(f"{rule.tensor} maps to {rule.path}, which the model does not have")
    problems += [
        f"{path}: {count:,} of {shapes[path].size:,} values are filled"
        for path, count in filled.items()
        if count != shapes[path].size
    ]
    return problems


def _linear(tensor: str, path: str) -> list[tuple[str, str, str]]:
    return [
        (f"{tensor}.weight", f"{path}/kernel", "o i -> i o"),
        (f"{tensor}.bias", f"{path}/bias", "o -> o"),
    ]


def _norm(tensor: str, path: str) -> list[tuple[str, str, str]]:
    return [
        (f"{tensor}.weight", f"{path}/scale", "d -> d"),
        (f"{tensor}.bias", f"{path}/bias", "d -> d"),
    ]


def _unchanged(path: str, ndim: int) -> TensorRule:
    axes = " ".join("abcdefgh"[:ndim])
    return TensorRule(
        tensor=path.removeprefix("projector/").replace("/", "."),
        path=path,
        pattern=f"{axes} -> {axes}",
    )
