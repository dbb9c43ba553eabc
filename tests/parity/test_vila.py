"""A small random NVILA: logits and greedy answers of the imported model equal a torch reference written from its
public description, for images and videos, and added Mamba layers change nothing before they are trained."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from reference_models import (
    config_for,
    edit_json,
    load_model,
    make_decoder,
    make_tower,
    randomised,
    save,
)
from rows_by_hand import build_rows
from safetensors.torch import save_file
from torch import nn

import storm_jax
from storm_jax.compression import Grid
from storm_jax.config import RunConfig
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.rows import RowSample, RowShape
from storm_jax.inference.generate import Sampling
from storm_jax.media.media import Media
from storm_jax.models.storm import VisualShape
from storm_jax.run import Run
from storm_jax.text.conversation import ConversationEncoder
from storm_jax.text.sample import Sample, Turn
from storm_jax.weights import WeightsError
from storm_jax.weights.importer import Sources, import_run

ROOT = pathlib.Path(__file__).parents[2]
SIZE, NEW, MAX_ERROR = 56, 32, 1e-4
KINDS = {"mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3, "mlp_downsample": 2, "linear": 1}
QUESTIONS = {
    "an image": ("<image>\nWhat colour?", ["a.png"]),
    "two images": ("<image>\n<image>\nWhich?", ["a.png", "b.png"]),
    "a video": ("<video>\nWhy?", ["clip"]),
    "a ragged video": ("<video>\nWhy?", ["short"]),
}


class Downsample(nn.Module):
    """Concatenates the features of r x r patches; zeros fill odd grids at the bottom and right."""

    def __init__(self, r: int):
        super().__init__()
        self.r = r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side, r = round(x.shape[1] ** 0.5), self.r
        rest = -side % r
        x = nn.functional.pad(x.reshape(len(x), side, side, -1), (0, 0, 0, rest, 0, rest))
        cells = x.unfold(1, r, r).unfold(2, r, r)  # [F, S, S, C, r, r]
        return cells.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)


def projector(kind: str, inputs: int, width: int) -> nn.Module:
    r = KINDS[kind]
    merged = inputs * r * r
    layers: list[nn.Module] = [Downsample(r), nn.LayerNorm(merged)]
    if kind == "linear":
        return nn.Linear(inputs, width)
    if r == 3:
        layers += [nn.Linear(merged, inputs * 3), nn.GELU(), nn.LayerNorm(inputs * 3)]
        merged = inputs * 3
    return nn.Sequential(*layers, nn.Linear(merged, width), nn.GELU(), nn.Linear(width, width))


@dataclasses.dataclass
class Vila:
    """The torch reference, and its folder."""

    folder: pathlib.Path
    tower: nn.Module
    projector: nn.Module
    decoder: nn.Module
    pool: tuple[int, int]

    def group_features(self, frames: np.ndarray) -> torch.Tensor:
        """Embeddings [G, N, D] of the pooled groups of uint8 [T, H, W, 3]."""
        pixels = torch.from_numpy((frames / 255.0 - 0.5) / 0.5).float().permute(0, 3, 1, 2)
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        x = self.projector(hidden)
        if len(frames) == 1:
            return x
        time, space = self.pool
        groups = torch.stack([part.mean(0) for part in x.split(time)])
        side = round(groups.shape[1] ** 0.5)
        cells = groups.reshape(len(groups), side, side, -1).permute(0, 3, 1, 2)
        pooled = nn.functional.avg_pool2d(cells, space, ceil_mode=True, count_include_pad=False)
        return pooled.flatten(2).transpose(1, 2)

    def inputs(self, text: str, clips: list[np.ndarray], tokenizer) -> torch.Tensor:
        """Embeddings [1, S, D] of a prompt; a newline follows every image and pooled frame."""
        embed = self.decoder.get_input_embeddings()

        def words(piece: str) -> torch.Tensor:
            return embed(torch.tensor(tokenizer.encode(piece, add_special_tokens=False)))

        pieces = text.replace("<video>", "<image>").split("<image>")
        parts = [words(pieces[0])]
        for piece, frames in zip(pieces[1:], clips, strict=True):
            for group in self.group_features(frames):
                parts += [group, words("\n")]
            parts.append(words(piece))
        return torch.cat(parts)[None]


def make_vila(folder: pathlib.Path, kind: str, pool: tuple[int, int] = (2, 1)) -> Vila:
    tower, decoder = make_tower(image_size=SIZE), make_decoder("qwen2")
    project = randomised(projector(kind, 24, 56), seed=1)
    save(tower, folder / "vision_tower")
    save(decoder, folder / "llm", "qwen2")
    (folder / "mm_projector").mkdir()
    tensors = {f"layers.{name}": value for name, value in project.state_dict().items()}
    save_file(tensors, folder / "mm_projector/model.safetensors")
    (folder / "mm_projector/config.json").write_text(
        json.dumps({"model_type": "v2l_projector", "mm_projector_type": kind})
    )
    encoder = {
        "_target_": "llava.model.encoders.TSPVideoEncoder",
        "pool_sizes": [[pool[0], pool[1], pool[1]]],
    }
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llava_llama", "llm_cfg": {}, "vision_tower_cfg": {},
                "mm_projector_cfg": {}, "mm_vision_select_layer": None, "num_video_frames": 8, "fps": 0.0,
                "mm_vision_select_feature": "cls_patch", "image_aspect_ratio": "resize",
                "image_encoder": '{"_target_": "llava.model.encoders.BasicImageEncoder"}',
                "video_encoder": json.dumps(encoder),
            }
        )
    )  # fmt: skip
    return Vila(folder, tower, project, decoder, pool)


VILAS = {
    "mlp_downsample_2x2_fix": (2, 1), "mlp_downsample_3x3_fix": (8, 2), "linear": (3, 2),
}  # fmt: skip
FIRST, *REST = VILAS
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in REST]


@pytest.fixture
def media(tmp_path) -> pathlib.Path:
    """Images and folders of frames, of the tower's size, so that they are read as they are."""
    rng = np.random.default_rng(5)
    folder = tmp_path / "media"
    for name in ("a.png", "b.png", *(f"clip/{i}.png" for i in range(8)), *(f"short/{i}.png" for i in range(5))):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(folder / name)
    return folder


