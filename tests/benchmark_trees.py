"""Small benchmark folders in the documented layouts, and models whose replies are known.

Right answers follow the row number, so that expected scores can be counted by hand.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from media_files import barcode, write_numbered
from PIL import Image

from storm_jax.evals.benchmark import Question
from storm_jax.inference.encoding import EncodedBatch, EncodedScene
from storm_jax.inference.prediction import Prediction
from storm_jax.media.frames import Clip
from storm_jax.media.media import Media
from storm_jax.text.sample import Sample

OPTIONS = ("red car", "blue boat", "green tree", "white house", "black dog", "grey cat")


def write_json(path: pathlib.Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_rows(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


class Videos:
    """Copies one small video to where it is needed."""

    def __init__(self, folder: pathlib.Path):
        self._video = write_numbered(folder / "one.mp4", 8, rate=4)

    def put(self, path: pathlib.Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self._video, path)


def lettered(options: Sequence[str]) -> list[str]:
    return [f"{letter}. {option}" for letter, option in zip("ABCDEF", options, strict=False)]


def videomme_rows() -> list[dict[str, Any]]:
    """24 questions about 8 videos: 9 short, 9 medium and 6 long; the answers are A, B, C, D in turn."""
    rows = []
    for i in range(24):
        video = i // 3
        rows.append(
            {
                "video_id": f"{video + 1:03}",
                "duration": ("short", "medium", "long")[min(2, video // 3)],
                "domain": ("Knowledge", "Multilingual")[video % 2],
                "sub_category": ("Law", "Multilingual")[video % 2],
                "url": f"https://www.youtube.com/watch?v=v-{video}_x",
                "videoID": f"v-{video}_x",
                "question_id": f"{video + 1:03}-{i % 3 + 1}",
                "task_type": ("OCR Problems", "Counting Problem")[i % 2],
                "question": f"What is {i}?",
                "options": lettered(OPTIONS[:4]),
                "answer": "ABCD"[i % 4],
            }
        )
    return rows


def videomme_hub(root: pathlib.Path, videos: Videos) -> None:
    rows = videomme_rows()
    write_rows(root / "videomme/test-00000-of-00001.parquet", rows)
    for i, name in enumerate(sorted({row["videoID"] for row in rows})):
        videos.put(root / "data" / f"{name}{('.mp4', '.MP4', '.mkv')[i % 3]}")
    (root / "subtitle").mkdir()
    (root / "subtitle/v-0_x.srt").write_text(
        '1\n00:00:00,000 --> 00:00:00,900\n<font color="white" size=".72c">Good morning.</font>\n\n'
        '2\n00:00:01,000 --> 00:00:01,200\n<font color="white" size=".72c">Unseen</font>\n\n'
        '3\n00:00:01,500 --> 00:01:00,000\n<font color="white" size=".72c">Good night.</font>\n'
    )


def videomme_flat(root: pathlib.Path, videos: Videos) -> None:
    """As others unpack it: the annotations next to videos/ and subtitles/."""
    rows = videomme_rows()
    write_rows(root / "test-00000-of-00001.parquet", rows)
    for row in rows:
        videos.put(root / "videos" / f"{row['videoID']}.mp4")
    (root / "subtitles").mkdir()


def egoschema_authors(root: pathlib.Path, videos: Videos) -> None:
    """24 questions, 20 of them in the subset; the answers are A to E in turn."""
    records = [
        {
            "q_uid": f"uid-{i}",
            "google_drive_id": "x",
            "question": f"What does C do, {i}?",
            **{f"option {k}": OPTIONS[k] for k in range(5)},
        }
        for i in range(24)
    ]
    write_json(root / "questions.json", records)
    write_json(root / "subset_answers.json", {f"uid-{i}": i % 5 for i in range(20)})
    for record in records:
        videos.put(root / "good_clips_git" / f"{record['q_uid']}.mp4")


def egoschema_hub(root: pathlib.Path, videos: Videos) -> None:
    rows = [
        {
            "question_idx": str(i),
            "question": f"What does C do, {i}?",
            "video_idx": f"uid-{i}",
            "option": lettered(OPTIONS[:5]),
            "answer": str(i % 5) if i < 20 else None,
        }
        for i in range(24)
    ]
    write_rows(root / "Subset/test-00000-of-00001.parquet", rows[:20])
    unkeyed = [{**row, "answer": None} for row in rows]
    write_rows(root / "MC/test-00000-of-00001.parquet", unkeyed)
    for row in rows:
        videos.put(root / "videos" / f"{row['video_idx']}.MP4")


MVBENCH = {
    "action_sequence": ("star/Charades_v1_480", "star/Charades_segment", 4, "c{}.mp4", ".mp4"),
    "action_antonym": ("ssv2_video", "ssv2_video_mp4", 3, "w{}.webm", ".mp4"),
    "fine_grained_pose": ("nturgbd", "nturgbd_convert", 4, "n{}_rgb.avi", ".mp4"),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment", 5, "t{}", ".mp4"),
}


def _mvbench(root: pathlib.Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    for task, (_, _, count, pattern, _) in MVBENCH.items():
        rows = [
            {
                "video": pattern.format(i),
                "question": f"What happens in {task} {i}?",
                "candidates": list(OPTIONS[:count]),
                "answer": OPTIONS[i % count],
                **(
                    {"start": 0.5, "end": 1.5}
                    if task in ("action_sequence", "episodic_reasoning")
                    else {}
                ),
            }
            for i in range(6)
        ]
        write_json(root / "json" / f"{task}.json", rows)
        for i, row in enumerate(rows):
            yield task, i, row


def mvbench_main(root: pathlib.Path, videos: Videos) -> None:
    """4 tasks of 6 questions with 4, 3, 4 and 5 options; the answers are A, B, ... in turn."""
    for task, i, row in _mvbench(root):
        path = root / "video" / MVBENCH[task][0] / row["video"]
        if task == "episodic_reasoning":
            path.mkdir(parents=True)
            for k in range(6):
                Image.fromarray(barcode(k)).save(path / f"{k + 1:05}.jpg")
        elif task == "action_sequence" and i == 5:
            videos.put(root / "video/data0613" / MVBENCH[task][0] / row["video"])
        else:
            videos.put(path)


def mvbench_video(root: pathlib.Path, videos: Videos) -> None:
    for task, _, row in _mvbench(root):
        stem = row["video"].partition(".")[0]
        videos.put(root / MVBENCH[task][1] / f"{stem}{MVBENCH[task][4]}")


MLVU_DEV = {
    "plotQA": 6, "needle": 4, "ego": 2, "count": 2, "order": 2, "anomaly_reco": 2,
    "topic_reasoning": 4,
}  # fmt: skip


def _mlvu_rows(task: str, count: int, options: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "video": f"{task}_{i // 2}.mp4",
            "duration": 200.0,
            "question": f"What about {task} {i}?",
            "candidates": list(options),
            "answer": options[i % len(options)],
            "question_type": task,
        }
        for i in range(count)
    ]


def mlvu_dev_authors(root: pathlib.Path, videos: Videos) -> None:
    """22 questions in tasks of unequal size; the answers are A, B, C, D in turn, but the third of needle
    has none, and the fourth of plotQA's four candidates is a second copy of the first."""
    for number, (task, count) in enumerate(MLVU_DEV.items(), start=1):
        rows = _mlvu_rows(task, count, OPTIONS[:4])
        if task == "needle":
            rows[2]["answer"] = "something else"
        if task == "plotQA":
            for row in rows:
                row["candidates"][3] = row["candidates"][0]
            rows[3]["answer"] = OPTIONS[0]
        write_json(root / "MLVU/json" / f"{number}_{task}.json", rows)
        for row in rows:
            videos.put(root / "MLVU/video" / f"{number}_{task}" / row["video"])


