"""Videos whose pictures tell their numbers: a barcode of eight stripes, most significant bit first."""

from __future__ import annotations

import pathlib

import av
import numpy as np

BITS = 8


def barcode(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A frame uint8 [H, W, 3]."""
    bits = number >> np.arange(BITS)[::-1] & 1
    columns = bits[np.arange(width) * BITS // width]
    return np.broadcast_to((columns * 200 + 28)[None, :, None], (height, width, 3)).astype(np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames [F, S, S, 3] of any size show."""
    centres = ((np.arange(BITS) + 0.5) * frames.shape[2] / BITS).astype(int)
    bits = frames[:, frames.shape[1] // 2, centres].mean(-1) > 128
    return (bits << np.arange(BITS)[::-1]).sum(-1).tolist()


def write_numbered(
    path: pathlib.Path,
    count: int,
    codec: str = "libx264",
    *,
    pix_fmt: str = "yuv420p",
    pts: list[int] | None = None,
    size: tuple[int, int] = (48, 64),
    rate: int = 10,
    muxer: dict[str, str] | None = None,
    **options: str,
) -> pathlib.Path:
    """`count` numbered frames at `rate` a second; `pts` in units of a frame."""
    if codec == "libx265":
        options = {"x265-params": "log-level=none", **options}
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.options = options
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(barcode(i, *size), "rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts = pts[i] if pts else i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
