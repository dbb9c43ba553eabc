"""How a video is watched as it arrives."""

from __future__ import annotations

import dataclasses

POLICIES = ("window", "stride", "merge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """The arguments of `Predictor.stream`, besides compression.

    Attributes:
      fps: frames per second to use; 0 uses all.
      budget_tokens: visual tokens of a prompt at most.
      policy: what makes room when they are used up (see `storm_jax.inference.streaming.groups`).
      recent: how many of the newest groups stride and merge leave alone.
    """

    fps: float = 1.0
    budget_tokens: int = 8192
    policy: str = "window"
    recent: int = 16
