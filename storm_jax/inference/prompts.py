"""The arrays of prompts that are answered together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from storm_jax.text.conversation import Encoded


def prompt_rows(
    prompts: Sequence[tuple[Encoded, Sequence[np.ndarray]]], rows: int, slots: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Prompts as rows, padded with empty ones: `tokens` and `visual_index`, int32 [B, S], and `lengths`, int32 [B].

    Args:
      prompts: tokens, and the entries of each medium in the prompt's visual table.
      rows, slots: B and S.
    """
    tokens = np.full((rows, slots), pad_id, np.int32)
    index = np.full((rows, slots), -1, np.int32)
    lengths = np.zeros(rows, np.int32)
    for row, (encoded, entries) in enumerate(prompts):
        lengths[row] = len(encoded)
        tokens[row, : lengths[row]] = encoded.tokens
        for medium, positions in enumerate(entries):
            index[row, : lengths[row]][encoded.media == medium] = positions
    return {"tokens": tokens, "visual_index": index, "lengths": lengths}
