"""Damaged files of a run: checkpoints, tokenizer, configuration, metrics, skips, answers, results, indices."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from configs import tiny
from storm_jax import evals
from storm_jax.config import RunConfig, from_dict
from storm_jax.data.cache import cached_arrays
from storm_jax.data.skips import Skip
from storm_jax.evals.journal import Journal
from storm_jax.inference.prediction import Prediction
from storm_jax.run import Run
from storm_jax.sharding import make_mesh
from storm_jax.tasks import shapes
from storm_jax.text.bpe import train_tokenizer
from storm_jax.text.tokenizer import stop_ids
from storm_jax.train.checkpoint import Checkpointer
from storm_jax.train.metrics import MetricsWriter, read_metrics
from storm_jax.train.skip_log import SkipLog
from storm_jax.train.state import StateSpec
from tests.fuzz.damage import SILENT, damage_bytes, outcome_of
from tests.small_model import SMALL

_STEPS = (2, 4)
_LINES = 8
_SETTINGS = {"step": 4, "num_frames": 8}
_TEXT = "Which flash came first? <|im_end|> ü 17"


@dataclasses.dataclass(frozen=True)
class Stored:
    """Files, and a function that reads what they say.

    Attributes:
      lossy: lines may be lost without a warning, as a process would write them again.
    """

    files: list[pathlib.Path]
    read: Callable[[], Any]
    lossy: bool = False


def fuzz_state(seed: int, count: int, folder: pathlib.Path) -> Counter[str]:
    """Flips, cuts, zeroes and repeats bytes of one file at a time, and reads what it belongs to."""
    rng = np.random.default_rng(seed)
    kinds = list(write_state(folder).items())
    expected = {name: stored.read() for name, stored in kinds}
    outcomes: Counter[str] = Counter()
    for number in range(count):
        name, stored = kinds[number % len(kinds)]
        file = stored.files[int(rng.integers(len(stored.files)))]
        whole = file.read_bytes()
        file.write_bytes(flip_bit(rng, whole) if rng.random() < 0.5 else damage_bytes(rng, whole))

        def read(name: str = name, stored: Stored = stored) -> str:
            with warnings() as warned:
                found = stored.read()
            if found == expected[name]:
                return "as written"
            lost = isinstance(found, dict) and found.items() <= expected[name].items()
            return "dropped" if lost and (warned or stored.lossy) else SILENT

        outcome = outcome_of(read, f"{file} ({name}, state {number} of seed {seed})")
        if outcome == SILENT:
            print(f"{SILENT}: {file} ({name}, state {number} of seed {seed})")
        outcomes[f"{name} {outcome}"] += 1
        outcomes[outcome] += outcome.isupper()  # what must not happen is counted alone too
        file.write_bytes(whole)
    return outcomes


def flip_bit(rng: np.random.Generator, data: bytes) -> bytes:
    found = bytearray(data)
    found[rng.integers(len(found))] ^= 1 << int(rng.integers(8))
    return bytes(found)


@contextlib.contextmanager
def warnings() -> Iterator[list[str]]:
    """The messages of the warnings that are logged meanwhile."""
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, root = Handler(logging.WARNING), logging.getLogger()
    others, root.handlers = root.handlers, [handler]
    try:
        yield messages
    finally:
        root.handlers = others


def write_state(folder: pathlib.Path) -> dict[str, Stored]:
    """A run with two checkpoints, an evaluation and an index, by kind of file."""
    shapes.write(
        folder / "data",
        shapes.Settings(clips=4, seed=0, families=("colour",), frames=8, eval_clips=4),
        workers=1,
    )
    train_tokenizer([_TEXT], 400).save_pretrained(folder / "tokenizer")
    config = _config(folder)
    run = Run(folder / "run")
    run.prepare(config, folder / "tokenizer")
    spec = StateSpec.make(config, make_mesh(config.mesh, jax.devices()[:1]))
    _write_checkpoints(run, spec)
    return {
        "checkpoint": Stored(_files(run.path / "checkpoints/4"), lambda: _restore(run, spec)),
        "parameters": Stored(
            _files(run.path / "checkpoints/4/params"), lambda: _parameters(run, spec)
        ),
        "config": Stored([run.path / "config.json"], lambda: Run(run.path).config),
        "tokenizer": Stored(_files(run.tokenizer_path), lambda: _tokens(run)),
        "metrics": _metrics(run),
        "skips": _skips(run),
        **_evaluation(folder / "eval"),
        "results": _results(folder),
        "index": _index(folder),
    }


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def _config(folder: pathlib.Path) -> RunConfig:
    config = tiny.get_config("stage=sft")
    config.update_from_flattened_dict(
        {
            **SMALL, "train.steps": 4, "mesh.data": 1, "train.eval_every": 0,
            "data.train": [{"name": "shapes", "path": str(folder / "data/train.json")}],
        }
    )  # fmt: skip
    return from_dict(RunConfig, config)


def _write_checkpoints(run: Run, spec: StateSpec) -> None:
    run.checkpoints.path.mkdir()
    with contextlib.closing(Checkpointer(run, spec)) as checkpointer:
        state = spec.init()
        for step in _STEPS:
            state = state._replace(step=state.step + 2)
            data = {"plan": {"window": 0, "rows": list(range(50))}, "sources": {"shapes": "17"}}
            checkpointer.save(step, state, data, {})


def _restore(run: Run, spec: StateSpec) -> Any:
    with contextlib.closing(Checkpointer(Run(run.path), spec)) as checkpointer:
        restored = checkpointer.restore_latest()
    assert restored is not None
    state, data = restored
    return _digest_of(state), data


def _parameters(run: Run, spec: StateSpec) -> str:
    """One by one, as the exporter reads them."""
    checkpoints = Run(run.path).checkpoints
    step = checkpoints.resolve(None)
    return _digest_of({name: checkpoints.read(step, name) for name in checkpoints.shapes(step)})


def _digest_of(arrays: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    found = [f"{path} {np.asarray(leaf).tobytes()!r}" for path, leaf in leaves]
    return hashlib.sha256("".join(found).encode()).hexdigest()


def _tokens(run: Run) -> Any:
    tokenizer = Run(run.path).tokenizer()
    return tokenizer(_TEXT)["input_ids"], stop_ids(run.tokenizer_path, tokenizer), len(tokenizer)


def _metrics(run: Run) -> Stored:
    def read() -> dict[int, str]:
        MetricsWriter(run.path, _LINES, tensorboard=False).close()
        return {line["step"]: str(sorted(line.items())) for line in read_metrics(run.path)}

    writer = MetricsWriter(run.path, 0, tensorboard=False)
    for step in range(1, _LINES + 1):
        writer.write(step, {"loss": 1 / step, "accuracy": step / 10, "tokens": 64.0})
    writer.close()
    return Stored([run.path / "metrics.jsonl"], read)


def _skips(run: Run) -> Stored:
    def read() -> dict[str, str]:
        return SkipLog(run.path).lasting_failures

    SkipLog(run.path).write(
        [
            Skip(source="a", sample=f"{i}", where=f"a.json:{i}", cause="timeout", message="", file=f"{i}.mp4")
            for i in range(_LINES)
        ]
    )  # fmt: skip
    return Stored([run.path / "skipped.jsonl"], read, lossy=True)


def _evaluation(folder: pathlib.Path) -> dict[str, Stored]:
    journal = Journal(folder)
    journal.prepare(_SETTINGS)
    with journal.writing() as writer:
        for i in range(_LINES):
            writer.add(f"q{i}", Prediction(text=f"({'ABCD'[i % 4]}) because", visual_tokens=i))
    return {
        "settings": Stored([folder / "settings.json"], lambda: Journal(folder).prepare(_SETTINGS)),
        "answers": Stored(
            [folder / "answers.0-of-1.jsonl"], lambda: Journal(folder).predictions(), lossy=True
        ),
    }


def _results(folder: pathlib.Path) -> Stored:
    out = folder / "results"
    questions = json.loads((folder / "data/test.json").read_text())
    replies = folder / "replies.jsonl"
    replies.write_text(
        "".join(json.dumps({"id": q["id"], "reply": "red"}) + "\n" for q in questions)
    )
    evals.score("shapes", replies, data_root=folder / "data", split="test", out=out)

    def read() -> Any:
        found = evals.score("shapes", out / "predictions.jsonl")
        return found.scores, found.split

    return Stored([out / "results.json", out / "predictions.jsonl"], read)


def _index(folder: pathlib.Path) -> Stored:
    def read() -> dict[str, bytes]:
        arrays = cached_arrays(folder / "index", "a", "key", lambda: {"lengths": np.arange(500)})
        return {name: array.tobytes() for name, array in arrays.items()}

    read()
    return Stored(_files(folder / "index"), read)
