"""MVBench (arXiv 2311.17005): 20 tasks of 200 questions about short clips.

    DIR/json/TASK.json                 the annotations of either branch of the hub
    DIR/video/star/Charades_v1_480/    branch "main": whole videos, with start and end; frames of TVQA
    DIR/star/Charades_segment/         branch "video": clips that are already cut, all as files

Folders may be in DIR or DIR/video, and those of data0613.zip in DIR/video/data0613 or DIR/data0613.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

from storm_jax.evals import parsing
from storm_jax.evals.benchmark import (
    Benchmark,
    BenchmarkError,
    Question,
    Split,
    letter_of,
    without_placeholders,
)
from storm_jax.evals.files import FileFinder, read_file
from storm_jax.media.media import Media
from storm_jax.text.sample import Sample

TVQA_FPS = 3.0


@dataclasses.dataclass(frozen=True)
class Task:
    """Folders of a task's videos: whole ones, and clips cut from them.

    Attributes:
      bounded: whether rows have the start and end of the clip in the whole video.
    """

    whole: str
    cut: str
    bounded: bool = False


_CLEVRER = Task("clevrer/video_validation", "clevrer/video_validation")
_PERCEPTION = Task("perception/videos", "perception/videos")
_STAR = Task("star/Charades_v1_480", "star/Charades_segment", bounded=True)
TASKS = {
    "action_sequence": _STAR,
    "action_prediction": _STAR,
    "action_antonym": Task("ssv2_video", "ssv2_video_mp4"),
    "fine_grained_action": Task("Moments_in_Time_Raw/videos", "Moments_in_Time_Raw/videos"),
    "unexpected_action": Task("FunQA_test/test", "FunQA_test/test"),
    "object_existence": _CLEVRER,
    "object_interaction": _STAR,
    "object_shuffle": _PERCEPTION,
    "moving_direction": _CLEVRER,
    "action_localization": Task("sta/sta_video", "sta/sta_video_segment", bounded=True),
    "scene_transition": Task("scene_qa/video", "scene_qa/video"),
    "action_count": _PERCEPTION,
    "moving_count": _CLEVRER,
    "moving_attribute": _CLEVRER,
    "state_change": _PERCEPTION,
    "fine_grained_pose": Task("nturgbd", "nturgbd_convert"),
    "character_order": _PERCEPTION,
    "egocentric_navigation": Task("vlnqa", "vlnqa"),
    "episodic_reasoning": Task("tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment", bounded=True),
    "counterfactual_inference": _CLEVRER,
}
_PLACES = ("video", ".", "video/data0613", "data0613")

_SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and "
    "movement of objects, and the action and pose of persons. Based on your observations, select the "
    "best option that accurately addresses the question.\n"
)
_BEST = "Only give the best option."


def load(root: pathlib.Path, split: str) -> list[Question]:
    folder = next((f for f in (root / "json", root / "MVBench/json") if f.is_dir()), None)
    if folder is None:
        raise BenchmarkError(f"--data_root={root} has no folder json/ with the tasks of MVBench")
    root = folder.parent
    finders = {  # tasks share folders
        name: FileFinder(root, [f"{place}/{name}" for place in _PLACES])
        for task in TASKS.values()
        for name in (task.whole, task.cut)
    }
    questions = []
    for name, task in TASKS.items():
        if not (folder / f"{name}.json").exists():
            continue
        whole, cut = finders[task.whole], finders[task.cut]
        for number, row in enumerate(read_file(folder / f"{name}.json")):
            options = tuple(map(str, row["candidates"]))
            questions.append(
                Question(
                    id=f"{name}/{number}",
                    video=f"{task.whole}/{row['video']}",
                    media=_medium(row, f"{folder / name}.json row {number}", task, whole, cut),
                    text=without_placeholders(row["question"]),
                    options=tuple(map(without_placeholders, options)),
                    answer=letter_of(str(row["answer"]), options),
                    groups={"task": name},
                )
            )
    return questions


def _medium(
    row: dict[str, Any], where: str, task: Task, whole: FileFinder, cut: FileFinder
) -> Media:
    """The clip of a row: a file, or a part of a video or of a folder of frames.

    Raises:
      BenchmarkError: naming the file, row and field, if the bounds are not times in order.
    """
    start, end = (_seconds(row, key, where) for key in ("start", "end"))
    if start is not None and end is not None and end < start:
        raise BenchmarkError(f"{where}: start={row['start']} is after end={row['end']}")
    found = whole.find(row["video"])
    if task.whole != task.cut and found is None:
        path = pathlib.PurePosixPath(row["video"])
        named = f"{path.with_suffix('')}_{row.get('start')}_{row.get('end')}{path.suffix}"
        if clip := cut.find(row["video"]) or cut.find(named):
            return Media.file("video", clip)
    medium = Media.file("video", found or whole.path(row["video"]))
    if task.bounded and start is not None:
        until = "" if end is None else f" to {row['end']}"
        name = f"{medium.name} from {row['start']}{until} s"
        medium = dataclasses.replace(medium, name=name, start=start, end=end)
    return dataclasses.replace(medium, fps=TVQA_FPS) if medium.is_folder() else medium


def _seconds(row: dict[str, Any], key: str, where: str) -> float | None:
    """A time in a row, which may be text; None if it has none."""
    value = row.get(key)
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise BenchmarkError(f"{where}: {key}={value!r} must be seconds")
    return seconds


def lmms(question: Question) -> Sample:
    options = question.list_options("({letter}) {option}")
    return question.sample(f"<video>\nQuestion:{question.text}\nOption:\n{options}\n{_BEST}\n")


def official(question: Question) -> Sample:
    return question.sample(
        f"<video>\n{question_and_options(question)}\n{_BEST}",
        system=_SYSTEM,
        opening="Best option:(",
    )


def vlmevalkit(question: Question) -> Sample:
    return question.sample(f"{question_and_options(question)}<video>\n{_BEST}", system=_SYSTEM)


def question_and_options(question: Question) -> str:
    """As in VideoChat2's evaluation, from which MLVU's authors took it."""
    options = question.list_options("({letter}) {option}")
    return f"Question: {question.text}\nOptions:\n{options}".rstrip()


BENCHMARK = Benchmark(
    name="mvbench",
    title="MVBench",
    source="get it from huggingface.co/datasets/OpenGVLab/MVBench, branch main or video",
    splits={"test": Split(rows=4000, groups={"task": dict.fromkeys(TASKS, 200)})},
    load=load,
    prompts={"vila": lmms, "lmms": lmms, "vlmevalkit": vlmevalkit, "official": official},
    parsers={
        "strict": parsing.strict,
        "lmms": parsing.letter_in_text,
        "vlmevalkit": parsing.check_answer_vlm,
        "official": parsing.check_answer,
    },
    headline="mean of tasks",
    headline_over=("task",),
)
