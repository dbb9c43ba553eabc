"""One record of a dataset to a Sample: LLaVA's `conversations`, or `messages` as OpenAI writes them.

Media are named by `image`, `images`, `video` or `videos` (one or a list) and stand where the text
holds `<image>` or `<video>`; or they are parts of a message's content. docs/data.md has the schema.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from storm_jax.media.media import Media
from storm_jax.text.sample import PLACEHOLDER, Sample, SampleError, Turn

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
_FIELDS = {"image": ("image", "images"), "video": ("video", "videos")}
MEDIA_FIELDS = (*_FIELDS["image"], *_FIELDS["video"])
_KNOWN = {"id", "conversations", "messages", *MEDIA_FIELDS}
_TIMING = ("start", "end", "fps")
# A placeholder of the text, and the value of its medium where the content itself has it.
_Placed = tuple[str, Any]


def parse_record(
    record: Any,
    media_root: pathlib.Path,
    index: int,
    members: Mapping[str, Media] | None = None,
) -> Sample:
    """One record as a Sample.

    Args:
      media_root: folder that the names of media files are relative to.
      index: the sample's id when the record has none.
      members: media that lie beside the record (in a tar shard), by name; names are looked up here
        instead of in `media_root`.

    Raises:
      SampleError: with cause "malformed", "empty_conversation" or "placeholder".
    """
    if not isinstance(record, Mapping):
        raise SampleError(str(index), "malformed", f"record {index} is not an object")
    sample_id = str(index if record.get("id") is None else record["id"])
    parser = _Parser(sample_id, media_root, members)
    turns, placed = parser.turns(record)
    files = {kind: parser.files(record, kind) for kind in _FIELDS}
    media = parser.media(placed, files)
    extra = {key: value for key, value in record.items() if key not in _KNOWN}
    return Sample(id=sample_id, turns=turns, media=media, extra=extra)


class _Parser:
    """Parses the fields of one record; every problem is a SampleError of that record."""

    def __init__(
        self, sample_id: str, root: pathlib.Path, members: Mapping[str, Media] | None
    ) -> None:
        self._id, self._root, self._members = sample_id, root, members

    def _error(self, cause: str, message: str) -> SampleError:
        return SampleError(self._id, cause, message)

    def turns(self, record: Mapping[str, Any]) -> tuple[tuple[Turn, ...], list[_Placed]]:
        """The turns, and the placeholders of their texts in order."""
        name = "messages" if "messages" in record else "conversations"
        messages = record.get(name)
        if not isinstance(messages, Sequence) or not messages:
            raise self._error("empty_conversation", f"{name} is missing or empty")
        turns, placed = [], []
        for message in messages:
            turn, found = self._turn(message)
            turns.append(turn)
            placed += found
        roles = [turn.role for turn in turns]
        if roles[0] == "system":
            roles = roles[1:]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise self._error(
                "malformed", f"turns must alternate human and gpt, found {', '.join(roles)}"
            )
        if not all(turn.text.strip() for turn in turns if turn.role == "assistant"):
            raise self._error("empty_conversation", "an answer is empty")
        return tuple(turns), placed

    def _turn(self, message: Any) -> tuple[Turn, list[_Placed]]:
        try:
            is_llava = "from" in message
            role = _ROLES[message["from" if is_llava else "role"]]
            text, placed = self._content(message["value" if is_llava else "content"])
            text.encode()  # half of a surrogate pair cannot be tokenised
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
            raise self._error(
                "malformed",
                f"turn {_short(message)} must be {{'from': 'human' or 'gpt', 'value': text}} or "
                f"{{'role': 'user' or 'assistant', 'content': text or a list of parts}}",
            ) from None
        return Turn(role, text), placed

    def _content(self, content: Any) -> tuple[str, list[_Placed]]:
        """Text, or a list of parts, each on its own line."""
        if isinstance(content, str):
            return content, [(name.strip("<>"), None) for name in PLACEHOLDER.findall(content)]
        texts, placed = [], []
        for part in content:
            kind = part["type"].removesuffix("_url")
            if kind == "text":
                text, found = self._content(part["text"])
                texts.append(text)
                placed += found
            elif kind in _FIELDS:
                value = part.get(part["type"], part.get("path"))
                if value is not None:
                    bounds = {key: part[key] for key in _TIMING if key in part}
                    value = {**(value if isinstance(value, Mapping) else {"path": value}), **bounds}
                texts.append(f"<{kind}>")
                placed.append((kind, value))
            else:
                raise KeyError(kind)
        return "\n".join(texts), placed

    def files(self, record: Mapping[str, Any], kind: str) -> list[Any]:
        """The values of the record's own fields of one kind."""
        found = []
        for field in _FIELDS[kind]:
            value = record.get(field)
            values = value if isinstance(value, list) else [value]
            found += [each for each in values if each is not None and each != ""]
        return found

    def media(self, placed: Sequence[_Placed], files: Mapping[str, list[Any]]) -> tuple[Media, ...]:
        """One medium per placeholder. With one kind of file, either placeholder may stand for it (some
        data sets write <image> for videos); with both, each takes the next file of its kind."""
        open_kinds = [kind for kind, value in placed if value is None]
        present = [kind for kind, values in files.items() if values]
        kinds = present * len(open_kinds) if len(present) == 1 else open_kinds
        if Counter(kinds) != Counter({kind: len(values) for kind, values in files.items()}):
            raise self._error(
                "placeholder",
                f"{len(open_kinds)} placeholders ({', '.join(open_kinds)}) in the text for "
                f"{len(files['image'])} images and {len(files['video'])} videos",
            )
        left = {kind: iter(values) for kind, values in files.items()}
        order = iter(kinds)
        media = []
        for kind, value in placed:
            if value is None:
                kind = next(order)
                value = next(left[kind])
            media.append(self._medium(kind, value))
        return tuple(media)

    def _medium(self, kind: str, value: Any) -> Media:
        if isinstance(value, str):
            value = {"path": value}
        if not isinstance(value, Mapping):
            raise self._error(
                "malformed",
                f"{kind}={_short(value)} must be a file name, an object or a list of them",
            )
        name, data = value.get("path") or value.get("url"), value.get("bytes")
        if isinstance(data, bytes) or callable(data):
            path = self._root / name if isinstance(name, str) else None
            name = f"{name or 'bytes'} of sample {self._id}"
            return self._timed(Media(kind=kind, name=name, path=path, data=data), value)
        if not isinstance(name, str) or not name:
            raise self._error("malformed", f"{kind}={_short(value)} names no file")
        if "://" in name and not name.startswith("file://"):
            raise self._error(
                "malformed", f"{kind} {_short(name)} is not here: download it and name the file"
            )
        name = name.removeprefix("file://")
        if self._members is None:
            return self._timed(Media.file(kind, self._root / name), value)
        if name not in self._members:
            raise self._error("malformed", f"{kind} {name!r} is not beside the record")
        member = self._members[name]
        return self._timed(dataclasses.replace(member, kind=kind), value)

    def _timed(self, medium: Media, value: Mapping[str, Any]) -> Media:
        timing = {key: value[key] for key in _TIMING if value.get(key) is not None}
        for key, number in timing.items():
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise self._error("malformed", f"{key}={_short(number)} must be a number")
            if not math.isfinite(number) or number < 0 or (key == "fps" and number == 0):
                raise self._error("malformed", f"{key}={number} must be positive")
        if timing.get("end", math.inf) < timing.get("start", 0):
            raise self._error(
                "malformed", f"start={timing.get('start', 0)} lies behind end={timing['end']}"
            )
        return dataclasses.replace(medium, **timing)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
