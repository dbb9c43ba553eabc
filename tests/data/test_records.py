"""Parsing of records: what is accepted, the order of media, and the cause of each unusable record."""

from __future__ import annotations

import pathlib

import pytest
from media_files import write_numbered

from storm_jax.config import FramesConfig
from storm_jax.data.records import parse_record
from storm_jax.media.media import Media
from storm_jax.media.read import count_frames
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


# Fields of other trainers.

VIDEO = {"from": "human", "value": "<video>\nWhy?"}


def video_part(**fields) -> dict:
    return messages([{"type": "video", "video": "a.mp4", **fields}, {"type": "text", "text": "Q"}])


@pytest.mark.parametrize(
    ("bad_or_good", "expected"),
    [
        (record(VIDEO, ANSWER, video="a.mp4", start=600, end=610.5), (600, 610.5, None, None)),
        (record(VIDEO, ANSWER, video="a.mp4", start_time=3), (3, None, None, None)),
        (record(VIDEO, ANSWER, video={"path": "a.mp4", "end": 4}, start=3), (3, 4, None, None)),
        (video_part(video_start=600.0, video_end=610.0), (600, 610, None, None)),
        (video_part(fps=4.0), (0, None, 4, None)),
        (video_part(nframes=12), (0, None, None, 12)),
        (record(VIDEO, ANSWER, video="a.mp4", nframes=12.0, fps=2), (0, None, 2, 12)),
    ],
)
def test_bounds_and_rates_of_other_trainers_are_obeyed(bad_or_good, expected):
    (medium,) = parse_record(bad_or_good, ROOT, 0).media
    assert (medium.start, medium.end, medium.fps, medium.nframes) == expected


def test_a_rate_and_a_number_of_frames_limit_the_frames_of_a_file(tmp_path):
    write_numbered(tmp_path / "a.mp4", 41)
    for fields, count in [({}, 16), ({"fps": 1}, 5), ({"fps": 9}, 16), ({"nframes": 7}, 7)]:
        (medium,) = parse_record(video_part(**fields), tmp_path, 0).media
        assert count_frames(medium, 16, FramesConfig()) == count


def test_a_system_field_is_the_system_turn():
    parsed = parse_record(record(ASK, ANSWER, system="In French."), ROOT, 0)
    assert parsed.turns[0] == Turn("system", "In French.")
    assert parse_record(record(ASK, ANSWER, system=""), ROOT, 0).turns[0].role == "user"


@pytest.mark.parametrize("field", ["weight", "loss", "train"])
def test_answers_may_carry_no_loss(field):
    turns = (ASK, {**ANSWER, field: 0}, ASK, {**ANSWER, field: True})
    parsed = parse_record(record(*turns), ROOT, 0)
    assert [turn.trained for turn in parsed.turns] == [True, False, True, True]


@pytest.mark.parametrize(
    ("url", "name", "data"),
    [
        ("file:///data/my%20film.mp4", "/data/my film.mp4", None),
        ("file://localhost/a.mp4", "/a.mp4", None),
        ("my%20film.mp4", "/data/my%20film.mp4", None),
        ("data:video/mp4;base64,aGVsbG8=", "data URL of sample 0", b"hello"),
        ("data:video/mp4;base64,aGVsbG8%3D", "data URL of sample 0", b"hello"),
    ],
)
def test_urls_are_decoded(url, name, data):
    parsed = parse_record({**video_part(video_url=0), **video_part(video=url), "id": "0"}, ROOT, 0)
    assert (parsed.media[0].name, parsed.media[0].data) == (name, data)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("List HTML tags", "<video>, <audio>"),
        ("What does a <video> tag do?", "It shows a <video>."),
    ],
)
def test_placeholders_that_mean_no_medium_are_text(question, answer):
    turns = ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
    parsed = parse_record(record(*turns), ROOT, 0)
    assert parsed.media == () and [turn.text for turn in parsed.turns] == [question, answer]


def test_unknown_fields_are_listed_with_their_place():
    turns = ({**VIDEO, "name": "Ann"}, ANSWER)
    parsed = parse_record(record(*turns, video={"path": "a", "clip": [1, 2]}, clip=3), ROOT, 0)
    assert parsed.ignored == {"conversations.name": "Ann", "video.clip": [1, 2], "clip": 3}
    assert parsed.extra == {"clip": 3}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record(VIDEO, VIDEO, ANSWER, video=["a", "b"], start=3), "alternate"),
        (record({"from": "human", "value": "<video> <video>"}, ANSWER, video=["a", "b"], start=3), "start applies to one video"),
        (record(LOOK, ANSWER, image={"path": "a.png", "start": 3}), "start applies to videos"),
        (video_part(start=1, video_start=2), "given twice"),
        (video_part(nframes=1.5), "nframes=1.5 must be whole"),
        (video_part(start=10**400), "start=1000"),
        (video_part(start=10**5000), "start=an integer of thousands of digits must be positive"),
        (record(ASK, ANSWER, system=["a"]), r"system=\['a'\] must be text"),
        (record({"from": "system", "value": "a"}, ASK, ANSWER, system="b"), "both `system` and"),
        (record(ASK, {**ANSWER, "weight": 0.5}), "weight=0.5 must be 0 or 1"),
        (record(ASK, {**ANSWER, "weight": 0}), "no answer is trained on"),
        (record(ASK, {**ANSWER, "weight": 0, "loss": True}), "weight and loss contradict"),
        (record({**ASK, "loss": True}, ANSWER), "loss of a user turn"),
        (video_part(video="\ud800.mp4"), "cannot be a file name"),
        (video_part(video="a\0.mp4"), "cannot be a file name"),
        (video_part(video=["1.jpg", "2.jpg"]), "lists 2 frames"),
        (video_part(video="data:video/mp4,hello"), "must be in base64"),
        (video_part(video="data:video/mp4;base64,a"), "data:video"),
    ],
)  # fmt: skip
def test_what_cannot_be_obeyed_is_refused_by_name(bad, message):
    with pytest.raises(SampleError, match=message):
        parse_record(bad, ROOT, 0)
