"""Tokenizer folders: read, checked and saved; the ids that end an answer."""

from __future__ import annotations

import json
import pathlib
import shutil

import transformers

from storm_jax.config import ConfigError, RunConfig
from storm_jax.text.conversation import ConversationEncoder
from storm_jax.text.sample import Sample, Turn
from storm_jax.text.template import end_of_turn, exchange


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
    turns = tuple(Turn(role, text) for text in "ab" for role, text in exchange(text))
    ConversationEncoder(tokenizer, "").encode(
        Sample(id="two exchanges", turns=turns, media=(), extra={}), []
    )


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
