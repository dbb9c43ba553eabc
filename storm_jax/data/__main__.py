"""Inspects the data of a configuration without training or an accelerator.

Check all of it: errors with file and line, missing media, lengths, truncation, skips, packing:

    python -m storm_jax.data check --config=configs/tiny.py:stage=sft --out=OUT

Show one sample as the model sees it, as a picture and as text:

    python -m storm_jax.data show --config=configs/tiny.py:stage=sft --source=NAME --index=3 --out=OUT

Any field of the configuration can be overridden: --config.data.rows[0].tokens=512
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

import transformers
from absl import app, flags
from ml_collections import config_flags

from storm_jax import command_line
from storm_jax.config import CompressionConfig, ConfigError, RunConfig, SourceConfig, from_dict
from storm_jax.data.check import check
from storm_jax.data.mixture import Ref, open_mixture
from storm_jax.data.show import show
from storm_jax.data.skips import DataError
from storm_jax.media.media import MediaError
from storm_jax.media.reader import MediaReader
from storm_jax.media.workers import WorkerPool
from storm_jax.text.sample import SampleError
from storm_jax.text.tokenizer import load_tokenizer, tokenizer_folder

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file and stage: configs/NAME.py:stage=align|sft|long."
)
OUT = flags.DEFINE_string("out", "data_report", "Output folder.")
SPLIT = flags.DEFINE_enum(
    "split", "train", ["train", "val"], "Which sources of the configuration to use."
)
READ_MEDIA = flags.DEFINE_integer(
    "read_media",
    0,
    "check: number of samples per source whose media are decoded, not only located; -1 = all.",
)
SOURCE = flags.DEFINE_string("source", "", "show: name of the source; defaults to the first.")
INDEX = flags.DEFINE_integer("index", 0, "show: index of the sample in its source.", lower_bound=0)
COMPRESSION = flags.DEFINE_integer(
    "compression", 0, "show: index of the compression in train.compressions.", lower_bound=0
)
flags.mark_flag_as_required("config")


def main(argv: Sequence[str]) -> None:
    command = argv[1] if len(argv) == 2 else None
    if command not in ("check", "show"):
        raise app.UsageError("expected `check` or `show` (--help shows examples)")
    transformers.logging.set_verbosity_error()
    config = from_dict(RunConfig, CONFIG.value)
    sources = getattr(config.data, SPLIT.value)
    if not sources:
        raise ConfigError(f"data.{SPLIT.value} is empty: it must list at least one source")
    tokenizer = load_tokenizer(tokenizer_folder(config))
    if command == "check":
        out = pathlib.Path(OUT.value)
        found = check(config, sources, tokenizer, out, READ_MEDIA.value, _compression(config))
        sys.exit(1 if found.failures else 0)
    for path in _show(config, _named(sources, SOURCE.value), tokenizer):
        print(path)


def _compression(config: RunConfig) -> CompressionConfig | None:
    """That of validation samples; None draws those of training."""
    return config.unsampled if SPLIT.value == "val" else None


def _named(sources: Sequence[SourceConfig], name: str) -> SourceConfig:
    for source in sources:
        if name in ("", source.name):
            return source
    known = ", ".join(source.name for source in sources)
    raise ConfigError(f"--source={name} is not in data.{SPLIT.value}: {known}")


def _show(
    config: RunConfig, source: SourceConfig, tokenizer: transformers.PreTrainedTokenizerBase
) -> list[pathlib.Path]:
    with WorkerPool(config.data.num_workers) as pool:
        mixture = open_mixture(config, [source], tokenizer, pool, _compression(config))
        if COMPRESSION.value >= len(mixture.compressions):
            raise ConfigError(
                f"--compression={COMPRESSION.value}: must be at most {len(mixture.compressions) - 1}"
            )
        part = mixture.parts[0]
        if INDEX.value >= len(part.source):
            raise DataError(f"--index={INDEX.value}: {source.name} has {len(part.source)} samples")
        reader = MediaReader(pool, config.model.vision.image_size, config.data.frames)
        return show(
            mixture, Ref(0, INDEX.value, COMPRESSION.value), reader, pathlib.Path(OUT.value)
        )


if __name__ == "__main__":
    command_line.run(main, (DataError, MediaError, SampleError))
