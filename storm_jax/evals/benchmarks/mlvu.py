"""MLVU (arXiv 2406.04264): questions about videos of three minutes to nine hours.

    DIR/MLVU/json/1_plotQA.json ..., DIR/MLVU/video/1_plotQA/   dev and generation, the authors' layout
    DIR/data/test-*.parquet, DIR/*.mp4                          dev or test, lmms-eval's layout
    DIR/test-ground-truth/test_mcq_gt.json, DIR/video/          test, the authors' layout; or in DIR/MLVU_Test

The two generation tasks are scored by a judge model, which is not called: its input is written, and its
output is read (`eval.py score --judgements`).
"""

from __future__ import annotations

import pathlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from storm_jax.evals import parsing
from storm_jax.evals.benchmark import (
    Benchmark,
    BenchmarkError,
    Question,
    ScoredReply,
    Split,
    letter_of,
    without_placeholders,
)
from storm_jax.evals.benchmarks.mvbench import question_and_options
from storm_jax.evals.files import FileFinder, read_file, read_rows, write_json
from storm_jax.evals.judging import write_judge_input
from storm_jax.media.media import Media
from storm_jax.text.sample import Sample

DEV = {
    "plotQA": 539, "needle": 355, "ego": 352, "count": 206, "order": 259, "anomaly_reco": 200,
    "topic_reasoning": 264,
}  # fmt: skip
GENERATION = {"sub_scene": 201, "summary": 217}
TEST = {
    "plotQA": 50, "needleQA": 60, "ego": 53, "count": 60, "order": 70, "anomaly_reco": 39,
    "topic_reasoning": 91, "tutorialQA": 43, "sportsQA": 36,
}  # fmt: skip
# Files with the answers come first.
TEST_FILES = (
    "test-ground-truth/test_mcq_gt.json", "test_mcq_gt.json", "leaderboard/test_question.json",
    "test_question.json", "data/*.parquet", "*.parquet",
)  # fmt: skip
_FILES = {task: f"{number}_{task}" for number, task in enumerate((*DEV, *GENERATION), start=1)}
_VIDEOS = ("video", "videos", "data", ".")

_WATCH = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, "
)
_SELECT = f"{_WATCH}select the best option that accurately addresses the question."
_ANSWER = f"{_WATCH}answer the given questions."
_BEST = "\nOnly give the best option."


def load(root: pathlib.Path, split: str) -> list[Question]:
    if split == "test":
        return _load_flat(root / "MLVU_Test" if (root / "MLVU_Test").is_dir() else root, TEST_FILES)
    tasks = GENERATION if split == "generation" else DEV
    base = next((p for p in (root / "MLVU", root) if (p / "json").is_dir()), None)
    if base is not None:
        return [question for task in tasks for question in _load_task(base, task)]
    if split == "generation":
        raise BenchmarkError(
            f"--data_root={root} has no MLVU/json/: only the authors' layout has the generation tasks"
        )
    return _load_flat(root, ("data/*.parquet", "*.parquet"))


def _load_task(base: pathlib.Path, task: str) -> list[Question]:
    name = _FILES[task]
    path = base / "json" / f"{name}.json"
    if not path.exists():
        return []
    videos = FileFinder(base, (f"video/{name}", "video"))
    return [
        _question(f"{task}/{i}", row, row["video"], task, str(row["answer"]), videos)
        for i, row in enumerate(read_file(path))
    ]


def _load_flat(root: pathlib.Path, patterns: Sequence[str]) -> list[Question]:
    """Loads one file of all tasks. Without ids, a row is numbered within its task."""
    videos = FileFinder(root, _VIDEOS)
    numbers: Counter[str] = Counter()
    questions = []
    for row in read_rows(root, patterns, "MLVU"):
        task = str(row.get("task_type") or row["question_type"])
        identity = str(row.get("question_id") or f"{task}/{numbers[task]}")
        numbers[task] += 1
        name = row.get("video_name") or row["video"]
        questions.append(_question(identity, row, name, task, row.get("answer"), videos))
    return questions


def _question(
    identity: str, row: dict[str, Any], name: str, task: str, answer: Any, videos: FileFinder
) -> Question:
    raw = str(row["question"])
    candidates = tuple(without_placeholders(str(text)) for text in row.get("candidates") or ())
    text = re.split(r"\n\(A\) ", raw)[0] if candidates else raw
    key = _letter(answer, tuple(map(str, row.get("candidates") or ()))) if candidates else answer
    return Question(
        id=identity,
        video=name,
        media=Media.file("video", videos.path(name)),
        text=without_placeholders(text).rstrip(),
        options=candidates,
        answer=key,
        groups={"task": task},
        extra={"scoring_points": row["scoring_points"]} if "scoring_points" in row else {},
    )


def _letter(answer: Any, options: Sequence[str]) -> str | None:
    """The letter of an answer, which is a letter or the text of an option; None if it is not public."""
    if answer in (None, ""):
        return None
    text = str(answer)
    if text in options:
        return letter_of(text, options)
    return text if len(text) == 1 and text.isupper() else ""


def _or_open(prompt: Callable[[Question], Sample]) -> Callable[[Question], Sample]:
    """Extends a multiple-choice prompt to the generation tasks."""

    def ask(question: Question) -> Sample:
        if question.options:
            return prompt(question)
        return question.sample(f"<video>\n{question.text}", system=_ANSWER)

    return ask


def lmms(question: Question) -> Sample:
    """The dev split asks for the best option and starts the answer in the user's turn; the test split (six
    options) adds nothing."""
    text = f"<video>\n{question.text}\n{question.list_options('({letter}) {option}')}"
    return question.sample(text if len(question.options) > 4 else f"{text}{_BEST}\nBest option: (")


def official(question: Question) -> Sample:
    return question.sample(
        f"<video>\n{question_and_options(question)}{_BEST}",
        system=_SELECT,
        opening="Best Option: (",
    )


def vlmevalkit(question: Question) -> Sample:
    return question.sample(f"{question_and_options(question)}<video>{_BEST}", system=_SELECT)


def submit(split: str, replies: Sequence[ScoredReply], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the chosen options of the test split for the authors' server, and the judge's input of the
    generation tasks."""
    if split == "generation":
        return [write_judge_input(replies, folder)]
    if split != "test":
        return []
    options = [
        {
            "question_id": reply.question.id,
            "question_type": reply.question.groups["task"],
            "option": reply.parsed or "",
        }
        for reply in replies
    ]
    path = folder / "test_res.json"
    write_json(path, options)
    return [path]


BENCHMARK = Benchmark(
    name="mlvu",
    title="MLVU",
    source="get it from huggingface.co/datasets/MLVU/MVLU (dev), MLVU/MLVU_Test or sy1998/MLVU_dev",
    splits={
        "dev": Split(rows=2175, groups={"task": DEV}),
        "test": Split(rows=502, groups={"task": TEST}),
        "generation": Split(rows=418, groups={"task": GENERATION}, max_new_tokens=512, judged=True),
    },
    load=load,
    prompts={
        "vila": _or_open(lmms),
        "lmms": _or_open(lmms),
        "vlmevalkit": _or_open(vlmevalkit),
        "official": _or_open(official),
    },
    parsers={
        "strict": parsing.strict,
        "lmms": parsing.extract_mcq("ABCD"),
        "vlmevalkit": parsing.before_bracket_vlm,
        "official": parsing.before_bracket,
    },
    headline="M-Avg",
    headline_over=("task",),
    submit=submit,
)
