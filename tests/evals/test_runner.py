"""Interrupted, sharded and repeated evaluations have the same results as uninterrupted ones."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import benchmark_trees as trees
import pytest
from benchmark_trees import FakeModel, Videos, failing, link_run, oracle

from storm_jax.config import CompressionConfig
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.evals.journal import Journal
from storm_jax.evals.runner import run_benchmark
from storm_jax.evals.settings import PAPER_SETTINGS, EvalSettings
from storm_jax.inference.generate import Sampling
from storm_jax.inference.prediction import Prediction
from storm_jax.run import RunError

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = EvalSettings(
    split="val",
    prompt_style="vila",
    compression=CompressionConfig(num_frames=8, temporal_pool=4),
    max_new_tokens=32,
)


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    trees.longvideobench_authors(tmp_path / "root", Videos(tmp_path))
    return tmp_path / "root"


def ask(root, folder, reply=oracle, settings=SETTINGS, model=None, **options):
    benchmark = BENCHMARKS["longvideobench"]
    questions = benchmark.questions(root, settings.split)
    model = model or FakeModel(questions, reply)
    options = {"identity": {"step": 3}, "about": {}} | options
    report = run_benchmark(benchmark, questions, settings, folder, lambda: model, **options)
    return report, model


class KilledError(Exception):
    pass


class DyingModel(FakeModel):
    """Stops after some replies, like a killed process."""

    left = 7

    def ask(self, batch, samples, **how):
        for item in super().ask(batch, samples, **how):
            if self.left == 0:
                raise KilledError
            self.left -= 1
            yield item


def test_only_the_rest_is_asked_and_failures_are_asked_again(root, tmp_path):
    questions = BENCHMARKS["longvideobench"].questions(root, "val")
    dying = DyingModel(questions, failing)
    with pytest.raises(KilledError):
        ask(root, tmp_path / "out", model=dying)
    assert not (tmp_path / "out/results.json").exists()
    (journal,) = (tmp_path / "out").glob("answers.*.jsonl")
    with journal.open("a") as file:
        file.write('{"id": "lv-9_0", "rep')  # torn
    report, model = ask(root, tmp_path / "out")
    # Of the 7 that were answered, the 1st, 4th and 7th failed.
    assert len(model.asked) == 24 - 7 + 3
    assert report.scores.headline.value == 1
    again, model = ask(root, tmp_path / "out")
    assert model.asked == [] and again.scores == report.scores


DAMAGE = [b"\0" * 30, b"null", b'{"id": "q"}', b'{"id": "a", "reply": 3}', b"\xff\xfe", b'{"id": "a',
          b'{"id": "a", "reply": "b", "seconds": "x"}']  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_answer_is_asked_again_once(root, tmp_path, damage):
    expected, _ = ask(root, tmp_path / "whole")
    ask(root, tmp_path / "out")
    (journal,) = (tmp_path / "out").glob("answers.*.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], damage + b"\n", *lines[4:]]))
    report, model = ask(root, tmp_path / "out")
    assert report.scores == expected.scores and len(model.asked) == 1
    report, model = ask(root, tmp_path / "out")
    assert report.scores == expected.scores and not model.asked


def test_damaged_settings_are_named(root, tmp_path):
    ask(root, tmp_path / "out")
    (tmp_path / "out/settings.json").write_text('{"step": 3')
    with pytest.raises(RunError, match=r"settings.json is damaged, so that .* remove"):
        ask(root, tmp_path / "out")


def test_shards_write_one_report_in_any_order(root, tmp_path):
    whole, _ = ask(root, tmp_path / "whole", failing)
    first, one = ask(root, tmp_path / "shared", failing, shard=(0, 2))
    assert first is None and not (tmp_path / "shared/results.json").exists()
    last, two = ask(root, tmp_path / "shared", failing, shard=(1, 2))
    assert len(one.asked) == len(two.asked) == 12
    assert {i.split("_")[0] for i in one.asked}.isdisjoint(i.split("_")[0] for i in two.asked)
    assert last.scores == whole.scores
    lines = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("whole", "shared")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prompt_style": "lmms"}, "prompt_style: 'vila' there, 'lmms' now"),
        ({"compression": CompressionConfig(num_frames=16, temporal_pool=4)}, "'num_frames': 8"),
        ({"max_new_tokens": 8}, "max_new_tokens: 32 there, 8 now"),
    ],
)
def test_answers_of_other_settings_are_not_mixed(root, tmp_path, changes, problem):
    ask(root, tmp_path / "out")
    settings = EvalSettings(**{**vars(SETTINGS), **changes})
    with pytest.raises(RunError, match=re.escape(problem)):
        ask(root, tmp_path / "out", settings=settings)
    with pytest.raises(RunError, match="step: 3 there, 4 now"):
        ask(root, tmp_path / "out", identity={"step": 4})


def test_answers_to_other_questions_are_refused(root, tmp_path):
    ask(root, tmp_path / "out")
    rows = trees.longvideobench_rows("val")
    rows[3]["question"] += " And why?"
    trees.write_json(root / "lvb_val.json", rows)
    with pytest.raises(RunError, match="questions: '"):
        ask(root, tmp_path / "out")
    rows = trees.longvideobench_rows("val")
    rows[3]["correct_choice"] = 1  # a better key is welcome
    trees.write_json(root / "lvb_val.json", rows)
    report, model = ask(root, tmp_path / "out")
    assert model.asked == [] and report.scores.headline.value == 23 / 24


def test_two_processes_do_not_write_one_journal(root, tmp_path):
    journal = Journal(tmp_path, (0, 1))
    with journal.writing() as writer:
        writer.add("a", Prediction(text="x"))
        other = Journal(tmp_path, (0, 1)).writing()
        with pytest.raises(RunError, match=r"another process is writing .*answers.0-of-1.jsonl"):
            other.__enter__()
        writer.add("b", Prediction(text="y"))
    assert journal.predictions() == {"a": Prediction(text="x"), "b": Prediction(text="y")}


def test_limit_asks_the_first_and_says_so(root, tmp_path):
    settings = EvalSettings(
        split="val",
        prompt_style="vila",
        compression=CompressionConfig(num_frames=8),
        max_new_tokens=32,
        limit=5,
    )
    report, model = ask(root, tmp_path / "out", settings=settings)
    assert model.asked == ["lv-0_0", "lv-0_1", "lv-1_0", "lv-1_1", "lv-2_0"]
    counts = report.scores.counts
    assert (counts.published, counts.rows, counts.asked) == (1337, 24, 5)
    assert settings.folder_name(7, "vila") == "step7_frames8_k1_p1_s1_limit5"
    lmms = EvalSettings(
        split="val",
        prompt_style="lmms",
        compression=CompressionConfig(num_frames=8),
        max_new_tokens=32,
        answers="likelihood",
    )
    assert lmms.folder_name(7, "vila") == "step7_frames8_k1_p1_s1_lmms_likelihood"


def test_settings_are_passed_to_the_model(root, tmp_path):
    seen = {}

    class Model(FakeModel):
        def encode(self, media, **how):
            seen.update(how)
            yield from super().encode(media, **how)

        def ask(self, batch, samples, **how):
            seen.setdefault("sampling", how["sampling"])
            seen.setdefault("choices", []).extend(how["choices"])
            yield from super().ask(batch, samples, **how)

    questions = BENCHMARKS["longvideobench"].questions(root, "val")
    settings = EvalSettings(
        split="val",
        prompt_style="vila",
        compression=CompressionConfig(
            num_frames=8, temporal_pool=4, spatial_pool=2, temporal_sample=2
        ),
        max_new_tokens=32,
        answers="likelihood",
    )
    model = Model(questions, oracle)
    ask(root, tmp_path / "out", settings=settings, model=model, batch_size=3)
    assert seen["compression"] == CompressionConfig(
        num_frames=8, temporal_pool=4, spatial_pool=2, temporal_sample=2
    )
    assert (seen["sampling"], seen["batch_size"]) == (Sampling(32), 3)
    assert seen["choices"][:3] == ["ABCDE", "ABCD", "ABC"]
    assert seen["preview_frames"] == 16


def test_journals_of_several_processes_are_merged(tmp_path):
    for shard in ((0, 2), (1, 2)):
        journal = Journal(tmp_path, shard)
        with journal.writing() as writer:
            writer.add(
                "a", Prediction(text="x") if shard[0] else Prediction(error="e", cause="missing")
            )
            writer.add(f"b{shard[0]}", Prediction(text="y"))
    assert Journal(tmp_path).predictions() == {
        "a": Prediction(text="x"),
        "b0": Prediction(text="y"),
        "b1": Prediction(text="y"),
    }


def test_the_papers_settings_are_those_of_its_table():
    pooled = PAPER_SETTINGS["storm_t_pool"].compression("storm_t_pool", "longvideobench")
    assert pooled == CompressionConfig(num_frames=128, temporal_pool=4)
    both = PAPER_SETTINGS["storm_t_pool_t_samp"].compression("storm_t_pool_t_samp", "mlvu")
    assert both == CompressionConfig(num_frames=256, temporal_pool=4, temporal_sample=2)
    with pytest.raises(ValueError, match="--settings=storm: the paper has no frames for egoschema"):
        PAPER_SETTINGS["storm"].compression("storm", "egoschema")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_questions_killed_five_times_are_answered_alike(trained_run, tmp_path):
    """With a real model and real kills: a process is killed as soon as it has saved some answers."""
    videos, names = Videos(tmp_path), [f"v{i}.mp4" for i in range(100)]
    rows = [
        {**row, "id": f"q{i}", "video_id": f"v{i // 2}", "video_path": f"v{i // 2}.mp4"}
        for i, row in enumerate(trees.longvideobench_rows("val") * 9)
    ][:200]
    trees.write_json(tmp_path / "root/lvb_val.json", rows)
    for name in names:
        videos.put(tmp_path / "root/videos" / name)
    (tmp_path / "root/videos/v13.mp4").write_bytes(b"broken")
    predictions = []
    for kills in (0, 5):
        run = link_run(trained_run, tmp_path / f"run{kills}")
        command = [
            sys.executable, "eval.py", f"--workdir={run}", "--benchmark=longvideobench",
            f"--data_root={tmp_path}/root", "--num_frames=2", "--max_new_tokens=4",
            "--batch_size=8",
        ]  # fmt: skip
        journal = run / "evals/longvideobench/step2_frames2_k2_p1_s1/answers.0-of-1.jsonl"
        for kill in range(kills + 1):
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "XLA_FLAGS": ""},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            while kill < kills and process.poll() is None:
                time.sleep(0.005)
                answered = journal.read_text().count("\n") if journal.exists() else 0
                if answered > 25 * (kill + 1):
                    process.send_signal(signal.SIGKILL)
            out, errors = process.communicate()
            assert process.returncode == (-signal.SIGKILL if kill < kills else 0), errors
        assert "200 questions, 1,337 published" in out
        lines = (journal.parent / "predictions.jsonl").read_text().splitlines()
        predictions.append(
            [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
        )
    assert len(predictions[0]) == 200
    assert [line["status"] for line in predictions[0]].count("failed") == 2
    assert len({line["reply"] for line in predictions[0]}) > 5
    assert predictions[0] == predictions[1]
    written = [json.loads(line)["id"] for line in journal.read_text().splitlines()]
    assert len(written) < 200 + 5 * 2 + 5  # nothing that had an answer was asked again
