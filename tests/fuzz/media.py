"""Damaged media files."""

from __future__ import annotations

import pathlib
from collections import Counter

import numpy as np
from PIL import Image

from storm_jax.config import FramesConfig
from storm_jax.media.media import Media
from storm_jax.media.read import count_frames, read_media
from tests.fuzz.damage import damage_bytes, outcome_of
from tests.media_files import write_numbered

FRAMES = FramesConfig(fps=1.0)


def write_media(folder: pathlib.Path) -> list[pathlib.Path]:
    """One small file of each common format."""
    folder.mkdir(parents=True, exist_ok=True)
    codecs = {
        "mp4": "libx264",
        "mkv": "libx264",
        "webm": "libvpx-vp9",
        "avi": "mpeg4",
        "ts": "libx264",
    }
    files = [
        write_numbered(folder / f"a.{suffix}", 20, codec, g="5") for suffix, codec in codecs.items()
    ]
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    for suffix in ("png", "jpg", "webp", "tiff"):
        files.append(folder / f"a.{suffix}")
        Image.fromarray(pixels).save(files[-1])
    return files


def fuzz_media(seed: int, count: int, folder: pathlib.Path) -> Counter[str]:
    """Flips, cuts, zeroes and repeats bytes of media files, and reads them."""
    rng = np.random.default_rng(seed)
    files = write_media(folder)
    outcomes: Counter[str] = Counter()
    for number in range(count):
        file = files[number % len(files)]
        damaged = folder / f"damaged{file.suffix}"
        damaged.write_bytes(damage_bytes(rng, file.read_bytes()))
        kind = "image" if file.suffix in (".png", ".jpg", ".webp", ".tiff") else "video"
        medium = Media.file(kind, damaged)

        def read(medium: Media = medium) -> str:
            frames = count_frames(medium, 8, FRAMES)
            clip = read_media(medium, frames, 16, 0.0)
            assert clip.frames.shape == (frames, 16, 16, 3) and len(clip.times) == frames
            return "read"

        outcomes[outcome_of(read, f"{damaged} (media {number} of seed {seed})")] += 1
    return outcomes
