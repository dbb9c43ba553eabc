"""VILA and NVILA: a folder with config.json, llm/, vision_tower/ and mm_projector/.

The tower's features go through a stem (mm_projector), and the token of a newline follows the tokens of each image
and of each pooled frame. What we do not support, such as tiles, is refused by field.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from storm_jax.config import LayoutConfig, StemConfig
from storm_jax.weights import WeightsError
from storm_jax.weights.architecture import read_vision
from storm_jax.weights.whole import WholeModel, is_positive, pooling, read_json, unsupported

_FOLDERS = {"vision": "vision_tower", "decoder": "llm", "projector": "mm_projector"}
_STEMS = {
    "linear": StemConfig(kind="linear", downsample=1),
    "mlp2x_gelu": StemConfig(kind="mlp2x_gelu", downsample=1),
    "mlp_downsample": StemConfig(kind="mlp_downsample", downsample=2),
    "mlp_downsample_2x2_fix": StemConfig(kind="mlp_downsample", downsample=2),
    "mlp_downsample_3x3_fix": StemConfig(kind="mlp_downsample_3x3_fix", downsample=3),
}
# Values that we support, by field of config.json.
_SUPPORTS: Mapping[str, tuple[Any, ...]] = {
    "s2": (False, None),
    "dynamic_s2": (False, None),
    "ps3": (False, None),
    "mm_vision_select_feature": ("cls_patch", None),
    "mm_use_im_start_end": (False, None),
}


def recognise(fields: Mapping[str, Any]) -> bool:
    return {"llm_cfg", "vision_tower_cfg", "mm_projector_cfg"} <= fields.keys()


def read(folder: pathlib.Path, fields: Mapping[str, Any]) -> WholeModel:
    """Reads the tower, stem, layout and pooling.

    Raises:
      WeightsError: naming each missing part or unsupported field.
    """
    problems = [f"{part}/ is missing" for part in _FOLDERS.values() if not (folder / part).is_dir()]
    problems += unsupported(fields, _SUPPORTS)
    kind = _projector_type(folder, fields)
    if kind not in _STEMS:
        problems.append(f"mm_projector_type={kind!r} is not supported, only {', '.join(_STEMS)}")
    image, video = (_encoder(fields, f"{name}_encoder", problems) for name in ("image", "video"))
    if image.get("end_tokens", "\n") != video.get("end_tokens", "\n"):
        problems.append("image_encoder and video_encoder have different end_tokens")
    choices = {"data.system": "", **_pooling(video, problems)}
    family = read_json(folder / _FOLDERS["decoder"] / "config.json").get("model_type")
    # Its newline has a BOS before it, and its template is chosen by the folder's name.
    if family == "llama":
        problems.append(
            "llm/config.json: model_type='llama' is not supported: the folder does not have its prompt"
        )
    frames = fields.get("num_video_frames")
    if is_positive(frames):
        choices["compression.num_frames"] = frames
    elif frames is not None:
        problems.append(f"num_video_frames={frames!r} must be a positive number")
    layer = fields.get("mm_vision_select_layer")
    layer = -2 if layer is None else layer  # VILA's default
    if type(layer) is not int or layer >= 0:
        problems.append(f"mm_vision_select_layer={layer!r} must be a negative number")
    if problems:
        raise WeightsError(f"{folder}/config.json:", problems)
    return WholeModel(
        folders={component: folder / name for component, name in _FOLDERS.items()},
        vision=read_vision(folder / _FOLDERS["vision"], feature_layer=layer),
        stem=_STEMS[kind],
        layout=LayoutConfig(after_group=image.get("end_tokens", "\n") or "", trim=True),
        choices=choices,
        notes=_notes(fields),
    )


def _notes(fields: Mapping[str, Any]) -> list[str]:
    notes = []
    if fields.get("image_aspect_ratio") not in (None, "resize"):
        notes.append(
            f"image_aspect_ratio={fields['image_aspect_ratio']!r} cuts images into tiles; here they are resized to "
            f"a square"
        )
    if fields.get("fps"):
        notes.append(f"fps={fields['fps']!r} is not used; set data.frames.fps to sample at a rate")
    return notes


def _projector_type(folder: pathlib.Path, fields: Mapping[str, Any]) -> str:
    found = read_json(folder / "mm_projector/config.json").get("mm_projector_type")
    inside = fields["mm_projector_cfg"]
    return str(found or (inside.get("mm_projector_type") if isinstance(inside, dict) else ""))


def _encoder(fields: Mapping[str, Any], name: str, problems: list[str]) -> Mapping[str, Any]:
    """The arguments of the image or video encoder, which are JSON in a string."""
    value = fields.get(name) or {}
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, dict):
        problems.append(f"{name}={value!r} is not a JSON object")
        return {}
    for part in ("start_tokens", "sep_tokens"):
        if found.get(part):
            problems.append(f"{name}: {part}={found[part]!r} is not supported")
    return found


def _pooling(video: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The pooling of the video encoder."""
    sizes = video.get("pool_sizes", [[1, 1, 1]])
    try:
        ((time, height, width),) = sizes
    except (ValueError, TypeError):
        time = height = width = None
    if height != width or not is_positive(time) or not is_positive(height):
        problems.append(
            f"video_encoder: pool_sizes={sizes!r} is not supported, only one with equal sides"
        )
    return pooling(time, height)
