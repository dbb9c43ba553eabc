"""Settings of a data set of the task."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that a data set is rendered from; equal settings, and equal footage, produce equal files.

    Attributes:
      clips: number of training samples, including images.
      families: names of the families, in turns; a repeated one gets more samples.
      frames: frames per clip.
      size: height and width in pixels.
      noise: amplitude of the noise of a texture, 0 to 255.
      event_frames: frames of a motion, and of each of two flashes that are far apart.
      eval_clips: samples per family in each of val and test.
      footage: folder of videos whose parts are the backgrounds; None for a texture with noise.
    """

    clips: int
    seed: int
    families: tuple[str, ...]
    frames: int = 16
    size: int = 32
    noise: int = 16
    event_frames: int = 2
    eval_clips: int = 100
    footage: str | None = None
