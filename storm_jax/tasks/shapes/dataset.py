"""Writes and reads data sets of rendered samples."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import signal
from typing import Any

import numpy as np
from PIL import Image

from storm_jax.media.video import write_video
from storm_jax.progress import with_progress
from storm_jax.tasks.shapes.families import FAMILIES
from storm_jax.tasks.shapes.footage import read_footage
from storm_jax.tasks.shapes.rendering import SPLITS, render
from storm_jax.tasks.shapes.settings import Settings

FPS = 8


def read_settings(folder: str | pathlib.Path) -> Settings:
    """Returns the settings that a folder was rendered with.

    Raises:
      ValueError: the folder is not a data set of this task.
    """
    path = pathlib.Path(folder) / "shapes.json"
    try:
        fields = json.loads(path.read_text())
        return Settings(**{**fields, "families": tuple(fields["families"])})
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: render the task with python -m storm_jax.tasks.shapes --out={folder}"
        ) from None
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a valid shapes.json: {error}") from None


def write(folder: str | pathlib.Path, settings: Settings, workers: int) -> None:
    """Renders a data set in `workers` processes. A complete one with equal settings is left unchanged.

    Raises:
      ValueError: the folder was rendered with other settings or contains other files, a family does not
        support the settings, or the footage cannot be read.
    """
    folder = pathlib.Path(folder)
    if _is_complete(folder, settings):
        print(f"{folder} is already complete")
        return
    for family in set(settings.families):  # fails before anything is written
        FAMILIES[family].events(settings)
    if settings.footage is not None:
        read_footage(settings.footage, 2 * settings.size)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "shapes.json", dataclasses.asdict(settings))
    counts = {split: settings.eval_clips * len(settings.families) for split in SPLITS}
    counts["train"] = settings.clips
    print(
        f"{folder}: " + ", ".join(f"{count:,} {split}" for split, count in counts.items()),
        flush=True,
    )
    jobs = [(split, i) for split, count in counts.items() for i in range(count)]
    records: dict[str, list] = {split: [] for split in SPLITS}
    for split in SPLITS:
        (folder / "media" / split).mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=_ignore_interrupts) as pool:
        rendered = pool.map(functools.partial(_write_sample, folder, settings), jobs, chunksize=32)
        progress = with_progress(rendered, len(jobs), "rendering", unit="samples")
        for (split, _), record in zip(jobs, progress, strict=True):
            records[split].append(record)
    for split in SPLITS:
        order = np.random.default_rng([settings.seed, SPLITS.index(split)]).permutation(
            counts[split]
        )
        _write_json(folder / f"{split}.json", [records[split][i] for i in order])


def _is_complete(folder: pathlib.Path, settings: Settings) -> bool:
    """Whether there is nothing left to do; raises the errors of `write` about a folder."""
    if (folder / "shapes.json").exists():
        found = read_settings(folder)
        for field in dataclasses.fields(Settings):
            there, here = getattr(found, field.name), getattr(settings, field.name)
            if there != here:
                raise ValueError(
                    f"{folder} was rendered with {field.name}={there!r}, not {here!r}: "
                    f"use another --out, or remove the folder"
                )
        return (folder / "test.json").exists()  # written last
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and contains no shapes.json: use another --out")
    return False


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes; the first one tells the others to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_sample(folder: pathlib.Path, settings: Settings, job: tuple[str, int]) -> dict[str, Any]:
    split, index = job
    sample = render(settings, split, index)
    kind = "image" if FAMILIES[sample.family].is_image else "video"
    name = f"media/{split}/{index:06}{'.png' if kind == 'image' else '.mp4'}"
    if kind == "image":
        Image.fromarray(sample.frames[0]).save(folder / name)
    else:
        write_video(folder / name, sample.frames, FPS)
    record = {
        "id": f"{split}-{index:06}",
        kind: name,
        "conversations": [
            {"from": "human", "value": f"<{kind}>\n{sample.question}"},
            {"from": "gpt", "value": sample.answer},
        ],
        "family": sample.family,
    }
    return record | ({"options": list(sample.options)} if sample.options else {})


def _write_json(path: pathlib.Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.rename(path)