def frames_of(path: pathlib.Path) -> np.ndarray:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return np.stack([np.asarray(Image.open(file)) for file in files])


def sample_of(question: str, media: pathlib.Path) -> tuple[Sample, list[np.ndarray]]:
    text, names = QUESTIONS[question]
    kind = "video" if "<video>" in text else "image"
    turns = (Turn("user", text), Turn("assistant", "red\nand green"))
    clips = [frames_of(media / name) for name in names]
    files = tuple(
        dataclasses.replace(Media.file(kind, media / name), nframes=len(clip))
        for name, clip in zip(names, clips, strict=True)
    )
    return Sample(id=question, turns=turns, media=files, extra={}), clips


def run_config() -> RunConfig:
    return config_for(
        model__vision__image_size=28,  # the tower's own is taken
        model__dtype="float32",
        compression__num_frames=8,
        data__rows=[{"tokens": 512, "frames": 16}],
    )


def our_logits(run: Run, samples: list[tuple[Sample, list[np.ndarray]]]) -> list[np.ndarray]:
    """Logits of samples packed into one row."""
    config = run.config
    encoder = SampleEncoder(
        text=ConversationEncoder(run.tokenizer(), config.data.system), grid=Grid.of(config.model),
        compression=config.compression, frames=config.data.frames, layout=config.model.layout,
    )  # fmt: skip
    encoded = [encoder.encode(s, [np.arange(len(c)) * 1.0 for c in clips]) for s, clips in samples]
    for (sample, clips), found in zip(samples, encoded, strict=True):
        assert len(encoder.plan(sample, [len(clip) for clip in clips])) >= len(found)
    shape = RowShape(
        tokens=1600,
        frames=32,
        image_size=SIZE,
        grid=Grid.of(config.model),
        compression=config.compression,
    )
    rows = [RowSample(e, clips) for e, (_, clips) in zip(encoded, samples, strict=True)]
    batch = {k: jnp.asarray(v) for k, v in build_rows([rows], 0, shape).items()}
    model = load_model(run.path)
    visual = VisualShape(shape.num_groups, config.compression.spatial_pool)
    hidden = nnx.jit(lambda model, batch: model(batch, visual) @ model.decoder.head())(model, batch)
    ends = np.cumsum([len(e) for e in encoded])
    return np.split(np.asarray(hidden[0][: ends[-1]]), ends[:-1])


def their_logits(vila: Vila, sample: Sample, clips: list[np.ndarray], tokenizer) -> np.ndarray:
    messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    with torch.no_grad():
        return vila.decoder(inputs_embeds=vila.inputs(text, clips, tokenizer)).logits[0].numpy()


@pytest.mark.parametrize("kind", VILAS)
def test_packed_logits_equal_torch_and_an_added_mixer_changes_nothing(kind, media, tmp_path):
    vila = make_vila(tmp_path / "vila", kind, VILAS[kind])
    import_run(run_config(), Sources(model=str(vila.folder)), tmp_path / "run")
    run = Run(tmp_path / "run")
    samples = [sample_of(question, media) for question in QUESTIONS]
    found = our_logits(run, samples)
    for (sample, clips), logits in zip(samples, found, strict=True):
        expected = their_logits(vila, sample, clips, run.tokenizer())
        # The last newline of the template is no part of our rows.
        assert 0 <= len(expected) - len(logits) <= 2
        error = np.abs(logits - expected[: len(logits)]).max()
        assert error <= MAX_ERROR * np.abs(expected).max() < np.inf, sample.id
    for mixer in ("mamba1", "mamba2") if kind == FIRST else ():
        config = run_config()
        mamba = dataclasses.replace(config.model.mamba, head_dim=16)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, mamba=mamba))
        import_run(config, Sources(model=str(vila.folder)), tmp_path / mixer, add_mixer=mixer)
        added = Run(tmp_path / mixer)
        assert any("projector/mixer/" in name for name in added.checkpoints.shapes(0))
        for with_mixer, without in zip(our_logits(added, samples), found, strict=True):
            np.testing.assert_allclose(with_mixer, without, atol=1e-4)  # fused differently


