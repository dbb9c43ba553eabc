"""Benchmarks: the methods that they compare compute the same results."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_trees import link_run

from benchmarks import data, eval_throughput, scan, scan_compile
from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import latency, report, rows, runs
from storm_jax.config import CompressionConfig
from storm_jax.evals.benchmark import Question, ScoredReply
from storm_jax.inference.generate import Sampling
from storm_jax.inference.prediction import Prediction
from storm_jax.inference.predictor import Predictor
from storm_jax.inference.programs import Programs
from storm_jax.media.media import Media
from storm_jax.media.read import read_media
from storm_jax.ops.selective_scan import IMPLEMENTATIONS, KERNELS, selective_scan
from storm_jax.run import Run
from storm_jax.tasks import shapes


@pytest.fixture(autouse=True)
def plain_broadcasting():
    """The reference implementations rely on rank promotion."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_every_method_agrees_with_float64(tmp_path):
    scan.main([f"--out={tmp_path}", "--problems", "2x70x12x4", "--rounds=2"])
    rows = json.loads((tmp_path / "scan.json").read_text())["rows"]
    measured = {row["method"] for row in rows}
    assert measured == {
        *set(IMPLEMENTATIONS) - set(KERNELS),
        "jax.lax.associative_scan",
        "jax.lax.scan",
        "torch, unbind",
        "torch, transformers",
    }
    for row in rows:
        assert max(row["error_y"], row["error_gradients"]) < 1e-5, row
        assert row.get("error_y_bfloat16", 0) < 5e-3, row
        assert len(row["forward_seconds"]) == len(row["backward_seconds"]) == 2
    assert (tmp_path / "scan.png").stat().st_size > 1000
    assert len((tmp_path / "scan.md").read_text().splitlines()) == 4 + len(rows)


SHORTEST, WIDEST = scan.GRID[0], scan.GRID[-1]


