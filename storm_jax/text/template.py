"""A tokenizer's chat template: rendering, and the token that ends an answer."""

from __future__ import annotations

import transformers

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

    The date is always `DATE`, so that samples do not change from day to day.
    """
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=opened, date_string=DATE
    )
    return str(text)


def exchange(text: str) -> list[tuple[str, str]]:
    """Returns a question and an answer, as (role, text), to probe a template with."""
    return [("user", f"question {text}"), ("assistant", f"answer {text}")]
