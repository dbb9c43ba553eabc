"""Long videos: LLaVA-Video, about 1.35 million video-text pairs, at 128 frames.

The set comes as folders by length and origin of the videos, each with lists of captions, of open
questions and of multiple choices. Join the lists of each kind as JSON lines. The paper states no
weights, so every sample comes once an epoch. It also tunes on the quarter with the longest videos alone.
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
