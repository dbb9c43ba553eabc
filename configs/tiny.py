"""The built-in task on a laptop: stage=align, stage=sft or stage=long (see storm_jax/presets.py).

Trained from scratch, so alignment is short: with a random decoder there is little to align to.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.common import complete, parse_stage
from storm_jax import presets
from storm_jax.config import to_dict


def get_config(arg: str | None = None) -> ConfigDict:
    stage = parse_stage(arg)
    is_align, is_long = stage == "align", stage == "long"
    frames = 64 if is_long else 16
    steps = {"align": 20, "sft": 200, "long": 200}[stage]
    rate = 1e-3
    return complete(
        {
            "model": to_dict(presets.tiny()),
            "compression": {"num_frames": frames, "temporal_pool": 4},
            "data": {
                "train": [{"name": "shapes", "path": "data/shapes/train.json"}],
                "val": [{"name": "shapes", "path": "data/shapes/val.json"}],
                "system": "",
                "rows": [{"tokens": 384, "frames": 64}],
                "num_workers": 2,
            },
            "optim": {
                "learning_rate": {
                    "vision": 0.0 if is_align else rate,
                    "projector": rate,
                    "decoder": 0.0 if is_align else rate,
                },
                "warmup_fraction": 0.05,
                "weight_decay": 0.01,
                "b2": 0.99,
            },
            "train": {
                "steps": steps,
                "batch_size": 16,
                "remat": False,
                "eval_every": 100,
                "save_every": 100,
            },
        }
    )
