"""Damaged records of annotation files."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from typing import Any

import numpy as np

from storm_jax.compression import Grid
from storm_jax.config import CompressionConfig, SourceConfig
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.sources import open_source
from storm_jax.media.read import read_media
from storm_jax.text.bpe import train_tokenizer
from storm_jax.text.conversation import ConversationEncoder
from tests.fuzz.damage import damage_bytes, outcome_of
from tests.fuzz.media import FRAMES, write_media

ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 3, 1.5, -2.5, 10**18, 10**400, float("nan"), float("inf"), "", " ", "a",
    "human", "gpt", "system", "<video>", "<image>\n<video>", "\ud800", "a\0b", "x" * 300, "/", "..", ".",
    "a.mp4", "file:///a%20b.mp4", "file://%ff", "http://a/b.mp4", "data:image/png;base64,aGVsbG8=",
    "data:,", "con\\cat", "{{ 7 }}", "<|im_end|>", "\u202e", [], {}, [[]], [None], [{}], {"": 0},
    {"path": "a.mp4"}, {"url": {"url": "a"}}, {"type": "text", "text": "?"}, {"type": "video"}, ["a", "b"],
]  # fmt: skip
KEYS = (
    "id", "conversations", "messages", "from", "value", "role", "content", "type", "text", "image", "video",
    "images", "videos", "path", "url", "bytes", "start", "end", "video_start", "video_end", "fps", "nframes",
    "system", "weight", "loss", "train", "other", "image_url", "video_url",
)  # fmt: skip


def good_records(video: str, image: str) -> list[dict[str, Any]]:
    answer = {"from": "gpt", "value": "So."}
    parts = [{"type": "video", "video": video, "video_start": 0.5, "video_end": 1.5, "fps": 2.0},
             {"type": "text", "text": "Why?"}]  # fmt: skip
    return [
        {"id": "1", "video": video, "conversations": [{"from": "human", "value": "<video>\nQ"}, answer]},
        {"id": 2, "image": [image, image], "conversations": [
            {"from": "human", "value": "<image> or <image>?"}, answer, {"from": "human", "value": "Q"}, answer]},
        {"id": "3", "system": "Be brief.", "messages": [
            {"role": "user", "content": parts}, {"role": "assistant", "content": "A", "weight": 1}]},
        {"id": "4", "video": {"path": video, "start": 0.2, "nframes": 3}, "conversations": [
            {"from": "human", "value": "<video>"}, answer]},
    ]  # fmt: skip


def fuzz_records(seed: int, count: int, folder: pathlib.Path) -> Counter[str]:
    """Mutates records as JSON and as text, and takes each the whole way to tokens and frames."""
    rng = np.random.default_rng(seed)
    files = {file.suffix: file.name for file in write_media(folder)}
    good = good_records(files[".mp4"], files[".png"])
    lines = [mutated_line(rng, good[number % len(good)]) for number in range(count)]
    path = folder / "records.jsonl"
    path.write_bytes(b"\n".join([json.dumps(good[0]).encode(), *lines]))
    source = open_source(SourceConfig(name="fuzz", path=str(path)))
    encoder = SampleEncoder(
        text=ConversationEncoder(train_tokenizer(["Why? So. Be brief."], 300), ""),
        grid=Grid.square(2), compression=CompressionConfig(num_frames=8), frames=FRAMES,
    )  # fmt: skip
    outcomes: Counter[str] = Counter()
    for index in range(len(source)):

        def use(index: int = index) -> str:
            sample = source.sample(index)
            counts = encoder.frame_counts(sample.media)
            encoder.plan(sample, counts)
            times = []
            for medium, frames in zip(sample.media, counts, strict=True):
                medium.check_exists()
                times.append(read_media(medium, frames, 16, 0.0).times)
            encoder.encode(sample, times)
            json.dumps(sample.id).encode()
            source.where(index).encode()
            return "used"

        outcomes[outcome_of(use, f"record {index} of seed {seed}: {path}")] += 1
    return outcomes


def mutated_line(rng: np.random.Generator, record: dict[str, Any]) -> bytes:
    """A record with one to three faults in its structure, and sometimes in its text, on one line."""
    value: Any = json.loads(json.dumps(record))
    for _ in range(rng.integers(1, 4)):
        value = mutated(rng, value)
    text = json.dumps(value, ensure_ascii=bool(rng.integers(2))).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        text = damage_bytes(rng, text)
    if rng.random() < 0.02:
        text = text.replace(b"1", b"1" * 5000, 1)
    return text.replace(b"\n", b" ").replace(b"\r", b" ").strip() or b"{}"


def mutated(rng: np.random.Generator, value: Any) -> Any:
    """The value with one fault at a random place."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = str(rng.choice(list(value)))
        match rng.integers(6):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, str(rng.choice(KEYS)): _odd(rng)}
            case 2:
                return {(str(rng.choice(KEYS)) if k == key else k): v for k, v in value.items()}
            case _:
                return {**value, key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = int(rng.integers(len(value)))
        match rng.integers(5):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value[: at + 1], *value[at:]]
            case _:
                return [*value[:at], mutated(rng, value[at]), *value[at + 1 :]]
    return _odd(rng)


def _odd(rng: np.random.Generator) -> Any:
    return ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
