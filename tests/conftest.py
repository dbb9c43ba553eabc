"""Eight fake CPU devices, no silent rank promotion, and the fixtures that many tests share."""

from __future__ import annotations

import atexit
import json
import os
import pathlib
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # The older emitters compile a training step in two thirds of the time.
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    )
)
# Most of the time is compilation: optimise less, and share compiled programs between all processes.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the folder
    _cache = tempfile.mkdtemp(prefix="storm-test-programs-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache

from collections.abc import Callable
from typing import Any

import filelock
import hypothesis
import jax
import media_files
import numpy as np
import pytest
import transformers
from flax import nnx
from small_model import SMALL

from configs import tiny
from storm_jax.config import ModelConfig, RunConfig, from_dict, to_dict
from storm_jax.run import Run
from storm_jax.sharding import make_mesh
from storm_jax.tasks import shapes
from storm_jax.text.bpe import train_tokenizer
from storm_jax.text.tokenizer import load_tokenizer
from storm_jax.train import loop

# Times depend on what else runs on the machine.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def randomise():
    """Replaces all parameters of a module by random values, because zeros would hide what they multiply.

    The module may be abstract (`nnx.eval_shape`), which saves compiling its initialisation.
    """

    def apply(module: nnx.Module, seed: int = 0, scale: float = 0.2) -> nnx.Module:
        rng = np.random.default_rng(seed)
        graphdef, params = nnx.split(module)

        def noise(path: tuple, value: jax.Array) -> np.ndarray:
            drawn = (rng.standard_normal(value.shape) * scale).astype(np.float32)
            name = jax.tree_util.keystr(path)
            return drawn + 1 if "norm" in name and "scale" in name else drawn

        pure = jax.tree_util.tree_map_with_path(noise, nnx.to_pure_dict(params))
        return nnx.merge(graphdef, pure)

    return apply


@pytest.fixture(scope="session")
def small_model() -> ModelConfig:
    """The tiny preset with narrower layers."""
    config = tiny.get_config("stage=sft")
    config.update_from_flattened_dict(SMALL)
    return from_dict(RunConfig, config).model


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory):
    """Builds a folder once for all workers: `build_once(name, build)` calls `build(folder)` or waits."""

    def folder_of(name: str, build: Callable[[pathlib.Path], None]) -> pathlib.Path:
        root = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            root = root.parent
        folder = root / f"shared-{name}"
        with filelock.FileLock(f"{folder}.lock"):
            if not folder.exists():
                partial = root / f"partial-{name}"
                shutil.rmtree(partial, ignore_errors=True)
                build(partial)
                partial.rename(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def shapes_folder(build_once) -> pathlib.Path:
    """A small rendering of the built-in task, with a tokenizer."""
    return build_once("shapes", _render_shapes)


def _render_shapes(folder: pathlib.Path) -> None:
    shapes.write(
        folder,
        shapes.Settings(clips=72, seed=0, families=tuple(shapes.FAMILIES), frames=8, eval_clips=2),
        workers=1,
    )
    texts = [
        turn["value"]
        for record in json.loads((folder / "train.json").read_text())
        for turn in record["conversations"]
    ]
    train_tokenizer(texts, 512).save_pretrained(folder / "tokenizer")


@pytest.fixture(scope="session")
def tokenizer(shapes_folder: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """The project's own tokenizer, trained on the built-in task and read back from its folder."""
    return load_tokenizer(shapes_folder / "tokenizer")


@pytest.fixture(scope="session")
def encode_video():
    """Writes frames with any codec, container and timestamps (in eighths of a second)."""

    def encode(path: pathlib.Path, frames: np.ndarray, codec: str = "libx264", **how: Any):
        return media_files.encode(path, frames, codec, size=frames.shape[1:3], rate=8, **how)

    return encode


@pytest.fixture(scope="session")
def small_config(small_model: ModelConfig, shapes_folder: pathlib.Path):
    """Makes a RunConfig that trains in seconds; keywords are dotted fields: `train__steps=3`."""

    def make(**overrides) -> RunConfig:
        config = tiny.get_config("stage=sft")
        config.model.update(to_dict(small_model))
        fields = {
            "compression__num_frames": 8,
            "compression__temporal_pool": 2,
            "data__train": [{"name": "shapes", "path": str(shapes_folder / "train.json")}],
            "data__val": [{"name": "shapes", "path": str(shapes_folder / "val.json")}],
            "data__rows": [{"tokens": 128, "frames": 16}],
            "data__num_workers": 0,
            "train__steps": 6,
            "train__batch_size": 8,
            "train__eval_every": 3,
            "train__save_every": 3,
            "mesh__data": 1,
        }
        changed = {name.replace("__", "."): value for name, value in (fields | overrides).items()}
        config.update_from_flattened_dict(changed)
        return from_dict(RunConfig, config)

    return make


@pytest.fixture(scope="session")
def trained_run(small_config, shapes_folder, build_once, tmp_path_factory) -> pathlib.Path:
    """A run of two steps: it answers, though not well. Each worker has a copy to write into."""

    def train(folder: pathlib.Path) -> None:
        config = small_config(train__steps=2, train__eval_every=0)
        run = Run(folder)
        run.prepare(config, shapes_folder / "tokenizer")
        loop.train(run, make_mesh(config.mesh, jax.devices()[:1]), lambda spec, pool: {})

    copy = tmp_path_factory.mktemp("runs") / "trained"
    return shutil.copytree(build_once("trained", train), copy)
