"""A run: the folder that training writes and evaluation reads.

RUN/config.json            the complete configuration
RUN/tokenizer/
RUN/checkpoints/STEP/      params (always complete), opt_state, data, meta
RUN/metrics.jsonl  RUN/skipped.jsonl  RUN/curves.png
RUN/evals/BENCHMARK/SETTINGS/
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import transformers

from storm_jax import config as config_lib
from storm_jax.config import ConfigError, RunConfig
from storm_jax.files import write_atomically
from storm_jax.params import flatten, unflatten
from storm_jax.text.tokenizer import check_tokenizer, load_tokenizer, read_tokenizer, save_tokenizer

# What may differ when a run is continued; anything else makes it another run.
_MAY_CHANGE = (
    "mesh", "train.steps", "train.accumulation", "train.remat", "train.log_every",
    "train.eval_every", "train.save_every", "train.keep_last", "train.keep_best",
    "train.tensorboard", "data.num_workers", "data.max_skip_fraction", "data.index_dir",
    "data.frames.time_limit",
)  # fmt: skip
# Data may move to another place.
_MAY_MOVE = re.compile(r"data\.(train|val)\[\d+\]\.(path|media_root)")
_PIECE = 2**25  # bytes; larger ones are held, compressed and copied whole on their way to the disk


class RunError(RuntimeError):
    """A run folder that is not what was asked for."""


class Run:
    """Paths, configuration, tokenizer and checkpoints of one run folder."""

    def __init__(self, workdir: str | pathlib.Path):
        self.path = pathlib.Path(workdir).absolute()

    @functools.cached_property
    def config(self) -> RunConfig:
        return config_lib.load(self.path / "config.json")

    @property
    def tokenizer_path(self) -> pathlib.Path:
        return self.path / "tokenizer"

    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        return load_tokenizer(self.tokenizer_path)

    def prepare(self, config: RunConfig, tokenizer_from: pathlib.Path) -> None:
        """Creates the folder, or checks that the run in it has the same configuration.

        Until its first step there is nothing to protect: another configuration replaces it.

        Raises:
          RunError: when the folder cannot be written or holds another run; nothing is overwritten.
          ConfigError: when `tokenizer_from` holds no tokenizer, or one too large for the model.
        """
        tokenizer, slots = read_tokenizer(tokenizer_from), config.model.decoder.vocab_size
        check_tokenizer(tokenizer, tokenizer_from)
        if len(tokenizer) > slots:
            raise ConfigError(
                f"the tokenizer in {tokenizer_from} has {len(tokenizer)} entries, more than "
                f"model.decoder.vocab_size={slots}"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.has_begun:
                self._check_same(config)
            else:
                (self.path / "skipped.jsonl").unlink(missing_ok=True)
                partial = self.path / f"tokenizer.{os.getpid()}.tmp"
                save_tokenizer(tokenizer, tokenizer_from, partial)
                shutil.rmtree(self.tokenizer_path, ignore_errors=True)
                partial.rename(self.tokenizer_path)
            write_atomically(
                self.path / "config.json", json.dumps(config_lib.to_dict(config), indent=2) + "\n"
            )
        except OSError as error:
            raise RunError(f"--workdir={self.path} cannot be written: {error}") from error
        self.__dict__.pop("config", None)

    def _check_same(self, config: RunConfig) -> None:
        old, new = config_lib.to_dict(self.config), config_lib.to_dict(config)
        changed = {
            name: values
            for name, values in config_lib.differences(old, new).items()
            if not name.startswith(_MAY_CHANGE) and not _MAY_MOVE.fullmatch(name)
        }
        if changed:
            listed = "\n  ".join(f"{k}: {a!r} there, {b!r} now" for k, (a, b) in changed.items())
            raise RunError(
                f"{self.path} holds a run with another configuration:\n  {listed}\n"
                f"Use another --workdir, or set these fields back to continue it"
            )

    @property
    def checkpoints_path(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def has_begun(self) -> bool:
        """Whether a step was made: a start that failed before leaves nothing to go on with."""
        metrics = self.path / "metrics.jsonl"
        return bool(self._checkpoint_steps()) or (metrics.exists() and metrics.stat().st_size > 0)

    def _checkpoint_steps(self) -> list[int]:
        if not self.checkpoints_path.is_dir():
            return []
        return sorted(ocp.utils.checkpoint_steps(self.checkpoints_path))

    def checkpoint_step(self, step: int | None = None) -> int:
        """The step of the last checkpoint, or `step` when there is one.

        Raises:
          RunError: when there is none.
        """
        steps = self._checkpoint_steps()
        if not steps:
            raise RunError(f"{self.path} has no checkpoint: train.py saves them")
        if step is not None and step not in steps:
            raise RunError(f"{self.path} has no checkpoint of step {step}; steps here: {steps}")
        return steps[-1] if step is None else step

    def checkpoint_written(self, step: int) -> int:
        """When a checkpoint was written, in nanoseconds since 1970: another training's has another time.

        Raises:
          RunError: when it does not say.
        """
        with self.reading(step):
            path = self.checkpoints_path / str(step) / "_CHECKPOINT_METADATA"
            return int(json.loads(path.read_text())["init_timestamp_nsecs"])

    def restore_params(self, target: Any, step: int) -> Any:
        """Reads the parameters of a checkpoint.

        Args:
          target: pure dict of `jax.ShapeDtypeStruct`s with shardings; dtypes are cast to it.

        Raises:
          RunError: when the parameters have other names or shapes.
        """
        folder = self.checkpoints_path / str(step) / "params"
        there, here = self.stored_params(step), flatten(target)
        problems = [f"{name} is not in the checkpoint" for name in here.keys() - there.keys()]
        problems += [f"{name} is only in the checkpoint" for name in there.keys() - here.keys()]
        problems += [
            f"{name} is {there[name].shape} in the checkpoint and {here[name].shape} here"
            for name in here.keys() & there.keys()
            if there[name].shape != here[name].shape
        ]
        if problems:
            raise RunError(f"checkpoint {step} of {self.path}:\n  " + "\n  ".join(sorted(problems)))
        with self.reading(step):
            handler = ocp.StandardCheckpointHandler()
            return handler.restore(folder, args=ocp.args.StandardRestore(target))

    def stored_params(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter of a checkpoint, by path."""
        with self.reading(step):
            handler = ocp.PyTreeCheckpointHandler()
            tree = handler.metadata(self.checkpoints_path / str(step) / "params").tree
            return {
                path: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
                for path, leaf in flatten(tree).items()
            }

    def read_param(self, step: int, path: str, dtype: Any = None) -> np.ndarray:
        """One parameter in host memory, in its own or another dtype; no other is read."""
        folder = self.checkpoints_path / str(step) / "params"
        how = ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
        with self.reading(step):
            restored = ocp.PyTreeCheckpointHandler().restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    unflatten({path: 0}), unflatten({path: how}), partial_restore=True
                ),
            )
        return flatten(restored)[path]

    def save_params(self, params: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Writes a checkpoint of parameters alone, at step 0.

        Beside the arrays themselves, host memory holds no more than a copy of the largest one and
        some hundred megabytes of pieces on their way to the disk.

        Args:
          params: nested dict of arrays.
          meta: plain JSON, kept beside them.
        """
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
        handler = ocp.PyTreeCheckpointHandler(
            save_device_host_concurrent_gb=math.ceil(largest / 1e9) + 1
        )
        pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), params)
        with ocp.CheckpointManager(
            self.checkpoints_path,
            item_handlers={"params": handler, "meta": ocp.JsonCheckpointHandler()},
        ) as manager:
            manager.save(
                0,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(
                        params, save_args=pieces, ocdbt_target_data_file_size=_PIECE
                    ),
                    meta=ocp.args.JsonSave({"step": 0, **meta}),
                ),
            )
            manager.wait_until_finished()

    @contextlib.contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """Damage to a checkpoint's files, whatever is raised for it, as a RunError."""
        try:
            yield
        except Exception as error:
            raise RunError(f"checkpoint {step} of {self.path} cannot be read: {error}") from error
