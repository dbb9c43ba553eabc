"""The commands check, score and sweep, from the shell and from Python; submissions and judgements."""

from __future__ import annotations

import csv
import json
import os
import pathlib
import re
import subprocess
import sys

import benchmark_trees as trees
import pytest
from benchmark_trees import FakeModel, Videos, always_a, failing, link_run, oracle, rambler
from matplotlib import pyplot

from storm_jax import evals
from storm_jax.config import CompressionConfig
from storm_jax.evals.benchmark import BenchmarkError
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.evals.judging import read_scores, score_judgements
from storm_jax.evals.report.sweep_plot import set_ticks
from storm_jax.evals.runner import run_benchmark
from storm_jax.evals.settings import EvalSettings
from storm_jax.evals.sweeps import parse_sweep

ROOT = pathlib.Path(__file__).parents[2]


def call(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "eval.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def make(name: str, tmp_path: pathlib.Path) -> pathlib.Path:
    root = tmp_path / name
    root.mkdir()
    getattr(trees, name)(root, Videos(tmp_path))
    return root


def ask(benchmark_name: str, split: str, root, folder, reply):
    benchmark = BENCHMARKS[benchmark_name]
    questions = benchmark.questions(root, split)
    settings = EvalSettings(
        split=split,
        prompt_style=next(iter(benchmark.prompts)),
        compression=CompressionConfig(num_frames=8, temporal_pool=4),
        max_new_tokens=16,
    )
    model = FakeModel(questions, reply)
    return run_benchmark(
        benchmark, questions, settings, folder, lambda: model, identity={}, about={"commit": "c0"}
    )


def test_check_lists_what_is_missing(tmp_path):
    root = make("mvbench_main", tmp_path)
    (root / "video/ssv2_video/w2.webm").unlink()
    done = call("check", "--benchmark=mvbench", f"--data_root={root}")
    assert done.returncode == 1
    assert done.stderr == "eval.py: not everything that was published is here\n"
    lines = done.stdout.splitlines()
    assert lines[0] == "MVBench test: 24 (PUBLISHED: 4,000) questions about 24 videos"
    assert "    action_antonym: 6 (PUBLISHED: 200), 1 without a video" in lines
    assert "    object_shuffle: 0 (PUBLISHED: 200)" in lines
    assert f"    {root}/video/ssv2_video/w2.webm" in lines


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["check", "--benchmark=mlvu"], "--data_root is missing"),
        (["check", "--benchmark=mlvu", "--data_root=/nowhere"], "/nowhere is not a folder"),
        (["score", "--benchmark=mlvu"], "--predictions is missing"),
        (["--benchmark=mlvu"], "--workdir is missing"),
        (["chek", "--benchmark=mlvu"], "chek; commands are check and score (--help lists"),
    ],
)
def test_missing_flags_and_folders_are_reported_in_one_line(arguments, problem):
    refused = call(*arguments)
    assert refused.returncode == 1
    assert problem in refused.stderr and refused.stderr.count("\n") == 1


def test_predictions_are_scored_again_without_a_model(tmp_path):
    root = make("videomme_hub", tmp_path)
    first = ask("videomme", "test", root, tmp_path / "run", rambler)
    assert first.scores.headline.value == 1
    predictions = f"--predictions={tmp_path}/run/predictions.jsonl"
    again = call(
        "score", "--benchmark=videomme", predictions, "--parser=lmms", f"--out={tmp_path}/out"
    )
    assert again.returncode == 0, again.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["headline"]["value"] == 6 / 24
    assert results["counts"]["published"] == 2700
    assert results["versions"]["jax"] and results["commit"]
    assert "THE FILES DIFFER FROM WHAT WAS PUBLISHED" in again.stdout
    template = json.loads((tmp_path / "out/videomme_results.json").read_text())
    assert [len(video["questions"]) for video in template] == [3] * 8
    asked = template[0]["questions"][1]
    assert asked == {
        "question_id": "001-2",
        "task_type": "Counting Problem",
        "question": "What is 1?",
        "options": ["A. red car", "B. blue boat", "C. green tree", "D. white house"],
        "answer": "B",
        "response": "A man and a dog. The answer is (B).",
    }
    (tmp_path / "few.jsonl").write_text('{"id": "001-1", "reply": "A"}\n')
    with pytest.raises(BenchmarkError, match="with --data_root, id and reply are enough"):
        evals.score("videomme", tmp_path / "few.jsonl")
    joined = evals.score("videomme", tmp_path / "few.jsonl", data_root=root)
    assert (
        "1 parsed; counted as wrong: 0 unparsed, 0 without a video, 23 failed (no_reply 23)"
        in str(joined)
    )
    assert joined.folder is None and joined.files == ()
    with pytest.raises(BenchmarkError, match="is the report of an evaluation"):
        evals.score("videomme", tmp_path / "run/predictions.jsonl", out=tmp_path / "run")


