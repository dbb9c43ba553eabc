"""Trains a small byte-level BPE tokenizer with a ChatML template on the text of a data set.

For models trained from scratch, such as the `tiny` recipe; a pretrained decoder comes with a tokenizer.
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
        "--data", required=True, help="data set to train on, such as a LLaVA JSON file"
    )
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=512,
        help="maximum number of entries, at least 259; default 512",
    )
    args = parser.parse_args()
    if args.vocab_size < 259:
        parser.error(
            f"--vocab_size={args.vocab_size} must be at least 259: 256 bytes and 3 special tokens"
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
        parser.error(
            f"{args.data}: all {unusable} samples are malformed; the format is in docs/data.md"
        )
    if unusable:
        print(f"{args.data}: skipped {unusable} of {len(source)} samples, which are malformed")
    tokenizer = train_tokenizer(texts, args.vocab_size)
    tokenizer.save_pretrained(pathlib.Path(args.out))
    print(f"{args.out}: tokenizer with {len(tokenizer)} entries, trained on {len(texts) - 1} texts")


if __name__ == "__main__":
    main()
