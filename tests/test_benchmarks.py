"""Benchmarks: the methods that they compare compute the same results."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accuracy_latency, data, eval_throughput, scan, scan_compile
from benchmarks import shapes as shapes_benchmark
from storm_jax.config import CompressionConfig
from storm_jax.inference.generate import Sampling
from storm_jax.inference.predictor import Predictor
from storm_jax.inference.programs import Programs
from storm_jax.media.media import Media
from storm_jax.media.read import read_media
from storm_jax.ops.selective_scan import IMPLEMENTATIONS, KERNELS, selective_scan
from storm_jax.run import Run


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
    samples = shapes_benchmark.video_questions(shapes_folder, 8)
    compression = CompressionConfig(num_frames=8, temporal_pool=2)
    tokens = accuracy_latency.FirstTokens(trained_run, samples, compression)()
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


def test_accuracy_against_latency_of_trained_runs(
    trained_run, shapes_folder, tmp_path, monkeypatch
):
    accuracies = dict.fromkeys(shapes_benchmark.FAMILIES, 0.5)
    monkeypatch.setattr(shapes_benchmark, "render", lambda *_: shapes_folder)
    monkeypatch.setattr(shapes_benchmark, "train", lambda *_: None)
    monkeypatch.setattr(shapes_benchmark, "evaluate", lambda *_: accuracies)
    monkeypatch.setattr(shapes_benchmark, "run_folder", lambda *_: trained_run)
    monkeypatch.setattr(shapes_benchmark, "BATCH", 8)
    monkeypatch.setattr(shapes_benchmark, "ROUNDS", 2)
    drawn = []
    monkeypatch.setattr(shapes_benchmark, "plot", lambda points, path: drawn.extend(points))
    shapes_benchmark.main(
        [f"--out={tmp_path}", "--seeds=0,1", "--projectors=storm", "--settings=4x,spatial"]
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["accuracy"]) == 2 * 2
    timed = results["latency"]["milliseconds a clip"]
    assert [(row["setting"], len(row["rounds"])) for row in timed] == [("4x", 2), ("spatial 4x", 2)]
    assert "STORM ms a clip" in (tmp_path / "results.md").read_text()
    assert [(point.setting, point.visual_tokens, point.is_spatial) for point in drawn] == [
        ("4x", 16, False),
        ("spatial 4x", 16, True),
    ]
    for point, row in zip(drawn, timed, strict=True):
        assert point.accuracies == {key: [0.5, 0.5] for key in ("order", "motion", "needle")}
        assert point.milliseconds()[1] == pytest.approx(row["median"], abs=1e-4)
    accuracy_latency.plot(drawn, tmp_path / "accuracy_latency.png")
    assert (tmp_path / "accuracy_latency.png").stat().st_size > 1000
