"""The one folder for PyTorch: prompts, pixels, logits and greedy tokens of the exported model equal ours."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from exported_runs import CASES, SLOW, random_run
from PIL import Image
from reference_models import encoder_of, packed_logits

from storm_jax.compression import plan_clip
from storm_jax.config import RunConfig
from storm_jax.data.rows import RowSample
from storm_jax.media.frames import Clip
from storm_jax.media.media import Media
from storm_jax.media.read import count_frames, read_media
from storm_jax.text.conversation import Encoded
from storm_jax.text.sample import Sample, Turn
from storm_jax.weights.exporter import export_run

MAX_ERROR, NEW = 1e-3, 12
QUESTIONS = {
    "an image": ["<image>\nWhat colour?"],
    "two images": ["<image>\n<image>\nWhich?"],
    "a video": ["<video>\nWhy?"],
    "a file": ["<video>\nWhat, red?", "So, green.", "And then?"],
    "a video and an image": ["<video>\nLike <image>\nthis?"],
    "a short video": ["<video>\nWhat?"],
    "text": ["What colour was the flash?"],
}


@pytest.fixture(scope="module")
def media(tmp_path_factory, encode_video) -> dict[str, list[Media]]:
    """Media of each question: images of several kinds and sizes, folders of frames, a file."""
    root, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(5)

    def picture(name: str, channels: int, height: int, width: int) -> pathlib.Path:
        (root / name).parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
        Image.fromarray(pixels.squeeze()).save(root / name)
        return root / name

    pictures = [
        picture("a.png", 4, 50, 30),
        picture("b.jpg", 3, 20, 64),
        picture("c.png", 1, 40, 40),
    ]
    for i in range(5):
        picture(f"clip/{i}.png", 3, 48, 36)
    picture("short/0.png", 3, 40, 50)
    frames = rng.integers(0, 256, (19, 48, 64, 3), np.uint8)
    stamps = np.cumsum(rng.integers(1, 5, 19))
    encode_video(root / "film.mp4", frames, pts=stamps.tolist())
    images = [Media.file("image", path) for path in pictures]
    clip, short, film = (Media.file("video", root / name) for name in ("clip", "short", "film.mp4"))
    return {
        "an image": images[:1],
        "two images": images[1:],
        "a video": [clip],
        "a file": [film],
        "a video and an image": [film, images[0]],
        "a short video": [short],
        "text": [],
    }


def sample_of(question: str, media: dict[str, list[Media]]) -> Sample:
    roles = ("user", "assistant", "user")
    turns = tuple(Turn(role, text) for role, text in zip(roles, QUESTIONS[question], strict=False))
    return Sample(id=question, turns=turns, media=tuple(media[question]), extra={})


def clips_of(config: RunConfig, sample: Sample) -> list[Clip]:
    size, limit = config.model.vision.image_size, config.compression.num_frames
    counts = [count_frames(medium, limit, config.data.frames) for medium in sample.media]
    return [read_media(m, n, size, 0.0) for m, n in zip(sample.media, counts, strict=True)]


def conversation_of(sample: Sample, stripped: bool) -> list[dict[str, Any]]:
    """The sample as messages of parts, with the paths of its media; `stripped` of the spaces around them."""
    media = iter(sample.media)
    messages = []
    for turn in sample.turns:
        first, *rest = re.split(r"<(image|video)>\n", turn.text)
        if stripped:
            first, rest = first.strip() if rest else first, [text.strip() for text in rest]
        parts = [{"type": "text", "text": first}] if first else []
        for kind, text in zip(rest[::2], rest[1::2], strict=True):
            parts.append({"type": kind, kind: content_of(next(media))})
            parts += [{"type": "text", "text": text}] if text else []
        messages.append({"role": turn.role, "content": parts})
    return messages


def content_of(medium: Media) -> Any:
    """A path, or the images of a folder."""
    if not medium.is_folder():
        return str(medium.path)
    return [Image.open(path) for path in sorted(medium.path.iterdir())]


def extended(encoded: Encoded, tokens: list[int]) -> Encoded:
    count = len(tokens)
    return Encoded(
        np.append(encoded.tokens, np.array(tokens, np.int32)),
        np.append(encoded.answer, np.zeros(count, bool)),
        np.append(encoded.media, np.full(count, -1, np.int32)),
    )


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW or name == "mamba2" else name
        for name in CASES | SLOW
    ],
)
def test_ids_pixels_logits_and_greedy_tokens_are_ours(case, media, tmp_path):
    family, changes = (CASES | SLOW)[case]
    run = random_run(tmp_path / "run", family, **changes)
    out = tmp_path / "out"
    export_run(run, out, form="hf")
    model = transformers.AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(out, trust_remote_code=True)
    encoder, config = encoder_of(run), run.config
    rows, expected, prompts, answers = [], [], [], {}
    for question in QUESTIONS:
        sample = sample_of(question, media)
        clips = clips_of(config, sample)
        encoded = encoder.encode(sample, [clip.times for clip in clips])
        inputs = processor.apply_chat_template(
            conversation_of(sample, family == "parts"),
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
        )
        ids = inputs["input_ids"][0].numpy()
        of_image, of_video = (
            ids == i for i in (processor.image_token_id, processor.video_token_id)
        )
        np.testing.assert_array_equal(of_image | of_video, encoded.media >= 0)
        is_text = encoded.media < 0
        np.testing.assert_array_equal(ids[is_text], encoded.tokens[is_text])
        counts = [
            plan_clip(len(c.frames), encoder.grid, config.compression).num_tokens for c in clips
        ]
        assert counts == np.bincount(encoded.media + 1, minlength=len(clips) + 1)[1:].tolist()
        videos = [c for m, c in zip(sample.media, clips, strict=True) if m.kind == "video"]
        for found, clip in zip(inputs.get("pixel_values_videos", []), videos, strict=True):
            pixels = clip.frames.astype(np.float32) / 127.5 - 1.0
            np.testing.assert_array_equal(found.permute(0, 2, 3, 1).numpy(), pixels)
        with torch.no_grad():
            prompt_logits = model(**inputs).logits[0]
            if config.model.mixer != "none" and sample.media:  # it matters
                projector = model.model.projector
                layers, projector.layers = projector.layers, torch.nn.ModuleList()
                changed = (model(**inputs).logits[0] - prompt_logits).abs().max()
                projector.layers = layers
                assert changed > 100 * MAX_ERROR
            done = model.generate(
                **inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=[10**6], output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        answers[question] = new = done.sequences[0, len(ids) :]
        logits = torch.cat([prompt_logits, *done.logits[1:]]).numpy()
        expected.append(logits[:, : config.model.decoder.vocab_size])
        frames = [clip.frames for clip in clips]
        rows.append(RowSample(extended(encoded, new.tolist()), frames, config.compression))
        prompts.append(len(ids))
    for found, theirs, start, question in zip(
        packed_logits(run, rows), expected, prompts, QUESTIONS, strict=True
    ):
        found = found[:-1]  # what follows the last token is not asked
        assert np.abs(found - theirs).max() < MAX_ERROR < np.abs(found).max(), question
        greedy = found[start - 1 :].argmax(axis=1)  # of our model, after the same tokens
        np.testing.assert_array_equal(greedy, answers[question])
