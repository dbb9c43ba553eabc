"""Tokenizer folders: loading, checking, saving, and the ids that end an answer."""

from __future__ import annotations

import json
import pathlib
import shutil

import transformers

from storm_jax.config import ConfigError, RunConfig
from storm_jax.files import describe_change
from storm_jax.text.conversation import ConversationEncoder
from storm_jax.text.sample import Sample, Turn
from storm_jax.text.template import end_of_turn, exchange


def load_tokenizer(folder: str | pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """Loads a tokenizer with a usable chat template from a local folder.

    Raises:
      ConfigError: the tokenizer is missing or unusable.
    """
    tokenizer = read_tokenizer(folder)
    check_tokenizer(tokenizer, folder)
    if tokenizer.pad_token_id is None:  # any token will do: padding is masked
        tokenizer.pad_token = end_of_turn(tokenizer)
    return tokenizer


def read_tokenizer(folder: str | pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """Loads the tokenizer of a local folder unchecked; code in the folder is never executed.

    Raises:
      ConfigError: the tokenizer is missing or damaged.
    """
    names = ("tokenizer_config.json", "tokenizer.json")  # transformers needs either
    if not any((pathlib.Path(folder) / name).is_file() for name in names):
        raise ConfigError(
            f"{folder} contains no tokenizer: set data.tokenizer to a folder with tokenizer.json and "
            f"tokenizer_config.json, or train one (python -m storm_jax.data.tokenizer --help)"
        )
    if change := describe_change(pathlib.Path(folder)):
        raise ConfigError(change)
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ConfigError(f"{folder}: the tokenizer cannot be loaded: {error}") from error


def check_tokenizer(
    tokenizer: transformers.PreTrainedTokenizerBase, folder: str | pathlib.Path
) -> None:
    """Raises ConfigError, naming the tokenizer's folder, if its chat template cannot be used."""
    if tokenizer.chat_template is None:
        raise ConfigError(f"{folder}: the tokenizer has no chat template")
    try:
        check_template(tokenizer)
    except Exception as error:  # templates can raise anything
        raise ConfigError(f"{folder}: {error}") from error


def save_tokenizer(
    tokenizer: transformers.PreTrainedTokenizerBase, source: pathlib.Path, folder: pathlib.Path
) -> None:
    """Saves a tokenizer loaded from `source`, with the generation_config.json found there.

    Nothing else is copied: `source` may also contain a model's weights and config.json.
    """
    tokenizer.save_pretrained(folder)
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", folder)


def tokenizer_folder(config: RunConfig) -> pathlib.Path:
    """Returns the tokenizer folder for a new run.

    The first of: `data.tokenizer`, the tokenizer of the `init_from` run, and `tokenizer/` next to the
    first source.

    Raises:
      ConfigError: there is none of these.
    """
    if config.data.tokenizer:
        return pathlib.Path(config.data.tokenizer)
    if config.init_from:
        return pathlib.Path(config.init_from) / "tokenizer"
    if not config.data.train:
        raise ConfigError("data.tokenizer is empty, and so is data.train: set one of them")
    return pathlib.Path(config.data.train[0].path).parent / "tokenizer"


def check_template(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Checks that answers can be located in the text that the chat template renders.

    Raises:
      ValueError: no token ends an answer, or earlier answers are rendered differently.
    """
    if end_of_turn(tokenizer) is None:
        raise ValueError(
            "the chat template does not end an answer with a special token, so generation would never "
            "stop; it must put an end-of-turn token after each answer"
        )
    turns = tuple(Turn(role, text) for text in "ab" for role, text in exchange(text))
    ConversationEncoder(tokenizer, "").encode(
        Sample(id="two exchanges", turns=turns, media=(), extra={}), []
    )


def stop_ids(
    folder: str | pathlib.Path, tokenizer: transformers.PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Returns the ids that end an answer.

    These are the template's end-of-turn token, eos_token, and the eos_token_id entries of
    generation_config.json in the tokenizer's folder.

    Raises:
      ConfigError: generation_config.json is damaged or lists an invalid id.
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
            raise ConfigError(
                f"{path}: eos_token_id contains {wrong[0]!r}, which is not a valid token id"
            )
        ids += listed
    return tuple(dict.fromkeys(i for i in ids if i is not None))
