"""What a model returns for one sample."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """The generated text, or the reason why there is none.

    Attributes:
      text: empty if the sample failed.
      error, cause: the message of a failure, and the one word it is counted under; empty on success.
      visual_tokens: number of visual tokens in the prompt.
      seconds: model time. Work shared by several samples is divided among them; compilation and waiting for
        media are not counted.
    """

    text: str = ""
    error: str = ""
    cause: str = ""
    visual_tokens: int = 0
    seconds: float = 0.0