def mlvu_dev_hub(root: pathlib.Path, videos: Videos) -> None:
    rows = []
    for task, count in MLVU_DEV.items():
        for i, row in enumerate(_mlvu_rows(task, count, OPTIONS[:4])):
            listed = "\n".join(f"({x}) {o}" for x, o in zip("ABCD", OPTIONS, strict=False))
            rows.append(
                {
                    "video_name": row["video"],
                    "duration": "200",
                    "question": f"{row['question']}\n{listed}",
                    "candidates": row["candidates"],
                    "answer": "ABCD"[i % 4],
                    "task_type": task,
                }
            )
            videos.put(root / row["video"])
    write_rows(root / "data/test-00000-of-00001.parquet", rows)


MLVU_TEST = {
    "plotQA": 6, "needleQA": 2, "ego": 2, "count": 2, "order": 2, "anomaly_reco": 2,
    "topic_reasoning": 2, "tutorialQA": 2, "sportsQA": 2,
}  # fmt: skip


def mlvu_test(root: pathlib.Path, videos: Videos) -> None:
    """22 questions of six options; the answers are A to F in turn, given as texts."""
    rows = []
    for task, count in MLVU_TEST.items():
        for i, row in enumerate(_mlvu_rows(task, count, OPTIONS)):
            rows.append({**row, "question_id": f"{task}_{i}"})
            videos.put(root / "MLVU_Test/video" / row["video"])
    write_json(root / "MLVU_Test/test-ground-truth/test_mcq_gt.json", rows)
    unkeyed = [{k: v for k, v in row.items() if k != "answer"} for row in rows]
    write_json(root / "MLVU_Test/leaderboard/test_question.json", unkeyed)


