"""A tokenizer's chat template: what it renders, and what it ends an answer with."""

from __future__ import annotations

import transformers

# Llama 3's templates show today's date unless they are given one; this is their own default.
DATE = "26 Jul 2024"


def end_of_turn(tokenizer: transformers.PreTrainedTokenizerBase) -> str | None:
    """The special token that the chat template puts behind an answer; it need not be eos_token,
    which in base models ends a document."""
    messages = [{"role": role, "content": text} for role, text in exchange("text")]
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


def exchange(text: str) -> list[tuple[str, str]]:
    return [("user", f"question {text}"), ("assistant", f"answer {text}")]
