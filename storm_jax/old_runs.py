"""Runs and exported projectors of version 0.1, in the fields and parameter names of today."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_LINEAR = {"projector/linear/": "projector/stem/linear1/"}
_MLP = {
    "projector/norm/": "projector/stem/norm1/",
    "projector/linear/": "projector/stem/linear1/",
    "projector/mixer/linear/": "projector/stem/linear2/",
}


def current_model(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model or projector: `projector`, `projector_args` and `downsample` became `stem` and `mixer`."""
    fields = dict(fields)
    mamba = fields.get("mamba", {})
    if not isinstance(fields.get("projector"), str) or not isinstance(mamba, Mapping):
        return fields  # of today, or damaged
    projector, args = fields.pop("projector"), fields.pop("projector_args", {})
    mamba = dict(mamba)
    version = mamba.pop("mixer", "mamba1")
    kind = "mlp_downsample" if projector == "mlp" else "linear"
    downsample = fields.pop("downsample", 2)
    return {
        **fields,
        "stem": {"kind": kind, "downsample": downsample},
        "mixer": {"storm": version, "mlp": "none"}.get(projector, projector),
        "mixer_args": args,
        "mamba": mamba,
    }


def current_names(stored: Collection[str]) -> dict[str, str]:
    """{name in a checkpoint: name in the model} of parameters."""
    old = _MLP if any(name.startswith("projector/norm/") for name in stored) else _LINEAR
    return {name: _renamed(name, old) for name in stored}


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
