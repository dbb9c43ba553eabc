"""WebDataset-style tar shards: KEY.json next to its media KEY.mp4, KEY.0.jpg and so on.

Shards are indexed once; media are then read directly from their byte range in the shard.
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
    """The samples of all shards, sorted by shard name, then in member order."""

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
            raise DataError(f"{config.path} contains no samples")

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
            raise SampleError(key, "malformed", f"expected one .json member, found {len(texts)}")
        try:
            record = json.loads(next(iter(texts.values())).open().read())  # type: ignore[union-attr]
        except ValueError as error:
            raise SampleError(
                key, "malformed", f"its .json member is not valid JSON: {error}"
            ) from None
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
    """Adds all media of the sample, sorted by name, to a record that lists none."""
    if "messages" in record or any(record.get(field) for field in MEDIA_FIELDS):
        return record
    for name in sorted(media):
        record.setdefault(media[name].kind, []).append(name)
    return record


def _by_short_names(media: dict[str, Media]) -> dict[str, Media]:
    """Returns members by path in the shard, by file name, and by what follows the key."""
    short = {name.rpartition("/")[2]: medium for name, medium in media.items()}
    endings = {name.partition(".")[2]: medium for name, medium in short.items()}
    return {**endings, **short, **media}


def _key(name: str) -> str:
    """Returns the path up to the first dot of the file name, shared by the members of a sample."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def find_members(files: Sequence[pathlib.Path]) -> dict[str, np.ndarray]:
    """Indexes all shards.

    A shard that is unreadable, or truncated, adds one bad sample: a single member at offset -1.

    Returns:
      members: int64 [K, 3], (shard, offset, size) of each member.
      names, name_ends: uint8, the concatenated member names, and int64 [K], where each ends.
      starts: int64 [M + 1], first member of each of the M samples.
      problems: uint8, one line of text per shard, empty if the shard is readable.
    """
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