@pytest.mark.parametrize("kind", [FIRST, *SLOW])
def test_greedy_answers_equal_torch(kind, media, tmp_path):
    vila = make_vila(tmp_path / "vila", kind, VILAS[kind])
    import_run(run_config(), Sources(model=str(vila.folder)), tmp_path / "run")
    storm = storm_jax.load(tmp_path / "run")
    tokenizer = storm.run.tokenizer()
    questions = list(QUESTIONS) if kind != FIRST else ["two images", "a video"]
    samples = [sample_of(question, media) for question in questions]
    answered = dict(storm.predict([s.prompt() for s, _ in samples], sampling=Sampling(NEW)))
    for index, (sample, clips) in enumerate(samples):
        messages = [{"role": "user", "content": sample.turns[0].text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = vila.inputs(text, clips, tokenizer)
        with torch.no_grad():
            ids = vila.decoder.generate(
                inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2]), do_sample=False,
                max_new_tokens=NEW, pad_token_id=0,
                eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]),
            )[0]  # fmt: skip
        assert answered[index].error == ""
        assert answered[index].text == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_fields_come_from_the_folder_and_pooling_may_be_chosen(tmp_path):
    vila = make_vila(tmp_path / "vila", "mlp_downsample_3x3_fix", (4, 1))
    config = import_run(run_config(), Sources(model=str(vila.folder)), tmp_path / "run")
    assert (config.model.stem.kind, config.model.stem.downsample) == ("mlp_downsample_3x3_fix", 3)
    assert (config.model.mixer, config.model.layout.after_group) == ("none", "\n")
    assert (config.compression.temporal_pool, config.compression.spatial_pool) == (4, 1)
    chosen = run_config()
    config = import_run(
        chosen,
        Sources(model=str(vila.folder)),
        tmp_path / "2",
        explicit=["compression.temporal_pool"],
    )
    assert config.compression.temporal_pool == chosen.compression.temporal_pool


REFUSED = {
    "a missing part": (lambda f: (f / "llm").rename(f / "lm"), "llm/ is missing"),
    "another projector": (
        lambda f: edit_json(f / "mm_projector/config.json", lambda c: c.update(mm_projector_type="x")),
        "mm_projector_type='x' is not supported",
    ),
    "scales": (lambda f: edit_json(f / "config.json", lambda c: c.update(dynamic_s2=True)), "dynamic_s2=True"),
    "two pools": (
        lambda f: edit_json(
            f / "config.json", lambda c: c.update(video_encoder='{"pool_sizes": [[8, 1, 1], [1, 2, 2]]}')
        ),
        r"pool_sizes=\[\[8, 1, 1\], \[1, 2, 2\]\] is not supported",
    ),
    "no encoder": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(video_encoder="null")),
        "video_encoder='null' is not a JSON object",
    ),
    "odd numbers": (
        lambda f: edit_json(
            f / "config.json",
            lambda c: c.update(num_video_frames="auto", mm_vision_select_layer="last"),
        ),
        r"num_video_frames='auto' must be .*\n.*mm_vision_select_layer='last' must be",
    ),
    "a pool of 0": (
        lambda f: edit_json(
            f / "config.json", lambda c: c.update(video_encoder='{"pool_sizes": [[0, 1, 1]]}')
        ),
        r"pool_sizes=\[\[0, 1, 1\]\] is not supported",
    ),
    "another family": (lambda f: (f / "config.json").write_text("{}"), "is no model of a known family"),
    "a wrong size": (
        lambda f: edit_json(f / "mm_projector/config.json", lambda c: c.update(mm_projector_type="mlp_downsample_3x3_fix")),
        "do not match the model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named_and_nothing_is_written(case, tmp_path):
    vila = make_vila(tmp_path / "vila", "mlp_downsample_2x2_fix")
    damage, problem = REFUSED[case]
    damage(vila.folder)
    with pytest.raises(WeightsError, match=problem):
        import_run(run_config(), Sources(model=str(vila.folder)), tmp_path / "out/run")
    assert not (tmp_path / "out/run").exists()


def test_one_command_imports_it_and_another_asks_it(media, tmp_path):
    vila = make_vila(tmp_path / "vila", "mlp_downsample_2x2_fix")
    commands = [
        ["-m", "storm_jax.weights", "import", f"--model={vila.folder}", f"--out={tmp_path}/run"],
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
