"""The text of an answer while its tokens arrive."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import transformers


class TextStream:
    """Turns the tokens of one answer into text, a few at a time."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, stop_ids: Sequence[int]):
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._ids: list[int] = []
        self._shown = ""

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens add. It may come with later ones: a character can take several."""
        self._ids += ids
        return self._more(self.text.rstrip("\ufffd"))

    def end(self) -> str:
        """The rest of the text."""
        return self._more(self.text)

    @property
    def text(self) -> str:
        """All of it, up to the first stop token."""
        answer = itertools.takewhile(lambda token: token not in self._stop_ids, self._ids)
        return str(self._tokenizer.decode(list(answer), skip_special_tokens=True)).strip()

    def _more(self, text: str) -> str:
        if len(text) <= len(self._shown) or not text.startswith(self._shown):
            return ""
        more, self._shown = text[len(self._shown) :], text
        return more
