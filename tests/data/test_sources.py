"""Protects the parsing of LLaVA JSON: what is accepted, in which order media come, and under which
cause each unusable record is counted."""

from __future__ import annotations

import pathlib

import pytest

from storm_jax.data.sources import Media, SampleError, Turn, parse_record, read_records

ROOT = pathlib.Path("/data")
ASK, ANSWER = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}
LOOK = {"from": "human", "value": "<image>\nWhy?"}


def record(*turns, **fields) -> dict:
    return {"id": "a", "conversations": list(turns), **fields}


# Files.


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[]", b"{}", b'{"id": 1}', b'"text"', b"null", b"3", None],
)
def test_bad_file_is_a_value_error_that_names_it(tmp_path: pathlib.Path, content: bytes | None):
    path = tmp_path / "train.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.json"):
        read_records(path)


def test_folder_instead_of_a_file_is_a_value_error(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_records(tmp_path)


def test_records_come_as_they_are(tmp_path: pathlib.Path):
    (tmp_path / "a.json").write_text('[{"id": "é"}, 3]', encoding="utf-8")
    assert read_records(tmp_path / "a.json") == [{"id": "é"}, 3]


# Records that are fine.


@pytest.mark.parametrize("human", ["human", "user"])
@pytest.mark.parametrize("gpt", ["gpt", "assistant"])
def test_both_ways_to_name_who_speaks(human: str, gpt: str):
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
        ({"video": "a.mp4"}, "<image>", [("video", "/data/a.mp4")]),  # LLaVA-Video writes it so
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
def test_media_stand_in_the_order_of_their_placeholders(fields: dict, text: str, media: list):
    parsed = parse_record(record({"from": "human", "value": text}, ANSWER, **fields), ROOT, 0)
    assert parsed.media == tuple(Media(kind, pathlib.Path(path)) for kind, path in media)


def test_placeholders_may_stand_in_several_turns():
    parsed = parse_record(record(LOOK, ANSWER, LOOK, ANSWER, image=["a.png", "b.png"]), ROOT, 0)
    assert [medium.path.name for medium in parsed.media] == ["a.png", "b.png"]


@pytest.mark.parametrize(("kind", "frames"), [("image", 1), ("video", 8)])
def test_frames_of_a_medium(kind: str, frames: int):
    assert Media(kind, ROOT).num_frames(8) == frames


@pytest.mark.parametrize(("fields", "expected"), [({"id": 7}, "7"), ({"id": "x"}, "x"), ({}, "5")])
def test_id_is_a_string_or_else_the_index(fields: dict, expected: str):
    assert parse_record({"conversations": [ASK, ANSWER], **fields}, ROOT, 5).id == expected


def test_other_fields_are_kept_apart():
    parsed = parse_record(record(LOOK, ANSWER, image="a.png", family="order", options=[1]), ROOT, 0)
    assert parsed.extra == {"family": "order", "options": [1]}


def test_prompt_leaves_out_the_last_answer_only():
    last = {"from": "gpt", "value": "Because."}
    parsed = parse_record(record(LOOK, ANSWER, ASK, last, image="a.png"), ROOT, 0)
    assert parsed.answer() == "Because."
    assert parsed.prompt().turns == parsed.turns[:3]
    assert (parsed.prompt().id, parsed.prompt().media) == (parsed.id, parsed.media)


# Records that are not.


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
        (
            record(LOOK, ANSWER, image={"path": "a.png"}), "malformed",
        ),
        (
            record(LOOK, ANSWER, image=[None]), "malformed",
        ),
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
