"""Small random models of every family that is imported whole: logits and greedy answers equal torch for images and
videos, with more pooling too, and added Mamba layers change nothing before they are trained."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import transformers
from families import (
    FAMILIES,
    QUESTIONS,
    LlavaOneVision,
    LlavaOriginal,
    SmolVLM,
    Vila,
    sample_of,
    write_media,
)
from family_checks import (
    differing_answers,
    import_family,
    logits_error,
    our_logits,
    run_config,
    their_logits,
)
from reference_models import edit_json

from storm_jax.config import LayoutConfig
from storm_jax.run import Run
from storm_jax.weights import WeightsError
from storm_jax.weights.importer import Sources, import_run

ROOT = pathlib.Path(__file__).parents[2]
MAX_ERROR = 1e-4
QUICK = ["NVILA (mlp_downsample_2x2_fix)", "LLaVA-OneVision", "LLaVA-Video (original)", "SmolVLM2"]
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.fixture
def media(tmp_path) -> pathlib.Path:
    return write_media(tmp_path / "media")


@pytest.mark.parametrize("family", CASES)
def test_packed_logits_equal_torch_and_an_added_mixer_changes_nothing(family, media, tmp_path):
    reference = FAMILIES[family](tmp_path / "model")
    samples = [sample_of(question, media) for question in QUESTIONS]
    found = our_logits(import_family(reference, tmp_path / "run"), samples)
    assert logits_error(found, their_logits(reference, samples)) <= MAX_ERROR
    if family != "LLaVA-Video (original)":
        pooled = our_logits(import_family(reference, tmp_path / "pooled", pool=3), samples)
        assert logits_error(pooled, their_logits(reference, samples, 3)) <= MAX_ERROR
    for mixer in ("mamba1",) if family == "SmolVLM2" else ():
        added = import_family(reference, tmp_path / mixer, add_mixer=mixer)
        assert any("projector/mixer/" in name for name in added.checkpoints.shapes(0))
        # Here programs are hardly optimised and differ in fusion; the table of docs/weights.md compares bits.
        assert logits_error(our_logits(added, samples), found) <= 1e-5


@pytest.mark.parametrize(
    "family",
    [
        name if name == "SmolVLM2" else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_greedy_answers_equal_torch(family, media, tmp_path):
    reference = FAMILIES[family](tmp_path / "model")
    run = import_family(reference, tmp_path / "run")
    # Each kind of question is a program to compile; the slow families ask all.
    questions = ["a ragged video"] if family == "SmolVLM2" else QUESTIONS
    samples = [sample_of(question, media) for question in questions]
    assert differing_answers(reference, run, samples) == []


def test_fields_come_from_the_folder_and_pooling_may_be_chosen(tmp_path):
    vila = Vila(tmp_path / "vila", "mlp_downsample_3x3_fix", (4, 1))
    config = import_family(vila, tmp_path / "run").config
    assert (config.model.stem.kind, config.model.stem.downsample) == ("mlp_downsample_3x3_fix", 3)
    assert (config.model.mixer, config.model.layout) == (
        "none",
        LayoutConfig(after_group="\n", trim=True),
    )
    assert (config.compression.temporal_pool, config.compression.spatial_pool) == (4, 1)
    assert import_family(vila, tmp_path / "2", pool=3).config.compression.temporal_pool == 3


def test_frames_and_their_rate_come_from_the_video_processor(tmp_path):
    config = import_family(SmolVLM(tmp_path / "model"), tmp_path / "run").config
    assert (config.compression.num_frames, config.data.frames.fps) == (8, 1.0)
    assert config.model.vision.final_norm and not config.model.stem.bias


@pytest.mark.parametrize(
    ("position", "merge", "expected"),
    [
        ("one_token", "spatial_unpad", (True, "clip")),
        pytest.param("one_token", "spatial", (False, "none"), marks=pytest.mark.slow),
        ("frame", "spatial_unpad", (True, "group")),
        pytest.param("no_token", "spatial_unpad", (True, "none"), marks=pytest.mark.slow),
        ("grid", "flat", (False, "none")),
    ],
)
def test_the_newline_of_the_original_llava(position, merge, expected, media, tmp_path):
    reference = LlavaOriginal(tmp_path / "model", "max", position, merge)
    run = import_family(reference, tmp_path / "run")
    layout = run.config.model.layout
    assert (layout.image_newline, layout.video_newline) == expected
    samples = [sample_of(question, media) for question in ("an image", "a ragged video")]
    assert logits_error(our_logits(run, samples), their_logits(reference, samples)) <= MAX_ERROR


def config_edit(**fields):
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(fields))


def make_vila(folder):
    return Vila(folder, "mlp_downsample_2x2_fix")


def make_llava(folder):
    return LlavaOriginal(folder, "average", "grid")


REFUSED = {
    "a missing part": (make_vila, lambda f: (f / "llm").rename(f / "lm"), "llm/ is missing"),
    "another projector": (
        make_vila,
        lambda f: edit_json(f / "mm_projector/config.json", lambda c: c.update(mm_projector_type="x")),
        "mm_projector_type='x' is not supported",
    ),
    "scales": (make_vila, config_edit(dynamic_s2=True), "dynamic_s2=True"),
    "two pools": (
        make_vila,
        config_edit(video_encoder='{"pool_sizes": [[8, 1, 1], [1, 2, 2]]}'),
        r"pool_sizes=\[\[8, 1, 1\], \[1, 2, 2\]\] is not supported",
    ),
    "no encoder": (
        make_vila, config_edit(video_encoder="null"), "video_encoder='null' is not a JSON object"
    ),
    "odd numbers": (
        make_vila,
        config_edit(num_video_frames="auto", mm_vision_select_layer="last"),
        r"num_video_frames='auto' must be .*\n.*mm_vision_select_layer='last' must be",
    ),
    "a pool of 0": (
        make_vila,
        config_edit(video_encoder='{"pool_sizes": [[0, 1, 1]]}'),
        r"pool_sizes=\[\[0, 1, 1\]\] is not supported",
    ),
    "another family": (make_vila, lambda f: (f / "config.json").write_text("{}"), "is no model of a known family"),
    "code": (
        make_vila,
        lambda f: (f / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoModel": "x.X"}}'),
        "model_type='x'; code in its folder is never run",
    ),
    "a list": (make_vila, lambda f: (f / "config.json").write_text("[]"), "is no model of a known family"),
    "a wrong size": (
        make_vila,
        lambda f: edit_json(f / "mm_projector/config.json", lambda c: c.update(mm_projector_type="mlp_downsample_3x3_fix")),
        "do not match the model",
    ),
    "two resolutions": (make_llava, config_edit(add_faster_video=True), "add_faster_video=True is not supported"),
    "another pool": (make_llava, config_edit(mm_spatial_pool_mode="mean"), "mm_spatial_pool_mode='mean' is not"),
    "another position": (make_llava, config_edit(mm_newline_position="two"), "mm_newline_position='two' is not"),
    "no tower": (make_llava, config_edit(mm_vision_tower="/nowhere"), "mm_vision_tower='/nowhere', which cannot be read"),
    "a quantized model": (
        make_llava, config_edit(quantization_config={"quant_method": "gptq"}), r"quantization_config \(gptq\)"
    ),
    "a wrong shape": (make_llava, config_edit(intermediate_size=40), "do not match the model"),
    "other features": (
        LlavaOneVision, config_edit(vision_feature_select_strategy="default"), "vision_feature_select_strategy='default'"
    ),
    "several layers": (LlavaOneVision, config_edit(vision_feature_layer=[-1, -2]), r"vision_feature_layer=\[-1, -2\]"),
    "a quantized tower": (
        LlavaOneVision, config_edit(quantization_config={"quant_method": "awq"}), r"quantization_config \(awq\)"
    ),
    "an odd factor": (SmolVLM, config_edit(scale_factor=3), "scale_factor=3 must divide the grid of 4 x 4"),
    "other tokens": (
        SmolVLM,
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text().replace("<global-img>", "<x>")),
        "tokenizer.json has no special token <global-img>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named_and_nothing_is_written(case, tmp_path):
    make, damage, problem = REFUSED[case]
    folder = make(tmp_path / "model").folder
    damage(folder)
    with pytest.raises(WeightsError, match=problem):
        import_run(run_config(), Sources(model=str(folder)), tmp_path / "out/run")
    assert not (tmp_path / "out/run").exists()


@pytest.mark.slow
def test_one_command_imports_it_and_another_asks_it(media, tmp_path):
    folder = Vila(tmp_path / "vila", "mlp_downsample_2x2_fix").folder
    commands = [
        ["-m", "storm_jax.weights", "import", f"--model={folder}", f"--out={tmp_path}/run"],
        ["predict.py", f"--workdir={tmp_path}/run", f"--video={media}/clip", "--question=Why?",
         "--max_new_tokens=4"],
    ]  # fmt: skip
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
    assert Run(tmp_path / "run").config.data.train == ()


def test_tokens_without_an_embedding_are_left_out(tmp_path):
    vila = make_vila(tmp_path / "vila")
    stored = transformers.AutoTokenizer.from_pretrained(tmp_path / "vila/llm")
    tokenizer = import_family(vila, tmp_path / "run").tokenizer()
    size = vila.decoder.config.vocab_size
    assert len(stored) > size >= len(tokenizer)
    kept = {token: i for token, i in stored.get_vocab().items() if i < size}
    assert tokenizer.get_vocab() == kept
    assert max(tokenizer.encode("<vila/video> <vila/3>")) < size


def test_a_llama_based_vila_is_refused(tmp_path):
    vila = make_vila(tmp_path / "vila")
    edit_json(vila.folder / "llm/config.json", lambda c: c.update(model_type="llama"))
    with pytest.raises(WeightsError, match="model_type='llama' is not supported: the folder does"):
        import_family(vila, tmp_path / "run")
