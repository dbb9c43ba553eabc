"""Long videos: LLaVA-Video, about 1.35 million video-text pairs, at 128 frames.

The data set has one folder per length and origin of videos, each with files of captions, open questions and
multiple-choice questions. Concatenate the files of each kind as JSON lines. The paper states no weights, so
every sample is used once per epoch. The paper also fine-tunes on only the quarter with the longest videos.
"""

from __future__ import annotations

from configs.mixtures import PublicSet

_URL = "https://huggingface.co/datasets/lmms-lab/LLaVA-Video-178K"

SETS: tuple[PublicSet, ...] = (
    PublicSet(
        name="llava_video_captions", path="llava_video/captions.jsonl", url=_URL, samples=178_510
    ),
    PublicSet(
        name="llava_video_open", path="llava_video/open_ended.jsonl", url=_URL, samples=960_792
    ),
    PublicSet(
        name="llava_video_choice",
        path="llava_video/multiple_choice.jsonl",
        url=_URL,
        samples=196_198,
    ),
)