def test_the_full_egoschema_is_submitted_with_every_id(tmp_path):
    root = make("egoschema_authors", tmp_path)
    report = ask("egoschema", "full", root, tmp_path / "run", failing_letters)
    lines = str(report).splitlines()
    assert "24 not scored: no public answer, or scored by a judge" in lines
    assert lines[-1] == "  ... and 5 more, in predictions.jsonl"
    answers = json.loads((tmp_path / "run/submission.json").read_text())
    assert answers == {f"uid-{i}": -1 if i % 3 == 0 else 2 for i in range(24)}
    rows = list(csv.reader((tmp_path / "run/submission.csv").open()))
    assert rows == [["q_uid", "answer"], *([uid, str(a)] for uid, a in answers.items())]


def failing_letters(number, question):
    return None if number % 3 == 0 else "C"


def test_test_sets_are_submitted_as_their_servers_read_them(tmp_path):
    root = make("longvideobench_hub", tmp_path)
    ask("longvideobench", "test", root, tmp_path / "lvb", rambler)
    path = tmp_path / "lvb/longvideobench_test_for_submission.json"
    replies = json.loads(path.read_text())
    assert len(replies) == 24
    assert replies["lv-0_1"] == "A man and a dog. The answer is (C)."
    root = make("mlvu_test", tmp_path)
    ask("mlvu", "test", root, tmp_path / "mlvu", failing)
    options = json.loads((tmp_path / "mlvu/test_res.json").read_text())
    assert len(options) == 22
    assert options[:2] == [
        {"question_id": "plotQA_0", "question_type": "plotQA", "option": ""},
        {"question_id": "plotQA_1", "question_type": "plotQA", "option": "B"},
    ]


def test_the_judges_input_is_written_and_its_output_scored(tmp_path):
    root = make("mlvu_generation", tmp_path)
    report = ask("mlvu", "generation", root, tmp_path / "run", failing_text)
    assert tmp_path / "run/judge_input.jsonl" in report.files
    assert report.scores.headline is None and report.scores.counts.without_key == 20
    lines = [json.loads(x) for x in (tmp_path / "run/judge_input.jsonl").read_text().splitlines()]
    assert len(lines) == 20 - 7
    first, last = lines[0], lines[-1]
    assert first["id"] == "sub_scene/1" and [m["role"] for m in first["messages"]] == [
        "system",
        "user",
    ]
    assert first["messages"][1]["content"] == (
        "Please score the respondent's answer according to the steps in the Instructions. You must end "
        "with a JSON dict to store the scores.\nQuestion: Describe 1.\nScoring Points: point 1\n"
        "Respondent's Answer: a story\n"
    )
    assert "score_accuracy" in first["messages"][0]["content"]
    assert "Standard Answer: It shows 7.\n" in last["messages"][1]["content"]
    said = {"sub_scene": "{'score_accuracy': 4, 'score_relevance': 5, 'total_score': 9}",
            "summary": 'so {"score_completeness": 2.5, "score_reliability": 3}'}  # fmt: skip
    judgements = [{"id": line["id"], "judgement": said[line["task"]]} for line in lines]
    judgements[0]["judgement"] = "I cannot say"
    path = tmp_path / "judgements.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in judgements))
    scored = call(
        "score", "--benchmark=mlvu", "--split=generation", f"--judgements={path}",
        f"--predictions={tmp_path}/run/predictions.jsonl",
    )  # fmt: skip
    # 12 sub-scenes: 4 failed and one is not judged (2 each), 7 have 9; 8 summaries: 3 failed, 5 have 5.5.
    assert scored.stdout.splitlines() == [
        f"sub_scene   {(5 * 2 + 7 * 9) / 12:8.2f}",
        f"summary     {(3 * 2 + 5 * 5.5) / 8:8.2f}",
        f"G-Avg       {((5 * 2 + 7 * 9) / 12 + (3 * 2 + 5 * 5.5) / 8) / 2:8.2f}   of 2 to 10",
        "20 replies, 8 without a judgement (counted as 2)",
    ]


