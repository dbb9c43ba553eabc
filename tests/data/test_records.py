"""Parsing of records: what is accepted, the order of media, and the cause of each unusable record."""

from __future__ import annotations

import pathlib

import pytest

from storm_jax.data.records import parse_record
from storm_jax.media.media import Media
from storm_jax.text.sample import SampleError, Turn

ROOT = pathlib.Path("/data")
ASK, ANSWER = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}
LOOK = {"from": "human", "value": "<image>\nWhy?"}


def record(*turns, **fields) -> dict:
    return {"id": "a", "conversations": list(turns), **fields}


# Valid records.


@pytest.mark.parametrize("human", ["human", "user"])
@pytest.mark.parametrize("gpt", ["gpt", "assistant"])
def test_both_names_of_each_role(human: str, gpt: str):
    turns = (
        {"from": "system", "value": "Be brief."},
        {"from": human, "value": "Why?"},
        {"from": gpt, "value": "So."},
    )
    parsed = parse_record(record(*turns), ROOT, 0)
    assert parsed.turns == (
        Turn("system", "Be brief."),
        Turn("user", "Why?"),
        Turn("assistant", "So."),
    )


@pytest.mark.parametrize(
    ("fields", "text", "media"),
    [
        ({}, "Why?", []),
        ({"image": "i/a.png"}, "<image>\nWhy?", [("image", "/data/i/a.png")]),
        ({"video": "a.mp4"}, "Why? <video>", [("video", "/data/a.mp4")]),
        ({"video": "a.mp4"}, "<image>", [("video", "/data/a.mp4")]),  # as in LLaVA-Video
        ({"image": "/other/a.png"}, "<image>", [("image", "/other/a.png")]),
        ({"image": "", "video": None}, "Why?", []),
        (
            {"image": ["b.png", "a.png", "b.png"]},
            "<image> or <image>? <image>",
            [("image", "/data/b.png"), ("image", "/data/a.png"), ("image", "/data/b.png")],
        ),
        (
            {"video": ["a.mp4", "b.mp4"]},
            "<video><video>",
            [("video", "/data/a.mp4"), ("video", "/data/b.mp4")],
        ),
        (
            {"video": "v.mp4", "image": "i.png"},
            "<image> <video>",
            [("image", "/data/i.png"), ("video", "/data/v.mp4")],
        ),
        (
            {"video": "v.mp4", "image": "i.png"},
            "<video> <image>",
            [("video", "/data/v.mp4"), ("image", "/data/i.png")],
        ),
    ],
)
def test_media_are_in_the_order_of_their_placeholders(fields: dict, text: str, media: list):
    parsed = parse_record(record({"from": "human", "value": text}, ANSWER, **fields), ROOT, 0)
    assert parsed.media == tuple(Media.file(kind, path) for kind, path in media)


def test_placeholders_may_be_in_several_turns():
    parsed = parse_record(record(LOOK, ANSWER, LOOK, ANSWER, image=["a.png", "b.png"]), ROOT, 0)
    assert [medium.path.name for medium in parsed.media] == ["a.png", "b.png"]


@pytest.mark.parametrize(("fields", "expected"), [({"id": 7}, "7"), ({"id": "x"}, "x"), ({}, "5")])
def test_id_is_a_string_or_else_the_index(fields: dict, expected: str):
    assert parse_record({"conversations": [ASK, ANSWER], **fields}, ROOT, 5).id == expected


def test_other_fields_are_in_extra():
    parsed = parse_record(record(LOOK, ANSWER, image="a.png", family="order", options=[1]), ROOT, 0)
    assert parsed.extra == {"family": "order", "options": [1]}


def test_prompt_drops_only_the_last_answer():
    last = {"from": "gpt", "value": "Because."}
    parsed = parse_record(record(LOOK, ANSWER, ASK, last, image="a.png"), ROOT, 0)
    assert parsed.answer() == "Because."
    assert parsed.prompt().turns == parsed.turns[:3]
    assert (parsed.prompt().id, parsed.prompt().media) == (parsed.id, parsed.media)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"images": ["a.png", "b.png"]}, "<image><image>"),
        ({"image": "a.png", "images": ["b.png"]}, "<image><image>"),
        ({"image": [{"path": "a.png"}, "file://b.png"]}, "<image><image>"),
    ],
)
def test_media_may_be_in_either_field_or_both(fields: dict, text: str):
    parsed = parse_record(record({"from": "human", "value": text}, ANSWER, **fields), ROOT, 0)
    assert [medium.name for medium in parsed.media] == ["/data/a.png", "/data/b.png"]


def test_a_video_has_bounds_and_a_folder_of_frames_its_rate():
    videos = [{"path": "a.mp4", "start": 2, "end": 4.5}, {"path": "frames", "fps": 0.5}]
    turn = {"from": "human", "value": "<video><video>"}
    clip, folder = parse_record(record(turn, ANSWER, videos=videos), ROOT, 0).media
    assert (clip.path, clip.start, clip.end) == (ROOT / "a.mp4", 2, 4.5)
    assert (folder.path, folder.fps, folder.start, folder.end) == (ROOT / "frames", 0.5, 0, None)


def messages(content, **fields) -> dict:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "So."}]
    return {"id": "a", "messages": turns, **fields}


