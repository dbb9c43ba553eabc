"""Alignment: image-text pairs.

The paper is inconsistent: section 4.1 states 95,000 pairs and cites SVIT; section 8.4 names
LLaVA-CC3M-Pretrain-595K. We use the latter, which can be identified.
"""

from __future__ import annotations

from configs.mixtures import PublicSet

SETS: tuple[PublicSet, ...] = (
    PublicSet(
        name="llava_cc3m",
        path="llava_cc3m/chat.json",
        url="https://huggingface.co/datasets/liuhaotian/LLaVA-CC3M-Pretrain-595K",
        samples=595_375,
        note="unpack images.zip next to chat.json",
    ),
)
