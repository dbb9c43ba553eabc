"""Fixtures that several tests of the data package share: a trained tokenizer and video files."""

from __future__ import annotations

import pathlib

import av
import numpy as np
import pytest
import transformers

from storm_jax.data.conversation import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(shapes_folder: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """The project's own tokenizer, trained on the built-in task and read back from its folder."""
    return load_tokenizer(shapes_folder / "tokenizer")


@pytest.fixture(scope="session")
def encode_video():
    """Writes frames with any codec, container and timestamps (in eighths of a second)."""

    def encode(
        path: pathlib.Path,
        frames: np.ndarray,
        codec: str = "libx264",
        pts: list[int] | None = None,
        muxer: dict[str, str] | None = None,
        **options: str,
    ) -> pathlib.Path:
        with av.open(str(path), "w", options=muxer or {}) as container:
            stream = container.add_stream(codec, rate=8)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = options
            for i, array in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(array, "rgb24")
                frame.pts = pts[i] if pts else i
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return encode
