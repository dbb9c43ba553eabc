"""Scores, confidence intervals, and files of predictions."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from storm_jax.evals import predictions
from storm_jax.evals.benchmark import BenchmarkError, Question, ScoredReply, parse_replies
from storm_jax.evals.scoring import estimate, wilson_interval
from storm_jax.inference.prediction import Prediction
from storm_jax.media.media import Media


def replies(
    right: list[bool], videos: list[str], groups: list[str] | None = None
) -> list[ScoredReply]:
    groups = groups or [""] * len(right)
    return [
        ScoredReply(
            Question(
                id=str(i),
                video=video,
                media=Media(kind="video", name=video),
                text="?",
                options=("x", "y"),
                answer="A",
                groups={"g": group},
            ),
            Prediction(text="A" if is_right else "B"),
            "A" if is_right else "B",
        )
        for i, (is_right, video, group) in enumerate(zip(right, videos, groups, strict=True))
    ]


def test_wilson_interval_is_the_published_one():
    low, high = wilson_interval(0.8, 10)  # Brown, Cai and DasGupta (2001): 0.490 to 0.943
    assert (round(low, 3), round(high, 3)) == (0.49, 0.943)
    assert wilson_interval(0, 20)[0] == 0
    assert wilson_interval(1, 20)[1] == pytest.approx(1)
    assert wilson_interval(0, 0) == (0, 1)


def test_independent_questions_have_wilsons_interval():
    found = estimate(replies([True] * 8 + [False] * 2, [str(i) for i in range(10)]))
    assert found.value == 0.8
    assert (found.low, found.high) == pytest.approx(wilson_interval(0.8, 10))


def test_a_video_that_is_asked_about_three_times_counts_once_where_its_answers_agree():
    right = [True] * 8 + [False] * 2
    once = estimate(replies(right, [str(i) for i in range(10)]))
    thrice = estimate(replies(right * 3, [str(i) for i in range(10)] * 3))
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    all_right = estimate(replies([True] * 30, [str(i) for i in range(10)] * 3))
    assert (all_right.low, all_right.high) == pytest.approx(wilson_interval(1, 10))


def test_questions_that_disagree_within_a_video_are_no_surer_than_independent_ones():
    mixed = estimate(replies([True, False] * 10, [str(i // 2) for i in range(20)]))
    assert (mixed.low, mixed.high) == pytest.approx(wilson_interval(0.5, 20))


def test_the_mean_of_groups_and_its_interval_are_those_of_a_simulation(rng):
    """Two groups of 20 and 200 questions: the interval covers the true mean in about 95 % of draws."""
    sizes, true = {"small": 20, "large": 200}, {"small": 0.7, "large": 0.4}
    covered = 0
    for _ in range(400):
        groups = [name for name, size in sizes.items() for _ in range(size)]
        right = [bool(rng.random() < true[name]) for name in groups]
        found = estimate(replies(right, [str(i) for i in range(220)], groups), ("g",))
        by_hand = np.mean([np.mean(right[:20]), np.mean(right[20:])])
        assert found.value == pytest.approx(by_hand)
        covered += found.low <= 0.55 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_failures_and_unparseable_replies_are_wrong():
    question = Question(
        id="1",
        video="v",
        media=Media(kind="video", name="v"),
        text="?",
        options=("x", "y"),
        answer="A",
        groups={},
    )
    answers = {"1": Prediction(error="it is gone", cause="missing")}
    (reply,) = parse_replies([question], answers, lambda reply, q: "A")
    assert (reply.right, reply.status, reply.parsed) == (False, "missing", None)
    (reply,) = parse_replies([question], {"1": Prediction(text="?")}, lambda reply, q: None)
    assert (reply.right, reply.status) == (False, "unparsed")
    assert parse_replies([question], {}, lambda reply, q: "A") == []
    unkeyed = Question(
        id="1",
        video="v",
        media=Media(kind="video", name="v"),
        text="?",
        options=("x", "y"),
        answer=None,
        groups={},
    )
    (reply,) = parse_replies([unkeyed], {"1": Prediction(text="A")}, lambda reply, q: "A")
    assert not reply.right


def test_a_line_of_predictions_is_read_back(tmp_path):
    question = Question(
        id="1", video="v", media=Media(kind="video", name="v"), text="?", options=("x", "y"), answer="A", groups={"g": "1"}, lines=("A. x", "B. y"),
        guess=0.25, extra={"scoring_points": "p\u2028q", "settings": object()},
    )  # fmt: skip
    reply = ScoredReply(question, Prediction(text="A", visual_tokens=3, seconds=0.25), "A")
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(predictions.to_line(reply), ensure_ascii=False) + "\n")
    (again,), answers = predictions.read(path, None)
    assert answers == {"1": reply.prediction}
    plain = {"scoring_points": "p\u2028q"}
    assert again == dataclasses.replace(question, extra=plain)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            '{"id": "1", "reply": "A"}\n{"id": "1", "re\n{"id": "2", "reply": "B"}',
            ":2 is not valid JSON",
        ),
        (
            '{"id": "1", "reply": "A"}\n\n{"id": "1", "reply": "B"}',
            "the id '1' occurs more than once",
        ),
        ('{"id": "1"}', "a line has no 'reply'"),
        (
            '{"id": "9", "reply": "A"}',
            "1 ids are not in the benchmark, e.g. '9'; .* like '0'",
        ),
        ("[1]", ":1 must be an object"),
        ("", "is empty"),
    ],
)
def test_files_of_predictions_that_cannot_be_scored_are_refused(text, problem, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    questions = [reply.question for reply in replies([True, True], ["a", "b"])]
    with pytest.raises(BenchmarkError, match=problem):
        predictions.read(path, questions)
    if "not in the benchmark" not in problem:
        with pytest.raises(BenchmarkError):
            predictions.read(path, None)


def test_null_replies_are_empty_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "0", "reply": null}\n\n{"id": 1, "reply": "B"}\n')
    questions = [reply.question for reply in replies([True] * 3, ["a", "b", "c"])]
    _, answers = predictions.read(path, questions)
    assert answers["0"] == Prediction(text="") and answers["1"] == Prediction(text="B")
    assert answers["2"].cause == "no_reply"


def test_letters_that_the_question_does_not_have_are_unparsed():
    question = Question(
        id="1",
        video="v",
        media=Media(kind="video", name="v"),
        text="?",
        options=("x", "y"),
        answer="A",
        groups={},
    )
    for found in ("C", "I cannot tell", ""):
        (reply,) = parse_replies(
            [question], {"1": Prediction(text="?")}, lambda reply, q, found=found: found
        )
        assert (reply.parsed, reply.status) == (None, "unparsed")
