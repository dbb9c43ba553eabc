"""Parses a record of a data set into a Sample: LLaVA `conversations` or OpenAI-style `messages`.

Media are listed in `image`, `images`, `video` or `videos` (one or a list) and placed at `<image>` or
`<video>` in the text, or they are parts of a message's content. The schema is in docs/data.md.
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
# The kind of a placeholder, and its medium's value if the message itself contains it.
_Placeholder = tuple[str, Any]


def parse_record(
    record: Any,
    media_root: pathlib.Path,
    index: int,
    members: Mapping[str, Media] | None = None,
) -> Sample:
    """Parses one record.

    Args:
      media_root: folder that media file names are relative to.
      index: id of the sample if the record has none.
      members: media by name, for records from a tar shard; replaces `media_root`.

    Raises:
      SampleError: with cause "malformed", "empty_conversation" or "placeholder".
    """
    if not isinstance(record, Mapping):
        raise SampleError(str(index), "malformed", f"record {index} is not a JSON object")
    sample_id = str(index if record.get("id") is None else record["id"])
    parser = _Parser(sample_id, media_root, members)
    turns, placeholders = parser.turns(record)
    files = {kind: parser.files(record, kind) for kind in _FIELDS}
    media = parser.media(placeholders, files)
    extra = {key: value for key, value in record.items() if key not in _KNOWN}
    return Sample(id=sample_id, turns=turns, media=media, extra=extra)


class _Parser:
    """Parses the fields of one record; every problem raises a SampleError with its id."""

    def __init__(
        self, sample_id: str, root: pathlib.Path, members: Mapping[str, Media] | None
    ) -> None:
        self._id, self._root, self._members = sample_id, root, members

    def _error(self, cause: str, message: str) -> SampleError:
        return SampleError(self._id, cause, message)

    def turns(self, record: Mapping[str, Any]) -> tuple[tuple[Turn, ...], list[_Placeholder]]:
        """Returns the turns, and the placeholders in their texts in order."""
        name = "messages" if "messages" in record else "conversations"
        messages = record.get(name)
        if not isinstance(messages, Sequence) or not messages:
            raise self._error("empty_conversation", f"{name} is missing or empty")
        turns, placeholders = [], []
        for message in messages:
            turn, found = self._turn(message)
            turns.append(turn)
            placeholders += found
        roles = [turn.role for turn in turns]
        if roles[0] == "system":
            roles = roles[1:]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise self._error(
                "malformed", f"turns must alternate human and gpt, found {', '.join(roles)}"
            )
        if not all(turn.text.strip() for turn in turns if turn.role == "assistant"):
            raise self._error("empty_conversation", "an answer is empty")
        return tuple(turns), placeholders

    def _turn(self, message: Any) -> tuple[Turn, list[_Placeholder]]:
        try:
            is_llava = "from" in message
            role = _ROLES[message["from" if is_llava else "role"]]
            text, placeholders = self._content(message["value" if is_llava else "content"])
            text.encode()  # a lone surrogate cannot be tokenised
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
            raise self._error(
                "malformed",
                f"turn {_short(message)} must be {{'from': 'human' or 'gpt', 'value': text}} or "
                f"{{'role': 'user' or 'assistant', 'content': text or a list of parts}}",
            ) from None
        return Turn(role, text), placeholders

    def _content(self, content: Any) -> tuple[str, list[_Placeholder]]:
        """Returns the text of a message and its placeholders. Parts of a list become lines."""
        if isinstance(content, str):
            return content, [(name.strip("<>"), None) for name in PLACEHOLDER.findall(content)]
        texts, placeholders = [], []
        for part in content:
            kind = part["type"].removesuffix("_url")
            if kind == "text":
                text, found = self._content(part["text"])
                texts.append(text)
                placeholders += found
            elif kind in _FIELDS:
                value = part.get(part["type"], part.get("path"))
                if value is not None:
                    bounds = {key: part[key] for key in _TIMING if key in part}
                    value = {**(value if isinstance(value, Mapping) else {"path": value}), **bounds}
                texts.append(f"<{kind}>")
                placeholders.append((kind, value))
            else:
                raise KeyError(kind)
        return "\n".join(texts), placeholders

    def files(self, record: Mapping[str, Any], kind: str) -> list[Any]:
        """Returns the values of the record's media fields of one kind."""
        found = []
        for field in _FIELDS[kind]:
            value = record.get(field)
            values = value if isinstance(value, list) else [value]
            found += [each for each in values if each is not None and each != ""]
        return found

    def media(
        self, placeholders: Sequence[_Placeholder], files: Mapping[str, list[Any]]
    ) -> tuple[Media, ...]:
        """Returns one medium per placeholder.

        If the record has only images or only videos, either placeholder is accepted (some data sets write
        <image> for videos). Otherwise each placeholder takes the next file of its kind.
        """
        open_kinds = [kind for kind, value in placeholders if value is None]
        present = [kind for kind, values in files.items() if values]
        kinds = present * len(open_kinds) if len(present) == 1 else open_kinds
        if Counter(kinds) != Counter({kind: len(values) for kind, values in files.items()}):
            raise self._error(
                "placeholder",
                f"{len(open_kinds)} placeholders ({', '.join(open_kinds)}) in the text for "
                f"{len(files['image'])} images and {len(files['video'])} videos",
            )
        remaining = {kind: iter(values) for kind, values in files.items()}
        order = iter(kinds)
        media = []
        for kind, value in placeholders:
            if value is None:
                kind = next(order)
                value = next(remaining[kind])
            media.append(self._medium(kind, value))
        return tuple(media)

    def _medium(self, kind: str, value: Any) -> Media:
        if isinstance(value, str):
            value = {"path": value}
        if not isinstance(value, Mapping):
            raise self._error(
                "malformed",
                f"{kind}={_short(value)} must be a file name, an object, or a list of them",
            )
        name, data = value.get("path") or value.get("url"), value.get("bytes")
        if isinstance(data, bytes) or callable(data):
            path = self._root / name if isinstance(name, str) else None
            name = f"{name or 'bytes'} of sample {self._id}"
            return self._timed(Media(kind=kind, name=name, path=path, data=data), value)
        if not isinstance(name, str) or not name:
            raise self._error("malformed", f"{kind}={_short(value)} has no `path`")
        if "://" in name and not name.startswith("file://"):
            raise self._error(
                "malformed",
                f"{kind} {_short(name)} is a URL: download it and give a file name instead",
            )
        name = name.removeprefix("file://")
        if self._members is None:
            return self._timed(Media.file(kind, self._root / name), value)
        if name not in self._members:
            raise self._error(
                "malformed", f"{kind} {name!r} is not in the shard next to the record"
            )
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
                "malformed", f"start={timing.get('start', 0)} is after end={timing['end']}"
            )
        return dataclasses.replace(medium, **timing)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
