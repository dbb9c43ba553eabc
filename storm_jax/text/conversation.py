"""Tokenises conversations, with a loss mask and slots for visual tokens.

The text is rendered by the tokenizer's own chat template. Each answer, with its end marker, is one span of
that text, located by rendering the conversation up to it. Spans are tokenised separately, so an answer has
the same ids as after a prompt at inference. Media placeholders never reach the tokenizer: each is replaced
by slots for its visual tokens and, optionally, text around them, such as timestamps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import transformers

from storm_jax.config import ConfigError
from storm_jax.files import digest
from storm_jax.text.sample import PLACEHOLDER, Sample, SampleError, Turn
from storm_jax.text.template import end_of_turn, render


@dataclasses.dataclass(frozen=True)
class Text:
    """Text between visual tokens.

    Attributes:
      joined: whether it is tokenised together with the text around it, or on its own.
      timed: whether it depends on times, which are known only when the medium was read.
    """

    text: str
    joined: bool = False
    timed: bool = False


# What replaces a medium's placeholder: text, and numbers of visual slots.
Pieces = Sequence[Text | int]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A tokenised conversation of n tokens.

    Attributes:
      tokens: int32 [n]; the pad id at visual tokens.
      answer: bool [n], True for the tokens to train on: answers that carry loss, and their end markers.
      media: int32 [n], index of the medium that a visual token belongs to; -1 for text.
    """

    tokens: np.ndarray
    answer: np.ndarray
    media: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def min_tokens(self) -> int:
        """Length of the shortest usable prefix: all media and the first token of an answer."""
        answers, media = np.flatnonzero(self.answer), np.flatnonzero(self.media >= 0)
        first = answers[0] + 1 if len(answers) else len(self)
        return int(max(first, media[-1] + 1 if len(media) else 0))

    def visual_index(self, entries: Sequence[np.ndarray]) -> np.ndarray:
        """For each token its entry in the visual table, int32 [n]; -1 is text.

        Args:
          entries: of the tokens of each medium, in order.
        """
        index = np.full(len(self), -1, np.int32)
        for medium, positions in enumerate(entries):
            index[self.media == medium] = positions
        return index

    def truncated(self, length: int) -> Encoded:
        """Returns the first `length` tokens. A truncated answer has no end marker to train on."""
        return Encoded(self.tokens[:length], self.answer[:length], self.media[:length])


@dataclasses.dataclass(frozen=True)
class ConversationEncoder:
    """Encodes samples with one tokenizer.

    `system` is prepended to samples that have no system turn; an empty text disables it.
    """

    tokenizer: transformers.PreTrainedTokenizerBase
    system: str

    def __post_init__(self) -> None:
        if PLACEHOLDER.search(self.system):
            raise ConfigError(f"data.system={self.system!r} must not contain <image> or <video>")
        if self.system:
            try:
                rendered = render(
                    self.tokenizer,
                    [{"role": "system", "content": self.system}, {"role": "user", "content": "?"}],
                    opened=True,
                )
            except Exception as error:  # templates can raise anything
                raise ConfigError(
                    f"data.system={self.system!r}: the chat template rejects a system turn ({error}); "
                    f"set data.system to an empty text"
                ) from error
            if self.system.strip() not in rendered:
                raise ConfigError(
                    f"data.system={self.system!r}: the chat template drops the system turn; set "
                    f"data.system to an empty text"
                )

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the tokenizer and its chat template."""
        tokenizer = self.tokenizer
        return digest(tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template))

    @functools.cached_property
    def end_of_turn(self) -> str | None:
        return end_of_turn(self.tokenizer)

    def encode(self, sample: Sample, media: Sequence[Pieces]) -> Encoded:
        """Tokenises a sample; `media[n]` replaces its n-th placeholder.

        If the sample ends with a question (see `Sample.prompt`), the result ends with the template's
        generation prompt and the sample's `opening`.

        Raises:
          SampleError: the sample has no turns, its numbers of placeholders and media differ, or the
            template does not render it turn by turn.
        """
        placeholders = sample.placeholders()
        if not sample.turns or placeholders != len(media):
            raise SampleError(
                sample.id,
                "placeholder",
                f"{len(sample.turns)} turns with {placeholders} placeholders for {len(media)} media",
            )
        parts = _Parts(self.tokenizer, media)
        spans = self._spans(sample)
        self._check_order(sample, [text for text, answer in spans if not answer])
        for text, answer in spans:
            if answer:
                parts.add_text(text, is_trained=answer.trained)
            else:
                parts.add_prompt(text)
        return parts.encoded()

    def _check_order(self, sample: Sample, prompts: Sequence[str]) -> None:
        """Raises SampleError if the template drops, renames, reorders or adds placeholders."""
        if not sample.media:
            return
        named = [
            name
            for turn in sample.turns
            if turn.role == "user"
            for name in PLACEHOLDER.findall(turn.text)
        ]
        rendered = [name for text in prompts for name in PLACEHOLDER.findall(text)]
        if rendered != named:
            raise SampleError(
                sample.id,
                "template",
                f"the prompt has {', '.join(rendered) or 'no media'}, and not {', '.join(named)}: its text, or the "
                f"chat template, names other media",
            )

    def _spans(self, sample: Sample) -> list[tuple[str, Turn | None]]:
        """Returns the rendered text as (text, turn if it is an answer with its end marker) spans."""
        messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
        if self.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        spans: list[tuple[str, Turn | None]] = []
        done, through = "", ""
        answers = iter([turn for turn in sample.turns if turn.role == "assistant"])
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = render(self.tokenizer, messages[:i], opened=True)
            through = render(self.tokenizer, messages[: i + 1], opened=False)
            content = message["content"].strip()
            start = through.find(content, len(before)) if through.startswith(before) else -1
            marker = self.end_of_turn or ""
            end = through.find(marker, start + len(content)) if marker else -1
            if start < 0 or end < 0 or not before.startswith(done):
                raise SampleError(
                    sample.id,
                    "template",
                    f"the chat template does not render turn {i} as a continuation of its prompt that "
                    f"ends with {marker!r}",
                )
            end += len(marker)
            spans += [(before[len(done) :], None), (through[len(before) : end], next(answers))]
            done = through[:end]
        if messages[-1]["role"] != "assistant":
            through = render(self.tokenizer, messages, opened=True) + sample.opening
        return [*spans, (through[len(done) :], None)]


class _Parts:
    """Accumulates token ids span by span."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, pieces: Sequence[Pieces]):
        self.tokenizer, self.pieces = tokenizer, pieces
        self.tokens: list[int] = []
        self.answer: list[bool] = []
        self.media: list[int] = []
        self.next_medium = 0

    def add_text(self, text: str, is_trained: bool) -> None:
        if text:
            self._extend(self._ids(text), is_trained, -1)

    def add_prompt(self, text: str) -> None:
        """Adds a prompt; its placeholders are replaced, unless the sample has no media."""
        before, *texts = PLACEHOLDER.split(text) if self.pieces else [text]
        for after in texts:
            for part in self.pieces[self.next_medium]:
                if isinstance(part, Text) and part.joined:
                    before += part.text
                    continue
                self.add_text(before, is_trained=False)
                before = ""
                if isinstance(part, Text):
                    self.add_text(part.text, is_trained=False)
                else:
                    self._extend([self.tokenizer.pad_token_id] * part, False, self.next_medium)
            self.next_medium += 1
            before += after
        self.add_text(before, is_trained=False)

    def _ids(self, text: str) -> list[int]:
        # Bypasses the transformers wrapper, whose overhead exceeds the tokenisation itself.
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

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