def failing_text(number, question):
    return None if number % 3 == 0 else "a story"


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("{'score_accuracy': 3, 'score_relevance': 4.5}", 7.5),
        ("first score_accuracy: 1, then 'score_accuracy': 2, 'score_relevance': 1", 3),
        ("'score_accuracy': 3", None),
        ("'score_accuracy': 9, 'score_relevance': 4", None),
        ("'score_accuracy': score_acc, 'score_relevance': score_rele", None),
    ],
)
def test_judgements_are_read_or_not_counted(text, total):
    assert read_scores(text, "sub_scene") == total


def test_judgements_of_unknown_questions_are_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"id": "other", "judgement": "x"}\n')
    with pytest.raises(
        BenchmarkError, match=r"j.jsonl: judgement 1 must have the id of a question"
    ):
        score_judgements({"sub_scene/0": "sub_scene"}, path)


@pytest.mark.slow
def test_a_sweep_writes_a_table_and_a_plot(trained_run, shapes_folder, tmp_path, capsys):
    run = link_run(trained_run, tmp_path / "run")
    values = parse_sweep(["num_frames=2,8", "temporal_sample=1,2"])
    options = {"data_root": shapes_folder, "max_new_tokens": 2, "batch_size": 8, "limit": 6}
    done = evals.sweep(run, "shapes", values, **options)
    name = "sweep_num_frames_temporal_sample_step2_frames8_k2_p1_s1_limit6"
    folder = run / "evals/shapes" / name
    assert list(done.files) == [folder / f"sweep.{ending}" for ending in ("json", "md", "png")]
    points = json.loads((folder / "sweep.json").read_text())
    swept = [(p["compression"]["num_frames"], p["compression"]["temporal_sample"]) for p in points]
    assert swept == [(2, 1), (8, 1), (2, 2), (8, 2)]
    tokens = [point["visual_tokens"] for point in points]
    assert tokens[1] > tokens[3] > tokens[2] and tokens[1] > tokens[0]
    assert all(point["seconds"] > 0 for point in points)
    rows = (folder / "sweep.md").read_text().splitlines()
    assert rows[2].startswith("| num_frames | temporal_sample | accuracy | 95 % interval")
    assert len(rows) == 8
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    again = evals.sweep(run, "shapes", values, **options)
    assert [r.scores for r in again.reports] == [r.scores for r in done.reports]
    out = capsys.readouterr().out
    assert out.count("6 of 6 questions are already answered") == 4
    assert "num_frames=8, temporal_sample=2\n" in out


def test_ticks_of_a_sweep_are_its_values():
    figure, axis = pyplot.subplots()
    axis.set_xscale("log", base=2)
    set_ticks(axis, [16, 96, 32, 64.0, 64.5, 16])
    assert list(axis.get_xticks()) == [16, 32, 64, 96]
    low, high = axis.get_xlim()
    assert low < 16 and high > 96
    pyplot.close(figure)


def test_the_python_call_of_the_evaluation_guide_works(
    trained_run, shapes_folder, tmp_path, monkeypatch, capsys
):
    """As printed, with a run and data at the paths it uses."""
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(), re.DOTALL
    )
    (tmp_path / "runs").mkdir()
    run = link_run(trained_run, tmp_path / "runs/sft")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shapes").symlink_to(shapes_folder)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    report = names["report"]
    assert report.folder == run / "evals/shapes/step2_frames8_k2_p1_s2_limit8"
    assert str(report) in capsys.readouterr().out
    assert {path.name for path in report.files} == {
        "results.json", "predictions.jsonl", "report.html", "contact_sheet.png",
    }  # fmt: skip
    assert all(path.exists() for path in report.files)
    lines = (report.folder / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == len(report.replies) == 8


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"subtitles": True}, "--subtitles: MVBench has no subtitles"),
        ({"answers": "guess"}, "--answers=guess: must be one of generate, likelihood"),
        ({"settings": "vila"}, "--settings=vila: must be one of storm_8f"),
        ({"split": "dev"}, "--split=dev: MVBench has test"),
        ({"data_root": None}, "--data_root is missing"),
    ],
)
def test_options_that_a_benchmark_does_not_have_are_refused(
    trained_run, tmp_path, options, problem
):
    root = make("mvbench_video", tmp_path)
    with pytest.raises(BenchmarkError, match=re.escape(problem)):
        evals.evaluate(trained_run, "mvbench", **{"data_root": root, **options})


