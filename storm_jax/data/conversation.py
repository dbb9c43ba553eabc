"""Conversations to token ids, with the spans that carry loss and the slots of visual tokens.

The text comes from the tokenizer's own chat template. Each answer with its end marker is a span of
that text, found by rendering the conversation up to it; spans are tokenised apart, so an answer has
the ids that it has after a prompt at inference. Media placeholders never reach the tokenizer: they
are cut out, and `num_tokens` slots stand in their place.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import transformers

from storm_jax.config import ConfigError
from storm_jax.data.sources import PLACEHOLDER, Sample, SampleError


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A tokenised conversation of n tokens.

    Attributes:
      tokens: int32 [n]; the pad id where a visual token stands.
      answer: bool [n], tokens to learn: answers and their end markers.
      media: int32 [n], index of the medium whose visual token stands here, -1 = text.
    """

    tokens: np.ndarray
    answer: np.ndarray
    media: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def load_tokenizer(folder: str | pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """A tokenizer with a chat template from a local folder.

    Raises:
      ConfigError: naming the folder and what it lacks.
    """
    if not (pathlib.Path(folder) / "tokenizer_config.json").is_file():
        raise ConfigError(
            f"{folder} holds no tokenizer: set data.tokenizer to a folder with tokenizer.json and "
            f"tokenizer_config.json, or train one (python -m storm_jax.data.tokenizer --help)"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # of whatever kind: tokenizers raises bare Exceptions
        raise ConfigError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    if tokenizer.chat_template is None:
        raise ConfigError(f"{folder}: the tokenizer has no chat template")
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ConfigError(f"{folder}: the tokenizer needs a pad token and an end-of-turn token")
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    if tokenizer.eos_token not in rendered.rpartition("answer")[2]:
        raise ConfigError(
            f"{folder}: the chat template does not end an answer with eos_token="
            f"{tokenizer.eos_token!r}, so no answer would ever stop; set eos_token in "
            f"tokenizer_config.json to the template's end-of-turn token. It renders {rendered!r}"
        )
    return tokenizer


@dataclasses.dataclass(frozen=True)
class ConversationEncoder:
    """Encodes samples with one tokenizer; `system` goes in front unless the sample has its own."""

    tokenizer: transformers.PreTrainedTokenizerBase
    system: str

    def __post_init__(self) -> None:
        if PLACEHOLDER.search(self.system):
            raise ConfigError(f"data.system={self.system!r} must not hold <image> or <video>")

    def encode(self, sample: Sample, num_tokens: Sequence[int]) -> Encoded:
        """Tokenises a sample whose n-th medium has `num_tokens[n]` visual tokens.

        A sample that ends with a question (see `Sample.prompt`) ends with the template's opening of
        the assistant's turn.
        """
        parts = _Parts(self.tokenizer, num_tokens)
        for text, is_answer in self._spans(sample):
            parts.add(text, is_answer)
        return parts.encoded()

    def _spans(self, sample: Sample) -> list[tuple[str, bool]]:
        """The rendered text in pieces (text, whether it is an answer with its end marker)."""
        messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
        if self.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        spans, done = [], ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], opened=True)
            through = self._render(messages[: i + 1], opened=False)
            content = message["content"].strip()
            start = through.find(content, len(before)) if through.startswith(before) else -1
            marker = self.tokenizer.eos_token
            end = through.find(marker, start + len(content))
            if start < 0 or end < 0 or not before.startswith(done):
                raise SampleError(
                    sample.id,
                    "template",
                    f"the chat template does not render turn {i} as a continuation of its prompt that "
                    f"ends with {marker!r}",
                )
            end += len(marker)
            spans += [(before[len(done) :], False), (through[len(before) : end], True)]
            done = through[:end]
        closed = messages[-1]["role"] == "assistant"
        rest = self._render(messages, opened=not closed)
        return [*spans, (rest[len(done) :], False)]

    def _render(self, messages: list[dict[str, str]], *, opened: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=opened
        )
        return str(text)


class _Parts:
    """Collects token ids span by span."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, num_tokens: Sequence[int]):
        self.tokenizer, self.num_tokens = tokenizer, num_tokens
        self.tokens: list[int] = []
        self.answer: list[bool] = []
        self.media: list[int] = []
        self.next_medium = 0

    def add(self, text: str, is_answer: bool) -> None:
        for i, piece in enumerate(PLACEHOLDER.split(text)):
            if i > 0:
                count = self.num_tokens[self.next_medium]
                self._extend([self.tokenizer.pad_token_id] * count, False, self.next_medium)
                self.next_medium += 1
            if piece:
                ids = self.tokenizer(piece, add_special_tokens=False)["input_ids"]
                self._extend(ids, is_answer, -1)

    def _extend(self, ids: list[int], is_answer: bool, medium: int) -> None:
        self.tokens += ids
        self.answer += [is_answer] * len(ids)
        self.media += [medium] * len(ids)

    def encoded(self) -> Encoded:
        return Encoded(
            np.array(self.tokens, np.int32),
            np.array(self.answer, np.bool_),
            np.array(self.media, np.int32),
        )
