"""Which tensor of a safetensors file is which parameter of ours: one table for import and export.

A row pairs a tensor's name with a parameter's path, and says with an einops pattern how the axes of
one become those of the other:

    "self_attn.q_proj.weight"  "query/kernel"  "(h k) d -> d h k"

Read from left to right it imports, from right to left it exports. Layers are stacked in our
parameters and apart in the files, so a row of a layer fills one entry of the stack.
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
_WHOLE = slice(None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A tensor and its place.

    Attributes:
      tensor: its name in the file.
      path: of our parameter.
      pattern: einops, from the tensor's axes to those of its place.
      index: where it stands in the parameter: a layer, one of a pair.
      sizes: of the axes that a tensor merges, such as heads ("h").
    """

    tensor: str
    path: str
    pattern: str
    index: Index = ()
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor in the layout of its place; a view where possible."""
        sizes = {axis: n for axis, n in self.sizes.items() if axis in self.pattern}
        return rearrange(tensor, self.pattern, **sizes)

    def to_theirs(self, parameter: np.ndarray) -> np.ndarray:
        """The tensor out of the whole parameter."""
        tensor, ours = self.pattern.split(" -> ")
        grouped = "".join(re.findall(r"\(.*?\)", ours))
        sizes = {axis: n for axis, n in self.sizes.items() if axis in grouped}
        return rearrange(parameter[self.index], f"{ours} -> {tensor}", **sizes)

    def tensor_shape(self, parameter_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that the tensor must have."""
        return self.to_theirs(np.broadcast_to(np.int8(0), tuple(parameter_shape))).shape


@dataclasses.dataclass(frozen=True)
class Table:
    """All tensors of one component.

    Attributes:
      rows: every tensor that is read or written.
      ignored: patterns of names that a file may have and that we do not keep.
      layouts: how checkpoints may call what the rows call by the first of them: {our prefix: theirs}.
    """

    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()
    layouts: tuple[Mapping[str, str], ...] = ({"": ""},)


def vision_table(config: VisionConfig) -> Table:
    """A SigLIP tower under the names of transformers' SiglipVisionModel."""
    sizes = {"h": config.num_heads, "a": config.patch_size, "b": config.patch_size, "c": 3}
    embeddings = [
        ("embeddings.patch_embedding.weight", "patch/kernel", "d c a b -> (a b c) d"),
        ("embeddings.patch_embedding.bias", "patch/bias", "d -> d"),
        ("embeddings.position_embedding.weight", "position", "p d -> p d"),
        ("post_layernorm.weight", "unused/norm/scale", "d -> d"),
        ("post_layernorm.bias", "unused/norm/bias", "d -> d"),
    ]
    layer = [
        *_norm("layer_norm1", "attn_norm"),
        *_norm("layer_norm2", "mlp_norm"),
        *(
            row
            for name in ("query", "key", "value")
            for row in (
                (f"self_attn.{name[0]}_proj.weight", f"{name}/kernel", "(h k) d -> d h k"),
                (f"self_attn.{name[0]}_proj.bias", f"{name}/bias", "(h k) -> h k"),
            )
        ),
        ("self_attn.out_proj.weight", "out/kernel", "d (h k) -> h k d"),
        ("self_attn.out_proj.bias", "out/bias", "d -> d"),
        *_linear("mlp.fc1", "up"),
        *_linear("mlp.fc2", "down"),
    ]
    run = config.depth + 1 + config.feature_layer
    rows = [
        Row(tensor=tensor, path=f"vision/{path}", pattern=p, sizes=sizes)
        for tensor, path, p in embeddings
    ]
    for i in range(config.depth):
        stack, entry = ("layers", i) if i < run else ("unused/layers", i - run)
        rows += [
            Row(
                tensor=f"encoder.layers.{i}.{tensor}",
                path=f"vision/{stack}/{path}",
                pattern=p,
                index=(entry,),
                sizes=sizes,
            )
            for tensor, path, p in layer
        ]
    towers = ("", "vision_model.", "vision_tower.", "vision_tower.vision_model.")
    return Table(
        tuple(rows),
        ignored=(r"head\..*", r"embeddings\.position_ids"),
        layouts=(*({"": name} for name in towers), *({"": f"model.{name}"} for name in towers[2:])),
    )


