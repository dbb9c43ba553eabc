"""Half a million parameters that learn the built-in task on two CPU cores in minutes.

    python train.py --config=configs/tiny.py:stage=align --workdir=runs/align
    python train.py --config=configs/tiny.py:stage=sft --workdir=runs/sft --config.init_from=runs/align

Everything trains from scratch, so alignment is short: there is little to align to in a random decoder.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.recipe import BUDGETS, select_stage
from storm_jax.config import (
    CompressionConfig,
    DataConfig,
    DecoderConfig,
    LearningRateConfig,
    MambaConfig,
    ModelConfig,
    OptimConfig,
    RowConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    TrainedCompression,
    VisionConfig,
)

MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=32,
        patch_size=8,
        width=64,
        depth=2,
        num_heads=4,
        mlp_dim=256,
        feature_layer=-1,
    ),
    mamba=MambaConfig(d_state=8),
    decoder=DecoderConfig(
        vocab_size=512,
        width=96,
        depth=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        mlp_dim=256,
        rope_theta=10_000.0,
        qkv_bias=True,
        tie_embeddings=True,
    ),
    dtype="float32",
)


def align() -> RunConfig:
    """Stage 1: train the projector."""
    return _run(
        num_frames=16,
        steps=20,
        learning_rate=LearningRateConfig(vision=0.0, projector=1e-3, decoder=0.0),
    )


def sft() -> RunConfig:
    """Stage 2: train everything."""
    return _run(
        num_frames=16,
        steps=200,
        compressions=BUDGETS,
        learning_rate=LearningRateConfig(vision=1e-3, projector=1e-3, decoder=1e-3),
    )


def long() -> RunConfig:
    """Stage 3: train everything on longer clips."""
    return _run(
        num_frames=64,
        steps=200,
        compressions=BUDGETS,
        learning_rate=LearningRateConfig(vision=1e-3, projector=1e-3, decoder=1e-3),
    )


def _run(
    *,
    num_frames: int,
    steps: int,
    learning_rate: LearningRateConfig,
    compressions: tuple[TrainedCompression, ...] = (),
) -> RunConfig:
    return RunConfig(
        model=MODEL,
        compression=CompressionConfig(num_frames=num_frames, temporal_pool=4),
        data=DataConfig(
            train=(SourceConfig(name="shapes", path="data/shapes/train.json"),),
            val=(SourceConfig(name="shapes", path="data/shapes/val.json"),),
            system="",
            rows=(RowConfig(tokens=384, frames=64),),
            num_workers=2,
        ),
        optim=OptimConfig(
            learning_rate=learning_rate, warmup_fraction=0.05, weight_decay=0.01, b2=0.99
        ),
        train=TrainConfig(
            steps=steps,
            batch_size=16,
            remat=False,
            eval_every=100,
            save_every=100,
            compressions=compressions,
        ),
    )


def get_config(arg: str | None = None) -> ConfigDict:
    return select_stage(arg, {"align": align, "sft": sft, "long": long})
