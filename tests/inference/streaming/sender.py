"""Serves frames once as MPEG-TS over TCP: python sender.py PORT COUNT PAUSE. Grey values are 4 times their number."""

from __future__ import annotations

import contextlib
import sys
import time
from fractions import Fraction

import av
import numpy as np


def main(port: int, count: int, pause: float) -> None:
    url = f"tcp://127.0.0.1:{port}?listen=1"
    # The reader may leave before the end.
    with contextlib.suppress(av.error.FFmpegError), av.open(url, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.options = "yuv420p", {"g": "1"}
        stream.codec_context.time_base = Fraction(1, 25)
        for number in range(count):
            image = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 4 * number, np.uint8), "rgb24")
            image.pts = number
            container.mux(stream.encode(image))
            time.sleep(pause)
        container.mux(stream.encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
