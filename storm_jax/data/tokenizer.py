"""Trains a small byte-level BPE tokenizer with a ChatML template on the text of a data set.

For models trained from scratch, such as the `tiny` preset; a pretrained decoder brings its own.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterable

import tokenizers
import transformers

from storm_jax.config import SourceConfig
from storm_jax.data.sample import PLACEHOLDER, DataError, SampleError
from storm_jax.data.sources import open_source

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Words with their leading space, single digits, punctuation, white space: as Qwen2 splits text.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> transformers.PreTrainedTokenizerBase:
    """A tokenizer of at most `vocab_size` entries, 3 of them special; deterministic."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m storm_jax.data.tokenizer", description=__doc__)
    parser.add_argument(
        "--data", required=True, help="data set whose text is learned, such as a LLaVA JSON file"
    )
    parser.add_argument("--out", required=True, help="folder to write the tokenizer to")
    parser.add_argument(
        "--vocab_size", type=int, default=512, help="entries (at least 259); default 512"
    )
    args = parser.parse_args()
    if args.vocab_size < 259:
        parser.error(
            f"--vocab_size={args.vocab_size}: 256 bytes and 3 special tokens are the least"
        )
    texts = ["system\nuser\nassistant\nYou are a helpful assistant"]
    try:
        source = open_source(SourceConfig("data", args.data))
    except DataError as error:
        parser.error(str(error))
    unusable = 0
    for index in range(len(source)):
        try:
            turns = source.sample(index).turns
        except SampleError:
            unusable += 1
            continue
        texts += [PLACEHOLDER.sub("", turn.text) for turn in turns]
    if unusable == len(source):
        parser.error(f"{args.data}: all {unusable} samples are malformed (docs/data.md)")
    if unusable:
        print(f"{args.data}: {unusable} of {len(source)} samples are malformed and left out")
    tokenizer = train_tokenizer(texts, args.vocab_size)
    tokenizer.save_pretrained(pathlib.Path(args.out))
    print(f"{args.out}: a tokenizer of {len(tokenizer)} entries from {len(texts) - 1} texts")


if __name__ == "__main__":
    main()
