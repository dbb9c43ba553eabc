"""Folders of safetensors files: what is in them, one tensor at a time, and written in shards."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections import Counter
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from storm_jax.weights import WeightsError
from storm_jax.weights.mapping import Table

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}  # fmt: skip
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 * 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where a tensor is, without its values; `dtype` as safetensors calls it."""

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        """The values, copied from the file."""
        with safetensors.safe_open(self.file, "np") as file:  # closed, so that its pages can go
            return file.get_tensor(self.name)


@dataclasses.dataclass(frozen=True)
class Match:
    """The tensors of a table found in a folder, and the names of those that were not wanted."""

    tensors: Mapping[str, Tensor]
    ignored: tuple[str, ...]
    outside: tuple[str, ...]


def list_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
    """Every tensor of a folder with one safetensors file, or with an index and its shards.

    Raises:
      WeightsError: naming missing, damaged and contradicting files.
    """
    index = folder / INDEX
    if not index.exists():
        return _list_files(folder, [_only_file(folder)])
    try:
        listed = json.loads(index.read_text())["weight_map"]
        files = [folder / name for name in sorted(set(listed.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is damaged: {error!r}") from error
    tensors = _list_files(folder, files)
    problems = [
        f"{name} is not in {file}, where {INDEX} lists it"
        for name, file in listed.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    problems += [f"{name} is not listed in {INDEX}" for name in tensors if name not in listed]
    if problems:
        raise WeightsError(f"{folder}:", problems)
    return tensors


def _only_file(folder: pathlib.Path) -> pathlib.Path:
    files = sorted(folder.glob("*.safetensors"))
    standard = folder / "model.safetensors"
    if standard in files or len(files) == 1:
        return standard if standard in files else files[0]
    found = f"{len(files)} safetensors files and no {INDEX}" if files else "no safetensors file"
    raise WeightsError(
        f"{folder} has {found}: it must be a folder that transformers' save_pretrained writes (load "
        f"and save older .bin files with it once)"
    )


def _list_files(folder: pathlib.Path, files: list[pathlib.Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    problems = []
    for path in files:
        try:
            with safetensors.safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    piece = file.get_slice(name)
                    if name in tensors:
                        problems.append(
                            f"{name} is in {tensors[name].file.name} and in {path.name}"
                        )
                    tensors[name] = Tensor(
                        file=path,
                        name=name,
                        shape=tuple(piece.get_shape()),
                        dtype=piece.get_dtype(),
                    )
        except FileNotFoundError:
            problems.append(f"{path.name} is missing")
        except (safetensors.SafetensorError, OSError) as error:
            problems.append(f"{path.name} is damaged or cut off: {error}")
    if problems:
        raise WeightsError(f"{folder}:", problems)
    return tensors


def match(table: Table, tensors: Mapping[str, Tensor]) -> tuple[Match, list[str]]:
    """Finds a table's tensors under whichever of its layouts fits the names best.

    Returns:
      What was found, and as problems every tensor that is missing, and every one under the layout's
      prefixes that is neither in the table nor to be ignored.
    """
    names = {row.tensor for row in table.rows}
    layout = max(
        table.layouts, key=lambda layout: sum(_theirs(n, layout) in tensors for n in names)
    )
    found = {
        name: tensors[theirs] for name in names if (theirs := _theirs(name, layout)) in tensors
    }
    problems = [
        f"{_theirs(row.tensor, layout)} is missing" for row in table.rows if row.tensor not in found
    ]
    used = {tensor.name for tensor in found.values()}
    ignored, outside = [], []
    for theirs in tensors.keys() - used:
        ours = _ours(theirs, layout)
        if ours is None:
            outside.append(theirs)
        elif any(re.fullmatch(pattern, ours) for pattern in table.ignored):
            ignored.append(theirs)
        else:
            problems.append(f"{theirs} is not known")
    return Match(found, tuple(sorted(ignored)), tuple(sorted(outside))), problems


def _theirs(name: str, layout: Mapping[str, str]) -> str:
    ours = next(ours for ours in layout if name.startswith(ours))
    return layout[ours] + name.removeprefix(ours)


def _ours(name: str, layout: Mapping[str, str]) -> str | None:
    """The name that the table would use, or None outside of the layout's prefixes."""
    for ours, theirs in layout.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None


def summary(names: tuple[str, ...]) -> str:
    """Names by their first part: "text_model.* (198), logit_scale (1)"."""
    counts = Counter(name.split(".")[0] + (".*" if "." in name else "") for name in names)
    return ", ".join(f"{name} ({n})" for name, n in sorted(counts.items()))


class ShardWriter:
    """Writes tensors as safetensors, in files of at most `SHARD_BYTES` (or one larger tensor).

    Only the shard that is being filled is in memory. `close` gives the files the names that
    transformers expects and writes the index.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._shard: dict[str, np.ndarray] = {}
        self._files: list[list[str]] = []
        self._bytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        size = sum(kept.nbytes for kept in self._shard.values())
        if self._shard and size + array.nbytes > SHARD_BYTES:
            self._flush()
        self._shard[name] = np.array(array, order="C")  # a copy, since `array` may be a view
        self._bytes += array.nbytes

    def close(self) -> None:
        self._flush()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files):
            final = "model.safetensors"
            if count > 1:
                final = f"model-{number + 1:05}-of-{count:05}.safetensors"
            (self._folder / f"{number}.part").rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _flush(self) -> None:
        path = self._folder / f"{len(self._files)}.part"
        safetensors.numpy.save_file(self._shard, path, metadata={"format": "pt"})
        self._files.append(list(self._shard))
        self._shard = {}
