"""Conversations to token ids, with the spans that carry loss and the slots of visual tokens.

The text comes from the tokenizer's own chat template. Each answer with its end marker is a span of
that text, found by rendering the conversation up to it; spans are tokenised apart, so an answer has
the ids that it has after a prompt at inference. Media placeholders never reach the tokenizer: they
are cut out, and what stands for a medium takes their place: slots of visual tokens, and text that
tells when they are shown.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np
import transformers

from storm_jax.config import ConfigError, RunConfig
from storm_jax.data.cache import digest
from storm_jax.data.sample import PLACEHOLDER, Sample, SampleError, Turn

# What stands for a medium: text, and numbers of slots.
Pieces = Sequence[str | int]

# Llama 3's templates show today's date unless they are given one; this is their own default.
DATE = "26 Jul 2024"


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

    @property
    def least(self) -> int:
        """How many tokens from the start must be kept: all media, and the first of an answer."""
        answers, media = np.flatnonzero(self.answer), np.flatnonzero(self.media >= 0)
        first = answers[0] + 1 if len(answers) else len(self)
        return int(max(first, media[-1] + 1 if len(media) else 0))

    def cut(self, length: int) -> Encoded:
        """The first `length` tokens; an answer that is cut has no end marker to learn."""
        return Encoded(self.tokens[:length], self.answer[:length], self.media[:length])


def load_tokenizer(folder: str | pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """A tokenizer with a chat template from a local folder.

    Raises:
      ConfigError: naming the folder and what it lacks.
    """
    tokenizer = read_tokenizer(folder)
    check_tokenizer(tokenizer, folder)
    if tokenizer.pad_token_id is None:  # any will do: padding is neither seen nor learned
        tokenizer.pad_token = end_of_turn(tokenizer)
    return tokenizer


def read_tokenizer(folder: str | pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a local folder, as it is; code that lies beside it is not run.

    Raises:
      ConfigError: when there is none, or it is damaged.
    """
    if not (pathlib.Path(folder) / "tokenizer_config.json").is_file():
        raise ConfigError(
            f"{folder} holds no tokenizer: set data.tokenizer to a folder with tokenizer.json and "
            f"tokenizer_config.json, or train one (python -m storm_jax.data.tokenizer --help)"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # of whatever kind: tokenizers raises bare Exceptions
        raise ConfigError(f"{folder}: the tokenizer cannot be loaded: {error}") from error


def check_tokenizer(
    tokenizer: transformers.PreTrainedTokenizerBase, folder: str | pathlib.Path
) -> None:
    """Raises ConfigError, naming the folder it came from, for a chat template that cannot be used."""
    if tokenizer.chat_template is None:
        raise ConfigError(f"{folder}: the tokenizer has no chat template")
    try:
        check_template(tokenizer)
    except Exception as error:  # whatever the template's own code raises
        raise ConfigError(f"{folder}: {error}") from error


def save_tokenizer(
    tokenizer: transformers.PreTrainedTokenizerBase, source: pathlib.Path, folder: pathlib.Path
) -> None:
    """Saves a tokenizer, and the generation_config.json of the folder it came from; nothing else, for
    the folder of a model has weights and a config.json beside them."""
    tokenizer.save_pretrained(folder)
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", folder)


def tokenizer_folder(config: RunConfig) -> pathlib.Path:
    """Where a new run takes its tokenizer from: `data.tokenizer`, the run of `init_from`, or the folder
    beside the first source."""
    if config.data.tokenizer:
        return pathlib.Path(config.data.tokenizer)
    if config.init_from:
        return pathlib.Path(config.init_from) / "tokenizer"
    return pathlib.Path(config.data.train[0].path).parent / "tokenizer"


def check_template(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Raises an error unless answers can be told apart in what the chat template renders.

    Raises:
      ValueError: when nothing ends an answer, or earlier answers are rendered differently.
    """
    if end_of_turn(tokenizer) is None:
        raise ValueError(
            "the chat template ends an answer with no special token, so no answer would ever stop; "
            "it must put an end-of-turn token behind each"
        )
    turns = tuple(Turn(role, text) for text in "ab" for role, text in _exchange(text))
    ConversationEncoder(tokenizer, "").encode(Sample("two exchanges", turns, (), {}), [])


def end_of_turn(tokenizer: transformers.PreTrainedTokenizerBase) -> str | None:
    """The special token that the chat template puts behind an answer; it need not be eos_token,
    which in base models ends a document."""
    messages = [{"role": role, "content": text} for role, text in _exchange("text")]
    behind = render(tokenizer, messages, opened=False).rpartition("text")[2]
    found = [token for token in tokenizer.get_added_vocab() if token in behind]
    return min(found, key=behind.find, default=None)


def render(
    tokenizer: transformers.PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    opened: bool,
) -> str:
    """The text of a conversation; `opened` adds the start of an answer. The date is always `DATE`: a
    sample must not change over night."""
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=opened, date_string=DATE
    )
    return str(text)


def _exchange(text: str) -> list[tuple[str, str]]:
    return [("user", f"question {text}"), ("assistant", f"answer {text}")]


def stop_ids(
    folder: str | pathlib.Path, tokenizer: transformers.PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Ids that end an answer: the template's end of turn, eos_token, and those that a
    generation_config.json in the tokenizer's folder lists.

    Raises:
      ConfigError: when that file lists none as it should.
    """
    ids = [tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer) or ""), tokenizer.eos_token_id]
    path = pathlib.Path(folder) / "generation_config.json"
    if path.exists():
        try:
            listed = json.loads(path.read_text()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged: {error}") from error
        listed = listed if isinstance(listed, list) else [listed]
        wrong = [i for i in listed if i is not None and (type(i) is not int or i < 0)]
        if wrong:
            raise ConfigError(f"{path}: eos_token_id has {wrong[0]!r}, which is no token id")
        ids += listed
    return tuple(dict.fromkeys(i for i in ids if i is not None))


@dataclasses.dataclass(frozen=True)
class ConversationEncoder:
    """Encodes samples with one tokenizer; `system` goes in front unless the sample has its own."""

    tokenizer: transformers.PreTrainedTokenizerBase
    system: str

    def __post_init__(self) -> None:
        if PLACEHOLDER.search(self.system):
            raise ConfigError(f"data.system={self.system!r} must not hold <image> or <video>")
        if self.system:
            try:
                rendered = render(
                    self.tokenizer,
                    [{"role": "system", "content": self.system}, {"role": "user", "content": "?"}],
                    opened=True,
                )
            except Exception as error:  # whatever the template's own code raises
                raise ConfigError(
                    f"data.system={self.system!r}: the chat template takes no system turn ({error}); "
                    f"set data.system to an empty text"
                ) from error
            if self.system.strip() not in rendered:
                raise ConfigError(
                    f"data.system={self.system!r}: the chat template leaves it out; set data.system "
                    f"to an empty text"
                )

    @functools.cached_property
    def digest(self) -> str:
        """Changes with the tokenizer and its template."""
        tokenizer = self.tokenizer
        return digest(tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template))

    @functools.cached_property
    def end_of_turn(self) -> str | None:
        return end_of_turn(self.tokenizer)

    def encode(self, sample: Sample, media: Sequence[Pieces]) -> Encoded:
        """Tokenises a sample; `media[n]` stands for its n-th medium.

        A sample that ends with a question (see `Sample.prompt`) ends with the template's opening of
        the assistant's turn and the sample's own opening of the answer.

        Raises:
          SampleError: when it has no turn, its placeholders are not as many as its media, or the template
            does not render it turn by turn.
        """
        placeholders = sum(len(PLACEHOLDER.findall(turn.text)) for turn in sample.turns)
        if not sample.turns or placeholders != len(media):
            raise SampleError(
                sample.id,
                "placeholder",
                f"{len(sample.turns)} turns with {placeholders} placeholders for {len(media)} media",
            )
        parts = _Parts(self.tokenizer, media)
        for text, is_answer in self._spans(sample):
            parts.add(text, is_answer)
        return parts.encoded()

    def _spans(self, sample: Sample) -> list[tuple[str, bool]]:
        """The rendered text in pieces (text, whether it is an answer with its end marker)."""
        messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
        if self.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        spans, done, through = [], "", ""
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
            spans += [(before[len(done) :], False), (through[len(before) : end], True)]
            done = through[:end]
        if messages[-1]["role"] != "assistant":
            through = render(self.tokenizer, messages, opened=True) + sample.opening
        return [*spans, (through[len(done) :], False)]


class _Parts:
    """Collects token ids span by span."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, pieces: Sequence[Pieces]):
        self.tokenizer, self.pieces = tokenizer, pieces
        self.tokens: list[int] = []
        self.answer: list[bool] = []
        self.media: list[int] = []
        self.next_medium = 0

    def add(self, text: str, is_answer: bool) -> None:
        for i, piece in enumerate(PLACEHOLDER.split(text)):
            if i > 0:
                for part in self.pieces[self.next_medium]:
                    if isinstance(part, str):
                        self._extend(self._ids(part), False, -1)
                    else:
                        pad = self.tokenizer.pad_token_id
                        self._extend([pad] * part, False, self.next_medium)
                self.next_medium += 1
            if piece:
                self._extend(self._ids(piece), is_answer, -1)

    def _ids(self, text: str) -> list[int]:
        # Without what the tokenizer's own call adds around it, which takes longer than the work.
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
