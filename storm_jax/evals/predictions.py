"""predictions.jsonl: one line per question, from which replies can be scored again without a model."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from storm_jax.evals.benchmark import BenchmarkError, Question, ScoredReply
from storm_jax.inference.prediction import Prediction
from storm_jax.media.media import Media

_PLAIN = (str, int, float, list, tuple)


def to_fields(prediction: Prediction) -> dict[str, Any]:
    """A prediction as plain JSON."""
    return {
        "reply": prediction.text,
        "error": prediction.error,
        "cause": prediction.cause,
        "visual_tokens": prediction.visual_tokens,
        "seconds": round(prediction.seconds, 6),
    }


def from_fields(line: Mapping[str, Any]) -> Prediction:
    """The prediction of a line. Only `reply` is required; if it is not text, it counts as empty.

    Raises:
      KeyError, TypeError, ValueError: if it has no reply, or a field of the wrong type.
    """
    types: Mapping[str, Callable] = {
        "error": str,
        "cause": str,
        "visual_tokens": int,
        "seconds": float,
    }
    text = line["reply"] if isinstance(line["reply"], str) else ""
    return Prediction(
        text=text, **{name: to(line[name]) for name, to in types.items() if name in line}
    )


def to_line(reply: ScoredReply) -> dict[str, Any]:
    """A line of predictions.jsonl."""
    question, prediction = reply.question, to_fields(reply.prediction)
    return {
        "id": question.id,
        "video": question.video,
        "groups": dict(question.groups),
        "question": question.text,
        "options": list(question.options),
        "lines": list(question.lines),
        "answer": question.answer,
        "guess": question.guess,
        "extra": {k: v for k, v in question.extra.items() if isinstance(v, _PLAIN)},
        "reply": prediction.pop("reply"),
        "parsed": reply.parsed,
        "right": reply.right,
        "status": reply.status,
        **prediction,
    }


def read(
    path: pathlib.Path, questions: Sequence[Question] | None
) -> tuple[Sequence[Question], dict[str, Prediction]]:
    """Reads the questions and predictions of a file.

    Args:
      questions: those of the benchmark, if its files are available. Lines then need only `id` and `reply`,
        and questions without a line count as failed.

    Raises:
      BenchmarkError: if a line is malformed, lacks a field, or has an unknown id.
    """
    lines = read_objects(path)
    try:
        ids = [str(line["id"]) for line in lines]
        predictions = {name: from_fields(line) for name, line in zip(ids, lines, strict=True)}
        in_file = [_question(line) for line in lines] if questions is None else []
    except KeyError as error:
        raise BenchmarkError(
            f"{path}: a line has no {error}; with --data_root, id and reply are enough"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise BenchmarkError(f"{path}: a line has a field of the wrong type: {error}") from error
    if repeated := [i for i, n in Counter(ids).items() if n > 1]:
        raise BenchmarkError(f"{path}: the id {repeated[0]!r} occurs more than once")
    if questions is None:
        return in_file, predictions
    unknown = sorted(predictions.keys() - {question.id for question in questions})
    if unknown:
        raise BenchmarkError(
            f"{path}: {len(unknown)} ids are not in the benchmark, e.g. {unknown[0]!r}; its ids look "
            f"like {questions[0].id!r}"
        )
    nothing = Prediction(error=f"{path} has no reply", cause="no_reply")
    return questions, {question.id: nothing for question in questions} | predictions


def _question(line: Mapping[str, Any]) -> Question:
    return Question(
        id=str(line["id"]),
        video=line["video"],
        media=Media(kind="video", name=line["video"]),
        text=line["question"],
        options=tuple(line["options"]),
        answer=line["answer"],
        groups=line["groups"],
        lines=tuple(line["lines"]),
        guess=line["guess"],
        extra=line["extra"],
    )


def read_objects(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a user's JSONL file; unlike `storm_jax.files.read_lines`, a bad line is an error.

    Raises:
      BenchmarkError: if a line is not an object, or the file is empty.
    """
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise BenchmarkError(f"{path}:{number} is not valid JSON: {error}") from error
        if not isinstance(line, dict):
            raise BenchmarkError(f"{path}:{number} must be an object with id and reply")
        lines.append(line)
    if not lines:
        raise BenchmarkError(f"{path} is empty")
    return lines
