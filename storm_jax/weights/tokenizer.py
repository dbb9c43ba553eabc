"""The tokenizer of an imported run: the tokens that have an embedding, and a template that can be trained on."""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Collection
from typing import Any

import transformers

from storm_jax.config import RunConfig
from storm_jax.text.bpe import CHATML
from storm_jax.text.conversation import ConversationEncoder
from storm_jax.text.template import places_videos
from storm_jax.text.tokenizer import check_template, read_tokenizer, save_tokenizer, stop_ids
from storm_jax.weights import WeightsError
from storm_jax.weights.whole import read_json


def write_tokenizer(
    source: pathlib.Path, folder: pathlib.Path, config: RunConfig, template: str
) -> None:
    """Saves the decoder's tokenizer, unchanged except for tokens without an embedding and for the chat template.

    The template of a processor comes first. `template` replaces one that drops videos, and ChatML, if the tokenizer
    has its markers, one that cannot be trained on several turns.
    """
    tokenizer = _with_embeddings_only(source, config.model.decoder.vocab_size)
    tokenizer.chat_template = (
        read_json(source / "chat_template.json").get("chat_template") or tokenizer.chat_template
    )
    if template and tokenizer.chat_template and not places_videos(tokenizer):
        tokenizer.chat_template = template
        print("note: the chat template drops videos: the one of the model's processor is used")
    try:
        check_template(tokenizer)
    except Exception as error:  # a template's own code raises anything
        if not {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_added_vocab().keys():
            raise WeightsError(f"{source}: the chat template cannot be used: {error}") from error
        tokenizer.chat_template = CHATML
        print(
            "note: the chat template is replaced by ChatML: the tokenizer's own cannot be trained on "
            "several turns"
        )
    stop_ids(source, tokenizer)
    ConversationEncoder(tokenizer, config.data.system)
    save_tokenizer(tokenizer, source, folder)


def _with_embeddings_only(
    source: pathlib.Path, vocab_size: int
) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer without added tokens that have no embedding: NVILA names its media by such tokens.

    Raises:
      WeightsError: if tokens that were not added have none.
    """
    tokenizer = read_tokenizer(source)
    extra = {token for token, i in tokenizer.get_added_vocab().items() if i >= vocab_size}
    entries = len(tokenizer)
    if extra and entries - len(extra) <= vocab_size:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            remove_tokens(pathlib.Path(folder), extra)
            tokenizer = read_tokenizer(folder)
        print(f"note: tokens without an embedding are left out: {', '.join(sorted(extra))}")
    if len(tokenizer) > vocab_size:
        raise WeightsError(
            f"{source}: the tokenizer has {entries} entries, but config.json has vocab_size={vocab_size}"
        )
    return tokenizer


def remove_tokens(folder: pathlib.Path, tokens: Collection[str]) -> None:
    """Removes added tokens from the files of a tokenizer; other files stay as they are."""
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        if (kept := _without(content, tokens)) != content:
            path.write_text(json.dumps(kept))


def _without(value: Any, tokens: Collection[str]) -> Any:
    """A JSON value without the entries that name, or are, one of `tokens`."""

    def names(item: Any, key: str = "") -> bool:
        content = item.get("content") if isinstance(item, dict) else item
        return key in tokens or (isinstance(content, str) and content in tokens)

    if isinstance(value, dict):
        return {k: _without(v, tokens) for k, v in value.items() if not names(v, k)}
    if isinstance(value, list):
        return [_without(item, tokens) for item in value if not names(item)]
    return value
