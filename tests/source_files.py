"""Writes sources of every kind, with numbered images."""

from __future__ import annotations

import io
import json
import pathlib
import tarfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from media_files import barcode
from PIL import Image


def conversation(question: str = "<image>\nWhat?", answer: str = "So.") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def record(name: str, question: str = "Why?", answer: str = "So.", **fields: Any) -> dict:
    """Returns a LLaVA record of one exchange."""
    return {"id": name, "conversations": conversation(question, answer), **fields}


def picture(number: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(barcode(number)).save(buffer, kind)
    return buffer.getvalue()


def write_lines(path: pathlib.Path, records: list[dict]) -> None:
    path.write_text("\n".join(json.dumps(record) for record in records))


def write_parquet(path: pathlib.Path, rows: list[dict], **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)


def write_shard(path: pathlib.Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))


def write_tfds(folder: pathlib.Path, splits: dict[str, list[dict]]) -> pathlib.Path:
    """Prepares a data set in array_record files and returns the folder of its dataset_info.json.

    A record's `image` is bytes and its `video` a file name; empty values mean none.
    """
    import tensorflow_datasets as tfds

    class Some(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Tensor(shape=(None,), dtype=np.uint8),
                    "video": tfds.features.Text(),
                    "conversations": tfds.features.Sequence(
                        {"from": tfds.features.Text(), "value": tfds.features.Text()}
                    ),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(records) for name, records in splits.items()}

        def _generate_examples(self, records):
            for i, record in enumerate(records):
                image = np.frombuffer(record.get("image", b""), np.uint8)
                yield i, {"video": "", **record, "image": image}

    builder = Some(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)
