"""StreamingBench and OVO-Bench: what a model has seen when it is asked, when it answers, and how that is scored."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import benchmark_trees as trees
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_trees import FakeModel, Videos, always_a, link_run, oracle
from media_files import numbers

import storm_jax
from storm_jax import evals
from storm_jax.config import CompressionConfig, StreamSettings
from storm_jax.evals import sessions
from storm_jax.evals.benchmark import BenchmarkError
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.evals.checks import check_questions
from storm_jax.evals.runner import run_benchmark
from storm_jax.evals.settings import EvalSettings
from storm_jax.inference.encoding import EncodedBatch, EncodedScene
from storm_jax.inference.generate import Sampling
from storm_jax.inference.prediction import Prediction
from storm_jax.media.media import Media
from storm_jax.media.read import read_media
from storm_jax.run import RunError

STREAMINGBENCH, OVOBENCH = BENCHMARKS["streamingbench"], BENCHMARKS["ovobench"]
TWO_FPS = StreamSettings(fps=2)


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, pathlib.Path]:
    videos = Videos(tmp_path_factory.mktemp("video"))
    names = (
        "streamingbench_authors", "streamingbench_unpacked", "ovobench_whole", "ovobench_chunks",
    )  # fmt: skip
    made = {name: tmp_path_factory.mktemp(name) for name in names}
    for name, root in made.items():
        getattr(trees, name)(root, videos)
    return made


class FakeStream:
    """Remembers what was pushed."""

    image_size = 64

    def __init__(self):
        self.reset()

    def reset(self):
        self.frames, self.times = [], []

    def push(self, frames, times):
        self.frames += list(frames)
        self.times += np.atleast_1d(times).tolist()

    def encoded(self) -> EncodedBatch:
        scene = EncodedScene(
            media=(Media(kind="video", name="stream"),), times=(np.array(self.times),)
        )
        return EncodedBatch(
            number=0, scenes=(scene,), rows=1, table=jnp.zeros((1, 1, 1)), encoder=None, seconds=0.0
        )


class Watcher(FakeModel):
    """Says yes to a poll from the fourth second on, or at the times of `says_yes`, and remembers what it saw."""

    def __init__(self, questions, reply, says_yes=lambda question, second: second >= 4):
        super().__init__(questions, reply)
        self.watched = FakeStream()
        self._says_yes = says_yes
        self.seen: dict[str, list[int]] = {}
        self.clips: dict[str, list[tuple[float, float]]] = {}

    def stream(self, **settings):
        self.settings = settings
        return self.watched

    def ask(self, batch, samples, **options):
        for index, sample in enumerate(samples):
            clip = sample.media[0]
            second = self.watched.times[-1] if self.watched.times else clip.end
            self.clips.setdefault(sample.id, []).append((clip.start, clip.end))
            if self.watched.frames:
                self.seen[sample.id] = numbers(np.stack(self.watched.frames))
            if "right time" in sample.turns[-1].text:
                _, question = self._questions[sample.id]
                said = "Yes." if self._says_yes(question, second) else "No, no."
                self.asked.append(sample.id)
                yield index, Prediction(text=said, visual_tokens=9, seconds=1.0)
            else:
                for _, prediction in super().ask(batch, [sample], **options):
                    yield index, prediction


def ask(benchmark, split, root, folder, model, *, stream=TWO_FPS, **options):
    questions = benchmark.questions(root, split)
    settings = EvalSettings(
        split=split,
        prompt_style="official",
        compression=CompressionConfig(num_frames=8, temporal_pool=4),
        max_new_tokens=16,
        stream=stream,
    )
    return run_benchmark(
        benchmark, questions, settings, folder, lambda: model, identity={}, about={}, **options
    )


@pytest.mark.parametrize(
    ("layout", "split", "count"),
    [
        ("streamingbench_authors", "real", 6),
        ("streamingbench_authors", "omni", 6),
        ("streamingbench_unpacked", "sqa", 6),
        ("streamingbench_unpacked", "proactive", 6),
        ("ovobench_whole", "test", 13),
        ("ovobench_chunks", "test", 13),
    ],
)
@pytest.mark.parametrize("mode", ["offline", "stream"])
def test_every_layout_is_found_and_right_answers_are_right(
    layout, split, count, mode, roots, tmp_path
):
    benchmark = BENCHMARKS[layout.partition("_")[0]]
    questions = benchmark.questions(roots[layout], split)
    assert (
        "  no video is missing" in check_questions(benchmark, split, questions, roots[layout]).lines
    )
    assert read_media(questions[0].media, 4, 16, 0.0).frames.shape == (4, 16, 16, 3)
    model = Watcher(
        questions, oracle, says_yes=lambda question, second: second >= question.extra["due"]
    )
    stream = StreamSettings(fps=2) if mode == "stream" else None
    report = ask(benchmark, split, roots[layout], tmp_path, model, stream=stream)
    assert report.scores.headline.value == 1.0 and report.scores.counts.parsed == count
    again = ask(benchmark, split, roots[layout], tmp_path, None, stream=stream)  # nothing to ask
    assert again.scores == report.scores


def test_a_question_is_asked_when_its_frames_have_been_seen_and_no_later_one(
    roots, tmp_path, monkeypatch
):
    opened = []
    source = sessions.Source
    monkeypatch.setattr(
        sessions, "Source", lambda url, *rest: opened.append(url) or source(url, *rest)
    )
    questions = OVOBENCH.questions(roots["ovobench_whole"], "test")
    model = Watcher(questions, oracle)
    ask(OVOBENCH, "test", roots["ovobench_whole"], tmp_path, model)
    assert len(opened) == len(set(opened)) == 2  # one session per video
    last = 2 * trees.STREAM_SECONDS - 1
    for question in questions:
        end = int(2 * question.media.end)  # 2 frames per second, the first one at 0
        assert model.seen[question.id] == list(range(min(end, last) + 1)), question.id
    # In the order of the video, not of the file.
    assert model.asked[:4] == ["0", "6_0", "7_0", "8_0"]
    thumbnails = (tmp_path / "thumbnails.0-of-1.jsonl").read_text().splitlines()
    assert len(thumbnails) == 13


def test_only_what_fps_selects_is_seen(roots, tmp_path):
    questions = OVOBENCH.questions(roots["ovobench_whole"], "test")
    model = Watcher(questions, oracle)
    stream = StreamSettings(fps=1, budget_tokens=512, policy="merge", recent=3)
    ask(OVOBENCH, "test", roots["ovobench_whole"], tmp_path, model, stream=stream)
    assert model.seen["2"] == [0, 2, 4, 6, 8, 10]
    assert {k: v for k, v in model.settings.items() if k != "compression"} == dataclasses.asdict(
        stream
    )


@pytest.mark.parametrize("stream", [StreamSettings(fps=2), None], ids=["stream", "offline"])
def test_a_model_is_polled_each_second_until_it_says_yes(stream, roots, tmp_path):
    """Begun at 2, 5 and 7 seconds, right at 4, 8 and 9; the model says yes from 4 seconds on, so at 4, 6 and 8."""
    root = roots["streamingbench_authors"]
    questions = STREAMINGBENCH.questions(root, "proactive")
    model = Watcher(questions, lambda number, question: f"It is {question.answer}")
    report = ask(STREAMINGBENCH, "proactive", root, tmp_path / "1", model, stream=stream)
    replies = {reply.question.id: reply.prediction for reply in report.replies}
    assert replies["proactive/0"].text == "[4 s] It is 0"
    assert replies["proactive/0"].seconds == 2.5  # two polls, and the answer
    assert replies["proactive/4"].text == "[6 s] It is 4"
    assert model.asked.count("proactive/0") == 3 and model.asked.count("proactive/1") == 2
    assert report.scores.headline.value == 1.0  # 2, 2 and 1 seconds early
    if stream is None:
        assert model.clips["proactive/0"] == [(2, 3), (2, 4), (2, 4)]

    late = Watcher(questions, oracle, says_yes=lambda q, second: second == q.extra["due"] + 3)
    report = ask(STREAMINGBENCH, "proactive", root, tmp_path / "2", late, stream=stream)
    assert report.scores.headline.value == 0.0 and report.scores.counts.parsed == 6

    never = Watcher(questions, oracle, says_yes=lambda question, second: False)
    report = ask(STREAMINGBENCH, "proactive", root, tmp_path / "3", never, stream=stream)
    texts = [reply.prediction.text for reply in report.replies]
    assert texts[:3] == ["[no answer by 8 s]", "[no answer by 12 s]", "[no answer by 13 s]"]
    assert report.scores.headline.value == 0.0
    assert never.asked.count("proactive/0") == 6  # from 3 to 8 seconds

    wrong = Watcher(questions, lambda number, question: "nothing")
    report = ask(STREAMINGBENCH, "proactive", root, tmp_path / "4", wrong, stream=stream)
    assert report.scores.headline.value == 0.0
    timed = evals.score("streamingbench", tmp_path / "4/predictions.jsonl", parser="in_time")
    assert timed.scores.headline.value == 1.0


def test_the_headline_is_the_mean_of_the_modes_of_the_means_of_their_tasks(roots, tmp_path):
    """Always A: EPM is right on 2 of 4, OCR on 1 of 2, and nothing of the forward tasks."""
    questions = OVOBENCH.questions(roots["ovobench_whole"], "test")
    model = Watcher(questions, always_a)
    report = ask(OVOBENCH, "test", roots["ovobench_whole"], tmp_path, model)
    assert report.scores.headline.value == pytest.approx((2 / 4 + 0 / 2 + 0) / 3)
    replies = {"6_0": "0", "6_1": "2", "7_0": "No", "7_1": "No", "8_0": "No", "8_1": "Yes"}
    model = Watcher(questions, lambda _, q: replies.get(q.id, "D"))
    report = ask(OVOBENCH, "test", roots["ovobench_whole"], tmp_path / "2", model)
    assert report.scores.headline.value == pytest.approx((1 / 3 + 1 / 2 + 1) / 3 / 3)
    modes = {g.group: g.accuracy.value for g in report.scores.groups if g.dimension == "mode"}
    assert modes["forward"] == pytest.approx((1 / 3 + 1 / 2 + 1) / 3)


def test_the_official_parsers_are_those_of_the_authors(roots):
    official = OVOBENCH.parsers["official"]
    by_id = {q.id: q for q in OVOBENCH.questions(roots["ovobench_whole"], "test")}
    assert official("Blue, or A", by_id["0"]) == "A"  # contained anywhere
    assert official("BC", by_id["0"]) == "B"
    assert official("1 or 2", by_id["6_2"]) == "12"  # all digits together
    assert official("N", by_id["7_0"]) == "No" and official("no", by_id["7_0"]) is None
    assert official("Not yet", by_id["7_0"]) == "No"
    strict = OVOBENCH.parsers["strict"]
    assert strict("no.", by_id["7_0"]) == "No" and strict("Not yet", by_id["7_0"]) is None
    assert strict("12 times", by_id["6_2"]) == "12" and strict("", by_id["6_2"]) is None
    first = STREAMINGBENCH.parsers["official"]
    (question, *_) = STREAMINGBENCH.questions(roots["streamingbench_authors"], "real")
    assert first("A. red car", question) == "A" and first("The answer is A", question) == "T"
    assert first("", question) is None
    (watched, *_) = STREAMINGBENCH.questions(roots["streamingbench_authors"], "proactive")
    watched = dataclasses.replace(watched, answer="4")
    timed = STREAMINGBENCH.parsers["official"]
    assert timed("[6 s] It is 4.", watched) == "4"
    assert timed("[7 s] It is 4.", watched) != "4"  # 3 seconds late
    assert timed("[4 s] nothing", watched) != "4"  # the time is not part of the reply
    assert timed("4", watched) is None  # without a time


def test_files_for_the_authors_scorers_have_their_fields(roots, tmp_path):
    root = roots["ovobench_whole"]
    ask(OVOBENCH, "test", root, tmp_path / "1", Watcher(OVOBENCH.questions(root, "test"), oracle))
    results = json.loads((tmp_path / "1/STORM_offline.json").read_text())
    assert [len(results[mode]) for mode in ("backward", "realtime", "forward")] == [4, 2, 3]
    assert results["backward"][1] == {
        "id": 1, "video": "COIN/v1.mp4", "task": "EPM", "question": "What is 1?", "response": "B",
        "ground_truth": "B",
    }  # fmt: skip
    assert results["forward"][0]["test_info"][2] == {"realtime": 9.0, "count": 12, "response": "12"}
    root = roots["streamingbench_authors"]
    model = Watcher(STREAMINGBENCH.questions(root, "proactive"), oracle)
    ask(STREAMINGBENCH, "proactive", root, tmp_path / "2", model)
    written = json.loads((tmp_path / "2/proactive_output_STORM.json").read_text())
    (row,) = written[0]["questions"]
    assert "STORM" in row
    assert row["ground_truth_time_stamp"] == "00:00:04"
    assert row["STORM"]["dialog_history"] == [{"role": "assistant", "content": "0", "time": 4}]
    model = Watcher(STREAMINGBENCH.questions(root, "sqa"), oracle)
    ask(STREAMINGBENCH, "sqa", root, tmp_path / "3", model)
    [chain] = json.loads((tmp_path / "3/sqa_output_STORM.json").read_text())
    assert [entry["questions"][0]["STORM"] for entry in chain] == list("ABCDAB")


def test_questions_without_a_reply_are_left_out_for_the_authors_scorers(roots, tmp_path):
    """Their count.py takes the first character of each reply."""
    root = roots["streamingbench_authors"]
    questions = STREAMINGBENCH.questions(root, "real")
    model = Watcher(questions, lambda number, question: "" if number == 2 else "A")
    ask(STREAMINGBENCH, "real", root, tmp_path, model)
    written = json.loads((tmp_path / "real_output_STORM.json").read_text())
    answered = ["STORM" in entry["questions"][0] for entry in written]
    assert answered == [True, True, False, True, True, True]


def test_videos_that_arrive_later_are_asked_about_and_changed_questions_refused(tmp_path):
    root = tmp_path / "root"
    trees.ovobench_chunks(root, Videos(tmp_path))
    (root / "chunked_videos/0.mp4").rename(tmp_path / "0.mp4")
    report = ask(
        OVOBENCH, "test", root, tmp_path / "out", Watcher(OVOBENCH.questions(root, "test"), oracle)
    )
    assert report.scores.counts.missing == 1
    (tmp_path / "0.mp4").rename(root / "chunked_videos/0.mp4")
    model = Watcher(OVOBENCH.questions(root, "test"), oracle)
    report = ask(OVOBENCH, "test", root, tmp_path / "out", model)
    assert model.asked == ["0"] and report.scores.counts.missing == 0
    rows = trees.ovobench_rows()
    rows[1]["realtime"] += 1
    trees.write_json(root / "ovo_bench_new.json", rows)
    with pytest.raises(RunError, match="questions"):
        ask(OVOBENCH, "test", root, tmp_path / "out", model)


def test_a_video_that_breaks_off_fails_the_questions_after_it(roots, tmp_path):
    root = tmp_path / "root"
    trees.ovobench_whole(root, None)
    video = root / "data/src_videos/COIN/v0.mp4"
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) * 6 // 10])
    (root / "data/src_videos/COIN/v1.mp4").write_bytes(b"nothing")
    model = Watcher(OVOBENCH.questions(root, "test"), oracle)
    report = ask(OVOBENCH, "test", root, tmp_path / "out", model)
    counts = report.scores.counts
    assert counts.failed > 3 and counts.causes["unreadable"] >= 3
    assert counts.parsed + counts.failed == 13 and len(model.asked) == counts.parsed
    video.write_bytes(whole)
    (root / "data/src_videos/COIN/v1.mp4").write_bytes(whole)
    again = Watcher(OVOBENCH.questions(root, "test"), oracle)
    report = ask(OVOBENCH, "test", root, tmp_path / "out", again)
    assert report.scores.headline.value == 1.0 and len(again.asked) == counts.failed


def test_the_context_before_a_question_can_be_limited(roots, trained_run, tmp_path):
    storm = storm_jax.load(link_run(trained_run, tmp_path / "run"))
    options = {
        "data_root": roots["streamingbench_authors"], "mode": "offline", "num_frames": 4, "limit": 3,
    }  # fmt: skip
    report = evals.evaluate(storm, "streamingbench", context_seconds=3, **options)
    clips = [(r.question.media.start, r.question.media.end) for r in report.replies]
    assert clips[:3] == [(0.0, 2), (2.0, 5), (4.0, 7)]
    assert report.folder.name.endswith("_context3_limit3")
    chunks = {"data_root": roots["ovobench_chunks"], "mode": "offline", "num_frames": 4, "limit": 2}
    report = evals.evaluate(storm, "ovobench", context_seconds=1, **chunks)
    clips = [(r.question.media.start, r.question.media.end) for r in report.replies]
    assert clips == [(1.0, None), (2.0, None)]  # the chunks end at 2 and 3 seconds
    with pytest.raises(BenchmarkError, match="StreamingBench have no times to count from"):
        evals.evaluate(storm, "streamingbench", split="proactive", context_seconds=3, **options)


def test_a_session_of_a_real_model_gives_what_its_stream_gives(roots, trained_run, tmp_path):
    storm = storm_jax.load(link_run(trained_run, tmp_path / "run"))
    settings = StreamSettings(fps=2, budget_tokens=64)
    root = roots["ovobench_whole"]
    report = evals.evaluate(storm, "ovobench", data_root=root, stream=settings, limit=3)
    assert "fps2_window64" in report.folder.name
    stream = storm.stream(**dataclasses.asdict(settings))
    for reply in report.replies:
        medium = dataclasses.replace(reply.question.media, end=None)
        clip = read_media(medium, 2 * trees.STREAM_SECONDS, stream.image_size, 0.0)
        seen = clip.times <= reply.question.media.end
        stream.reset()
        stream.push(clip.frames[seen], clip.times[seen])
        batch = stream.encoded()
        sample = OVOBENCH.prompts["official"](reply.question)
        sample = dataclasses.replace(sample, media=batch.scenes[0].media)
        [(_, expected)] = storm.ask(batch, [sample], sampling=Sampling(16))
        assert reply.prediction.text == expected.text
        assert reply.prediction.visual_tokens == stream.stats.visual_tokens
    likely = evals.evaluate(
        storm,
        "streamingbench",
        data_root=roots["streamingbench_authors"],
        answers="likelihood",
        limit=2,
    )
    assert {reply.prediction.text for reply in likely.replies} <= set("ABCD")


@pytest.mark.parametrize(
    ("benchmark", "options", "problem"),
    [
        (
            "ovobench",
            {"num_frames": 8},
            "--num_frames=8 needs --mode=offline: a stream takes --fps",
        ),
        ("ovobench", {"context_seconds": 60}, "--context_seconds=60 needs --mode=offline"),
        ("ovobench", {"batch_size": 8}, "--batch_size=8 needs --mode=offline"),
        ("ovobench", {"settings": "storm"}, "--settings=storm needs --mode=offline"),
        ("ovobench", {"mode": "live"}, "--mode=live: must be one of offline, stream"),
        ("videomme", {"stream": StreamSettings()}, "--recent need --mode=stream"),
        (
            "videomme",
            {"mode": "stream", "subtitles": True},
            "--subtitles=True needs --mode=offline",
        ),
    ],
)
def test_options_that_a_mode_does_not_use_are_refused(benchmark, options, problem, trained_run):
    with pytest.raises(BenchmarkError, match=problem):
        evals.evaluate(trained_run, benchmark, data_root="/nowhere", **options)


def test_parts_of_videos_cannot_be_watched(trained_run, tmp_path):
    trees.mvbench_main(tmp_path, Videos(tmp_path / ".."))
    with pytest.raises(BenchmarkError, match=r"--mode=stream: .* is not a whole video in a file"):
        evals.evaluate(trained_run, "mvbench", data_root=tmp_path, mode="stream")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"realtime": "5 s"}, "row 0: realtime='5 s' must be seconds"),
        ({"task": "XYZ"}, "row 0: task='XYZ' must be one of EPM, ASI"),
        ({"gt": None}, "a row does not have the fields of OVO-Bench"),
    ],
)
def test_malformed_rows_are_named(row, problem, tmp_path):
    trees.write_json(tmp_path / "ovo_bench_new.json", [trees.ovobench_rows()[0] | row])
    with pytest.raises(BenchmarkError, match=problem):
        OVOBENCH.questions(tmp_path, "test")


def test_times_are_read_as_the_authors_read_them(tmp_path):
    entries = trees.streamingbench_entries("real")
    for entry, stamp in zip(
        entries, ("00:12450", "00:24", "00:00:8", "1:00:01", "5", "x"), strict=True
    ):
        entry["questions"][0]["time_stamp"] = stamp
    trees.write_json(tmp_path / "questions_real.json", entries[:5])
    questions = STREAMINGBENCH.questions(tmp_path, "real")
    assert [question.media.end for question in questions] == [12450, 24, 8, 3601, 5]
    trees.write_json(tmp_path / "questions_real.json", entries)
    late = trees.streamingbench_entries("proactive")
    late[1]["questions"][0]["ground_truth_time_stamp"] = "0:00:01"
    trees.write_json(tmp_path / "questions_proactive.json", late)
    with pytest.raises(BenchmarkError, match="ground_truth_time_stamp='0:00:01' is before"):
        STREAMINGBENCH.questions(tmp_path, "proactive")
    with pytest.raises(BenchmarkError, match=r"questions_real.json: time_stamp='x' must be a time"):
        STREAMINGBENCH.questions(tmp_path, "real")
