"""Prepared TFDS data sets in array_record files, read without TensorFlow."""

from __future__ import annotations

import io
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from storm_jax.config import SourceConfig
from storm_jax.data.records import parse_record
from storm_jax.data.skips import DataError
from storm_jax.files import file_stamp
from storm_jax.text.sample import Sample


class TfdsFolder:
    """One split of a folder with dataset_info.json.

    Features are the fields of a record. Media are file names (Text), encoded files (a uint8 vector) or
    pixels (Image).
    """

    def __init__(self, config: SourceConfig):
        import tensorflow_datasets as tfds

        self.name, self.path, self.split = config.name, config.path, config.split
        self._root = pathlib.Path(config.media_root or config.path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                builder = tfds.builder_from_directory(config.path)
                splits = list(builder.info.splits)
                if config.split not in splits:
                    raise ValueError(f"no split {config.split!r}; available: {', '.join(splits)}")
                self._items = builder.as_data_source(split=config.split)
        except (ValueError, NotImplementedError, OSError, KeyError) as error:
            raise DataError(
                f"{config.path}: data source {config.name!r} is not a TFDS data set in array_record "
                f"files: {error}"
            ) from error
        self.stamp = f"{file_stamp(sorted(pathlib.Path(config.path).iterdir()))} {config.split}"
        if not len(self):
            raise DataError(f"{config.path}: split {config.split!r} contains no samples")

    def __len__(self) -> int:
        return len(self._items)

    def sample(self, index: int) -> Sample:
        return parse_record(_plain(self._items[index]), self._root, index)

    def where(self, index: int) -> str:
        return f"{self.path} split {self.split} item {index}"


def _plain(value: Any) -> Any:
    """Converts an item to JSON types: bytes to text, a sequence of features to a list of objects."""
    if isinstance(value, Mapping):
        fields = {key: _plain(each) for key, each in value.items()}
        columns = [each for each in fields.values() if isinstance(each, list)]
        if len(columns) == len(fields) > 1 and len({len(column) for column in columns}) == 1:
            return [dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True)]
        return fields
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1:
        return {"bytes": value.tobytes()} if value.size else None
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3:
        encoded = io.BytesIO()
        Image.fromarray(value.squeeze(-1) if value.shape[-1] == 1 else value).save(encoded, "png")
        return {"bytes": encoded.getvalue()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return value.decode() if isinstance(value, bytes) else value
