"""What a data set of the task is rendered from."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a data set is rendered from; equal settings give equal files."""

    clips: int
    seed: int
    families: tuple[str, ...]
    frames: int = 16
    size: int = 32
    noise: int = 16
    event_frames: int = 2
    eval_clips: int = 100
