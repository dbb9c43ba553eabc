"""What one request may ask for."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Caps that are checked before anything is decoded.

    Attributes:
      body_bytes: of the request.
      media: images and videos.
      media_bytes: of all of them, downloaded ones included.
      frames: that are sampled from a video; a larger number is lowered to this.
      seconds: length of a video.
      pixels: of a frame.
      listed_frames: of a video that is sent as a list of JPEG files.
      new_tokens: of an answer; a larger number is lowered to this.
      fetch_seconds: to download a medium.
      queued: requests that wait for a row.
      sessions: live ones at once.
    """

    body_bytes: int = 2**27
    media: int = 8
    media_bytes: int = 2**26
    frames: int = 128
    seconds: float = 4 * 3600.0
    pixels: int = 2**26
    listed_frames: int = 1024
    new_tokens: int = 1024
    fetch_seconds: float = 30.0
    queued: int = 64
    sessions: int = 8