@pytest.mark.parametrize(
    "problem",
    [
        SHORTEST,
        WIDEST,
        *(pytest.param(problem, marks=pytest.mark.slow) for problem in scan.GRID[1:-1]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_lower_at_the_sizes_of_the_grid(problem, name):
    batch, length, width, d_state = problem
    shapes = {
        "x": (batch, length, width),
        "dt": (batch, length, width),
        "A": (width, d_state),
        "B": (batch, length, d_state),
        "C": (batch, length, d_state),
        "D": (width,),
        "dt_bias": (width,),
    }
    arrays = {k: jax.ShapeDtypeStruct(v, jnp.bfloat16) for k, v in shapes.items()}

    def loss(arrays):
        return selective_scan(**arrays, implementation=name)[0].sum()

    platform = {"pallas_gpu": "cuda", "pallas_tpu": "tpu"}[name]
    jax.jit(jax.grad(loss)).trace(arrays).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("text", ["4096", "1x2x3", "1x0x8x4", "axbxcxd"])
def test_an_invalid_problem_is_rejected_with_its_text(text, capsys):
    with pytest.raises(SystemExit):
        scan.main(["--out=unused", "--problems", text])
    assert text in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="the TPU's compiler is installed"
)
def test_a_missing_compiler_is_reported():
    command = [sys.executable, "-m", "benchmarks.scan_compile", "--target=v5e", "--out=unused"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip install --no-deps libtpu" in done.stderr


def test_only_transposes_are_counted_as_copies():
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)

    def program(function):
        return jax.jit(function).lower(x).compile().as_text()

    assert scan_compile.whole_copies(program(lambda x: x.T.reshape(32, 8, 8)), 64 * 32) == 1
    assert scan_compile.whole_copies(program(lambda x: x.T.reshape(32, 8, 8)), 64 * 32 + 1) == 0
    assert scan_compile.whole_copies(program(lambda x: jnp.tanh(x) + 1), 64 * 32) == 0


def test_the_data_pipeline_reads_the_frames_of_its_reference(tmp_path):
    files = data.Files.write(tmp_path, 1, seconds=2.0)
    for kind, path in (("video", files.videos[0]), ("image", files.images[0])):
        ours = read_media(Media.file(kind, path), data.FRAMES, data.SIZE, 0.0)
        np.testing.assert_array_equal(ours.frames, data.decode_plain(str(path)))
    for kind in data.KINDS:
        seconds, samples = data.run_ours(files, files.source("image", kind), 0, 4)
        assert samples >= 4 and seconds > 0


@pytest.mark.slow
def test_shared_and_separate_videos_get_the_same_replies(tmp_path, capsys):
    """The benchmark itself compares the replies to two videos with two questions each."""
    eval_throughput.main(
        [
            f"--out={tmp_path}",
            "--videos=2",
            "--questions=2",
            "--frames=4",
            "--rounds=1",
            "--batch_size=2",
        ]
    )
    results = json.loads((tmp_path / "eval_throughput.json").read_text())
    assert results["ratio"] > 0 and len(results["ratio of each round"]) == 1
    assert set(results["questions a second"]) == {"shared", "not shared"}


def test_what_is_timed_is_what_the_predictor_runs(trained_run, shapes_folder, monkeypatch):
    """The same prompts and visual tokens, and the same first tokens."""
    prompts_of_call = []

    def record(programs, table, scenes, tokens, visual_index):
        visual = np.asarray(table)[scenes]
        is_used = (tokens != pad) | (visual_index >= 0)
        prompts_of_call.append(
            [
                (row[used].tolist(), rows[index[index >= 0]])
                for row, used, index, rows in zip(
                    tokens, is_used, visual_index, visual, strict=True
                )
            ]
        )
        return embed(programs, table, scenes, tokens, visual_index)

    embed, pad = Programs.embed, Run(trained_run).tokenizer().pad_token_id
    monkeypatch.setattr(Programs, "embed", record)
    samples = latency.video_questions(shapes_folder, 8)
    compression = CompressionConfig(num_frames=8, temporal_pool=2)
    tokens = latency.FirstTokens(trained_run, samples, compression)()
    predictor = Predictor(trained_run)
    expected = predictor.predict(samples, compression=compression, sampling=Sampling(1))
    texts = [prediction.text for _, prediction in sorted(expected, key=lambda pair: pair[0])]
    tokenizer = predictor.run.tokenizer()
    assert [tokenizer.decode([token]).strip() for token in tokens] == texts
    ours, theirs = prompts_of_call
    ours.sort(key=lambda prompt: len(prompt[0]))  # as the predictor does
    for (our_tokens, our_visual), (their_tokens, their_visual) in zip(ours, theirs, strict=False):
        assert our_tokens == their_tokens
        assert len(our_visual) == 4 * predictor.config.model.side**2
        np.testing.assert_allclose(our_visual, their_visual, rtol=1e-5, atol=1e-5)


@pytest.fixture
def evidence_of(trained_run, shapes_folder, tmp_path, monkeypatch):
    """Runs the evidence of two rows, without training, on a copy of a trained run."""
    run = link_run(trained_run, tmp_path / "run")
    tested = [dataclasses.replace(r, tests=("4x", "8x")) for r in rows.TABLES["budgets"][:2]]
    monkeypatch.setitem(rows.TABLES, "budgets", tested)
    monkeypatch.setitem(rows.TABLES, "mixers", [])
    monkeypatch.setattr(runs, "render", lambda *_: shapes_folder)
    monkeypatch.setattr(runs, "train", lambda *_: 36.0)
    monkeypatch.setattr(evidence, "folder", lambda *_: run)
    monkeypatch.setattr(latency, "BATCH", 8)
    monkeypatch.setattr(latency, "ROUNDS", 2)
    monkeypatch.setattr(evidence, "BUDGETS", {"4x": rows.BUDGETS["4x"]})
    return lambda *more: evidence.main([f"--out={tmp_path}", "--seeds=3", *more])


def test_evidence_is_recorded_once_and_shown(evidence_of, tmp_path, monkeypatch, capsys):
    evidence_of("--latency")
    records = json.loads((tmp_path / "results.json").read_text())
    keys = [(r["seed"], r["row"], r["budget"], r["visual_tokens"]) for r in records]
    assert keys == [
        (3, row, budget, tokens)
        for row in ("storm", "mlp")
        for budget, tokens in (("4x", 8), ("8x", 4))  # of 8 frames
    ]
    assert {record["training_hours"] for record in records} == {0.01}
    for record in records:
        assert all(0 <= right <= total > 0 for right, total in record["right"].values())
        for family, (right, total) in record["inside a group"].items():
            assert 0 <= right <= total <= record["right"][family][1]
    page = (tmp_path / "results.md").read_text()
    assert "| STORM, every budget | 1 | 600 | 0.01 |" in page
    timed = json.loads((tmp_path / "latency.json").read_text())["rounds of a clip"]
    assert [(row["row"], len(row["milliseconds"])) for row in timed] == [("storm", 2), ("mlp", 2)]
    for name in ("budgets.png", "accuracy_latency.png"):
        assert (tmp_path / name).stat().st_size > 1000
    monkeypatch.setattr(runs, "train", lambda *_: pytest.fail("trained again"))
    evidence_of()
    assert json.loads((tmp_path / "results.json").read_text()) == records
    with pytest.raises(SystemExit):
        evidence_of("--rows=storm;stom")
    assert "'stom' is not one of storm; mlp" in capsys.readouterr().err


def test_rows_train_with_the_compressions_that_they_name():
    every, baseline, only, *_ = rows.TABLES["budgets"]
    config = every.config("data", 3, 5)
    assert (config.train.seed, config.train.steps) == (3, 5)
    assert config.trained_compressions == tuple(map(rows.compression, rows.BUDGETS))
    assert baseline.config("data", 0, 5).model.mixer == "none"
    assert only.config("data", 0, 5).trained_compressions == (rows.compression("4x"),)


def test_mixers_differ_in_mixer_and_rate_and_have_as_many_parameters():
    names = {row.name: row for row in rows.TABLES["mixers"]}
    assert len(names) == len(rows.MIXERS) * len(rows.RATES) - 1  # one of them is STORM
    counts = {name: report.parameter_count(row.config("", 0, 1)) for name, row in names.items()}
    assert max(counts.values()) < 1.05 * min(counts.values())
    rates = {row.config("", 0, 1).optim.learning_rate.projector for row in names.values()}
    assert rates == set(rows.RATES)


def test_each_mixer_is_shown_with_its_best_rate():
    def record(row: str, right: int) -> dict:
        counts = {family: [right, 10] for family in rows.FAMILIES}
        return {"row": row, "budget": "4x", "right": counts}

    records = [
        record("storm", 6),
        record("Mamba-1 at 0.002", 7),
        record("attention over frames at 0.0005", 9),
        record("attention over frames at 0.001", 8),
    ]
    lines = report.mixer_table(records).splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines[:: len(rows.FAMILIES)]] == [
        ["| Mamba-1", "0.002"],
        ["| attention over frames", "0.0005"],
    ]
    assert "90.0%" in lines[-1]


def test_one_group_has_the_events_whose_frames_are_averaged_together():
    """Of 16 frames in groups of 4, an event of two frames straddles two groups in 3 of 15 places; dropped groups do not
    count."""
    settings = shapes.Settings(clips=1, seed=0, families=("order",), eval_clips=600)
    replies = [
        ScoredReply(
            Question(
                id=f"test-{index:06}", video="", media=Media(kind="video", name=""), text="", options=(),
                answer="", groups={},
            ),
            Prediction(), None,
        )
        for index in range(600)
    ]  # fmt: skip
    for budget, share in (
        ("1x", 0),
        ("4x", 12 / 15),
        ("2x", 8 / 15),
        ("8x", 6 / 15),
        ("16x", 3 / 15),
    ):
        found = runs._inside(replies, settings, rows.compression(budget))
        assert abs(len(found) / 600 - share) < 0.07, budget
