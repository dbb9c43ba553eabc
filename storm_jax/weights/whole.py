"""A whole video model, as its family describes it.

A family is a module with `recognise(fields)` and `read(folder, fields)`, where `fields` is the folder's config.json.
What the model puts around its visual tokens becomes our layout; what we do not support is refused by field.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from storm_jax.config import LayoutConfig, MambaConfig, StemConfig, VisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeModel:
    """Everything but the decoder, whose fields are read as those of any decoder.

    Attributes:
      folders: {component: folder of its tensors}.
      mixer: that of the model; only our own have one.
      mamba: None keeps that of the configuration.
      vocab_size: rows of the embedding table that are used; None = all.
      write_tokenizer: writes the tokenizer into a new folder, if it is not the decoder's as it is.
      choices: fields of the run that are not in the weights and that the user may set otherwise, such as
        {"compression.temporal_pool": 8}.
      template: chat template, if the tokenizer's own drops videos.
      notes: what differs from the model as it was published.
    """

    folders: Mapping[str, pathlib.Path]
    vision: VisionConfig
    stem: StemConfig
    layout: LayoutConfig
    choices: Mapping[str, Any]
    template: str = ""
    notes: Sequence[str] = ()
    mixer: str = "none"
    mamba: MambaConfig | None = None
    vocab_size: int | None = None
    write_tokenizer: Callable[[pathlib.Path], None] | None = None


def in_one_folder(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The `folders` of a model whose components share files."""
    return dict.fromkeys(("vision", "projector", "decoder"), folder)


def pooling(temporal: int = 1, spatial: int = 1) -> dict[str, int]:
    """The `choices` of a model's own pooling; without arguments, it has none."""
    return {
        "compression.temporal_pool": temporal,
        "compression.spatial_pool": spatial,
        "compression.temporal_sample": 1,
    }


def unsupported(fields: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Problems with fields whose value is not listed; the first one is the default."""
    values = {name: fields.get(name, allowed[0]) for name, allowed in supported.items()}
    return [
        f"{name}={value!r} is not supported, only {supported[name][0]!r}"
        for name, value in values.items()
        if value not in supported[name]
    ]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file; empty if there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_positive(value: Any) -> bool:
    return type(value) is int and value > 0
