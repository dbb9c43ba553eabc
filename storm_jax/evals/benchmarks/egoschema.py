"""EgoSchema (arXiv 2308.09126): 5,031 questions about egocentric clips of three minutes; 500 answers are
public.

    DIR/questions.json, DIR/subset_answers.json, DIR/good_clips_git/UID.mp4       the authors' layout
    DIR/MC/test-*.parquet or DIR/Subset/test-*.parquet, DIR/videos/UID.mp4        the hub's layout
"""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Sequence
from typing import Any

from storm_jax.evals import parsing
from storm_jax.evals.benchmark import (
    Benchmark,
    BenchmarkError,
    Question,
    ScoredReply,
    Split,
    without_letter,
    without_placeholders,
)
from storm_jax.evals.files import FileFinder, first_match, read_json, read_rows, write_json
from storm_jax.files import write_atomically
from storm_jax.media.media import Media
from storm_jax.text.sample import Sample

LETTERS = "ABCDE"
_DIRECTLY = "answer with the option's letter from the given choices directly."


def load(root: pathlib.Path, split: str) -> list[Question]:
    videos = FileFinder(root, ("good_clips_git", "videos", "."))
    questions = []
    for uid, text, lines, answer in _rows(root, split):
        questions.append(
            Question(
                id=uid,
                video=uid,
                media=Media.file("video", videos.path(f"{uid}.mp4")),
                text=without_placeholders(text),
                options=tuple(map(without_letter, lines)),
                answer=answer,
                groups={},
                lines=lines,
            )
        )
    return questions


def _rows(root: pathlib.Path, split: str) -> list[tuple[str, str, tuple[str, ...], str | None]]:
    """Ids, questions, options with letters, and letters of the answers, None if not public."""
    patterns = {"subset": ("Subset/*.parquet",), "full": ("MC/*.parquet",)}[split]
    if first_match(root, patterns) is None:
        return _authors_rows(root, split, patterns)
    rows = []
    for row in read_rows(root, patterns, "EgoSchema"):
        answer = row.get("answer")
        letter = None if answer in (None, "") or int(answer) < 0 else LETTERS[int(answer)]
        lines = tuple(without_placeholders(line) for line in row["option"])
        rows.append((str(row["video_idx"]), row["question"], lines, letter))
    return rows


def _authors_rows(
    root: pathlib.Path, split: str, patterns: Sequence[str]
) -> list[tuple[str, str, tuple[str, ...], str | None]]:
    records = read_rows(root, ("questions.json", *patterns), "EgoSchema")
    key: dict[str, Any] = {}
    if (root / "subset_answers.json").exists():
        key = read_json(root / "subset_answers.json")
    elif split == "subset":
        raise BenchmarkError(
            f"{root} has no subset_answers.json, which defines the subset; --split=full does not need it"
        )
    rows = []
    for record in records:
        uid = str(record["q_uid"])
        if split == "subset" and uid not in key:
            continue
        options = (without_placeholders(str(record[f"option {i}"])) for i in range(5))
        lines = tuple(
            f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)
        )
        letter = LETTERS[int(key[uid])] if split == "subset" else None
        rows.append((uid, record["question"], lines, letter))
    return rows


def vila(question: Question) -> Sample:
    lines = "".join(f"{line}\n" for line in question.lines)
    return question.sample(f"<video>\nWatching the video and {_DIRECTLY}{question.text}\n{lines}")


def lmms(question: Question) -> Sample:
    lines = "\n".join(question.lines)
    return question.sample(f"<video>\n{question.text}\n{lines}\n{_DIRECTLY.capitalize()}")


def submit(split: str, replies: Sequence[ScoredReply], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes submission.csv for Kaggle and submission.json for the authors' server; both count -1 (no
    answer) as wrong."""
    if split != "full":
        return []
    answers = {reply.question.id: LETTERS.find(reply.parsed or "?") for reply in replies}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([("q_uid", "answer"), *answers.items()])
    paths = [folder / "submission.csv", folder / "submission.json"]
    write_atomically(paths[0], table.getvalue())
    write_json(paths[1], answers)
    return paths


BENCHMARK = Benchmark(
    name="egoschema",
    title="EgoSchema",
    source="get it from github.com/egoschema/EgoSchema or huggingface.co/datasets/lmms-lab/egoschema",
    splits={"subset": Split(rows=500), "full": Split(rows=5031)},
    load=load,
    prompts={"vila": vila, "lmms": lmms},
    parsers={"strict": parsing.strict, "lmms": parsing.mmmu},
    submit=submit,
)
