"""Trains a small byte-level BPE tokenizer with a ChatML template on the text of a data set.

For models trained from scratch, such as the `tiny` preset; a pretrained decoder brings its own.
"""

from __future__ import annotations

import argparse
import pathlib

from storm_jax.config import SourceConfig
from storm_jax.data.skips import DataError
from storm_jax.data.sources import open_source
from storm_jax.text.bpe import train_tokenizer
from storm_jax.text.sample import PLACEHOLDER, SampleError


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
        source = open_source(SourceConfig(name="data", path=args.data))
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
