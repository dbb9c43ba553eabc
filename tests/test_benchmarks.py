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
from benchmarks.evidence import latency, report, rows, runs, scores
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
    eight = {
        name: dataclasses.replace(compression, num_frames=8)
        for name, compression in rows.BUDGETS.items()
    }
    monkeypatch.setattr(runs, "COMPRESSIONS", eight)
    monkeypatch.setattr(latency, "COMPRESSIONS", eight)
    steps = Run(trained_run).checkpoints.resolve(None)
    tested = [
        dataclasses.replace(row, tests=("4x", "8x"), steps=steps)
        for row in (rows.STORM, rows.BASELINE)
    ]
    monkeypatch.setattr(evidence, "ROWS", {row.name: row for row in tested})
    monkeypatch.setattr(runs, "render", lambda *_: shapes_folder)
    monkeypatch.setattr(runs, "train", lambda *_: 36.0)
    monkeypatch.setattr(runs, "folder", lambda *_: run)
    monkeypatch.setattr(latency, "BATCH", 8)
    monkeypatch.setattr(latency, "ROUNDS", 2)
    monkeypatch.setattr(evidence, "TIMED", ("4x",))
    monkeypatch.setattr(report, "mixer_cost_table", lambda: "")  # slow, and tested below
    return lambda *more: evidence.main([f"--out={tmp_path}", "--seeds=3", *more])


def test_evidence_is_recorded_once_and_shown(evidence_of, tmp_path, monkeypatch, capsys):
    evidence_of("--latency")
    records = json.loads((tmp_path / "results.json").read_text())
    keys = [(r["seed"], r["row"], r["test"], r["visual_tokens"]) for r in records]
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
    assert "| STORM, every budget | 1 | 2 | 0.01 |" in page
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


def test_rows_train_with_the_compressions_that_they_name(tmp_path):
    config = rows.STORM.config(tmp_path, 3)
    assert (config.train.seed, config.train.steps) == (3, rows.STORM.steps)
    assert config.trained_compressions == tuple(rows.BUDGETS.values())
    assert rows.BASELINE.config(tmp_path, 0).model.mixer == "none"
    only = rows.specialist("4x").config(tmp_path, 0)
    assert only.trained_compressions == (rows.BUDGETS["4x"],)
    assert rows.FORWARD.config(tmp_path, 0).model.mamba.direction == "forward"


def test_readers_of_long_clips_start_from_the_row_for_short_ones(tmp_path):
    for start in (rows.STORM, rows.BASELINE):
        for read, compression in rows.READS.items():
            row = rows.reader(start, read)
            config = row.config(tmp_path / "data", 0, tmp_path / "start")
            assert (row.start, config.init_from) == (start.name, str(tmp_path / "start"))
            assert config.model == start.config(tmp_path, 0).model
            assert compression in config.trained_compressions
            assert config.unsampled.num_frames == compression.num_frames
            clips = config.data.rows[0].frames // compression.num_frames
            assert clips * config.train.batch_size == 8  # each step, of every row


def test_reads_of_long_clips_have_equal_numbers_of_tokens():
    assert {scores.visual_tokens(read) for read in rows.READS} == {32}


def test_names_of_rows_are_unique():
    assert len(rows.ROWS) == sum(map(len, rows.TABLES.values()))


def test_cost_of_a_token_grows_with_the_clip_only_in_attention_over_frames():
    def growth(mixer: str) -> float:
        model = report._config(rows.mixer_row(mixer, rows.STORM.rate)).model
        short, long = (report.mixer_flops(model, frames) for frames in (16, 64))
        return long / short

    assert growth("attention over frames") > 1.2
    assert growth("convolution over frames") == pytest.approx(1, abs=0.01)
    assert growth("Mamba-1") == pytest.approx(1, abs=0.01)


def test_mixers_take_as_many_flops_as_mamba():
    """Of the whole model, in a clip of 16 frames; Mamba-2 takes more."""
    forward = report.forward_flops(report._config(rows.STORM), "1x")
    costs = {
        mixer: report.mixer_flops(report._config(rows.mixer_row(mixer, rows.STORM.rate)).model, 16)
        for mixer in rows.MIXERS
    }
    for mixer in set(costs) - {"Mamba-2"}:
        assert abs(64 * (costs[mixer] - costs["Mamba-1"])) < 0.05 * forward, mixer


def test_mixers_differ_in_mixer_and_rate_and_have_as_many_parameters(tmp_path):
    mixers = rows.TABLES["mixers"]
    assert len(mixers) == len(rows.MIXERS) * len(rows.RATES) - 1  # one of them is STORM
    configs = [row.config(tmp_path, 0) for row in mixers]
    counts = [report.parameter_count(config) for config in configs]
    assert max(counts) < 1.05 * min(counts)
    assert {config.optim.learning_rate.projector for config in configs} == set(rows.RATES)


