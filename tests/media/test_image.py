"""Image files: transparency, bit depth and orientation are converted to upright 8-bit RGB, and every bad
file raises `MediaError`."""

from __future__ import annotations

import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from storm_jax.media import image as image_lib
from storm_jax.media.image import IMAGE_SUFFIXES
from storm_jax.media.media import Media, MediaError

SIDE = 16


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


def read_image(path: pathlib.Path, size: int) -> np.ndarray:
    return image_lib.read_image(Media.file("image", path), size)


def save(image: Image.Image, path: pathlib.Path, **options) -> pathlib.Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff"])
def test_lossless_pixels_are_unchanged(tmp_path: pathlib.Path, pixels: np.ndarray, suffix: str):
    image = read_image(save(Image.fromarray(pixels), tmp_path / f"a{suffix}"), SIDE)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, pixels)


@pytest.mark.parametrize("suffix", [*IMAGE_SUFFIXES, ".gif"])
def test_every_listed_suffix_is_readable(tmp_path: pathlib.Path, suffix: str):
    image = Image.new("RGB", (40, 24), (200, 40, 60))
    got = read_image(save(image, tmp_path / f"a{suffix}"), SIDE)
    assert got.shape == (SIDE, SIDE, 3)
    np.testing.assert_allclose(got, np.broadcast_to((200, 40, 60), got.shape), atol=6)


@pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (255, 0), (128, 127)])
def test_transparency_is_blended_over_white(tmp_path: pathlib.Path, alpha: int, expected: int):
    for mode, colour in (("RGBA", (255, 0, 0, alpha)), ("LA", (0, alpha))):
        image = read_image(save(Image.new(mode, (SIDE, SIDE), colour), tmp_path / "a.png"), SIDE)
        np.testing.assert_allclose(image[..., 1:], expected, atol=1)
        np.testing.assert_allclose(image[..., 0], 255 if mode == "RGBA" else expected, atol=1)


def test_transparent_palette_entry_is_white(tmp_path: pathlib.Path):
    image = Image.new("P", (SIDE, SIDE), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (SIDE // 2, 0, SIDE, SIDE))
    got = read_image(save(image, tmp_path / "a.png", transparency=0), SIDE)
    assert (got[:, : SIDE // 2] == 255).all()
    assert (got[:, SIDE // 2 :] == (0, 0, 255)).all()


def test_16_bit_grey_is_scaled_to_8_bits(tmp_path: pathlib.Path):
    values = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    got = read_image(save(Image.fromarray(values), tmp_path / "a.png"), SIDE)
    np.testing.assert_allclose(got[..., 0], values / 257, atol=1)
    assert (got == got[..., :1]).all() and got[-1, -1, 0] == 255


def test_only_the_first_frame_of_an_animation_is_read(tmp_path: pathlib.Path):
    first, second = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue"))
    path = save(first, tmp_path / "a.gif", save_all=True, append_images=[second])
    assert (read_image(path, SIDE) == (255, 0, 0)).all()


@pytest.mark.parametrize(("mode", "colour"), [("1", 1), ("L", 255), ("CMYK", (0, 0, 0, 0))])
def test_other_modes_become_rgb(tmp_path: pathlib.Path, mode: str, colour):
    image = save(Image.new(mode, (SIDE, SIDE), colour), tmp_path / "a.tiff")
    assert (read_image(image, SIDE) == np.full((SIDE, SIDE, 3), 255)).all()


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
        (8, np.rot90),
    ],
)
def test_exif_orientation_is_applied(
    tmp_path: pathlib.Path, pixels: np.ndarray, orientation: int, upright
):
    exif = Image.Exif()
    exif[0x112] = orientation
    path = save(Image.fromarray(pixels), tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(path, SIDE), upright(pixels))


# Bad files.


def _bomb() -> bytes:
    """A few bytes of PNG that declare 400 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
        + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 0) + b"IDAT"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "missing"),
        ("a directory", "unreadable"),
        (b"", "unreadable"),
        (b"This is not an image.\n" * 100, "unreadable"),
        (_bomb(), "unreadable"),
    ],
    ids=["missing", "directory", "empty", "text", "decompression bomb"],
)
def test_bad_file_is_an_image_error_with_its_cause(tmp_path: pathlib.Path, content, cause: str):
    path = tmp_path / "bad.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(MediaError) as caught:
        read_image(path, SIDE)
    assert caught.value.cause == cause
    assert caught.value.medium.path == path and str(path) in str(caught.value)


def test_decompression_bomb_is_reported_as_one(tmp_path: pathlib.Path):
    (tmp_path / "bomb.png").write_bytes(_bomb())
    with pytest.raises(MediaError, match="decompression bomb"):
        read_image(tmp_path / "bomb.png", SIDE)


@pytest.mark.filterwarnings("ignore:::PIL")  # Pillow warns about damaged files
@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_file_truncated_anywhere_is_an_image_error(
    tmp_path: pathlib.Path, rng: np.random.Generator, kind: str
):
    path = tmp_path / "a"
    noise = rng.integers(0, 256, (40, 30, 3)).astype(np.uint8)
    data = save(Image.fromarray(noise), path, format=kind).read_bytes()
    for size in np.linspace(1, len(data) * 0.98, 40).astype(int):
        path.write_bytes(data[:size])
        with pytest.raises(MediaError) as caught:
            read_image(path, SIDE)
        assert caught.value.cause == "unreadable"


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_damaged_file_is_an_image_or_an_image_error(
    tmp_path: pathlib.Path, rng: np.random.Generator, kind: str
):
    path = tmp_path / "a"
    noise = rng.integers(0, 256, (40, 30, 3)).astype(np.uint8)
    data = save(Image.fromarray(noise), path, format=kind).read_bytes()
    for _ in range(60):
        damaged = bytearray(data)
        damaged[rng.integers(min(len(data), 200))] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            assert read_image(path, SIDE).shape == (SIDE, SIDE, 3)
        except MediaError as error:
            assert error.cause == "unreadable"
