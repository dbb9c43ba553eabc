"""Videos whose frames show their number as a barcode of eight stripes, most significant bit first."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

import av
import numpy as np

BITS = 8


def barcode(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Returns the frame of a number, uint8 [H, W, 3]."""
    bits = number >> np.arange(BITS)[::-1] & 1
    columns = bits[np.arange(width) * BITS // width]
    return np.broadcast_to((columns * 200 + 28)[None, :, None], (height, width, 3)).astype(np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    """Returns the numbers shown by frames [F, S, S, 3] of any size."""
    centres = ((np.arange(BITS) + 0.5) * frames.shape[2] / BITS).astype(int)
    bits = frames[:, frames.shape[1] // 2, centres].mean(-1) > 128
    return (bits << np.arange(BITS)[::-1]).sum(-1).tolist()


def encode(
    path: pathlib.Path,
    frames: Iterable[np.ndarray],
    codec: str = "libx264",
    *,
    size: tuple[int, int],
    rate: int,
    pix_fmt: str = "yuv420p",
    pts: list[int] | None = None,
    muxer: dict[str, str] | None = None,
    **options: str,
) -> pathlib.Path:
    """Writes frames uint8 [H, W, 3] with any codec and container; `pts` counts frames."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.options = options
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, "rgb24").reformat(format=pix_fmt)
            frame.pts = pts[i] if pts else i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_numbered(
    path: pathlib.Path,
    count: int,
    codec: str = "libx264",
    *,
    size: tuple[int, int] = (48, 64),
    rate: int = 10,
    **how: Any,
) -> pathlib.Path:
    """Writes `count` numbered frames at `rate` frames per second; `how` as in `encode`."""
    if codec == "libx265":
        how = {"x265-params": "log-level=none", **how}
    frames = (barcode(i, *size) for i in range(count))
    return encode(path, frames, codec, size=size, rate=rate, **how)
