"""SmolLM2-135M-Instruct, a real pretrained language model, learns the built-in task on two CPU cores.

    python train.py --config=configs/smollm2_135m.py:stage=align --workdir=runs/pretrained/align --config.init_from=runs/pretrained/base
    python train.py --config=configs/smollm2_135m.py:stage=sft --workdir=runs/pretrained/sft --config.init_from=runs/pretrained/align

`make demo-pretrained` makes runs/pretrained/base: this decoder with the tower that `make demo` trained.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from configs import tiny
from configs.recipe import select_stage
from storm_jax.config import (
    DecoderConfig,
    LearningRateConfig,
    LoraConfig,
    RowConfig,
    RunConfig,
    TrainConfig,
)

DECODER = DecoderConfig(
    vocab_size=49_152,
    width=576,
    depth=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    rope_theta=100_000.0,
    qkv_bias=False,
    tie_embeddings=True,
    norm_eps=1e-5,
    max_positions=8192,
)


def align() -> RunConfig:
    """Stage 1: train the projector."""
    return _run(
        steps=120,
        learning_rate=LearningRateConfig(vision=0.0, projector=2e-3, decoder=0.0),
        lora=LoraConfig(),
    )


def sft() -> RunConfig:
    """Stage 2: train tower, projector and adapters on the decoder."""
    return _run(
        steps=400,
        learning_rate=LearningRateConfig(vision=1e-4, projector=1e-3, decoder=5e-4),
        lora=LoraConfig(rank=16, alpha=32.0),
    )


def _run(*, steps: int, learning_rate: LearningRateConfig, lora: LoraConfig) -> RunConfig:
    """The run of `configs/tiny.py` with another decoder."""
    base = tiny.sft()
    # Validation of all 700 samples would take as long as 30 steps.
    val = tuple(dataclasses.replace(source, cap=100) for source in base.data.val)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, decoder=dataclasses.replace(DECODER, lora=lora)),
        data=dataclasses.replace(
            base.data,
            val=val,
            # Without a system text, the chat template adds its own: 14 tokens more, of 34 in a sample.
            system="Answer.",
            rows=(RowConfig(tokens=384, frames=80),),
        ),
        optim=dataclasses.replace(base.optim, learning_rate=learning_rate),
        train=TrainConfig(steps=steps, batch_size=1, remat=False, eval_every=150, save_every=150),
    )


def get_config(arg: str | None = None) -> ConfigDict:
    return select_stage(arg, {"align": align, "sft": sft})
