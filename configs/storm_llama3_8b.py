"""Stages of `storm_llama3_8b` (see storm_jax/presets.py): stage=align, stage=sft or stage=long."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.common import paper_config, parse_stage
from storm_jax import presets


def get_config(arg: str | None = None) -> ConfigDict:
    return paper_config(presets.storm_llama3_8b(), parse_stage(arg))
