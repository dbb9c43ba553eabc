"""The built-in task on a laptop: stage=align, stage=sft or stage=long (see storm_jax/presets.py).

Trained from scratch, so alignment is short: with a random decoder there is little to align to.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.common import parse_stage
from storm_jax import presets
from storm_jax.config import to_dict


def get_config(arg: str | None = None) -> ConfigDict:
    stage = parse_stage(arg)
    is_align, is_long = stage == "align", stage == "long"
    frames = 64 if is_long else 16
    steps = {"align": 40, "sft": 600, "long": 200}[stage]
    return ConfigDict(
        {
            "model": to_dict(presets.tiny()),
            "compression": {
                "num_frames": frames,
                "temporal_pool": 4,
                "spatial_pool": 1,
                "temporal_sample": 1,
            },
            "data": {
                "train": "data/shapes/train.json",
                "val": "data/shapes/val.json",
                "media_root": "",
                "tokenizer": "",
                "system": "",
                "row_tokens": 256,
                "row_frames": 64,
                "max_skip_fraction": 0.1,
                "num_threads": 2,
            },
            "optim": {
                "learning_rate": {
                    "vision": 0.0 if is_align else 1e-3,
                    "projector": 1e-3,
                    "decoder": 0.0 if is_align else 1e-3,
                },
                "warmup_fraction": 0.05,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
            },
            "train": {
                "steps": steps,
                "batch_size": 16,
                "accumulation": 1,
                "seed": 0,
                "remat": False,
                "log_every": 10,
                "eval_every": 200,
                "save_every": 200,
                "keep_last": 2,
                "keep_best": 1,
                "tensorboard": False,
            },
            "mesh": {"data": -1, "fsdp": 1, "context": 1, "tensor": 1},
            "init_from": "",
        }
    )
