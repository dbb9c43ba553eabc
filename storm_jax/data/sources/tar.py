"""WebDataset-style tar shards: KEY.json beside its media KEY.mp4, KEY.0.jpg and so on.

Shards are indexed once; afterwards media are read from where they lie in the shard.
"""

from __future__ import annotations

import json
import pathlib
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from storm_jax.config import SourceConfig
from storm_jax.data.cache import cached_arrays
from storm_jax.data.records import MEDIA_FIELDS, parse_record
from storm_jax.data.skips import DataError
from storm_jax.files import file_stamp
from storm_jax.media.image import IMAGE_SUFFIXES
from storm_jax.media.media import Media
from storm_jax.text.sample import Sample, SampleError

_TEXT_SUFFIXES = (".json", ".txt")


class TarShards:
    """The samples of all shards, in the order of their names and of the members in them."""

    def __init__(
        self, config: SourceConfig, files: Sequence[pathlib.Path], index_folder: pathlib.Path
    ):
        self.name, self.files = config.name, list(files)
        self.stamp = file_stamp(self.files)
        index = cached_arrays(index_folder, "records", self.stamp, lambda: find_members(self.files))
        self._names, self._name_ends = index["names"], index["name_ends"]
        self._members, self._starts = index["members"], index["starts"]
        self._problems = index["problems"].tobytes().decode().split("\n")
        if not len(self):
            raise DataError(f"{config.path} holds no sample")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def sample(self, index: int) -> Sample:
        members = self._members_of(index)
        if not members:
            problem = self._problems[self._members[self._starts[index], 0]]
            raise SampleError(
                self.where(index), "malformed", f"the shard cannot be read: {problem}"
            )
        key = _key(next(iter(members)))
        texts = {name: medium for name, medium in members.items() if name.endswith(".json")}
        if len(texts) != 1:
            raise SampleError(key, "malformed", f"it has {len(texts)} .json members, not one")
        try:
            record = json.loads(next(iter(texts.values())).open().read())  # type: ignore[union-attr]
        except ValueError as error:
            raise SampleError(key, "malformed", f"its .json member is not JSON: {error}") from None
        media = {name: m for name, m in members.items() if not name.endswith(_TEXT_SUFFIXES)}
        if isinstance(record, dict):
            record = _with_media({"id": key, **record}, media)
        return parse_record(record, pathlib.Path(), index, _by_short_names(media))

    def where(self, index: int) -> str:
        shard = self.files[self._members[self._starts[index], 0]]
        members = self._members_of(index)
        return f"{shard}!{_key(next(iter(members)))}" if members else str(shard)

    def _members_of(self, index: int) -> dict[str, Media]:
        found = {}
        for number in range(self._starts[index], self._starts[index + 1]):
            shard, offset, size = self._members[number].tolist()
            if offset < 0:
                return {}
            begin = self._name_ends[number - 1] if number else 0
            name = self._names[begin : self._name_ends[number]].tobytes().decode()
            kind = "image" if name.lower().endswith(IMAGE_SUFFIXES) else "video"
            path = self.files[shard]
            found[name] = Media(kind=kind, name=f"{path}!{name}", path=path, span=(offset, size))
        return found


def _with_media(record: dict[str, Any], media: dict[str, Media]) -> dict[str, Any]:
    """A record that names no media has all that lie beside it, in the order of their names."""
    if "messages" in record or any(record.get(field) for field in MEDIA_FIELDS):
        return record
    for name in sorted(media):
        record.setdefault(media[name].kind, []).append(name)
    return record


def _by_short_names(media: dict[str, Media]) -> dict[str, Media]:
    """Members by their path in the shard, their file name, and what follows the key."""
    short = {name.rpartition("/")[2]: medium for name, medium in media.items()}
    endings = {name.partition(".")[2]: medium for name, medium in short.items()}
    return {**endings, **short, **media}


def _key(name: str) -> str:
    """Path up to the first dot of the file name: members of one sample share it."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def find_members(files: Sequence[pathlib.Path]) -> dict[str, np.ndarray]:
    """Members of all shards, int64 [K, 3] (shard, offset, size), their names as one text and where each
    ends, where each of the M samples starts among them, int64 [M + 1], and what is wrong with each shard,
    a line each. A shard that cannot be read, or not to its end, adds a sample of one member at offset
    -1."""
    members: list[tuple[int, int, int]] = []
    names: list[bytes] = []
    starts: list[int] = []
    problems = [""] * len(files)

    def add(key_is_new: bool, member: tuple[int, int, int], name: str) -> None:
        if key_is_new:
            starts.append(len(members))
        members.append(member)
        names.append(name.encode())

    for number, path in enumerate(files):
        last = None
        try:
            with tarfile.open(path, "r:") as shard:
                for member in shard:
                    if member.isfile():
                        key = _key(member.name)
                        place = (number, member.offset_data, member.size)
                        add(key != last, place, member.name)
                        last = key
        except (OSError, tarfile.TarError) as error:
            problems[number] = " ".join(str(error).split())
            add(True, (number, -1, 0), "")
    return {
        "members": np.array(members, np.int64).reshape(-1, 3),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        "starts": np.array([*starts, len(members)], np.int64),
        "problems": np.frombuffer("\n".join(problems).encode() or b" ", np.uint8),
    }
