"""StreamingBench (arXiv 2411.03628): questions at moments of 900 videos, asked while they are watched.

    DIR/questions_real.json ...           or in DIR/src/data/, as in the authors' repository
    DIR/videos/sample_1_real.mp4          or in DIR/src/data/videos/, as their scripts/preprocess.sh renames them
    DIR/data/real/sample_1/*.mp4          or as unpacked

Times, options and context are read as the authors' code reads them. A question of the split `proactive` has two
times: from the first one on, the model is asked each second whether it is time to answer.
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
    Watch,
    without_letter,
    without_placeholders,
)
from storm_jax.evals.files import VIDEO_SUFFIXES, FileFinder, first_match, read_json, write_json
from storm_jax.media.media import Media
from storm_jax.text.sample import Sample

REAL = {
    "Object Recognition": 367, "Action Recognition": 353, "Text-Rich Understanding": 321,
    "Clips Summarize": 317, "Attribute Recognition": 306, "Spatial Understanding": 246, "Counting": 193,
    "Event Understanding": 161, "Causal Reasoning": 128, "Prospective Reasoning": 108,
}  # fmt: skip
OMNI = (
    "Misleading Context Understanding", "Source Discrimination", "Emotion Recognition",
    "Anomaly Context Understanding", "Scene Understanding", "Multimodal Alignment",
)  # fmt: skip
SEQUENTIAL = "Sequential Question Answering"
POLLED_FOR = 4  # seconds after the right time
TOLERANCE = 2  # seconds
_NEVER = 10**9  # seconds; JSON has no infinity

_ASSISTANT = (
    "You are an advanced video question-answering AI assistant. You have been provided with"
)
_CHOOSE = "choosing from the four options provided. Respond with only the letter (A, B, C, or D) of the correct option."
_FRAMES = (
    f"{_ASSISTANT} some frames from the video and a multiple-choice question related to the video. Your task is to "
    f"carefully analyze the video and provide the best answer to question, {_CHOOSE}"
)
_CONTEXT = (
    f"{_ASSISTANT} a video and a multiple-choice question related to the video. Your task is to carefully analyze the "
    f"video and the provided context to answer the question, {_CHOOSE}"
)
_WATCHED = (
    "You are an advanced image question-answering AI assistant. You have been provided with images and a question "
    "related to the images. Your task is to carefully analyze the images and provide the answer to the question. You "
    "need to carefully confirm whether the images content meet the conditions of the question, and then output the "
    "correct content."
)
_INTRODUCTION = (
    "Here are the contextual information related to the video. Please answer the questions based on the contextual "
    "information: "
)
_HERE = "Here is the question. Answer it and don't confuse it with the previous conversation."


def load(root: pathlib.Path, split: str) -> list[Question]:
    name = f"questions_{split}.json"
    path = first_match(root, (name, f"src/data/{name}"))
    if path is None:
        raise BenchmarkError(f"--data_root={root} has neither {name} nor src/data/{name}")
    videos = FileFinder(root, ("videos", "src/data/videos"))
    unpacked = _unpacked(root)
    questions = []
    for number, (entry, row, context) in enumerate(_rows(read_json(path), path)):
        video = pathlib.PurePosixPath(entry["video_path"]).stem
        file = videos.find(video) or unpacked.get(video) or videos.path(f"{video}.mp4")
        lines = tuple(map(without_placeholders, _lines(row)))
        time = _seconds(row["time_stamp"], path)
        question = Question(
            id=f"{split}/{number}",
            video=video,
            media=dataclasses.replace(Media.file("video", file), end=time),
            text=without_placeholders(row["question"]),
            options=tuple(map(without_letter, lines)),
            answer=row.get("answer"),
            groups={"task": row["task_type"]},
            lines=lines,
            asked_at=time,
            extra={
                "time_stamp": row["time_stamp"],
                **({"context": without_placeholders(context)} if context else {}),
            },
        )
        is_watched = "ground_truth_time_stamp" in row
        questions.append(_watched(question, row, time, path) if is_watched else question)
    return questions


def _watched(
    question: Question, row: Mapping[str, Any], begin: int, path: pathlib.Path
) -> Question:
    """A question of the split `proactive`."""
    due, output = _seconds(row["ground_truth_time_stamp"], path), str(row["ground_truth_output"])
    if due + POLLED_FOR <= begin:
        raise BenchmarkError(
            f"{path}: ground_truth_time_stamp={row['ground_truth_time_stamp']!r} is before "
            f"time_stamp={row['time_stamp']!r}"
        )
    poll = (
        f'{question.text} Is it the right time to output "{without_placeholders(output)}"? You can only answer yes or '
        f"no."
    )
    return dataclasses.replace(
        question,
        media=dataclasses.replace(question.media, start=begin, end=due + POLLED_FOR),
        answer=output,
        watch=Watch(begin=begin, end=due + POLLED_FOR, poll=poll),
        extra={**question.extra, "due": due},
    )


def _rows(
    entries: Any, path: pathlib.Path
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], str]]:
    """Each question with the entry that contains it, and what was asked before about the same video in the split
    `sqa`, whose entries are nested once more.

    Raises:
      BenchmarkError: the file is not a list.
    """
    if not isinstance(entries, list):
        raise BenchmarkError(f"{path} must be a list of objects")
    for entry in entries:
        context = ""
        for part in entry if isinstance(entry, list) else [entry]:
            for row in part["questions"]:
                yield part, row, context if isinstance(entry, list) else ""
                context += _as_context(row)


def _as_context(row: Mapping[str, Any]) -> str:
    return (
        f"At timestamp {row['time_stamp']}, the following question and answer occurred: Question: {row['question']}; "
        f"Options: {', '.join(_lines(row))}; Answer: {row.get('answer')}; "
    )


def _lines(row: Mapping[str, Any]) -> list[str]:
    """The options with their letters; of the rows with more than four, the first four, as the authors show them."""
    options = row.get("options", [])[:4]
    if options and not options[0].startswith("A."):
        return [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)]
    return options


def _seconds(stamp: str, path: pathlib.Path) -> int:
    """The seconds of a time like 00:01:05, 1:05 or 65.

    Raises:
      BenchmarkError: naming the file and the time, if it is none.
    """
    if not re.fullmatch(r"\d+(:\d+){0,2}", stamp):
        raise BenchmarkError(f"{path}: time_stamp={stamp!r} must be a time like 00:01:05")
    return sum(int(part) * 60**place for place, part in enumerate(reversed(stamp.split(":"))))


def _unpacked(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Videos in the folders of the archives, by the names that the authors' script gives them."""
    found = {}
    for folder in sorted(root.glob("data/**/sample_*/")):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
        if files and "__MACOSX" not in folder.parts:
            found[f"{folder.name}_{folder.parent.name.replace(' ', '_')}"] = files[0]
    return found


