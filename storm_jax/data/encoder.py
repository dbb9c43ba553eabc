"""Encodes a whole sample: how many frames its media have, and the tokens that they and the text become."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from storm_jax.compression import ClipPlan, Grid, plan_clip
from storm_jax.config import CompressionConfig, FramesConfig, LayoutConfig, RunConfig
from storm_jax.media.media import Media, MediaError
from storm_jax.media.read import count_frames
from storm_jax.text.conversation import ConversationEncoder, Encoded, Pieces, Text
from storm_jax.text.sample import PLACEHOLDER, Caption, Sample
from storm_jax.text.words import clock, duration, in_words

# Seconds. Longer than any video, so that a timestamp never has more digits than planned.
_LONGEST = 99_999.9
_MEDIUM_AND_SPACE = re.compile(rf"({PLACEHOLDER.pattern})\s+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleEncoder:
    """Encodes samples for a model whose frames have a `grid` of tokens before spatial pooling."""

    text: ConversationEncoder
    grid: Grid
    compression: CompressionConfig
    frames: FramesConfig
    layout: LayoutConfig = dataclasses.field(default_factory=LayoutConfig)

    @classmethod
    def of(
        cls, config: RunConfig, text: ConversationEncoder, compression: CompressionConfig
    ) -> SampleEncoder:
        """The encoder of a run's samples."""
        model = config.model
        return cls(
            text=text,
            grid=Grid.of(model),
            compression=compression,
            frames=config.data.frames,
            layout=model.layout,
        )

    def compressed(self, compression: CompressionConfig) -> SampleEncoder:
        """The same encoder with another compression."""
        return dataclasses.replace(self, compression=compression)

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

        Times are unknown, so text with times is replaced by one token per byte, which is an upper bound.
        Only the length is meaningful then, not the tokens.
        """
        times = [np.full(count, _LONGEST) for count in counts]
        pieces = [
            [
                len(part.text.encode()) if isinstance(part, Text) and part.timed else part
                for part in parts
            ]
            for parts in self._pieces(sample, times)
        ]
        return self._encode(sample, pieces)

    def encode(
        self,
        sample: Sample,
        times: Sequence[np.ndarray],
        plans: Sequence[ClipPlan] | None = None,
    ) -> Encoded:
        """Encodes a sample whose n-th medium has frames at `times[n]` seconds, and is compressed as in `plans[n]`."""
        return self._encode(sample, self._pieces(sample, times, plans))

    def _encode(self, sample: Sample, pieces: Sequence[Pieces]) -> Encoded:
        is_trimmed = self.layout.trim and bool(sample.media)
        return self.text.encode(_trimmed(sample) if is_trimmed else sample, pieces)

    def _pieces(
        self,
        sample: Sample,
        times: Sequence[np.ndarray],
        plans: Sequence[ClipPlan] | None = None,
    ) -> list[Pieces]:
        captions = sample.captions if len(sample.media) == 1 else ()
        if plans is None:
            plans = [plan_clip(len(each), self.grid, self.compression) for each in times]
        media = zip(sample.media, times, plans, strict=True)
        return [self._medium(*medium, captions) for medium in media]

    def _medium(
        self, medium: Media, times: np.ndarray, plan: ClipPlan, captions: Sequence[Caption]
    ) -> list[Text | int]:
        """Returns the slots of the pooled groups, with the layout's text, timestamps and captions."""
        groups = [
            float(times[int(np.argmax(plan.frame_group == group))])
            for group in range(plan.num_groups)
        ]
        layout, is_video = self.layout, medium.kind == "video"
        style = self.frames.time_text if is_video else "none"

        def piece(text: str, timed: bool = False) -> list[Text]:
            return [Text(text, joined=layout.joined, timed=timed)] if text else []

        pieces: list[Text | int] = []
        about = _about(times) if is_video else {}
        if is_video:
            pieces += piece(layout.before_video.format(**about), timed=True)
        if style == "sentence":
            listed = ", ".join(f"{time:.1f}" for time in times)
            line = (
                f"The video lasts {times[-1]:.1f} s. Its {len(times)} frames are at {listed} s.\n"
            )
            pieces.append(Text(line, timed=True))
        left = iter(captions)
        caption = next(left, None)
        for time, tokens in zip(groups, plan.tokens_of_groups, strict=True):
            while caption and caption.time < time:
                pieces.append(Text(f"\n{caption.text}\n"))
                caption = next(left, None)
            if is_video:
                pieces += piece(layout.group_time.format(time=clock(time)), timed=True)
            if style == "per_group":
                pieces.append(Text(f"{time:.1f} s: ", timed=True))
            pieces += [*piece(layout.before_group), tokens, *piece(layout.after_group)]
        rest = [caption, *left] if caption else []
        pieces += [Text(f"\n{caption.text}\n") for caption in rest]
        if is_video:
            pieces += piece(layout.after_video.format(**about), timed=True)
        return pieces


def _about(times: np.ndarray) -> dict[str, str]:
    """What a layout may say about a video with frames at `times` [T] seconds."""
    # Where a video ends is not known here: its last frame is taken to be shown as long as one at 25 Hz.
    end = float(times[-1]) + 0.04
    return {
        "frames": in_words(len(times)),
        "count": str(len(times)),
        "times": ",".join(f"{time:.2f}s" for time in times),
        "seconds": f"{end:.2f}",
        "duration": duration(end),
    }


def _trimmed(sample: Sample) -> Sample:
    """`sample` without line breaks and spaces after the placeholders of its media."""
    turns = tuple(
        dataclasses.replace(turn, text=_MEDIUM_AND_SPACE.sub(r"\1", turn.text))
        if turn.role == "user"
        else turn
        for turn in sample.turns
    )
    return dataclasses.replace(sample, turns=turns)
