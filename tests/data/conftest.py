"""Fixtures shared by the tests of the data package: small mixtures and text sources."""

from __future__ import annotations

import json
import pathlib

import pytest

from storm_jax.compression import Grid
from storm_jax.config import CompressionConfig, FramesConfig, SourceConfig
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.mixture import Mixture
from storm_jax.data.rows import RowShape
from storm_jax.media.workers import WorkerPool
from storm_jax.text.conversation import ConversationEncoder

# Eight frames pooled by two are four groups of one token each; an image has four tokens.
SHAPE = RowShape(
    tokens=160,
    frames=24,
    image_size=32,
    grid=Grid.square(2),
    compressions=(
        CompressionConfig(num_frames=8, temporal_pool=2, spatial_pool=2, temporal_sample=1),
    ),
)


@pytest.fixture(scope="session")
def make_mixture(tokenizer):
    """Opens sources (paths or SourceConfigs) as a mixture for a small model."""

    def make(*sources, shapes=(SHAPE,), seed=0, skip=0.1, frames=None, pool=None, index_dir=""):
        configs = [
            source
            if isinstance(source, SourceConfig)
            else SourceConfig(name=f"s{i}", path=str(source))
            for i, source in enumerate(sources)
        ]
        text = ConversationEncoder(tokenizer, "")
        first = shapes[0]
        return Mixture(
            configs,
            SampleEncoder(
                text=text,
                grid=first.grid,
                compression=first.compressions[0],
                frames=frames or FramesConfig(),
            ),
            shapes,
            seed=seed,
            index_dir=index_dir,
            max_skip_fraction=skip,
            pool=pool or WorkerPool(0),
        )

    return make


@pytest.fixture(scope="session")
def write_texts():
    """Writes a source of `count` short questions; with `long`, each is longer than the previous one."""

    def write(path: pathlib.Path, count: int, long: bool = False) -> pathlib.Path:
        records = [
            {
                "id": f"{path.stem} {i}",
                "conversations": [
                    {"from": "human", "value": "Why? " * (1 + long * i)},
                    {"from": "gpt", "value": "So."},
                ],
            }
            for i in range(count)
        ]
        path.write_text("\n".join(json.dumps(record) for record in records))
        return path

    return write
