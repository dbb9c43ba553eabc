"""Encodes a whole sample: how many frames its media have, and the tokens that they and the text become."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from storm_jax.compression import plan_clip
from storm_jax.config import CompressionConfig, FramesConfig, LayoutConfig
from storm_jax.media.media import Media, MediaError
from storm_jax.media.read import count_frames
from storm_jax.text.conversation import ConversationEncoder, Encoded, Pieces
from storm_jax.text.sample import Caption, Sample

# Seconds. Longer than any video, so that a timestamp never has more digits than planned.
_LONGEST = 99_999.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleEncoder:
    """Encodes samples for a model with `side` x `side` tokens per frame before spatial pooling."""

    text: ConversationEncoder
    side: int
    compression: CompressionConfig
    frames: FramesConfig
    layout: LayoutConfig = dataclasses.field(default_factory=LayoutConfig)

    def frame_counts(self, media: Sequence[Media]) -> list[int]:
        """Returns the number of frames of each medium.

        If a header cannot be read, this is the maximum: the error is reported when the medium is read.
        """
        return [self._frame_count(medium) for medium in media]

    def _frame_count(self, medium: Media) -> int:
        limit = self.compression.num_frames
        try:
            return count_frames(medium, limit, self.frames)
        except MediaError:
            return limit

    def plan(self, sample: Sample, counts: Sequence[int]) -> Encoded:
        """Encodes a sample before its media are decoded, to find its maximum length.

        Timestamps are unknown, so their text is replaced by one token per byte, which is an upper bound.
        Only the length is meaningful then, not the tokens.
        """
        times = [np.full(count, _LONGEST) for count in counts]
        pieces = [
            [len(part.encode()) if isinstance(part, str) else part for part in parts]
            for parts in self._pieces(sample, times)
        ]
        return self.text.encode(sample, pieces)

    def encode(self, sample: Sample, times: Sequence[np.ndarray]) -> Encoded:
        """Encodes a sample whose n-th medium has frames at `times[n]` seconds."""
        return self.text.encode(sample, self._pieces(sample, times))

    def _pieces(self, sample: Sample, times: Sequence[np.ndarray]) -> list[Pieces]:
        captions = sample.captions if len(sample.media) == 1 else ()
        return [self._medium(m, t, captions) for m, t in zip(sample.media, times, strict=True)]

    def _medium(
        self, medium: Media, times: np.ndarray, captions: Sequence[Caption]
    ) -> list[str | int]:
        """Returns the slots of the pooled groups, with timestamps and captions between them."""
        plan = plan_clip(len(times), self.side, self.compression)
        style = self.frames.time_text if medium.kind == "video" else "none"
        pieces: list[str | int] = []
        if style == "sentence":
            listed = ", ".join(f"{time:.1f}" for time in times)
            pieces.append(
                f"The video lasts {times[-1]:.1f} s. Its {len(times)} frames are at {listed} s.\n"
            )
        left = iter(captions)
        caption = next(left, None)
        for group in range(plan.num_groups):
            time = times[int(np.argmax(plan.frame_group == group))]
            while caption and caption.time < time:
                pieces.append(f"\n{caption.text}\n")
                caption = next(left, None)
            if style == "per_group":
                pieces.append(f"{time:.1f} s: ")
            pieces.append(plan.tokens_per_group)
            if self.layout.after_group:
                pieces.append(self.layout.after_group)
        rest = [caption, *left] if caption else []
        return pieces + [f"\n{caption.text}\n" for caption in rest]
