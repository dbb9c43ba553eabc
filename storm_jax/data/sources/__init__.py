"""Where samples come from. A new kind of source is one file here and one line in `open_source`."""

from __future__ import annotations

import pathlib
from typing import Protocol

from storm_jax.config import SourceConfig
from storm_jax.data.skips import DataError
from storm_jax.text.sample import Sample


class Source(Protocol):
    """Random access to the samples of one data set.

    Attributes:
      name: from its configuration.
      stamp: changes when the files do; cheap to know, so by their sizes and times of change.
    """

    name: str
    stamp: str

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """Parses one sample; media are named, not read.

        Raises:
          SampleError: when it cannot be used.
        """
        ...

    def where(self, index: int) -> str:
        """File and line, or what else leads a person to the record."""
        ...


def open_source(config: SourceConfig, index_dir: str = "") -> Source:
    """The source of a path: its kind follows from what is there.

    Raises:
      DataError: when nothing is there, or nothing that is known.
    """
    path = pathlib.Path(config.path)
    folder = index_folder(config, index_dir)
    if path.is_file() and path.suffix == ".tar":
        from storm_jax.data.sources.tar import TarShards

        return TarShards(config, [path], folder)
    if path.is_file():
        from storm_jax.data.sources.json_file import JsonFile

        return JsonFile(config, folder)
    if not path.is_dir():
        raise DataError(f"{path} is missing: data source {config.name!r} names it as its path")
    if files := sorted(path.glob("**/*.parquet")):
        from storm_jax.data.sources.parquet import ParquetFolder

        return ParquetFolder(config, files)
    if (path / "dataset_info.json").exists():
        from storm_jax.data.sources.tfds import TfdsFolder

        return TfdsFolder(config)
    if files := sorted(path.glob("**/*.tar")):
        from storm_jax.data.sources.tar import TarShards

        return TarShards(config, files, folder)
    raise DataError(
        f"{path}: data source {config.name!r} is a folder without .parquet files, .tar shards or a "
        f"TFDS dataset_info.json; for JSON, name the file"
    )


def index_folder(config: SourceConfig, index_dir: str) -> pathlib.Path:
    """Where what was found out about a source is kept."""
    if index_dir:
        return pathlib.Path(index_dir) / config.name
    return pathlib.Path(config.path.rstrip("/") + ".index")
