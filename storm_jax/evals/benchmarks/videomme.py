"""Video-MME (arXiv 2405.21075): 2,700 questions about 900 videos of 11 seconds to an hour.

DIR/videomme/test-00000-of-00001.parquet      the annotations; or in DIR
DIR/data/VIDEO.mp4                            or video/, videos/; .MP4, .mkv and others too
DIR/subtitle/VIDEO.srt                        or subtitles/; 744 videos have some
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from storm_jax.evals import parsing, subtitles
from storm_jax.evals.benchmark import (
    Benchmark,
    Question,
    ScoredReply,
    Split,
    without_letter,
    without_placeholders,
)
from storm_jax.evals.files import FileFinder, read_rows, write_json
from storm_jax.media.media import Media
from storm_jax.text.sample import Caption, Sample

ANNOTATIONS = ("videomme/*.parquet", "test-*.parquet", "data/test-*.parquet")
TASKS = {
    "Temporal Perception": 55, "Spatial Perception": 54, "Attribute Perception": 222,
    "Action Recognition": 313, "Object Recognition": 354, "OCR Problems": 139,
    "Counting Problem": 268, "Temporal Reasoning": 177, "Spatial Reasoning": 56,
    "Action Reasoning": 285, "Object Reasoning": 454, "Information Synopsis": 323,
}  # fmt: skip
DOMAINS = {
    "Knowledge": 810, "Film & Television": 360, "Sports Competition": 450,
    "Artistic Performance": 360, "Life Record": 630, "Multilingual": 90,
}  # fmt: skip

_SELECT = "Select the best answer to the following multiple-choice question based on the video"
_LETTER = "Respond with only the letter (A, B, C, or D) of the correct option."
_BASED_ON_VIDEO = f"{_SELECT}. {_LETTER}\n"
_BASED_ON_BOTH = f"{_SELECT} and the subtitles. {_LETTER}\n"


def load(root: pathlib.Path, split: str) -> list[Question]:
    videos = FileFinder(root, ("data", "video", "videos", "."))
    srt = FileFinder(root, ("subtitle", "subtitles"), (".srt",))
    questions = []
    for row in read_rows(root, ANNOTATIONS, "Video-MME"):
        lines = tuple(without_placeholders(line) for line in row["options"])
        name = row["videoID"]
        questions.append(
            Question(
                id=str(row["question_id"]),
                video=str(row["video_id"]),
                media=Media.file("video", videos.path(f"{name}.mp4")),
                text=without_placeholders(row["question"]),
                options=tuple(map(without_letter, lines)),
                answer=row["answer"],
                groups={
                    key: str(row[key])
                    for key in ("duration", "domain", "sub_category", "task_type")
                },
                lines=lines,
                subtitles=srt.find(f"{name}.srt"),
            )
        )
    return questions


def captions(question: Question, times: np.ndarray) -> list[Caption]:
    path = question.subtitles
    lines = subtitles.shown_at(subtitles.read_srt(path), times) if path else []
    return [Caption(line.start, without_placeholders(line.text)) for line in lines]


def vila(question: Question) -> Sample:
    """The authors' prompt; without subtitles if the video has none."""
    asked = f"{question.text}\n{_options(question)}\nThe best answer is:"
    if not question.captions:
        return question.sample(f"<video>\n{_BASED_ON_VIDEO}{asked}")
    head = f"This video's subtitles are listed below:\n{_subtitle_text(question)}\n"
    return question.sample(f"<video>\n{head}{_BASED_ON_BOTH}{asked}")


def lmms(question: Question) -> Sample:
    """Mentions subtitles even if there are none."""
    asked = f"{_BASED_ON_BOTH}{question.text}\n{_options(question)}\n"
    if question.captions is None:
        end = "\nAnswer with the option's letter from the given choices directly."
        return question.sample(f"<video>\n{asked}{end}")
    shown = _subtitle_text(question) or "No subtitles available"
    head = f"This video's subtitles are listed below: \n{shown}\n"
    return question.sample(f"<video>\n{head}{asked}The best answer is:")


def vlmevalkit(question: Question) -> Sample:
    listed = f"This video's subtitles are listed below:\n{_subtitle_text(question)}\n"
    shown = "" if question.captions is None else listed
    head = f"\nThese are the frames of a video. {shown}{_BASED_ON_VIDEO}"
    asked = f"Question: {question.text}\n{_options(question)}\nAnswer: "
    return question.sample(f"<video>{head}{asked}")


def _subtitle_text(question: Question) -> str:
    return "\n".join(caption.text for caption in question.captions or ())


def _options(question: Question) -> str:
    return "\n".join(question.lines)


def submit(split: str, replies: Sequence[ScoredReply], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the input of the authors' eval_your_results.py: videos with their questions and responses."""
    videos: dict[str, dict[str, Any]] = {}
    for reply in replies:
        question = reply.question
        about = {
            "video_id": question.video,
            "duration": question.groups["duration"],
            "domain": question.groups["domain"],
            "sub_category": question.groups["sub_category"],
        }
        video = videos.setdefault(question.video, {**about, "questions": []})
        video["questions"].append(
            {
                "question_id": question.id,
                "task_type": question.groups["task_type"],
                "question": question.text,
                "options": list(question.lines),
                "answer": question.answer,
                "response": reply.prediction.text,
            }
        )
    path = folder / "videomme_results.json"
    write_json(path, list(videos.values()))
    return [path]


BENCHMARK = Benchmark(
    name="videomme",
    title="Video-MME",
    source="get it from huggingface.co/datasets/lmms-lab/Video-MME",
    splits={
        "test": Split(
            rows=2700,
            groups={
                "duration": {"short": 900, "medium": 900, "long": 900},
                "domain": DOMAINS,
                "task_type": TASKS,
            },
        )
    },
    load=load,
    prompts={"vila": vila, "lmms": lmms, "vlmevalkit": vlmevalkit, "official": vila},
    parsers={
        "strict": parsing.strict,
        "lmms": parsing.extract_mcq("ABCD"),
        "vlmevalkit": parsing.first_letter_vlm("ABCD"),
        "official": parsing.first_letter_videomme,
    },
    captions=captions,
    submit=submit,
)
