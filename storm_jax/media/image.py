"""Image files to frames, with Pillow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from storm_jax.media.media import Header, Media, MediaError

# Files with these suffixes are images unless stated otherwise; GIFs are treated as videos.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def read_image(medium: Media, image_size: int) -> np.ndarray:
    """Reads an image as uint8 [H, W, 3], resized (bicubic) to `image_size` x `image_size`.

    The EXIF orientation is applied. Transparent pixels become white, 16-bit grey is scaled to 8 bits,
    and only the first frame of an animation is read.

    Raises:
      MediaError: the file is missing, broken or suspiciously large.
    """
    with _opened(medium) as file:
        ImageOps.exif_transpose(file, in_place=True)
        image = _to_rgb(file)
        return np.asarray(image.resize((image_size, image_size), Image.Resampling.BICUBIC))


def image_header(medium: Media) -> Header:
    """Returns the size of an image.

    Raises:
      MediaError: as `read_image`.
    """
    with _opened(medium) as file:
        return Header(*file.size, 0.0)


@contextlib.contextmanager
def _opened(medium: Media) -> Iterator[Image.Image]:
    """Opens a file; errors of Pillow and the file system are raised as MediaError."""
    try:
        with Image.open(medium.open()) as file:
            yield file
    except UnidentifiedImageError as error:
        raise MediaError(medium, "unreadable", "unsupported image format") from error
    except OSError as error:
        raise MediaError.of(medium, error) from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(medium, "unreadable", str(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
