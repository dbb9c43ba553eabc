"""LLaVA-OneVision and LLaVA-Video, in transformers' layout and in the original one: SigLIP, two linear maps, Qwen2.

The 27 x 27 tokens of a video's frame are resized to 14 x 14, and a learned vector, the newline, follows an image
and a video, or each of its frames or rows. Images are not split into tiles: each is seen as one of
several images, which LLaVA does not split either.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from storm_jax.config import LayoutConfig, StemConfig, VisionConfig
from storm_jax.weights import WeightsError
from storm_jax.weights.architecture import is_original_llava, read_vision
from storm_jax.weights.hub import local_folder
from storm_jax.weights.tensors import list_tensors
from storm_jax.weights.whole import WholeModel, in_one_folder, is_positive, pooling, unsupported

_TRANSFORMERS_SUPPORTS: Mapping[str, tuple[Any, ...]] = {
    "vision_feature_select_strategy": ("full",),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
}
_ORIGINAL_SUPPORTS: Mapping[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_resampler_type": (None,),
    "mm_vision_select_feature": ("patch",),
    "mm_vision_select_layer": (-2,),
    "mm_use_im_start_end": (False, None),
    "mm_spatial_pool_stride": (2, None),
    "add_faster_video": (False, None),
}
_POSITIONS = {"one_token": "clip", "frame": "group", "grid": "row", "no_token": "none"}
_POOLS = ("bilinear", "average", "max")
# After a video, if add_time_instruction is set.
_TIMES = (
    "\nThe video lasts for {seconds} seconds, and {count} frames are uniformly sampled from it. These frames are "
    "located at {times}.Please answer the following questions related to this video."
)


def recognise(fields: Mapping[str, Any]) -> bool:
    return fields.get("model_type") == "llava_onevision" or is_original_llava(fields)


def read(folder: pathlib.Path, fields: Mapping[str, Any]) -> WholeModel:
    """Reads the tower, stem and layout.

    Raises:
      WeightsError: naming each unsupported field.
    """
    describe = _original if is_original_llava(fields) else _transformers
    problems: list[str] = []
    vision, pool, layout = describe(folder, fields, problems)
    if problems or vision is None:
        raise WeightsError(f"{folder}/config.json:", problems)
    return WholeModel(
        folders=in_one_folder(folder),
        vision=vision,
        stem=StemConfig(kind="mlp2x_gelu", downsample=1, video_pool=pool),
        layout=layout,
        choices={
            "data.system": "You are a helpful assistant.",
            "compression.num_frames": 64 if layout.after_video else 32,
            **pooling(),
        },
        notes=["images are not split into tiles; each is resized to a square"],
    )


def _transformers(
    folder: pathlib.Path, fields: Mapping[str, Any], problems: list[str]
) -> tuple[VisionConfig | None, str, LayoutConfig]:
    problems += unsupported(fields, _TRANSFORMERS_SUPPORTS)
    layer = fields.get("vision_feature_layer", -1)
    if type(layer) is not int or layer >= 0:
        problems.append(f"vision_feature_layer={layer!r} is not supported, only a negative number")
    layout = LayoutConfig(image_newline=True, video_newline="clip")
    return None if problems else read_vision(folder, feature_layer=layer), "bilinear", layout


def _original(
    folder: pathlib.Path, fields: Mapping[str, Any], problems: list[str]
) -> tuple[VisionConfig | None, str, LayoutConfig]:
    problems += unsupported(fields, _ORIGINAL_SUPPORTS)
    pool = fields.get("mm_spatial_pool_mode", "bilinear")
    if pool not in _POOLS:
        problems.append(f"mm_spatial_pool_mode={pool!r} is not supported, only {', '.join(_POOLS)}")
    merge = str(fields.get("mm_patch_merge_type", "flat"))
    position = fields.get("mm_newline_position", "one_token")
    if merge not in ("flat", "spatial", "spatial_unpad"):
        problems.append(
            f"mm_patch_merge_type={merge!r} is not supported, only flat, spatial and spatial_unpad"
        )
    if position not in _POSITIONS:
        problems.append(
            f"mm_newline_position={position!r} is not supported, only {', '.join(_POSITIONS)}"
        )
    if problems:
        return None, pool, LayoutConfig()
    is_unpadded = merge == "spatial_unpad"
    newline = "none" if merge == "flat" else _POSITIONS[position]
    if newline == "clip" and not is_unpadded:
        newline = "none"
    layout = LayoutConfig(
        after_video=_TIMES if fields.get("add_time_instruction") else "",
        joined=True,
        image_newline=is_unpadded,
        video_newline=newline,
    )
    return _original_tower(folder, fields), pool, layout


def _original_tower(folder: pathlib.Path, fields: Mapping[str, Any]) -> VisionConfig:
    """The tower that config.json names; its last layer is not used, and usually not stored."""
    named = str(fields.get("mm_vision_tower") or "")
    try:
        tower = read_vision(local_folder(named, ["config.json"]))
    except WeightsError as error:
        raise WeightsError(
            f"{folder}/config.json: the sizes of the tower are those of mm_vision_tower={named!r}, which cannot "
            f"be read. Set it to a folder with the config.json of that tower:",
            str(error).splitlines(),
        ) from error
    found = (re.search(r"vision_tower.*\.layers\.(\d+)\.", name) for name in list_tensors(folder))
    stored = 1 + max((int(layer[1]) for layer in found if layer), default=-1)
    if not is_positive(stored):
        raise WeightsError(
            f"{folder} has no tensors of its tower, which was not trained: import its parts with --vision="
            f"{named} and --decoder"
        )
    return dataclasses.replace(tower, depth=stored, feature_layer=tower.depth - 2 - stored)
