"""Our own one folder for PyTorch (`storm_jax.weights.one_folder`), read back as the run that it was made from."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any, TypeVar

from storm_jax.config import (
    CompressionConfig,
    ConfigError,
    FramesConfig,
    LayoutConfig,
    MambaConfig,
    StemConfig,
    from_dict,
    to_dict,
)
from storm_jax.weights import WeightsError
from storm_jax.weights.architecture import read_vision
from storm_jax.weights.hf.configuration_storm import StormConfig
from storm_jax.weights.one_folder import HEAD_END, NEWLINES, POOLS, TEXTS
from storm_jax.weights.tokenizer import remove_tokens
from storm_jax.weights.whole import WholeModel, in_one_folder, is_positive, read_json

T = TypeVar("T")


def recognise(fields: Mapping[str, Any]) -> bool:
    return fields.get("model_type") == StormConfig.model_type


def read(folder: pathlib.Path, fields: Mapping[str, Any]) -> WholeModel:
    """Reads tower, stem, mixer, layout, compression and prompt. The code in the folder is not run.

    Raises:
      WeightsError: naming each missing or unsupported field.
    """
    processor = read_json(folder / "processor_config.json")
    video, settings = (_part(processor, name) for name in ("video_processor", "settings"))
    plan = _part(fields, "plan")
    problems: list[str] = []

    def build(kind: type[T], where: str, values: Mapping[str, Any]) -> T | None:
        try:
            return from_dict(kind, values)
        except ConfigError as error:
            problems.extend(f"{where}: {line.strip()}" for line in str(error).splitlines())
            return None

    for name in ("vision_config", "text_config", "stem", "mamba", "plan"):
        if not _part(fields, name):
            problems.append(f"config.json: {name}={fields.get(name)!r} must be a mapping of fields")
    for name in ("vision_depth", "text_vocab_size"):
        if not is_positive(fields.get(name)):
            problems.append(f"config.json: {name}={fields.get(name)!r} must be a positive number")
    mixer = fields.get("mixer")
    if mixer not in ("none", "mamba1", "mamba2"):
        problems.append(f"config.json: mixer={mixer!r} must be 'none', 'mamba1' or 'mamba2'")
    stem = build(StemConfig, "config.json: stem", _part(fields, "stem"))
    mamba = build(MambaConfig, "config.json: mamba", _part(fields, "mamba"))
    both = "config.json (plan), processor_config.json"
    texts = {name: value for name, value in _part(settings, "layout").items() if name in TEXTS}
    layout = build(LayoutConfig, both, texts | {name: plan.get(name) for name in NEWLINES})
    pools = {name: plan.get(name) for name in POOLS}
    compression = build(CompressionConfig, both, pools | {"num_frames": video.get("num_frames")})
    rate = {"fps": video.get("fps") or 0.0, "time_text": settings.get("time_text")}
    frames = build(FramesConfig, "processor_config.json", rate)
    system = re.search(r'set system = (".*") -%}', _template(folder)[0])
    if system is None:
        problems.append("chat_template.jinja does not begin with the head that the export wrote")
    if problems or not (stem and mamba and layout and compression and frames and system):
        raise WeightsError(f"{folder}:", problems)
    tower, depth = read_vision(folder), fields["vision_depth"]
    return WholeModel(
        folders=in_one_folder(folder),
        vision=dataclasses.replace(
            tower,
            depth=depth,
            feature_layer=tower.depth - depth - 1,
            final_norm=bool(fields.get("vision_final_norm")),
        ),
        stem=stem,
        mixer=str(mixer),
        mamba=mamba,
        layout=layout,
        vocab_size=fields["text_vocab_size"],
        choices={
            **{f"compression.{name}": value for name, value in to_dict(compression).items()},
            "data.frames.fps": frames.fps,
            "data.frames.time_text": frames.time_text,
            "data.system": json.loads(system[1]),
            **({"model.dtype": fields["dtype"]} if fields.get("dtype") != "float16" else {}),
        },
        write_tokenizer=lambda out: _write_tokenizer(folder, fields.get("added_tokens") or [], out),
    )


def _part(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = fields.get(name)
    return found if isinstance(found, dict) else {}


def _template(folder: pathlib.Path) -> tuple[str, str]:
    """The head of the chat template, and the template of the decoder."""
    try:
        head, _, rest = (folder / "chat_template.jinja").read_text().partition(HEAD_END)
    except OSError as error:
        raise WeightsError(f"{folder}/chat_template.jinja cannot be read: {error}") from error
    return head, rest


def _write_tokenizer(folder: pathlib.Path, added: list[str], out: pathlib.Path) -> None:
    """Writes the tokenizer as it was before the export added placeholders and a head to its template."""
    out.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(folder / name, out)
    remove_tokens(out, added)
    (out / "chat_template.jinja").write_text(_template(folder)[1])
