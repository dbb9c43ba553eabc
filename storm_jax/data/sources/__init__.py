"""Data sources. To add a kind of source, add a module here and a line in `open_source`."""

from __future__ import annotations

import pathlib
from typing import Protocol

from storm_jax.config import SourceConfig
from storm_jax.data.skips import DataError
from storm_jax.text.sample import Sample


class Source(Protocol):
    """Random access to the samples of one data set.

    Attributes:
      name: name from the configuration.
      stamp: changes with the files; derived from their sizes and modification times.
    """

    name: str
    stamp: str

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """Parses one sample without reading its media.

        Raises:
          SampleError: the sample cannot be used.
        """
        ...

    def where(self, index: int) -> str:
        """Returns where to find the record, such as its file and line."""
        ...


def open_source(config: SourceConfig, index_dir: str = "") -> Source:
    """Opens the source at `config.path`; its kind is detected from the files.

    Raises:
      DataError: the path is missing or contains no known kind of source.
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
        raise DataError(f"{path} does not exist: it is the path of data source {config.name!r}")
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
        f"{path}: the folder of data source {config.name!r} contains no .parquet files, .tar shards or "
        f"TFDS dataset_info.json; for JSON, set the path to the file"
    )


def index_folder(config: SourceConfig, index_dir: str) -> pathlib.Path:
    """Returns the folder for a source's cached indices."""
    if index_dir:
        return pathlib.Path(index_dir) / config.name
    return pathlib.Path(config.path.rstrip("/") + ".index")