def mlvu_generation(root: pathlib.Path, videos: Videos) -> None:
    """12 sub-scene and 8 summary questions."""
    for name, task, count in (("8_sub_scene", "sub_scene", 12), ("9_summary", "summary", 8)):
        rows = [
            {
                "video": f"{i}.mp4",
                "duration": 200.0,
                "question": f"Describe {i}.",
                "answer": f"It shows {i}.",
                "question_type": task,
                **({"scoring_points": f"point {i}"} if task == "sub_scene" else {}),
            }
            for i in range(count)
        ]
        write_json(root / "MLVU/json" / f"{name}.json", rows)
        for row in rows:
            videos.put(root / "MLVU/video" / name / row["video"])


def longvideobench_rows(split: str) -> list[dict[str, Any]]:
    """24 questions about 12 videos, 6 in each duration group, with 5, 4 and 3 options in turn; the keys
    are A, B, C in turn."""
    return [
        {
            "video_id": f"lv-{i // 2}",
            "question": f"When the text {i} appears, what is there?",
            "question_wo_referring_query": "What is there?",
            "candidates": list(OPTIONS[: (5, 4, 3)[i % 3]]),
            "correct_choice": i % 3 if split == "val" else -1,
            "position": [1],
            "topic_category": "NP-News-Programs",
            "question_category": ("S2E", "TAA")[i % 2],
            "level": ("L1-Perception", "L2-Relation")[i % 2],
            "id": f"lv-{i // 2}_{i % 2}",
            "video_path": f"lv-{i // 2}.mp4",
            "subtitle_path": f"lv-{i // 2}_en.json",
            "duration_group": (15, 60, 600, 3600)[i // 6],
            "starting_timestamp_for_subtitles": 0,
            "duration": 2.0,
            "view_count": 1,
        }
        for i in range(24)
    ]


def longvideobench_authors(root: pathlib.Path, videos: Videos) -> None:
    write_json(root / "lvb_val.json", longvideobench_rows("val"))
    write_json(root / "lvb_test_wo_gt.json", longvideobench_rows("test"))
    for row in longvideobench_rows("val"):
        videos.put(root / "videos" / row["video_path"])


def longvideobench_hub(root: pathlib.Path, videos: Videos) -> None:
    for split, name in (("val", "validation"), ("test", "test")):
        rows = []
        for row in longvideobench_rows(split):
            options = row.pop("candidates")
            padded = [*options, *["N/A"] * 5][:5]
            rows.append({**row, **{f"option{k}": padded[k] for k in range(5)}})
            videos.put(root / "videos" / f"{row['video_id']}.webm")
        write_rows(root / f"{name}-00000-of-00001.parquet", rows)


STREAM_SECONDS = 12  # of the videos of the streaming benchmarks, which have 2 frames per second


def _put_long(path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_numbered(path, 2 * STREAM_SECONDS, rate=2)


def streamingbench_entries(split: str) -> list[Any]:
    """Three questions about each of two videos, at 2, 5 and 7 seconds; the answers are A, B, C, D in turn. In the
    split `proactive`, they wait for 4, 8 and 9 seconds."""
    entries = []
    for video in range(2):
        parts = []
        for place, time in enumerate((2, 5, 7)):
            number = 3 * video + place
            row: dict[str, Any] = {
                "task_type": {"real": "Counting", "omni": "Scene Understanding"}.get(
                    split, "Sequential Question Answering"
                ),
                "question": f"What is {number}?",
                "time_stamp": f"00:00:{time:02}",
                "answer": "ABCD"[number % 4],
                "options": lettered(OPTIONS[:4]) if number % 2 else list(OPTIONS[:4]),
            }
            if split == "proactive":
                row = {
                    "task_type": "Proactive Output",
                    "question": f'When {number} appears, output "{number}".',
                    "time_stamp": f"0:00:{time:02}",
                    "ground_truth_time_stamp": f"0:00:{(4, 8, 9)[place]:02}",
                    "ground_truth_output": str(number),
                }
            path = f"./videos/sample_{video}_{split}.mp4"
            parts.append({"questions": [row], "video_path": path, "time": "[0:00:00 - 0:00:10]"})
        entries += [parts] if split == "sqa" else parts
    return entries


def streamingbench_authors(root: pathlib.Path, videos: Videos) -> None:
    """As the authors' scripts leave it, in their repository."""
    for split in ("real", "omni", "sqa", "proactive"):
        write_json(root / f"src/data/questions_{split}.json", streamingbench_entries(split))
        for video in range(2):
            _put_long(root / f"src/data/videos/sample_{video}_{split}.mp4")


def streamingbench_unpacked(root: pathlib.Path, videos: Videos) -> None:
    for split in ("real", "sqa", "proactive"):
        write_json(root / f"questions_{split}.json", streamingbench_entries(split))
        for video in range(2):
            _put_long(root / f"data/{split}/sample_{video}/video.mp4")


def ovobench_rows() -> list[dict[str, Any]]:
    """Questions about two videos: 4 of EPM, 2 of OCR, and 3, 2 and 2 of REC, SSR and CRR."""
    rows: list[dict[str, Any]] = [
        {
            "id": number,
            "task": "EPM" if number < 4 else "OCR",
            "video": f"COIN/v{number % 2}.mp4",
            "realtime": (1.5, 3, 5, 8.2, 6, 40)[number],  # the last one is after the end
            "question": f"What is {number}?",
            "answer": OPTIONS[number % 3],
            "options": list(OPTIONS[:3]),
            "gt": number % 3,
        }
        for number in range(6)
    ]
    video = {"video": "COIN/v0.mp4"}
    counts = [{"realtime": time, "count": count} for time, count in ((2, 0), (4, 1), (9.0, 12))]
    rows.append({"id": 6, "task": "REC", **video, "activity": "jump", "test_info": counts})
    steps = [{"realtime": time, "step": "mix", "type": kind} for time, kind in ((3, 0), (7, 1))]
    rows.append({"id": 7, "task": "SSR", **video, "test_info": steps})
    clues = [{"realtime": time, "type": kind} for time, kind in ((3, 0), (7, 1))]
    rows.append({"id": 8, "task": "CRR", **video, "question": "Where is it?", "test_info": clues})
    return rows


def ovobench_whole(root: pathlib.Path, videos: Videos) -> None:
    write_json(root / "data/ovo_bench_new.json", ovobench_rows())
    for video in range(2):
        _put_long(root / f"data/src_videos/COIN/v{video}.mp4")


def ovobench_chunks(root: pathlib.Path, videos: Videos) -> None:
    write_json(root / "ovo_bench_new.json", ovobench_rows())
    for row in ovobench_rows():
        names = [f"{row['id']}_{n}" for n in range(len(row.get("test_info", ())))] or [row["id"]]
        for name in names:
            videos.put(root / f"chunked_videos/{name}.mp4")


class FakeModel:
    """Replies by question; counts what it is asked, and fails if `reply` returns None.

    Args:
      previews: the frames that it pretends to have read, uint8 [8, H, W, 3].
    """

    def __init__(
        self,
        questions: Sequence[Question],
        reply: Callable[[int, Question], str | None],
        previews: np.ndarray | None = None,
    ):
        self._questions = {q.id: (i, q) for i, q in enumerate(questions)}
        self._reply, self._previews = reply, previews
        self.asked: list[str] = []
        self.prompts: dict[str, Sample] = {}

    def encode(self, media: Sequence[Sequence[Media]], **_: Any) -> Iterator[EncodedBatch]:
        """Two scenes at a time."""
        times = np.linspace(0, 1.75, 8)
        previews = () if self._previews is None else (Clip(self._previews, times),)
        scenes = [EncodedScene(media=tuple(m), times=(times,), previews=previews) for m in media]
        for number in range(0, len(scenes), 2):
            yield EncodedBatch(
                number=number // 2,
                scenes=tuple(scenes[number : number + 2]),
                rows=2,
                table=jnp.zeros((1, 1, 1)),
                encoder=None,
                seconds=0.0,
            )

    def ask(
        self, batch: EncodedBatch, samples: Sequence[Sample], **_: Any
    ) -> Iterator[tuple[int, Prediction]]:
        for index, sample in enumerate(samples):
            self.asked.append(sample.id)
            number, question = self._questions[sample.id]
            self.prompts[sample.id] = sample
            assert sample.media in {scene.media for scene in batch.scenes}
            reply = self._reply(number, question)
            if reply is None:
                broken = f"video {sample.media[0].name} is corrupt: made to fail"
                yield index, Prediction(error=broken, cause="corrupt")
            else:
                yield index, Prediction(text=reply, visual_tokens=64, seconds=0.5)


def link_run(source: pathlib.Path, run: pathlib.Path) -> pathlib.Path:
    """Links the files of a run into a new folder, so that the original is not written to."""
    run.mkdir()
    for name in ("config.json", "tokenizer", "checkpoints"):
        (run / name).symlink_to(source / name)
    return run


def oracle(_: int, question: Question) -> str:
    return question.answer or "no key"


def always_a(_: int, question: Question) -> str:
    return "A"


def rambler(_: int, question: Question) -> str:
    """Right, in a sentence that starts with another letter."""
    return f"A man and a dog. The answer is ({question.answer or 'C'})."


def failing(number: int, question: Question) -> str | None:
    """Right, except that every third row fails."""
    return None if number % 3 == 0 else oracle(number, question)
