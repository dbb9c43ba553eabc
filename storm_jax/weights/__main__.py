"""Pretrained weights in and out.

Make a run of public weights, to train from with --config.init_from=RUN:

    python -m storm_jax.weights import --vision=DIR_OR_HUB_ID --decoder=DIR_OR_HUB_ID \\
        --config=configs/storm_qwen2_7b.py:stage=align --out=RUN

Share a run as folders that transformers loads:

    python -m storm_jax.weights export --workdir=RUN --out=DIR

A DIR is what transformers' save_pretrained writes: config.json, safetensors, tokenizer files. Sizes
come from its config.json; all else, such as the projector and the image size, from --config.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import transformers
from absl import app, flags
from ml_collections import config_flags

from storm_jax import command_line
from storm_jax.config import RunConfig, from_dict
from storm_jax.run import Run, RunError
from storm_jax.weights import WeightsError
from storm_jax.weights.exporter import export_run
from storm_jax.weights.importer import Sources, import_run

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "import: configuration file, with the stage: configs/NAME.py:stage=align."
)
VISION = flags.DEFINE_string(
    "vision", "", "import: a SigLIP or fixed-size SigLIP2 tower, alone or in a larger model."
)
DECODER = flags.DEFINE_string(
    "decoder", "", "import: a Qwen2, Qwen2.5, Qwen2-VL, Qwen3 or Llama 3 with its tokenizer."
)
PROJECTOR = flags.DEFINE_string(
    "projector", "", "import: a projector that an export wrote; a random one by default."
)
OUT = flags.DEFINE_string("out", None, "Folder to write; it must not exist.", required=True)
WORKDIR = flags.DEFINE_string("workdir", "", "export: folder of a run.")
STEP = flags.DEFINE_integer("step", None, "export: checkpoint; the last one by default.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "export: model.dtype of the run by default."
)
_NEEDED = {"import": ("config", "vision", "decoder"), "export": ("workdir",)}


def main(argv: Sequence[str]) -> None:
    command = argv[1] if len(argv) == 2 else None
    if command not in _NEEDED:
        raise app.UsageError("say `import` or `export` (--help shows examples)")
    missing = [name for name in _NEEDED[command] if not flags.FLAGS[name].value]
    if missing:
        raise app.UsageError(f"{command} needs " + ", ".join(f"--{name}" for name in missing))
    transformers.logging.set_verbosity_error()
    out = pathlib.Path(OUT.value)
    if command == "import":
        sources = Sources(VISION.value, DECODER.value, PROJECTOR.value)
        explicit = config_flags.get_override_values(flags.FLAGS["config"])
        import_run(from_dict(RunConfig, CONFIG.value), sources, out, explicit)
    else:
        run = Run(pathlib.Path(WORKDIR.value).expanduser())
        export_run(run, out, step=STEP.value, dtype=DTYPE.value or "")


if __name__ == "__main__":
    command_line.run(main, (WeightsError, RunError, ImportError))
