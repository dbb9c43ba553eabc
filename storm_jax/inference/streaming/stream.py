"""A video that is asked about while it arrives.

stream = storm_jax.load("runs/sft").stream(fps=1)
stream.push(frames, times)
for text in stream.ask("What is happening?"):
    print(text, end="", flush=True)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from storm_jax.inference.encoding import EncodedBatch
from storm_jax.inference.engine import Request
from storm_jax.inference.generate import Sampling
from storm_jax.inference.streaming.time_grid import TimeGrid
from storm_jax.inference.streaming.video import Shown, Video


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamStats:
    """What a stream has seen and keeps.

    Attributes:
      mode: "recurrent", or "window, encoded again" for models that cannot continue from a state.
      received, used: frames that were pushed, and those of them that `fps` selects.
      groups, visual_tokens: in a prompt now.
      lost: groups that were dropped or merged; in a window, frames that were dropped.
      seconds: time of the newest frame, from the first one.
      device_bytes: of what is kept on each device; parameters are not counted.
    """

    mode: str
    received: int
    used: int
    groups: int
    visual_tokens: int
    lost: int
    seconds: float
    device_bytes: int


class Stream:
    """One video. Streams of one `Predictor` are independent, but may not be used by several threads at once.

    Attributes:
      image_size: height and width of the frames that the model sees.
    """

    def __init__(
        self,
        make_video: Callable[[], Video],
        make_batch: Callable[[Shown], EncodedBatch],
        make_request: Callable[[EncodedBatch, str, Sampling, int], Request],
        write: Callable[[Request], Iterator[str]],
        image_size: int,
        fps: float,
        settings: Mapping[str, Any],
    ):
        """See `Predictor.stream`.

        Args:
          make_video: what is kept of the frames; called again by `reset`.
          make_batch: what is kept, as a batch of one scene.
          make_request: the prompt of a question about it.
          write: its answer, in pieces.
          settings: those that a snapshot must have been made with.
        """
        self._make_video, self._make_batch = make_video, make_batch
        self._make_request, self._write = make_request, write
        self.image_size, self._fps = image_size, fps
        self._settings = {"fps": fps, **settings}
        self.reset()

    def reset(self) -> None:
        """Forgets all frames."""
        self._video = self._make_video()
        self._grid = TimeGrid(self._fps)
        self._received = self._used = 0
        self._last = -math.inf  # time of the newest frame

    def push(self, frames: np.ndarray, times: float | Sequence[float] | np.ndarray) -> int:
        """Adds the next frames. Of those, the first one in each 1/fps seconds is used.

        Args:
          frames: uint8 [F, H, W, 3], or one frame [H, W, 3]; resized if need be.
          times: when they are shown, in seconds, [F] or one number. They ascend from push to push.

        Returns:
          How many were used.

        Raises:
          ValueError: frames that are not such an array, or times that do not ascend; then nothing has changed.
        """
        frames, seconds = self._checked(frames, times)
        if not len(frames):
            return 0
        picks = [number for number, time in enumerate(seconds) if self._grid.takes(float(time))]
        self._received += len(frames)
        self._used += len(picks)
        self._last = float(seconds[-1])
        if picks:
            chosen = np.stack([self._resized(frames[pick]) for pick in picks])
            self._video.add(chosen, seconds[picks])
        return len(picks)

    def ask(
        self, question: str, *, sampling: Sampling | None = None, seed: int = 0
    ) -> Iterator[str]:
        """Asks about the frames so far, and yields the answer in pieces as it is written.

        A question changes nothing: asked again, it has the same answer. Frames may be pushed while it is written.

        Raises:
          ValueError: there are no frames yet, or the question is too long.
        """
        return self._write(self.request(question, sampling=sampling, seed=seed))

    def request(self, question: str, *, sampling: Sampling | None = None, seed: int = 0) -> Request:
        """What `ask` asks an engine."""
        return self._make_request(self.encoded(), question, sampling or Sampling(), seed)

    def encoded(self) -> EncodedBatch:
        """The frames so far as a batch of one scene with one medium, for `Predictor.ask`.

        Raises:
          ValueError: there are no frames yet.
        """
        if not self._used:
            raise ValueError("nothing has been pushed yet: a question needs at least one frame")
        return self._make_batch(self._video.shown())

    @property
    def seconds(self) -> float:
        """Time of the newest frame, from the first one; 0 before it."""
        return self._last - self._grid.first if self._used else 0.0

    @property
    def stats(self) -> StreamStats:
        video = self._video
        plan = video.plan() if self._used else None
        return StreamStats(
            mode=video.mode,
            received=self._received,
            used=self._used,
            groups=plan.num_groups if plan else 0,
            visual_tokens=plan.num_tokens if plan else 0,
            lost=video.lost,
            seconds=self.seconds,
            device_bytes=video.device_bytes,
        )

    def snapshot(self) -> dict[str, Any]:
        """The state of the stream, on the host; `restore` continues from it exactly. It can be pickled."""
        return {
            "video": self._video.snapshot(),
            "settings": self._settings,
            "received": self._received,
            "used": self._used,
            "last": self._last,
            "grid": dataclasses.replace(self._grid),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Continues from a snapshot of a stream of the same model with the same settings.

        Raises:
          ValueError: the settings differ.
        """
        for name, mine in self._settings.items():
            if (other := snapshot["settings"][name]) != mine:
                raise ValueError(f"the snapshot has {name}={other!r}, and this stream {mine!r}")
        self._video.restore(snapshot["video"])
        self._received, self._used = snapshot["received"], snapshot["used"]
        self._last = snapshot["last"]
        self._grid = dataclasses.replace(snapshot["grid"])

    def _checked(self, frames: np.ndarray, times: Any) -> tuple[np.ndarray, np.ndarray]:
        frames = np.asarray(frames)
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(
                f"frames are {frames.dtype} {list(frames.shape)}: use uint8 [F, H, W, 3], values 0 to 255"
            )
        if len(frames) and 0 in frames.shape:
            raise ValueError(f"frames of {frames.shape[2]} x {frames.shape[1]} pixels are empty")
        seconds = np.atleast_1d(np.asarray(times, np.float64))
        if seconds.shape != (len(frames),):
            raise ValueError(f"{len(frames)} frames have {seconds.size} times")
        steps = np.diff(seconds, prepend=self._last)
        if not (np.isfinite(seconds).all() and (steps >= 0).all()):
            wrong = int(np.argmin(np.isfinite(seconds) & (steps >= 0)))
            raise ValueError(
                f"times[{wrong}]={seconds[wrong]} does not follow {seconds[wrong - 1] if wrong else self._last}: "
                f"times must ascend"
            )
        return frames, seconds

    def _resized(self, frame: np.ndarray) -> np.ndarray:
        size = (self.image_size, self.image_size)
        if frame.shape[:2] == size:
            return frame
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