def test_importing_the_package_is_light():
    code = (
        "import sys\nfrom storm_jax import evals\n"
        "assert not {'jax', 'transformers', 'pyarrow', 'matplotlib'} & sys.modules.keys()\n"
        "assert evals.check and 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = evals.nothing


@pytest.mark.parametrize(
    "text", ["frames=8", "num_frames", "num_frames=", "num_frames=8,x", "num_frames=0"]
)
def test_invalid_sweeps_are_refused(text):
    with pytest.raises(BenchmarkError, match=f"--sweep={text}"):
        parse_sweep([text])
    with pytest.raises(BenchmarkError, match="at most once"):
        parse_sweep(["num_frames=1", "num_frames=2"])


def test_the_table_lists_groups_and_counts(tmp_path):
    root = make("mlvu_dev_hub", tmp_path)
    report = ask("mlvu", "dev", root, tmp_path / "run", always_a)
    lines = str(report).splitlines()
    assert lines[0].split() == ["accuracy", "95", "%", "interval", "chance", "n"]
    assert lines[1].split() == ["plotQA", "33.3%", "9.7%", "-", "70.0%", "25.0%", "6"]
    assert lines[8].split()[:2] == ["M-Avg", "40.5%"]
    assert lines[9].split()[:2] == ["all", "36.4%"]
    assert lines[10] == "22 questions, 2,175 published"
    assert lines[12] == ("22 parsed; counted as wrong: 0 unparsed, 0 without a video, 0 failed")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (results["commit"], results["split"], results["prompt_style"]) == ("c0", "dev", "vila")
    assert results["parser"] == "strict"


def test_the_built_in_task_is_one_more_benchmark(shapes_folder, tmp_path):
    report = ask("shapes", "test", shapes_folder, tmp_path / "run", oracle)
    assert report.scores.headline.value == 1
    order = next(group for group in report.scores.groups if group.group == "order")
    assert (order.chance, order.total) == (0.25, 2)
    assert order.ceiling is not None and order.ceiling < 1
    assert "ceiling" in str(report)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_of_the_evaluation_guide_runs(trained_run, tmp_path):
    """On small benchmark folders, with paths replaced."""
    run = link_run(trained_run, tmp_path / "run")
    roots = {
        "videomme": make("videomme_hub", tmp_path),
        "egoschema": make("egoschema_hub", tmp_path),
        "mvbench": make("mvbench_main", tmp_path),
        "mlvu": make("mlvu_dev_authors", tmp_path),
        "longvideobench": make("longvideobench_authors", tmp_path),
    }
    trees.mlvu_generation(roots["mlvu"], Videos(tmp_path))
    call(
        f"--workdir={run}", "--benchmark=mlvu", "--split=generation", "--max_new_tokens=4",
        f"--data_root={roots['mlvu']}",
    )  # fmt: skip
    (replies,) = (run / "evals/mlvu_generation").rglob("predictions.jsonl")
    (tmp_path / "judged.jsonl").write_text('{"id": "summary/0", "judgement": "I cannot say"}')
    guide = (ROOT / "docs/evaluation.md").read_text()
    commands = [
        line.split()[2:] for line in guide.splitlines() if line.startswith("    python eval")
    ]
    assert len(commands) >= 12
    for command in commands:
        name = next(part.split("=")[1] for part in command if part.startswith("--benchmark="))
        predictions = next(iter((run / f"evals/{name}").rglob("predictions.jsonl")), replies)
        if "--split=generation" in command:
            predictions = replies
        values = {
            "--workdir": run,
            "--data_root": roots[name],
            "--predictions": predictions,
            "--judgements": tmp_path / "judged.jsonl",
        }
        parts = [part.partition("=") for part in command]
        done = call(*(f"{key}{sign}{values.get(key, value)}" for key, sign, value in parts))
        incomplete = command[0] == "check" and "not everything that was published" in done.stderr
        assert done.returncode == 0 or incomplete, (command, done.stderr)
    assert (run / "evals/egoschema_full").exists()
