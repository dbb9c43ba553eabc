"""Folders of safetensors files: listing, reading one tensor at a time, writing in shards."""

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
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 * 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor in a file, without its values.

    Attributes:
      dtype: safetensors' name, such as "BF16".
      rows: read only so many; None = all.
    """

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: int | None = None

    def first(self, rows: int) -> Tensor:
        """The first rows, or the whole tensor if it has no more."""
        if len(self.shape) == 0 or self.shape[0] <= rows:
            return self
        return dataclasses.replace(self, shape=(rows, *self.shape[1:]), rows=rows)

    def read(self) -> np.ndarray:
        """Returns the values.

        Raises:
          WeightsError: if they are not all finite.
        """
        with safetensors.safe_open(self.file, "np") as file:  # closing it frees its pages
            values = (
                file.get_slice(self.name)[: self.rows] if self.rows else file.get_tensor(self.name)
            )
        if not _is_finite(values):
            raise WeightsError(f"{self.file}: {self.name} has values that are not finite")
        return values


@dataclasses.dataclass(frozen=True)
class Match:
    """The tensors of a folder that a table maps, and the names of the others.

    Attributes:
      tensors: by the name that the table has for them.
      ignored: names that the table lists as ignored.
      unknown: names of the component that are neither in the table nor ignored.
      outside: names without any prefix of the component, such as those of other components.
    """

    tensors: Mapping[str, Tensor]
    ignored: tuple[str, ...]
    unknown: tuple[str, ...]
    outside: tuple[str, ...]


def list_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
    """Lists the tensors of a folder with one safetensors file, or with shards and their index.

    If a folder has both, model.safetensors is read, as transformers does.

    Raises:
      WeightsError: if files are missing, damaged or contradict the index.
    """
    index = folder / INDEX
    if (folder / SINGLE).exists() or not index.exists():
        if index.exists():
            print(f"note: {folder}: {SINGLE} is read, and not the shards of {INDEX}")
        return _list_files(folder, [_only_file(folder)])
    try:
        listed = json.loads(index.read_text())["weight_map"]
        files = [folder / name for name in sorted(set(listed.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is damaged: {error!r}") from error
    tensors = _list_files(folder, files)
    problems = [
        f"{name} is listed in {INDEX} but is not in {file}"
        for name, file in listed.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    problems += [f"{name} is not listed in {INDEX}" for name in tensors if name not in listed]
    if problems:
        raise WeightsError(f"{folder}:", problems)
    return tensors


def _only_file(folder: pathlib.Path) -> pathlib.Path:
    files = sorted(folder.glob("*.safetensors"))
    standard = folder / SINGLE
    if standard in files or len(files) == 1:
        return standard if standard in files else files[0]
    found = f"{len(files)} safetensors files and no {INDEX}" if files else "no safetensors file"
    raise WeightsError(
        f"{folder} has {found}: it must be a folder written by transformers' save_pretrained (convert "
        f"older .bin files by loading and saving them)"
    )


def _list_files(folder: pathlib.Path, files: list[pathlib.Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    problems = []
    for path in files:
        try:
            with safetensors.safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
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
            problems.append(f"{path.name} is damaged or truncated: {error}")
    if problems:
        raise WeightsError(f"{folder}:", problems)
    return tensors


def match(table: Table, tensors: Mapping[str, Tensor]) -> tuple[Match, list[str]]:
    """Finds the tensors of a table, using the layout that matches the most names.

    Returns:
      The match, and the names of missing tensors.
    """
    names = {rule.tensor for rule in table.rules}
    layout = max(
        table.layouts, key=lambda layout: sum(file_name(n, layout) in tensors for n in names)
    )
    found = {
        name: tensors[in_file] for name in names if (in_file := file_name(name, layout)) in tensors
    }
    missing = [file_name(rule.tensor, layout) for rule in table.rules if rule.tensor not in found]
    used = {tensor.name for tensor in found.values()}
    ignored, unknown, outside = [], [], []
    for in_file in tensors.keys() - used:
        name = _table_name(in_file, layout)
        if name is None:
            outside.append(in_file)
        elif any(re.fullmatch(pattern, name) for pattern in table.ignored):
            ignored.append(in_file)
        else:
            unknown.append(in_file)
    groups = (tuple(sorted(names)) for names in (ignored, unknown, outside))
    return Match(found, *groups), missing


def file_name(name: str, layout: Mapping[str, str]) -> str:
    """The name in the file of a tensor of the table."""
    prefix = next((prefix for prefix in layout if name.startswith(prefix)), None)
    return name if prefix is None else layout[prefix] + name.removeprefix(prefix)


def _table_name(name: str, layout: Mapping[str, str]) -> str | None:
    """The inverse of `file_name`; None if the name has none of the layout's prefixes."""
    for prefix, file_prefix in layout.items():
        if name.startswith(file_prefix):
            return prefix + name.removeprefix(file_prefix)
    return None


def summary(names: tuple[str, ...]) -> str:
    """Counts names by their first part: "text_model.* (198), logit_scale (1)"."""
    counts = Counter(name.split(".")[0] + (".*" if "." in name else "") for name in names)
    return ", ".join(f"{name} ({n})" for name, n in sorted(counts.items()))


def _is_finite(values: np.ndarray) -> bool:
    """Whether all values are; infinities and NaNs have an exponent of ones. NumPy is slow for bfloat16."""
    if values.dtype != ml_dtypes.bfloat16:
        return bool(np.isfinite(values).all()) if values.dtype.kind == "f" else True
    exponent = np.uint16(0x7F80)
    return not ((values.view(np.uint16) & exponent) == exponent).any()


class ShardWriter:
    """Writes tensors to safetensors files of at most `SHARD_BYTES` each (or one larger tensor).

    Only the current shard is in memory. `close` renames the files as transformers expects, and
    writes the index.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._shard: dict[str, np.ndarray] = {}
        self._files: list[list[str]] = []
        self._bytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        size = sum(tensor.nbytes for tensor in self._shard.values())
        if self._shard and size + array.nbytes > SHARD_BYTES:
            self._flush()
        self._shard[name] = np.array(array, order="C")  # a copy, since `array` may be a view
        self._bytes += array.nbytes

    def close(self) -> None:
        self._flush()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files):
            final = SINGLE
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
