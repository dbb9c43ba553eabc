"""Parses a record of a data set into a Sample: LLaVA `conversations` or OpenAI-style `messages`.

Media are listed in `image`, `images`, `video` or `videos` (one or a list) and placed at `<image>` or
`<video>` in the text, or they are parts of a message's content. The schema is in docs/data.md.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import math
import os
import pathlib
import re
import urllib.parse
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from storm_jax.media.media import Media
from storm_jax.text.sample import PLACEHOLDER, Sample, SampleError, Turn

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
_FIELDS = {"image": ("image", "images"), "video": ("video", "videos")}
MEDIA_FIELDS = (*_FIELDS["image"], *_FIELDS["video"])
# What of a video to show: our name of a field, by its names in other trainers' records.
_TIMING = {
    "start": "start", "video_start": "start", "start_time": "start",
    "end": "end", "video_end": "end", "end_time": "end",
    "fps": "fps", "nframes": "nframes",
}  # fmt: skip
_KNOWN = {"id", "conversations", "messages", "system", *MEDIA_FIELDS, *_TIMING}
# Whether an answer is trained on: 0 or 1, false or true.
_LOSS = ("weight", "loss", "train")
# A placeholder where data sets put it; elsewhere, in a record without media, it is part of the text.
_AT_AN_EDGE = re.compile(r"(?m)^\s*<(?:image|video)>|<(?:image|video)>\s*$")
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
    sample_id = str(index) if record.get("id") is None else _name(record["id"])
    parser = _Parser(sample_id, media_root, members)
    turns, placeholders = parser.turns(record)
    files = parser.files(record)
    media: tuple[Media, ...] = ()
    if any(files.values()) or any(value is not None for _, value in placeholders):
        media = parser.media(placeholders, files, parser.bounds(record, files))
    else:
        parser.check_text_only(turns)
    extra = {key: value for key, value in record.items() if key not in _KNOWN}
    return Sample(
        id=sample_id, turns=turns, media=media, extra=extra, ignored=extra | parser.ignored
    )


class _Parser:
    """Parses the fields of one record; every problem raises a SampleError with its id.

    Attributes:
      ignored: unknown fields of messages and media, such as "messages.name".
    """

    def __init__(
        self, sample_id: str, root: pathlib.Path, members: Mapping[str, Media] | None
    ) -> None:
        self._id, self._root, self._members = sample_id, root, members
        self.ignored: dict[str, Any] = {}

    def _error(self, cause: str, message: str) -> SampleError:
        return SampleError(self._id, cause, message)

    def _ignore(self, name: str, fields: Mapping[str, Any], known: Collection[str]) -> None:
        self.ignored |= {f"{name}.{key}": v for key, v in fields.items() if key not in known}

    def turns(self, record: Mapping[str, Any]) -> tuple[tuple[Turn, ...], list[_Placeholder]]:
        """Returns the turns, and the placeholders of user turns in order."""
        name = "messages" if "messages" in record else "conversations"
        messages = record.get(name)
        if not isinstance(messages, Sequence) or not messages:
            raise self._error("empty_conversation", f"{name} is missing or empty")
        turns, placeholders = [], []
        for message in messages:
            turn, found = self._turn(name, message)
            turns.append(turn)
            placeholders += found
        if record.get("system"):
            turns.insert(0, self._system(record["system"], turns[0]))
        roles = [turn.role for turn in turns]
        if roles[0] == "system":
            roles = roles[1:]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise self._error(
                "malformed", f"turns must alternate human and gpt, found {', '.join(roles)}"
            )
        answers = [turn for turn in turns if turn.role == "assistant"]
        if not all(turn.text.strip() for turn in answers):
            raise self._error("empty_conversation", "an answer is empty")
        if not any(turn.trained for turn in answers):
            raise self._error("empty_conversation", "no answer is trained on: all have weight 0")
        return tuple(turns), placeholders

    def _system(self, text: Any, first: Turn) -> Turn:
        """The turn of a record's `system` field."""
        if not isinstance(text, str) or not _is_text(text):
            raise self._error("malformed", f"system={_short(text)} must be text")
        if first.role == "system":
            raise self._error("malformed", "both `system` and a system turn")
        if PLACEHOLDER.search(text):
            raise self._error("placeholder", "media in `system`: only user turns show media")
        return Turn("system", text)

    def _turn(self, name: str, message: Any) -> tuple[Turn, list[_Placeholder]]:
        try:
            role_field, text_field = ("from", "value") if "from" in message else ("role", "content")
            role = _ROLES[message[role_field]]
            text, placeholders = self._content(message[text_field])
        except (KeyError, TypeError, AttributeError, RecursionError):
            text = None
        if text is None or not _is_text(text):
            raise self._error(
                "malformed",
                f"turn {_short(message)} must be {{'from': 'human' or 'gpt', 'value': text}} or "
                f"{{'role': 'user' or 'assistant', 'content': text or a list of parts}}",
            )
        self._ignore(name, message, (role_field, text_field, *_LOSS))
        if (role == "system" and placeholders) or any(
            v is not None for _, v in placeholders if role != "user"
        ):
            raise self._error(
                "placeholder", f"media in the {role} turn: only user turns show media"
            )
        trained = self._trained(message, role)
        return Turn(role, text, trained), placeholders if role == "user" else []

    def _trained(self, message: Mapping[str, Any], role: str) -> bool:
        found = {}
        for name in _LOSS:
            if message.get(name) is None:
                continue
            if message[name] not in (0, 1):
                raise self._error("malformed", f"{name}={_short(message[name])} must be 0 or 1")
            found[name] = bool(message[name])
        if len(set(found.values())) > 1:
            raise self._error("malformed", f"{' and '.join(found)} contradict each other")
        if role != "assistant" and any(found.values()):
            name = next(iter(found))
            raise self._error("malformed", f"{name} of a {role} turn: only answers are trained on")
        return all(found.values())

    def _content(self, content: Any) -> tuple[str, list[_Placeholder]]:
        """Returns the text of a message and its placeholders. Parts of a list become lines."""
        if isinstance(content, str):
            return content, [(name.strip("<>"), None) for name in PLACEHOLDER.findall(content)]
        texts, placeholders = [], []
        for part in content:
            kind = part["type"].removesuffix("_url")
            if kind == "text":
                text, found = self._content(part["text"])
                self._ignore("text", part, ("type", "text"))
                texts.append(text)
                placeholders += found
            elif kind in _FIELDS:
                value = part.get(part["type"], part.get("path"))
                self._ignore(kind, part, ("type", part["type"], "path", *_TIMING))
                if value is not None:
                    bounds = {key: part[key] for key in _TIMING if key in part}
                    fields = value if isinstance(value, Mapping) else {"path": value}
                    value = {**fields, **bounds}
                texts.append(f"<{kind}>")
                placeholders.append((kind, value))
            else:
                raise KeyError(kind)
        return "\n".join(texts), placeholders

    def check_text_only(self, turns: Sequence[Turn]) -> None:
        """Refuses a record without media whose text looks as if they were forgotten."""
        for turn in turns:
            if turn.role == "user" and (found := _AT_AN_EDGE.search(turn.text)):
                raise self._error(
                    "placeholder",
                    f"{found.group().strip()} in the text, but the record has no media",
                )

    def files(self, record: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Returns the values of the record's media fields, by kind."""
        found: dict[str, list[Any]] = {kind: [] for kind in _FIELDS}
        for kind, fields in _FIELDS.items():
            for field in fields:
                value = record.get(field)
                values = value if isinstance(value, list) else [value]
                found[kind] += [each for each in values if each is not None and each != ""]
        return found

    def bounds(
        self, record: Mapping[str, Any], files: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """Returns the record's own timing fields, which apply to its only video."""
        bounds = {key: record[key] for key in _TIMING if record.get(key) is not None}
        if bounds and len(files["video"]) != 1:
            raise self._error(
                "malformed",
                f"{next(iter(bounds))} applies to one video, but the record lists "
                f"{len(files['video'])}: give it with each video",
            )
        return bounds

    def media(
        self,
        placeholders: Sequence[_Placeholder],
        files: Mapping[str, list[Any]],
        bounds: Mapping[str, Any],
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
            timing: Mapping[str, Any] = {}
            if value is None:
                kind = next(order)
                value = next(remaining[kind])
                timing = bounds if kind == "video" else {}
            media.append(self._medium(kind, value, timing))
        return tuple(media)

    def _medium(self, kind: str, value: Any, bounds: Mapping[str, Any]) -> Media:
        if isinstance(value, str):
            value = {"path": value}
        if not isinstance(value, Mapping):
            raise self._error(
                "malformed",
                f"{kind}={_short(value)} must be a file name, an object, or a list of them",
            )
        self._ignore(kind, value, ("path", "url", "bytes", *_TIMING))
        timing = self._timing(kind, {**bounds, **value})
        name, data = value.get("path") or value.get("url"), value.get("bytes")
        if isinstance(data, bytes) or callable(data):
            return Media(
                kind=kind,
                name=f"{name or 'bytes'} of sample {self._id}",
                path=self._root / name if isinstance(name, str) else None,
                data=data,
                **timing,
            )
        if isinstance(name, list) and all(isinstance(frame, str) for frame in name):
            raise self._error(
                "malformed",
                f"{kind}={_short(name)} lists {len(name)} frames: put them into a folder, and give the "
                f"folder's name",
            )
        if not isinstance(name, str) or not name:
            raise self._error("malformed", f"{kind}={_short(value)} has no `path`")
        if name[:5].lower() == "data:":
            content = f"data URL of sample {self._id}"
            return Media(kind=kind, name=content, data=self._decoded(kind, name), **timing)
        path = self._file_name(kind, name)
        if self._members is None:
            return dataclasses.replace(Media.file(kind, self._root / path), **timing)
        if path not in self._members:
            raise self._error(
                "malformed", f"{kind} {_short(path)} is not in the shard next to the record"
            )
        return dataclasses.replace(self._members[path], kind=kind, **timing)

    def _decoded(self, kind: str, url: str) -> bytes:
        """The content of a base64 data URL."""
        header, _, content = url.partition(",")
        if not header.endswith(";base64"):
            raise self._error("malformed", f"{kind}={_short(url)}: a data URL must be in base64")
        try:
            return base64.b64decode(urllib.parse.unquote(content), validate=True)
        except (binascii.Error, ValueError) as error:
            raise self._error("malformed", f"{kind}={_short(url)}: {error}") from None

    def _file_name(self, kind: str, name: str) -> str:
        """The path of a name, which may be a file URL."""
        if "://" in name:
            scheme, _, rest = name.partition("://")
            if scheme.lower() != "file":
                raise self._error(
                    "malformed",
                    f"{kind} {_short(name)} is a URL: download it and give a file name instead",
                )
            name = urllib.parse.unquote(rest.removeprefix("localhost"))
        if "\0" in name or not _is_file_name(name):
            raise self._error("malformed", f"{kind} {_short(name)} cannot be a file name")
        return name

    def _timing(self, kind: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `Media` that say what of a video to show."""
        timing: dict[str, Any] = {}
        for key, name in _TIMING.items():
            number = value.get(key)
            if number is None:
                continue
            if kind == "image":
                raise self._error("malformed", f"{key} applies to videos, not to images")
            if name in timing:
                raise self._error("malformed", f"{key} is given twice, under different names")
            timing[name] = self._number(key, number, positive=name in ("fps", "nframes"))
        if "nframes" in timing:
            if timing["nframes"] % 1:
                raise self._error("malformed", f"nframes={timing['nframes']} must be whole")
            timing["nframes"] = int(timing["nframes"])
        if timing.get("end", math.inf) < timing.get("start", 0):
            raise self._error(
                "malformed", f"start={timing.get('start', 0)} is after end={timing['end']}"
            )
        return timing

    def _number(self, key: str, number: Any, positive: bool) -> float:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise self._error("malformed", f"{key}={_short(number)} must be a number")
        try:
            found = float(number)
        except OverflowError:
            found = math.inf
        if not math.isfinite(found) or found < 0 or (positive and not found):
            raise self._error("malformed", f"{key}={_short(number)} must be positive and finite")
        return found


def _is_text(text: Any) -> bool:
    """Whether it can be tokenised: text without lone surrogates."""
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError):
        return False
    return True


def _is_file_name(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _name(value: Any) -> str:
    """The text of an id, which can be printed."""
    if not isinstance(value, str):
        return _short(value)
    return value.encode("utf-8", "backslashreplace").decode()


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:
        text = "an integer of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."