def official(question: Question) -> Sample:
    if "due" in question.extra:
        return question.sample(
            f"<video>\n{_WATCHED}\n\nQuestion: {question.text}\n\nThe answer is:\n"
        )
    listed = "\n".join(question.lines)
    asked = f"Question: {question.text}\n\nOptions:\n{listed}\n\nThe best option is:"
    if question.groups["task"] != SEQUENTIAL:
        return question.sample(f"<video>\n{_FRAMES}\n\n{asked}")
    context = question.extra.get("context", "")
    if context:
        context = _INTRODUCTION + context
    return question.sample(f"<video>\n{_CONTEXT}\n\n{context}\n\n{_HERE}\n{asked}")


def _or_in_time(parse: Parser, *, reads_output: bool = True) -> Parser:
    """Extends a multiple-choice parser to the split `proactive`: a reply is right if it comes at most 2 seconds before or
    after the right time and, with `reads_output`, contains the output."""

    def parse_any(reply: str, question: Question) -> str | None:
        if "due" not in question.extra:
            return parse(reply, question)
        if not _is_timed(reply):
            return None
        second, content = _last(reply)
        is_in_time = abs(second - question.extra["due"]) <= TOLERANCE
        is_right = is_in_time and (not reads_output or (question.answer or "") in content)
        return question.answer if is_right else reply

    return parse_any


def first_character(reply: str, question: Question) -> str | None:
    """As the authors' count.py."""
    return reply[:1] or None


def _is_timed(reply: str) -> bool:
    """Whether a reply says when it came, or that none came."""
    return re.match(r"\[(no answer by )?\d+ s\]", reply) is not None


def _last(reply: str) -> tuple[float, str]:
    """When a watched question was answered, in seconds, and how; never, if it was not."""
    found = re.fullmatch(r"\[(\d+) s\] (.*)", reply, re.DOTALL)
    return (int(found[1]), found[2]) if found else (math.inf, "")


def submit(split: str, replies: Sequence[ScoredReply], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the input of the authors' count.py, with the model's name `STORM`. It leaves out questions without a reply,
    but cannot read empty ones."""
    entries = []
    for reply in replies:
        question, text = reply.question, reply.prediction.text
        row = {
            "task_type": question.groups["task"],
            "question": question.text,
            "time_stamp": question.extra["time_stamp"],
        }
        if "due" in question.extra:
            minutes, seconds = divmod(question.extra["due"], 60)
            row["ground_truth_time_stamp"] = f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
            row["ground_truth_output"] = question.answer
            second, content = _last(text)
            last = {"role": "assistant", "content": content, "time": min(second, _NEVER)}
            answer: Any = {"dialog_history": [last]}
        else:
            row |= {"options": list(question.lines), "answer": question.answer}
            answer = text
        if text:
            row["STORM"] = answer
        entries.append({"video_path": f"./videos/{question.video}.mp4", "questions": [row]})
    path = folder / f"{split}_output_STORM.json"
    write_json(path, [entries] if split == "sqa" else entries)
    return [path]


BENCHMARK = Benchmark(
    name="streamingbench",
    title="StreamingBench",
    source="get it from github.com/THUNLP-MT/StreamingBench and huggingface.co/datasets/mjuicem/StreamingBench",
    splits={
        "real": Split(rows=2500, groups={"task": REAL}),
        "omni": Split(rows=1500, groups={"task": dict.fromkeys(OMNI, 250)}),
        "sqa": Split(rows=250, groups={"task": {SEQUENTIAL: 250}}),
        "proactive": Split(rows=250, groups={"task": {"Proactive Output": 250}}, max_new_tokens=32),
    },
    load=load,
    prompts={"official": official},
    parsers={
        "official": _or_in_time(first_character),
        "strict": _or_in_time(parsing.strict),
        "in_time": _or_in_time(parsing.strict, reads_output=False),
    },
    submit=submit,
    is_streaming=True,
)