def decoder_table(config: DecoderConfig) -> Table:
    """A decoder under the names of transformers' Qwen2, Qwen3 and Llama."""
    sizes = {"h": config.num_heads, "g": config.num_kv_heads}
    heads = {"query": "h", "key": "g", "value": "g"}
    layer: list[tuple[str, str, str, Index]] = [
        ("input_layernorm.weight", "attn_norm/scale", "d -> d", ()),
        ("post_attention_layernorm.weight", "mlp_norm/scale", "d -> d", ()),
        ("self_attn.o_proj.weight", "out/kernel", "d (h k) -> h k d", ()),
        ("mlp.gate_proj.weight", "gate_up/kernel", "m d -> d m", (_WHOLE, 0)),
        ("mlp.up_proj.weight", "gate_up/kernel", "m d -> d m", (_WHOLE, 1)),
        ("mlp.down_proj.weight", "down/kernel", "d m -> m d", ()),
    ]
    for name, h in heads.items():
        proj = f"self_attn.{name[0]}_proj"
        layer.append((f"{proj}.weight", f"{name}/kernel", f"({h} k) d -> d {h} k", ()))
        if config.qkv_bias:
            layer.append((f"{proj}.bias", f"{name}/bias", f"({h} k) -> {h} k", ()))
        if config.qk_norm and name != "value":
            layer.append((f"self_attn.{name[0]}_norm.weight", f"{name}_norm/scale", "k -> k", ()))
    rows = [
        Row(tensor="model.embed_tokens.weight", path="decoder/embedding", pattern="v d -> v d"),
        Row(tensor="model.norm.weight", path="decoder/norm/scale", pattern="d -> d"),
    ]
    if not config.tie_embeddings:
        rows.append(Row(tensor="lm_head.weight", path="decoder/lm_head", pattern="v d -> d v"))
    rows += [
        Row(
            tensor=f"model.layers.{i}.{tensor}",
            path=f"decoder/layers/{path}",
            pattern=p,
            index=(i, *index),
            sizes=sizes,
        )
        for i in range(config.depth)
        for tensor, path, p, index in layer
    ]
    ignored = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
    if config.tie_embeddings:
        ignored.append(r"lm_head\.weight")
    return Table(
        tuple(rows),
        tuple(ignored),
        layouts=(
            {"model.": "model.", "lm_head.": "lm_head."},
            {"model.": "model.language_model.", "lm_head.": "lm_head."},
            {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
            {"model.": "", "lm_head.": "lm_head."},
        ),
    )


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
    """The projector under names of our own, tensors as torch keeps them (docs/weights.md).

    Mamba layers have mamba_ssm's names, one set for each direction. A projector of the user's own
    keeps its paths and its layout.

    Args:
      shapes: the model's parameters {path: shape}, from which a user's projector is listed.
    """
    if config.projector == "mlp":
        rows = [
            *_norm("norm", "norm"),
            *_linear("linear", "linear"),
            *_linear("mixer.linear", "mixer/linear"),
        ]
        return Table(
            tuple(Row(tensor=t, path=f"projector/{path}", pattern=p) for t, path, p in rows)
        )
    if config.projector != "storm":
        paths = [path for path in shapes if path.startswith("projector/")]
        return Table(tuple(_as_it_is(path, len(shapes[path].shape)) for path in paths))
    directions = ("forward", "backward") if config.mamba.direction == "both" else ("forward",)
    layer = [
        *_norm("norm", "norm"),
        ("mixer.in_proj.weight", "mixer/in_proj/kernel", "(j e) d -> d j e"),
        ("mixer.out_proj.weight", "mixer/out_proj/kernel", "d e -> e d"),
    ]
    if config.mamba.mixer == "mamba2":
        layer.append(("mixer.norm.weight", "mixer/norm/scale", "e -> e"))
    for name in directions:
        for tensor, path, pattern in _DIRECTION[config.mamba.mixer]:
            layer.append((f"mixer.{name}.{tensor}", f"mixer/{name}/{path}", pattern))
    linear = [
        Row(tensor=t, path=f"projector/{path}", pattern=p)
        for t, path, p in _linear("linear", "linear")
    ]
    return Table(
        (
            *linear,
            *(
                Row(
                    tensor=f"layers.{i}.{t}",
                    path=f"projector/mixer/layers/{path}",
                    pattern=p,
                    index=(i,),
                    sizes={"j": 2},
                )
                for i in range(config.mamba.depth)
                for t, path, p in layer
            ),
        )
    )


def tables(config: ModelConfig, shapes: Mapping[str, Any]) -> dict[str, Table]:
    """The table of each component; together they cover every parameter but adapters, once."""
    return {
        "vision": vision_table(config.vision),
        "projector": projector_table(config, shapes),
        "decoder": decoder_table(config.decoder),
    }


def coverage_problems(rows: Sequence[Row], shapes: Mapping[str, Any]) -> list[str]:
    """Where the rows do not fill each of these parameters (adapters apart) exactly once."""
    filled = dict.fromkeys((path for path in shapes if not is_adapter(path)), 0)
    places = Counter((row.path, repr(row.index)) for row in rows)
    problems = [
        f"{path}{index} is filled {n} times" for (path, index), n in places.items() if n > 1
    ]
    for row in rows:
        if row.path in filled:
            filled[row.path] += np.broadcast_to(np.int8(0), shapes[row.path].shape)[row.index].size
        else:
            problems.append(f"{row.tensor} belongs to {row.path}, which the model lacks")
    problems += [
        f"{path}: {count:,} of {shapes[path].size:,} values are filled"
        for path, count in filled.items()
        if count != shapes[path].size
    ]
    return problems


def _linear(theirs: str, ours: str) -> list[tuple[str, str, str]]:
    return [
        (f"{theirs}.weight", f"{ours}/kernel", "o i -> i o"),
        (f"{theirs}.bias", f"{ours}/bias", "o -> o"),
    ]


def _norm(theirs: str, ours: str) -> list[tuple[str, str, str]]:
    return [
        (f"{theirs}.weight", f"{ours}/scale", "d -> d"),
        (f"{theirs}.bias", f"{ours}/bias", "d -> d"),
    ]


def _as_it_is(path: str, ndim: int) -> Row:
    axes = " ".join("abcdefgh"[:ndim])
    return Row(
        tensor=path.removeprefix("projector/").replace("/", "."),
        path=path,
        pattern=f"{axes} -> {axes}",
    )
