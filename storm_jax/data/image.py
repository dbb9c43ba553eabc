"""Image files to frames, with Pillow."""

from __future__ import annotations

import pathlib

import numpy as np
from PIL import Image, ImageOps

# Of files that are images when nothing else says so; a GIF is taken for a video.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class ImageError(ValueError):
    """An image that cannot be read; `cause` is "missing" or "unreadable"."""

    def __init__(self, path: str | pathlib.Path, cause: str, message: str):
        super().__init__(f"image {path} is {cause}: {message}")
        self.path, self.cause = str(path), cause


def read_image(path: str | pathlib.Path, image_size: int) -> np.ndarray:
    """An image as uint8 [H, W, 3], upright, resized (bicubic) to `image_size` x `image_size`.

    Transparent pixels become white; 16-bit grey is scaled to 8 bits.

    Raises:
      ImageError: for a missing, broken or suspiciously large file.
    """
    try:
        with Image.open(path) as file:
            image = _to_rgb(ImageOps.exif_transpose(file))
            return np.asarray(image.resize((image_size, image_size), Image.Resampling.BICUBIC))
    except FileNotFoundError as error:
        raise ImageError(path, "missing", "no such file") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(path, "unreadable", str(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
