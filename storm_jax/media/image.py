"""Image files to frames, with Pillow."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from storm_jax.media.media import Media, MediaError

# Of files that are images when nothing else says so; a GIF is taken for a video.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def read_image(medium: Media, image_size: int) -> np.ndarray:
    """An image as uint8 [H, W, 3], upright, resized (bicubic) to `image_size` x `image_size`.

    Transparent pixels become white; 16-bit grey is scaled to 8 bits; of an animation it is the first
    picture.

    Raises:
      MediaError: for a missing, broken or suspiciously large file.
    """
    try:
        with Image.open(medium.open()) as file:
            ImageOps.exif_transpose(file, in_place=True)
            image = _to_rgb(file)
            return np.asarray(image.resize((image_size, image_size), Image.Resampling.BICUBIC))
    except FileNotFoundError as error:
        raise MediaError(medium, "missing", "no such file") from error
    except UnidentifiedImageError as error:
        raise MediaError(medium, "unreadable", "it is no image of a known kind") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
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
