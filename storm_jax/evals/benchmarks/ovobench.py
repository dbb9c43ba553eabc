"""OVO-Bench (arXiv 2501.05510): questions at moments of 644 videos, asked while they are watched.

    DIR/data/ovo_bench_new.json           or in DIR
    DIR/data/src_videos/COIN/VIDEO.mp4    or in DIR/src_videos/: whole videos, one session each
    DIR/data/chunked_videos/12.mp4        or in DIR/chunked_videos/: used for questions whose video is not there

A row of a forward task has several questions, at the times of its `test_info`; question 3 of row 12 is 12_3, like its
chunk.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from storm_jax.evals import parsing
from storm_jax.evals.benchmark import (
    Benchmark,
    BenchmarkError,
    Parser,
    Question,
    ScoredReply,
    Split,
    without_placeholders,
)
from storm_jax.evals.files import FileFinder, read_rows, write_json
from storm_jax.media.media import Media
from storm_jax.text.sample import Sample

MODES = {
    "backward": {"EPM": 297, "ASI": 148, "HLD": 186},
    "realtime": {"OCR": 149, "ACR": 109, "ATR": 116, "STU": 178, "FPD": 101, "OJR": 184},
    "forward": {"REC": 698, "SSR": 629, "CRR": 240},
}
TASKS = {task: count for tasks in MODES.values() for task, count in tasks.items()}
_MODE_OF = {task: mode for mode, tasks in MODES.items() for task in tasks}
_ONLY = "Do not include any additional text or explanation in your response.\n"
_YES_OR_NO = f"Answer only with “Yes” or “No”.\n{_ONLY}"


def load(root: pathlib.Path, split: str) -> list[Question]:
    whole = FileFinder(root, ("data/src_videos", "src_videos"))
    chunks = FileFinder(root, ("data/chunked_videos", "chunked_videos"))
    patterns = ("data/ovo_bench_new.json", "ovo_bench_new.json")
    return [
        question
        for row in read_rows(root, patterns, "OVO-Bench")
        for question in _questions(row, whole, chunks)
    ]


def _questions(row: Mapping[str, Any], whole: FileFinder, chunks: FileFinder) -> Iterator[Question]:
    """The questions of a row: one, or those of its `test_info`.

    Raises:
      BenchmarkError: naming the row and the field, for a task or a time that is none.
    """
    where, task = f"row {row['id']}", row["task"]
    if task not in TASKS:
        raise BenchmarkError(f"{where}: task={task!r} must be one of {', '.join(TASKS)}")
    tests = row.get("test_info", [row])
    for number, test in enumerate(tests):
        name = f"{row['id']}_{number}" if "test_info" in row else str(row["id"])
        options = tuple(without_placeholders(str(option)) for option in row.get("options") or ())
        yield Question(
            id=name,
            video=row["video"],
            media=_clip(row["video"], name, _end(test["realtime"], where), whole, chunks),
            text=without_placeholders(_text(row, test)),
            options=options,
            answer=_answer(row, test),
            asked_at=_end(test["realtime"], where),
            groups={"mode": _MODE_OF[task], "task": task},
            guess=0.5 if task in ("SSR", "CRR") else None,
            extra={
                "realtime": test["realtime"],
                **{k: test[k] for k in ("count", "type") if k in test},
            },
        )


def _clip(video: str, name: str, end: float, whole: FileFinder, chunks: FileFinder) -> Media:
    """The part of a video before a question, or a chunk that was cut there."""
    found = whole.find(video)
    if found is None and (chunk := chunks.find(f"{name}.mp4")):
        return Media.file("video", chunk)
    return dataclasses.replace(Media.file("video", found or whole.path(video)), end=end)


def _end(realtime: Any, where: str) -> float:
    """Where the authors cut a video, in seconds."""
    if not isinstance(realtime, int | float) or not 0 <= realtime < math.inf:
        raise BenchmarkError(f"{where}: realtime={realtime!r} must be seconds")
    return float(math.ceil(realtime))


def _text(row: Mapping[str, Any], test: Mapping[str, Any]) -> str:
    if row["task"] == "REC":
        return f"How many times did they {row['activity']}?"
    return test["step"] if row["task"] == "SSR" else row["question"]


def _answer(row: Mapping[str, Any], test: Mapping[str, Any]) -> str:
    if row["task"] == "REC":
        return str(test["count"])
    if row["task"] in ("SSR", "CRR"):
        return "Yes" if test["type"] else "No"
    return "ABCDEFGH"[row["gt"]]


def official(question: Question) -> Sample:
    return question.sample(f"<video>\n{_prompt(question)}")


def _prompt(question: Question) -> str:
    task, text = question.groups["task"], question.text
    if task == "REC":
        return (
            "\nYou're watching a video in which people may perform a certain type of action repetively. \n"
            "The person performing this kind of action are referred to as 'they' in the following statement.\n"
            "You're task is to count how many times have different people in the video perform this kind of action in "
            "total.\nOne complete motion counts as one. \n"
            f"Now, answer the following question: {text}\n"
            "Provide your answer as a single number (e.g., 0, 1, 2, 3…) indicating the total count.\n"
            f"{_ONLY}"
        )
    if task == "SSR":
        return (
            "\nYou're watching a tutorial video which contain a sequential of steps. \n"
            f"The following is one step from the whole procedures: \n{text}\n"
            "Your task is to determine if the man or woman in the video is currently performing this step.\n"
            f"{_YES_OR_NO}"
        )
    if task == "CRR":
        return (
            "\nYou're responsible of answering questions based on the video content. \n"
            "The following question are relevant to the latest frames, i.e. the end of the video.\n"
            f"{text}\n"
            "Decide whether existing visual content, especially latest frames, i.e. frames that near the end of the "
            f"video, provide enough information for answering the question.\n{_YES_OR_NO}"
        )
    options = "; ".join(f"{letter}. {option}" for letter, option in question.lettered.items())
    return (
        f"\nQuestion: {text}\nOptions:\n{options};\n\n"
        f"Respond only with the letter corresponding to your chosen option (e.g., A, B, C). \n{_ONLY}"
    )


def contained(reply: str, question: Question) -> str | None:
    """As the authors' score.py: the right letter, or Yes or No, if the reply contains it anywhere; otherwise another
    one that it contains. A count is all digits of the reply."""
    if "count" in question.extra:
        return "".join(re.findall(r"\d+", reply)) or None
    answers = question.letters or ("Yes", "No")
    order = sorted(answers, key=lambda answer: answer != question.answer)
    is_short = len(question.letters) == 0  # Y and N are enough
    return next((a for a in order if a in reply or (is_short and reply == a[0])), None)


def _or_word(parse: Parser) -> Parser:
    """Extends a multiple-choice parser to the forward tasks: the first word of the reply is the answer."""

    def parse_any(reply: str, question: Question) -> str | None:
        if question.options:
            return parse(reply, question)
        words = parsing.normalise(reply).split()
        first = words[0].capitalize() if words else None
        is_number = "count" in question.extra
        return (
            first
            if first and (first.isdecimal() if is_number else first in ("Yes", "No"))
            else None
        )

    return parse_any


def submit(split: str, replies: Sequence[ScoredReply], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the input of the authors' score.py."""
    results: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    forward: dict[str, dict[str, Any]] = {}
    for reply in replies:
        question, text = reply.question, reply.prediction.text
        task, mode = question.groups["task"], question.groups["mode"]
        row, _, number = question.id.partition("_")
        about = {"id": int(row) if row.isdecimal() else row, "video": question.video, "task": task}
        if number:
            if row not in forward:
                forward[row] = {**about, "test_info": []}
                results[mode].append(forward[row])
            forward[row]["test_info"].append({**question.extra, "response": text})
        else:
            answer = {"response": text, "ground_truth": question.answer}
            results[mode].append({**about, "question": question.text, **answer})
    path = folder / "STORM_offline.json"
    write_json(path, results)
    return [path]


BENCHMARK = Benchmark(
    name="ovobench",
    title="OVO-Bench",
    source="get it from github.com/JoeLeelyf/OVO-Bench and huggingface.co/datasets/JoeLeelyf/OVO-Bench",
    splits={
        "test": Split(
            rows=sum(TASKS.values()),
            groups={
                "mode": {mode: sum(tasks.values()) for mode, tasks in MODES.items()},
                "task": TASKS,
            },
        )
    },
    load=load,
    prompts={"official": official},
    parsers={"official": contained, "strict": _or_word(parsing.strict)},
    headline="mean of modes",
    headline_over=("mode", "task"),
    submit=submit,
    is_streaming=True,
)
