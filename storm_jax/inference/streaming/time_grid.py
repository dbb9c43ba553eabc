"""Which frames of a video that arrives are used."""

from __future__ import annotations

import dataclasses
import math

_EPSILON = 1e-6  # seconds


@dataclasses.dataclass
class TimeGrid:
    """Takes the first frame in each interval of 1/fps seconds, counted from the first frame; with fps=0, every frame.

    Attributes:
      first: time of the first frame in seconds; infinite before it.
      next: time from which the next frame is taken.
    """

    fps: float
    first: float = -math.inf
    next: float = -math.inf

    def __post_init__(self) -> None:
        if not (self.fps >= 0 and math.isfinite(self.fps)):
            raise ValueError(f"fps={self.fps} must be at least 0; 0 uses every frame")

    def takes(self, time: float) -> bool:
        """Whether a frame at this time is used. Times ascend from call to call."""
        if self.first == -math.inf:
            self.first = time
        if time < self.next - _EPSILON:
            return False
        if self.fps:
            passed = math.floor((time - self.first) * self.fps + _EPSILON)
            self.next = self.first + (passed + 1) / self.fps
        return True
