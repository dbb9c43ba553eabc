"""A tokenizer's chat template: rendering, and the token that ends an answer."""

from __future__ import annotations

import functools
from typing import Any

import transformers

from storm_jax.text.sample import PLACEHOLDER

# Llama 3's templates insert today's date unless one is passed; this is their own default.
DATE = "26 Jul 2024"


def end_of_turn(tokenizer: transformers.PreTrainedTokenizerBase) -> str | None:
    """Returns the special token that the chat template puts after an answer, or None.

    It may differ from eos_token, which ends a document in base models.
    """
    messages = [{"role": role, "content": text} for role, text in exchange("text")]
    rest = render(tokenizer, messages, opened=False).rpartition("text")[2]
    found = [token for token in tokenizer.get_added_vocab() if token in rest]
    return min(found, key=rest.find, default=None)


def render(
    tokenizer: transformers.PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    opened: bool,
) -> str:
    """Renders a conversation as text; `opened` adds the generation prompt.

    Media are <image> and <video> in a user's text. The date is always `DATE`, so that samples do not change from
    day to day.
    """
    if wants_parts(tokenizer, str(tokenizer.chat_template)):
        return _apply(tokenizer, [_in_parts(message) for message in messages], opened)
    return _apply(tokenizer, messages, opened)


def places_videos(tokenizer: transformers.PreTrainedTokenizerBase) -> bool:
    """Whether the template keeps videos; those of models of images drop them from lists of parts."""
    return "<video>" in render(tokenizer, [{"role": "user", "content": "<video>"}], opened=True)


def _apply(
    tokenizer: transformers.PreTrainedTokenizerBase, messages: list[dict[str, Any]], opened: bool
) -> str:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=opened, date_string=DATE
    )
    return str(text)


@functools.lru_cache(maxsize=8)
def wants_parts(tokenizer: transformers.PreTrainedTokenizerBase, template: str) -> bool:
    """Whether messages are lists of parts, as in the templates of multimodal models, which place the media."""
    message = {"role": "user", "content": "<image> question"}
    try:
        rendered = _apply(tokenizer, [_in_parts(message)], opened=True)
    except Exception:  # templates can raise anything
        return False
    return "<image>" in rendered and "question" in rendered


def _in_parts(message: dict[str, str]) -> dict[str, Any]:
    """The message as texts, images and videos, without the spaces and lines that separate them."""
    text = message["content"]
    if message["role"] != "user":
        return message | {"content": [{"type": "text", "text": text}]}
    kinds = [found[1:-1] for found in PLACEHOLDER.findall(text)]
    first, *rest = PLACEHOLDER.split(text)
    parts: list[dict[str, str]] = []
    for kind, piece in zip(["", *kinds], [first, *rest], strict=True):
        parts += [{"type": kind}] if kind else []
        piece = piece.strip() if kinds else piece
        parts += [{"type": "text", "text": piece}] if piece or not kinds else []
    return message | {"content": parts}


def exchange(text: str) -> list[tuple[str, str]]:
    """Returns a question and an answer, as (role, text), to probe a template with."""
    return [("user", f"question {text}"), ("assistant", f"answer {text}")]
