"""A run: the folder that training writes and evaluation reads.

RUN/config.json            the complete configuration, with absolute paths
RUN/digests.json           the SHA-256 of config.json; the tokenizer and each checkpoint have a file of this name too
RUN/tokenizer/
RUN/checkpoints/STEP/      params (always complete), opt_state, data, meta; elsewhere with train.checkpoint_dir
RUN/metrics.jsonl  RUN/skipped.jsonl  RUN/curves.png
RUN/profile/               with train.profile_steps
RUN/lock                   names the process that trains it
RUN/evals/BENCHMARK/SETTINGS/
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import time
from collections.abc import Iterator

import transformers

from storm_jax import config as config_lib
from storm_jax import distributed
from storm_jax.checkpoints import Checkpoints, RunError
from storm_jax.config import ConfigError, RunConfig, SourceConfig
from storm_jax.files import describe_change, rewriting, write_atomically, write_digests
from storm_jax.text.tokenizer import check_tokenizer, load_tokenizer, read_tokenizer, save_tokenizer

# Fields that may change when a run is resumed.
_MAY_CHANGE = (
    "mesh", "train.steps", "train.accumulation", "train.remat", "train.log_every",
    "train.eval_every", "train.save_every", "train.keep_last", "train.keep_best", "train.checkpoint_dir",
    "train.tensorboard", "train.profile_steps", "data.num_workers", "data.max_skip_fraction", "data.index_dir",
    "data.frames.time_limit",
)  # fmt: skip
_VISIBLE_WITHIN = 20.0  # seconds until a network file system shows a new file
# Data may move.
_MAY_MOVE = re.compile(r"data\.(train|val)\[\d+\]\.(path|media_root)")


class Run:
    """Configuration, tokenizer and checkpoints of one run folder."""

    def __init__(self, workdir: str | pathlib.Path):
        self.path = pathlib.Path(workdir).absolute()

    @functools.cached_property
    def config(self) -> RunConfig:
        if change := describe_change(self.path):
            raise RunError(change)
        return config_lib.load(self.path / "config.json")

    @property
    def tokenizer_path(self) -> pathlib.Path:
        return self.path / "tokenizer"

    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        return load_tokenizer(self.tokenizer_path)

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        if not (self.path / "config.json").exists():
            return Checkpoints(self.path / "checkpoints")
        return self._checkpoints_of(self.config)

    def _checkpoints_of(self, config: RunConfig) -> Checkpoints:
        return Checkpoints(config.train.checkpoint_dir or self.path / "checkpoints")

    @property
    def has_begun(self) -> bool:
        """Whether a step was taken; before that, there is nothing to resume."""
        metrics = self.path / "metrics.jsonl"
        return bool(self.checkpoints.steps()) or (metrics.exists() and metrics.stat().st_size > 0)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the folder and holds RUN/lock, so that no other process writes this run.

        The lock of a process that died is free. Its temporary files are removed.

        Raises:
          RunError: if another process holds the lock, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("a+")
        except OSError as error:
            raise RunError(f"--workdir={self.path} cannot be written: {error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise RunError(
                    f"{self.path} is in use by {file.read().strip()}: use another --workdir, or wait"
                ) from error
            except OSError:
                logging.warning("%s: the file system has no locks: train once at a time", self.path)
            for leftover in self.path.glob("*.tmp"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)
                if [entry.name for entry in self.path.iterdir()] == ["lock"]:  # nothing was written
                    (self.path / "lock").unlink()
                    self.path.rmdir()

    def prepare(self, config: RunConfig, tokenizer_from: pathlib.Path) -> None:
        """Creates the folder, or checks that the run in it has the same configuration.

        Paths in the configuration are stored absolute, so that the run can be used from any folder.
        The configuration of a run that has not taken a step yet is replaced.

        Raises:
          RunError: if the folder cannot be written or contains another run; nothing is overwritten.
          ConfigError: if `tokenizer_from` has no tokenizer, or one too large for the model.
        """
        config = _with_absolute_paths(config)
        tokenizer, vocab_size = read_tokenizer(tokenizer_from), config.model.decoder.vocab_size
        check_tokenizer(tokenizer, tokenizer_from)
        if len(tokenizer) > vocab_size:
            raise ConfigError(
                f"the tokenizer in {tokenizer_from} has {len(tokenizer)} entries, more than "
                f"model.decoder.vocab_size={vocab_size}"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.has_begun:
                self._check_same(config)
                self._check_moved(config)
            else:
                self._check_unused(config)
                (self.path / "skipped.jsonl").unlink(missing_ok=True)
                partial = self.path / f"tokenizer.{os.getpid()}.tmp"
                save_tokenizer(tokenizer, tokenizer_from, partial)
                shutil.rmtree(self.tokenizer_path, ignore_errors=True)
                write_digests(partial, partial.iterdir())
                partial.rename(self.tokenizer_path)
            text = json.dumps(config_lib.to_dict(config), indent=2) + "\n"
            path = self.path / "config.json"
            if not path.exists() or path.read_text() != text:
                with rewriting(self.path, ["config.json"]):
                    write_atomically(path, text)
        except OSError as error:
            raise RunError(f"--workdir={self.path} cannot be written: {error}") from error
        for name in ("config", "checkpoints"):
            self.__dict__.pop(name, None)

    def share(self) -> None:
        """Waits until process 0 has prepared the folder, and checks that this process sees the same one.

        Raises:
          RunError: if it does not.
        """
        path = self.path / "config.json"
        text = distributed.broadcast(path.read_text() if distributed.is_main() else None)
        deadline = time.monotonic() + _VISIBLE_WITHIN
        while not path.exists() or path.read_text() != text:
            if time.monotonic() > deadline:
                raise RunError(
                    f"{socket.gethostname()} does not see the {path} that process 0 wrote: --workdir must "
                    f"be on a file system that all processes share"
                )
            time.sleep(0.2)

    def _check_same(self, config: RunConfig) -> None:
        # Runs of earlier versions may have relative paths.
        stored = config_lib.to_dict(_with_absolute_paths(self.config))
        changed = {
            name: values
            for name, values in config_lib.differences(stored, config_lib.to_dict(config)).items()
            if not name.startswith(_MAY_CHANGE) and not _MAY_MOVE.fullmatch(name)
        }
        if changed:
            listed = "\n  ".join(f"{k}: {a!r} there, {b!r} now" for k, (a, b) in changed.items())
            raise RunError(
                f"{self.path} contains a run with a different configuration:\n  {listed}\n"
                f"Use another --workdir, or set these fields back to resume the run"
            )
        last = max(self.checkpoints.steps(), default=0)
        if last > config.train.steps:
            raise RunError(
                f"{self.path} was trained to step {last}, beyond train.steps={config.train.steps}"
            )

    def _check_moved(self, config: RunConfig) -> None:
        """Checks that the checkpoints have moved if their place has."""
        old, new = self.checkpoints, self._checkpoints_of(config)
        if steps := set(old.steps()) - set(new.steps()):
            raise RunError(
                f"train.checkpoint_dir={new.path} does not have checkpoint {max(steps)} of this run: copy it "
                f"from {old.path}, or set the field back"
            )

    def _check_unused(self, config: RunConfig) -> None:
        """Checks that the place of a new run's checkpoints has none of another run."""
        place = self._checkpoints_of(config)
        if place.steps():
            raise RunError(
                f"train.checkpoint_dir={place.path} contains checkpoints of another run: name an empty folder"
            )


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """`config` with its paths relative to the current folder made absolute; empty ones stay empty."""

    def source(config: SourceConfig) -> SourceConfig:
        return dataclasses.replace(
            config, path=_absolute(config.path), media_root=_absolute(config.media_root)
        )

    data = dataclasses.replace(
        config.data,
        train=tuple(source(item) for item in config.data.train),
        val=tuple(source(item) for item in config.data.val),
        tokenizer=_absolute(config.data.tokenizer),
        index_dir=_absolute(config.data.index_dir),
    )
    train = dataclasses.replace(config.train, checkpoint_dir=_absolute(config.train.checkpoint_dir))
    return dataclasses.replace(
        config, data=data, train=train, init_from=_absolute(config.init_from)
    )


def _absolute(path: str) -> str:
    return str(pathlib.Path(path).absolute()) if path and "://" not in path else path
