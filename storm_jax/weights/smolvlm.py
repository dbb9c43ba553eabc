"""SmolVLM, SmolVLM2 and Idefics3 in transformers' layout: SigLIP, pixel shuffle, one linear map, Llama.

Special tokens surround an image, and a frame of a video follows its time. Images are not split: the whole
image, resized to a square, is what the model calls the global image.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from storm_jax.config import LayoutConfig, StemConfig
from storm_jax.weights import WeightsError
from storm_jax.weights.architecture import read_vision
from storm_jax.weights.whole import WholeModel, in_one_folder, is_positive, pooling, read_json

_AROUND, _WHOLE_IMAGE = "<fake_token_around_image>", "<global-img>"
_LAYOUT = LayoutConfig(
    before_video="You are provided the following series of {frames} frames from a {duration} [H:MM:SS] video.\n",
    group_time="\nFrame from {time}:",
    before_group=_AROUND + _WHOLE_IMAGE,
    after_group=_AROUND,
    after_video="\n\n",
    joined=True,
)
# The template of the files knows only images. With videos, the model's users render this one.
_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<' + part['type'] + '>' }}{% endfor %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}{{ 'Assistant:' if add_generation_prompt }}"
)


def recognise(fields: Mapping[str, Any]) -> bool:
    return fields.get("model_type") in ("smolvlm", "idefics3")


def read(folder: pathlib.Path, fields: Mapping[str, Any]) -> WholeModel:
    """Reads the tower, stem, layout and frame sampling.

    Raises:
      WeightsError: naming each unsupported field.
    """
    vision = read_vision(folder, feature_layer=-1, final_norm=True)
    factor, problems = fields.get("scale_factor", 2), []
    if not is_positive(factor) or vision.side % factor:
        problems.append(
            f"scale_factor={factor!r} must divide the grid of {vision.side} x {vision.side} patches"
        )
    added = read_json(folder / "tokenizer.json").get("added_tokens") or []
    tokens = {token.get("content") for token in added if isinstance(token, dict)}
    for token in (_AROUND, _WHOLE_IMAGE):
        if token not in tokens:
            problems.append(f"tokenizer.json has no special token {token}, which surrounds images")
    if problems:
        raise WeightsError(f"{folder}/config.json:", problems)
    return WholeModel(
        folders=in_one_folder(folder),
        vision=vision,
        stem=StemConfig(kind="linear", downsample=factor, bias=False),
        layout=_LAYOUT,
        choices={"data.system": "", **pooling(), **_sampling(folder)},
        template=_TEMPLATE,
        notes=[
            "images are not split into tiles; images and frames are resized to a square in one bicubic step, where "
            "the published processor first resizes the longest edge, with a Lanczos filter"
        ],
    )


def _sampling(folder: pathlib.Path) -> dict[str, Any]:
    """Frames and rate of the folder's video processor."""
    for name in (
        "video_preprocessor_config.json",
        "processor_config.json",
        "preprocessor_config.json",
    ):
        found = read_json(folder / name)
        found = found.get("video_processor") or found
        sampling = found.get("video_sampling") or {}
        frames = sampling.get("max_frames") or found.get("num_frames")
        rate = sampling.get("fps") or found.get("fps")
        if is_positive(frames):
            rates = {"data.frames.fps": float(rate)} if rate and is_positive(rate) else {}
            return {"compression.num_frames": frames, **rates}
    return {}