def record(row: str, test: str, right: int, seed: int = 0) -> dict:
    """One with 10 questions of every family."""
    families = ("order", "motion", "needle", "place", "apart")
    counts = {family: [right, 10] for family in families}
    return {"row": row, "seed": seed, "test": test, "right": counts}


def test_each_mixer_is_shown_with_its_best_rate():
    records = [
        record("storm", "4x", 6),
        record("Mamba-1 at 0.001", "4x", 7),
        record("storm", "4x", 10, seed=1),  # the first seed decides
        record("attention over frames at 0.00025", "4x", 9),
        record("attention over frames at 0.001", "4x", 8),
    ]
    lines = [line.strip("| ").split(" | ") for line in report.mixer_table(records).splitlines()[2:]]
    assert [[mixer, rate] for mixer, _, rate, *_ in lines[::3]] == [
        ["Mamba-1", "0.001"],
        ["attention over frames", "0.00025"],
    ]
    assert "90.0%" in lines[-1]
    rates = report.rate_table(records)
    assert "| Mamba-1 | - | 60.0% | 70.0% |" in rates
    assert "| no mixing | - | - | - |" in rates


def test_rates_of_a_mixer_are_compared_with_one_seed_and_the_best_is_trained_with_more(
    tmp_path, monkeypatch
):
    right = {"no mixing at 0.00025": 3, "no mixing at 0.0005": 5, "no mixing at 0.001": 4}
    names = [rows.STORM.name, *right]
    trained = []

    def tested(row, seed, out):
        trained.append((row.name, seed))
        for test in row.tests:
            yield record(row.name, test, right.get(row.name, 1), seed)

    monkeypatch.setattr(runs, "train", lambda *_: 1.0)
    monkeypatch.setattr(runs, "test", tested)
    monkeypatch.setattr(report, "write", lambda *_: (tmp_path / "results.md").write_text(""))
    command = [f"--out={tmp_path}", f"--rows={';'.join(names)}"]
    evidence.main([*command, "--seeds=1,0"])
    expected = [(name, 0) for name in names] + [("storm", 1), ("no mixing at 0.0005", 1)]
    assert trained == expected
    evidence.main([*command, "--seeds=2"])
    assert trained[len(expected) :] == [("storm", 2), ("no mixing at 0.0005", 2)]


@pytest.mark.parametrize(("budget", "frames"), [("4x", 16), ("8x", 12), ("16x", 4)])
def test_a_forward_scan_sees_events_that_begin_before_the_last_kept_group_ends(budget, frames):
    """Other colours are guessed: of all possible pairs and flashes, with the spread of 200 clips."""
    for family, starts in (("order", 15), ("needle", 16)):
        seen = min(frames, starts) / starts
        limit = scores.forward_limit(family, rows.BUDGETS[budget])
        assert limit == pytest.approx(seen + (1 - seen) / 4, abs=0.08), family


def test_gain_is_shown_for_each_number_of_frames():
    records = [
        record(f"{start}, {read}", read, right)
        for start, read, right in (
            ("storm", "8 frames", 3),
            ("mlp", "8 frames", 3),
            ("storm", "128 frames, 16x", 10),
            ("mlp", "128 frames, 16x", 4),
        )
    ]
    lines = report.frames_table(records).splitlines()[2:]
    gains = {tuple(line.split(" | ")[:2]): line.split(" | ")[-1].rstrip(" |") for line in lines}
    assert gains["| apart", "8 frames"] == "+0.0"
    assert gains["| apart", "128 frames, 16x"] == "+60.0"
    assert gains["| apart", "128 frames, 4x"] == "-"


def test_one_group_has_the_events_whose_frames_are_averaged_together():
    """And not those that straddle two groups, or whose group is dropped."""
    settings = shapes.Settings(clips=1, seed=0, families=("order",), eval_clips=100)
    replies = [
        ScoredReply(
            Question(
                id=f"test-{index:06}", video="", media=Media(kind="video", name=""), text="", options=(),
                answer="", groups={},
            ),
            Prediction(), None,
        )
        for index in range(100)
    ]  # fmt: skip
    firsts = [
        next(t for t, label in enumerate(shapes.event_of(settings, "test", index).labels) if label)
        for index in range(100)
    ]
    for budget, pool, sample in (
        ("1x", 1, 1),
        ("2x", 2, 1),
        ("4x", 4, 1),
        ("8x", 4, 2),
        ("16x", 4, 4),
    ):
        expected = [
            reply
            for reply, first in zip(replies, firsts, strict=True)
            if first // pool == (first + 1) // pool and first // pool % sample == 0
        ]
        assert runs._inside(replies, settings, rows.BUDGETS[budget]) == expected, budget
        assert expected or budget == "1x"