def test_parts_of_messages_are_lines_and_media():
    content = [
        {"type": "text", "text": "First"},
        {"type": "video", "video": "a.mp4", "start": 1, "end": 2},
        {"type": "image_url", "image_url": {"url": "file:///b.png"}},
        {"type": "text", "text": "Why?"},
    ]
    parsed = parse_record(messages(content), ROOT, 0)
    assert parsed.turns[0] == Turn("user", "First\n<video>\n<image>\nWhy?")
    assert parsed.turns[1] == Turn("assistant", "So.")
    video, image = parsed.media
    assert (video.kind, video.path, video.start, video.end) == ("video", ROOT / "a.mp4", 1, 2)
    assert (image.kind, image.path) == ("image", pathlib.Path("/b.png"))


def test_parts_without_a_file_take_those_of_the_record():
    content = [{"type": "image"}, {"type": "image", "image": "own.png"}, {"type": "image"}]
    parsed = parse_record(messages(content, images=["a.png", "b.png"]), ROOT, 0)
    assert [medium.path.name for medium in parsed.media] == ["a.png", "own.png", "b.png"]


def test_bytes_are_named_after_their_sample():
    parsed = parse_record(record(LOOK, ANSWER, image={"bytes": b"abc", "path": "x.png"}), ROOT, 0)
    assert parsed.media[0].open().read() == b"abc"
    assert "sample a" in parsed.media[0].name and "x.png" in parsed.media[0].name


def test_media_of_a_shard_are_looked_up_by_member_name():
    member = Media(kind="video", name="s.tar!a.mp4", path=pathlib.Path("s.tar"), span=(512, 9))
    found = record(LOOK, ANSWER, video={"path": "a.mp4", "start": 1})
    (medium,) = parse_record(found, ROOT, 0, {"a.mp4": member}).media
    assert (medium.name, medium.span, medium.start) == ("s.tar!a.mp4", (512, 9), 1)
    with pytest.raises(SampleError, match=r"'b.mp4' is not in the shard next to the record"):
        parse_record(record(LOOK, ANSWER, video="b.mp4"), ROOT, 0, {"a.mp4": member})


# Unusable records.


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (3, "malformed"),
        (None, "malformed"),
        ([ASK, ANSWER], "malformed"),
        (record("Why?", ANSWER), "malformed"),
        (record(None, ANSWER), "malformed"),
        (record({"value": "Why?"}, ANSWER), "malformed"),
        (record({"from": "human"}, ANSWER), "malformed"),
        (record({"from": "bird", "value": "?"}, ANSWER), "malformed"),
        (record({"from": ["human"], "value": "?"}, ANSWER), "malformed"),
        (record(ASK), "malformed"),
        (record(ANSWER), "malformed"),
        (record(ANSWER, ASK), "malformed"),
        (record(ASK, ASK, ANSWER), "malformed"),
        (record(ASK, ANSWER, ASK), "malformed"),
        (record({"from": "system", "value": "Be brief."}), "malformed"),
        ({"id": "a", "conversations": "Why? So."}, "malformed"),
        (record(), "empty_conversation"),
        ({"id": "a"}, "empty_conversation"),
        ({"id": "a", "conversations": None}, "empty_conversation"),
        ({"id": "a", "conversations": 3}, "empty_conversation"),
        (record(ASK, {"from": "gpt", "value": ""}), "empty_conversation"),
        (record(ASK, {"from": "gpt", "value": " \n"}), "empty_conversation"),
        (record(ASK, ANSWER, ASK, {"from": "gpt", "value": ""}), "empty_conversation"),
        (record(ASK, ANSWER, image="a.png"), "placeholder"),
        (record(LOOK, ANSWER), "placeholder"),
        (record(LOOK, ANSWER, image=["a.png", "b.png"]), "placeholder"),
        (record(LOOK, ANSWER, image=[]), "placeholder"),
        (record(LOOK, ANSWER, LOOK, ANSWER, image="a.png"), "placeholder"),
        (record(LOOK, ANSWER, image="a.png", video="a.mp4"), "placeholder"),
        (record(ASK, {"from": "gpt", "value": "See <image>"}), "placeholder"),
        (
            record(LOOK, ANSWER, image=5), "malformed",
        ),
        (record(LOOK, ANSWER, image=[None]), "placeholder"),
        (record(LOOK, ANSWER, image={"width": 3}), "malformed"),
        (record(LOOK, ANSWER, image="https://there/a.png"), "malformed"),
        (record(LOOK, ANSWER, video={"path": "a.mp4", "start": "3"}), "malformed"),
        (record(LOOK, ANSWER, video={"path": "a.mp4", "start": -1}), "malformed"),
        (record(LOOK, ANSWER, video={"path": "a.mp4", "start": 5, "end": 4}), "malformed"),
        (record(LOOK, ANSWER, video={"path": "a", "fps": 0}), "malformed"),
        (record(LOOK, ANSWER, video={"path": "a", "fps": float("nan")}), "malformed"),
        (messages([{"type": "image", "image": "a.png"}], image="b.png"), "placeholder"),
        (messages([{"type": "image"}]), "placeholder"),
        (messages([{"type": "audio", "audio": "a.wav"}]), "malformed"),
        (messages([{"text": "Why?"}]), "malformed"),
        (messages(["Why?"]), "malformed"),
        ({"id": "a", "messages": [ASK, ANSWER], "image": "a.png"}, "placeholder"),
        (
            record(ASK, {"from": "gpt", "value": None}), "malformed",
        ),
        (
            record(ASK, ANSWER, {"from": "system", "value": "s"}), "malformed",
        ),
    ],
)  # fmt: skip
def test_unusable_record_is_counted_under_its_cause(bad, cause: str):
    with pytest.raises(SampleError) as caught:
        parse_record(bad, ROOT, 9)
    assert caught.value.cause == cause
    assert caught.value.sample_id == ("a" if isinstance(bad, dict) else "9")
    assert repr(caught.value.sample_id) in str(caught.value)
