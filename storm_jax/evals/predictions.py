"""predictions.jsonl: a line a question, from which replies can be scored again without a model."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from storm_jax.evals.benchmark import BenchmarkError
from storm_jax.evals.questions import Answer, Question, Row
from storm_jax.media.media import Media

_PLAIN = (str, int, float, list, tuple)


def to_line(row: Row) -> dict[str, Any]:
    """A row as plain JSON."""
    question, answer = row.question, row.answer
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
        "reply": answer.reply,
        "parsed": row.parsed,
        "right": row.right,
        "status": row.status,
        "error": answer.error,
        "cause": answer.cause,
        "visual_tokens": answer.visual_tokens,
        "seconds": round(answer.seconds, 6),
    }


def read(
    path: pathlib.Path, questions: Sequence[Question] | None
) -> tuple[Sequence[Question], dict[str, Answer]]:
    """The questions and answers of a file.

    Args:
      questions: those of the benchmark, if its files are at hand: then lines of id and reply are enough, and
        a question without a line failed.

    Raises:
      BenchmarkError: for a line that is damaged, lacks a field, or answers what was not asked.
    """
    lines = read_objects(path)
    try:
        if repeated := [i for i, n in Counter(str(x["id"]) for x in lines).items() if n > 1]:
            raise BenchmarkError(f"{path}: the id {repeated[0]!r} occurs more than once")
        answers = {str(line["id"]): answer_of(line) for line in lines}
        if questions is None:
            return [_question(line) for line in lines], answers
    except KeyError as error:
        raise BenchmarkError(
            f"{path}: a line has no {error}; with --data_root, id and reply are enough"
        ) from error
    unknown = sorted(answers.keys() - {question.id for question in questions})
    if unknown:
        raise BenchmarkError(
            f"{path}: {len(unknown)} ids are none of the benchmark's, such as {unknown[0]!r}; its own "
            f"look like {questions[0].id!r}"
        )
    nothing = Answer(error=f"{path} has no reply", cause="no_reply")
    return questions, {question.id: nothing for question in questions} | answers


def answer_of(line: Mapping[str, Any]) -> Answer:
    """The answer of a line; no text as the reply is an empty one."""
    fields = {field.name for field in dataclasses.fields(Answer)} & line.keys()
    reply = line["reply"] if isinstance(line["reply"], str) else ""
    return Answer(**{**{name: line[name] for name in fields}, "reply": reply})


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
    """The lines of a JSONL file that is somebody's, of which none may be lost.

    Raises:
      BenchmarkError: naming a line that is no object, or an empty file.
    """
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise BenchmarkError(f"{path}:{number} is no JSON: {error}") from error
        if not isinstance(line, dict):
            raise BenchmarkError(f"{path}:{number} must be an object with id and reply")
        lines.append(line)
    if not lines:
        raise BenchmarkError(f"{path} is empty")
    return lines
