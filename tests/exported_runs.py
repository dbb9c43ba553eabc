"""Small random runs of every kind that can be exported to one folder for PyTorch."""

from __future__ import annotations

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from reference_models import config_for, make_tokenizer

from storm_jax.params import abstract_model, flat_params
from storm_jax.run import Run

BASE = {
    "model__vision__image_size": 40,  # a grid of 5 x 5 patches, which 2 and 3 do not divide
    "model__vision__depth": 3,
    "model__decoder__vocab_size": 300,
    "model__decoder__tie_embeddings": False,
    "compression__num_frames": 9,
    "compression__temporal_pool": 2,
    "data__system": "Be brief.\n\"Please\" 😀",
    "data__rows": [{"tokens": 2048, "frames": 32}],
}  # fmt: skip
LLAVA = {
    "model__mixer": "none",
    "model__stem__kind": "mlp2x_gelu",
    "model__stem__downsample": 1,
    "model__stem__video_pool": "bilinear",
    "model__layout__image_newline": True,
    "model__layout__video_newline": "clip",
}
VILA = {
    "model__mixer": "none",
    "model__stem__kind": "mlp_downsample",
    "model__layout__after_group": "\n",
}
# The tokenizer's family, and what differs from BASE.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba1": ("qwen2", {"compression__temporal_sample": 2, "compression__spatial_pool": 2}),
    "mamba2": (
        "llama3",
        {
            "model__mixer": "mamba2",
            "model__mamba__head_dim": 32,
            "model__decoder__vocab_size": 295,  # those of the tokenizer, so that rows are added
            "model__decoder__qkv_bias": False,
            "model__decoder__tie_embeddings": True,
            "data__frames__time_text": "per_group",
        },
    ),
    "llava": (
        "qwen2",
        {
            **LLAVA,
            "compression__temporal_pool": 1,
            "model__layout__after_video": "\n{count} frames at {times} of {seconds} s, {duration}.",
            "model__layout__trim": True,
        },
    ),
    "smolvlm": (
        "llama3",
        {
            "model__mixer": "none",
            "model__vision__feature_layer": -1,
            "model__vision__final_norm": True,
            "model__stem__bias": False,
            "model__layout__before_video": "See {frames} frames from a {duration} video.\n",
            "model__layout__group_time": "\nFrame from {time}:",
            "model__layout__before_group": "<|end_of_text|>{}",
            "model__layout__after_group": "<|end_of_text|>",
            "model__layout__after_video": "\n\n",
            "model__layout__joined": True,
            "data__frames__fps": 1.0,
            "data__system": "",
        },
    ),
}
SLOW = {
    "forward": ("qwen2", {"model__mamba__direction": "forward", "model__mamba__depth": 2}),
    "mamba2 forward": (
        "qwen2",
        {"model__mixer": "mamba2", "model__mamba__head_dim": 16, "model__mamba__direction": "forward"},
    ),
    "vila": ("qwen2", VILA),
    "vila 3x3": (
        "qwen2",
        {
            **VILA,
            "model__stem__kind": "mlp_downsample_3x3_fix",
            "model__stem__downsample": 3,
            "compression__temporal_pool": 3,
            "data__frames__time_text": "sentence",
        },
    ),
    "llava rows": (
        "qwen2",
        {**LLAVA, "model__layout__video_newline": "row", "model__stem__video_pool": "average"},
    ),
    "llava groups": (
        "qwen2",
        {
            **LLAVA,
            "model__layout__image_newline": False,
            "model__layout__video_newline": "group",
            "model__stem__video_pool": "max",
        },
    ),
    "a template of parts": ("parts", {"model__layout__after_video": "\n", "model__layout__joined": True}),
    "llava with a mixer": ("qwen2", {**LLAVA, "model__mixer": "mamba1", "model__decoder__qk_norm": True, "model__decoder__qkv_bias": False}),
    "everything apart": (
        "qwen2",
        {
            "model__layout__before_video": "See {frames} frames, {duration} {{}}.",
            "model__layout__group_time": "At {time}",
            "model__layout__before_group": "(",
            "model__layout__after_group": ")",
            "model__layout__after_video": "End",
            "data__frames__time_text": "per_group",
        },
    ),
}  # fmt: skip


# A template of a multimodal model, whose messages are lists of parts.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ ' ' + part['text'] }}{% else %}{{ '<' + part['type'] + '>' }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)


def random_run(path: pathlib.Path, family: str, **changes: Any) -> Run:
    """A run with random parameters; norms are around one, so that all of the model matters."""
    config = config_for(**BASE | changes)
    tokenizer = make_tokenizer("qwen2" if family == "parts" else family)
    if family == "parts":
        tokenizer.chat_template = PARTS
    tokenizer.save_pretrained(path.parent / "tokenizer")
    rng = np.random.default_rng(0)
    shapes = flat_params(abstract_model(config.model)[1])

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape).astype(np.float32) * 0.2
        return noise + ("norm" in name and name.endswith("scale")) - 2 * name.endswith("dt_bias")

    run = Run(path)
    run.prepare(config, path.parent / "tokenizer")
    drawn = {name: jnp.asarray(draw(name, leaf.shape)) for name, leaf in shapes.items()}
    run.checkpoints.write_params(drawn, {})
    return run
