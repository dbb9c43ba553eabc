"""LongVideoBench (arXiv 2407.15754): questions about moments of videos of 8 seconds to an hour.

    DIR/lvb_val.json, DIR/lvb_test_wo_gt.json       the authors' annotations, or the hub's parquet files
    DIR/videos/VIDEO.mp4
    DIR/subtitles/VIDEO_en.json

If subtitles are requested, they are inserted among the frames.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from storm_jax.evals import parsing, subtitles
from storm_jax.evals.benchmark import Benchmark, Question, ScoredReply, Split, without_placeholders
from storm_jax.evals.files import FileFinder, read_rows, write_json
from storm_jax.media.media import Media
from storm_jax.text.sample import Caption, Sample

ANNOTATIONS = {
    "val": ("lvb_val.json", "validation-*.parquet", "data/validation-*.parquet"),
    "test": ("lvb_test_wo_gt.json", "test-*.parquet", "data/test-*.parquet"),
}
_DIRECTLY = "Answer with the option's letter from the given choices directly."


def load(root: pathlib.Path, split: str) -> list[Question]:
    videos = FileFinder(root, ("videos", "video", "."))
    subs = FileFinder(root, ("subtitles",), (".json",))
    questions = []
    for row in read_rows(root, ANNOTATIONS[split], "LongVideoBench"):
        options = list(row.get("candidates") or [row.get(f"option{i}") for i in range(5)])
        while options and options[-1] in (None, "N/A"):  # padding
            options.pop()
        choice = row.get("correct_choice")
        questions.append(
            Question(
                id=str(row["id"]),
                video=str(row["video_id"]),
                media=Media.file(
                    "video", videos.path(row.get("video_path") or f"{row['video_id']}.mp4")
                ),
                text=without_placeholders(row["question"]),
                options=tuple(without_placeholders(str(option)) for option in options),
                answer=None if choice in (None, -1) else "ABCDE"[int(choice)],
                groups={
                    "duration_group": str(row["duration_group"]),
                    "question_category": str(row["question_category"]),
                    "level": str(row.get("level", "?")),
                },
                subtitles=subs.find(row.get("subtitle_path") or f"{row['video_id']}_en.json"),
                extra={
                    "subtitles_from": float(row.get("starting_timestamp_for_subtitles") or 0),
                    "duration": float(row.get("duration") or 0),
                },
            )
        )
    return questions


def captions(question: Question, times: np.ndarray) -> list[Caption]:
    """Lines with a frame in their interval, widened to at least a second; each is placed at its middle."""
    path, extra = question.subtitles, question.extra
    shown = []
    for line in subtitles.read_json(path, extra["duration"]) if path else []:
        start, end = line.start - extra["subtitles_from"], line.end - extra["subtitles_from"]
        middle = (start + end) / 2
        half = max(0.5, (end - start) / 2)
        if (np.abs(times - middle) < half).any():
            shown.append(Caption(middle, without_placeholders(line.text)))
    return sorted(shown, key=lambda caption: caption.time)


def lmms(question: Question) -> Sample:
    return _sample(question, f"<video>\n{_ask(question)}\n{_DIRECTLY}\n")


def vlmevalkit(question: Question) -> Sample:
    return _sample(question, f"<video>{_ask(question)}\n{_DIRECTLY}")


def official(question: Question) -> Sample:
    return _sample(question, f"<video>\nQuestion: {_ask(question)}\n{_DIRECTLY}")


def _ask(question: Question) -> str:
    options = question.list_options("{letter}. {option}")
    return f"{question.text}\n{options}"


def _sample(question: Question, user: str) -> Sample:
    return question.sample(user, captions=question.captions or ())


def submit(split: str, replies: Sequence[ScoredReply], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the replies of the test split for the authors' server."""
    if split != "test":
        return []
    path = folder / "longvideobench_test_for_submission.json"
    texts = {reply.question.id: reply.prediction.text for reply in replies}
    write_json(path, texts)
    return [path]


BENCHMARK = Benchmark(
    name="longvideobench",
    title="LongVideoBench",
    source="get it from huggingface.co/datasets/longvideobench/LongVideoBench",
    splits={
        "val": Split(
            rows=1337,
            groups={"duration_group": {"15": 189, "60": 172, "600": 412, "3600": 564}},
            max_new_tokens=32,
        ),
        "test": Split(
            rows=5341,
            groups={"duration_group": {"15": 700, "60": 753, "600": 1555, "3600": 2333}},
            max_new_tokens=32,
        ),
    },
    load=load,
    prompts={"vila": lmms, "lmms": lmms, "vlmevalkit": vlmevalkit, "official": official},
    parsers={
        "strict": parsing.strict,
        "lmms": parsing.first_letter,
        "vlmevalkit": parsing.first_letter_vlm("ABCDE"),
        "official": parsing.first_letter,
    },
    captions=captions,
    submit=submit,
)
