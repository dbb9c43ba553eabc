"""What the configuration files share: the argument after the colon and the paper's stages."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.mixtures import align, long, sft, sources
from storm_jax.config import ModelConfig, RunConfig, from_dict, to_dict

MIXTURES = {"align": align, "sft": sft, "long": long}
ROWS = {
    "align": [{"tokens": 8192, "frames": 32}],
    # Mostly text and some images; many images, or two videos.
    "sft": [{"tokens": 8192, "frames": 16}, {"tokens": 8192, "frames": 64}],
    "long": [{"tokens": 16_384, "frames": 128}],
}
STAGES = ("align", "sft", "long")


def parse_stage(arg: str | None) -> str:
    """The stage of "stage=align"; anything else is an error."""
    name, _, stage = (arg or "").partition("=")
    if name != "stage" or stage not in STAGES:
        raise ValueError(
            f"configuration argument {arg!r}: write --config=FILE.py:stage=STAGE with a STAGE of "
            f"{', '.join(STAGES)}"
        )
    return stage


def complete(fields: dict[str, Any]) -> ConfigDict:
    """Every field of a RunConfig, so that each can be set on the command line."""
    return ConfigDict(to_dict(from_dict(RunConfig, fields)))


def paper_config(model: ModelConfig, stage: str) -> ConfigDict:
    """A stage of the paper at full size: align on images, SFT at 32 frames, long videos at 128.

    The paper gives stages, data and frames. Rates, batch and warm-up are VILA's, which it builds on
    (docs/design.md says which numbers are whose).
    """
    is_align, is_long = stage == "align", stage == "long"
    rate = 1e-3 if is_align else 2e-5
    frames = 128 if is_long else 32
    return complete(
        {
            "model": to_dict(model),
            "compression": {"num_frames": frames, "temporal_pool": 4},
            "data": {
                "train": sources(MIXTURES[stage].SETS),
                "rows": ROWS[stage],
            },
            "optim": {
                "learning_rate": {
                    "vision": 0.0 if is_align else rate,
                    "projector": rate,
                    "decoder": 0.0 if is_align else rate,
                },
            },
            "train": {"steps": 1000 if is_align else 10_000, "batch_size": 256},
            "mesh": {"data": 1, "fsdp": -1},
        }
    )
