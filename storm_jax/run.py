"""A run: the folder that training writes and evaluation reads.

    RUN/config.json            the complete configuration
    RUN/tokenizer/
    RUN/checkpoints/STEP/      params (always complete), opt_state, data, meta
    RUN/metrics.jsonl  RUN/skipped.jsonl  RUN/curves.png
    RUN/evals/BENCHMARK/SETTINGS/
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
import transformers
from flax import nnx
from orbax.checkpoint import checkpoint_managers as managers

from storm_jax import config as config_lib
from storm_jax.config import ConfigError, RunConfig
from storm_jax.data.conversation import load_tokenizer
from storm_jax.models.storm import Storm

# What may differ when a run is continued; anything else makes it another run.
_MAY_CHANGE = (
    "mesh", "train.steps", "train.accumulation", "train.remat", "train.log_every",
    "train.eval_every", "train.save_every", "train.keep_last", "train.keep_best",
    "train.tensorboard", "data.num_threads", "data.max_skip_fraction", "init_from",
)  # fmt: skip


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

        Raises:
          RunError: when the folder cannot be written or holds another run; nothing is overwritten.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / "config.json").exists():
                self._check_same(config)
            if not self.tokenizer_path.exists():
                partial = self.path / f"tokenizer.{os.getpid()}.tmp"
                shutil.copytree(tokenizer_from, partial)
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
            if not name.startswith(_MAY_CHANGE)
        }
        if changed:
            listed = "\n  ".join(f"{k}: {a!r} there, {b!r} now" for k, (a, b) in changed.items())
            raise RunError(
                f"{self.path} holds a run with another configuration:\n  {listed}\n"
                f"Use another --workdir, or set these fields back to continue it"
            )

    def manager(self, *, read_only: bool = True) -> ocp.CheckpointManager:
        """Orbax's manager of `checkpoints/`. Close it, or use it as a context."""
        train = self.config.train
        policies = [managers.LatestN(n=train.keep_last)]
        if train.keep_best:
            policies.append(
                managers.BestN(
                    get_metric_fn=lambda metrics: metrics["val_loss"],
                    reverse=True,  # sorted descending, the last n are kept: the smallest losses
                    n=train.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        root = self.path / "checkpoints"
        if not read_only:
            for leftover in root.glob("*.orbax-checkpoint-tmp"):  # of a process that was killed
                shutil.rmtree(leftover)
            root.mkdir(exist_ok=True)
        return ocp.CheckpointManager(
            root,
            options=ocp.CheckpointManagerOptions(
                read_only=read_only,
                create=not read_only,
                preservation_policy=managers.AnyPreservationPolicy(policies),
                best_fn=lambda metrics: metrics["val_loss"],
                best_mode="min",
            ),
        )

    def restore_params(self, target: Any, step: int | None = None) -> Any:
        """Reads the parameters of a checkpoint (the last one by default).

        Args:
          target: pure dict of `jax.ShapeDtypeStruct`s with shardings.

        Raises:
          RunError: when there is no such checkpoint or its parameters have other names or shapes.
        """
        if not (self.path / "checkpoints").is_dir():
            raise RunError(f"{self.path} has no checkpoint: has train.py saved one?")
        with self.manager() as manager:
            steps = manager.all_steps()
            if not steps or (step is not None and step not in steps):
                raise RunError(f"{self.path} has no checkpoint {step or ''}; steps here: {steps}")
            step = manager.latest_step() if step is None else step
            args = ocp.args.Composite(params=ocp.args.StandardRestore(target))
            check_shapes(manager, step, target, self.path)
            return manager.restore(step, args=args)["params"]


def check_shapes(
    manager: ocp.CheckpointManager, step: int, target: Any, path: pathlib.Path
) -> None:
    """Raises RunError naming every parameter of a checkpoint that is not as expected."""
    saved = manager.item_metadata(step)["params"]
    here, there = flatten(target), flatten(getattr(saved, "tree", saved))
    problems = [f"{name} is not in the checkpoint" for name in here.keys() - there.keys()]
    problems += [f"{name} is only in the checkpoint" for name in there.keys() - here.keys()]
    problems += [
        f"{name} is {tuple(there[name].shape)} in the checkpoint and {here[name].shape} here"
        for name in here.keys() & there.keys()
        if tuple(there[name].shape) != tuple(here[name].shape)
    ]
    if problems:
        raise RunError(f"checkpoint {step} of {path}:\n  " + "\n  ".join(sorted(problems)))


def abstract_model(config: RunConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and its parameters as shapes; nothing is allocated."""
    model = nnx.eval_shape(
        lambda: Storm(config.model, rngs=nnx.Rngs(0), remat=config.train.remat)
    )
    graphdef, params = nnx.split(model)
    return graphdef, params


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict to {"a/b/c": leaf}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file that is either there whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(text)
    partial.rename(path)


def with_sharding(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of `tree` with the given shardings, the target of a restore."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
