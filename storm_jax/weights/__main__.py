"""Imports, exports and uploads pretrained weights.

Import public weights as a run, to train from with --config.init_from=RUN:

    python -m storm_jax.weights import --vision=DIR_OR_HUB_ID --decoder=DIR_OR_HUB_ID \\
        --config=configs/storm_qwen2_7b.py:stage=align --out=RUN

or a whole video model, with Mamba layers that change nothing before they are trained:

    python -m storm_jax.weights import --model=DIR_OR_HUB_ID --add_mixer=mamba1 --out=RUN

Export a run as folders that transformers loads, or as one folder that PyTorch runs, and upload that:

    python -m storm_jax.weights export --workdir=RUN --out=DIR
    python -m storm_jax.weights export --workdir=RUN --format=hf --out=DIR
    python -m storm_jax.weights push --folder=DIR --repo=OWNER/NAME

A DIR is a folder written by transformers' save_pretrained: config.json, safetensors, tokenizer files.
Sizes come from its config.json; everything else, such as projector and image size, from --config.
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
from storm_jax.weights.exporter import FORMATS, export_run
from storm_jax.weights.importer import Sources, import_run
from storm_jax.weights.push import push

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "import: configuration file with its stage, configs/NAME.py:stage=align."
)
VISION = flags.DEFINE_string(
    "vision", "", "import: SigLIP or fixed-size SigLIP2 tower, on its own or inside a larger model."
)
DECODER = flags.DEFINE_string(
    "decoder", "", "import: Qwen2, Qwen2.5, Qwen2-VL, Qwen3 or Llama 3 with its tokenizer."
)
PROJECTOR = flags.DEFINE_string(
    "projector", "", "import: exported projector; randomly initialised by default."
)
MODEL = flags.DEFINE_string(
    "model",
    "",
    "import: a whole video model, instead of its parts: NVILA, VILA, LLaVA-OneVision, LLaVA-Video, SmolVLM, or one that export wrote.",
)
ADD_MIXER = flags.DEFINE_enum(
    "add_mixer",
    "",
    ["", "mamba1", "mamba2"],
    "import: with --model, Mamba layers behind its projector, which start as the identity.",
)
OUT = flags.DEFINE_string("out", "", "import, export: output folder; must not exist.")
WORKDIR = flags.DEFINE_string("workdir", "", "export: run folder.")
STEP = flags.DEFINE_integer("step", None, "export: checkpoint step; defaults to the latest.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "export: dtype of all tensors; defaults to the run's model.dtype.",
)
FORMAT = flags.DEFINE_enum(
    "format", "folders", FORMATS, "export: three folders, or one that PyTorch runs."
)
FOLDER = flags.DEFINE_string("folder", "", "push: folder that export --format=hf wrote.")
REPO = flags.DEFINE_string("repo", "", "push: repository on the Hugging Face Hub, owner/name.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "push: only list what would be uploaded.")
_REQUIRED = {
    "import": ("config", "vision", "decoder", "out"),
    "export": ("workdir", "out"),
    "push": ("folder", "repo"),
}


def main(argv: Sequence[str]) -> None:
    command = argv[1] if len(argv) == 2 else None
    if command not in _REQUIRED:
        raise app.UsageError("the command must be `import`, `export` or `push` (see --help)")
    required = ("out",) if command == "import" and MODEL.value else _REQUIRED[command]
    missing = [name for name in required if not flags.FLAGS[name].value]
    if missing:
        raise app.UsageError(f"{command} needs " + ", ".join(f"--{name}" for name in missing))
    transformers.logging.set_verbosity_error()
    out = pathlib.Path(OUT.value)
    if command == "push":
        push(pathlib.Path(FOLDER.value), REPO.value, dry_run=DRY_RUN.value)
    elif command == "import":
        if MODEL.value and (VISION.value or DECODER.value or PROJECTOR.value):
            raise app.UsageError(
                "--model is a whole model: leave out --vision, --decoder, --projector"
            )
        if ADD_MIXER.value and not MODEL.value:
            raise app.UsageError("--add_mixer needs --model; otherwise model.mixer says which")
        sources = Sources(VISION.value, DECODER.value, PROJECTOR.value, MODEL.value)
        explicit = config_flags.get_override_values(flags.FLAGS["config"]) if CONFIG.value else ()
        config = from_dict(RunConfig, CONFIG.value) if CONFIG.value else None
        import_run(config, sources, out, explicit, ADD_MIXER.value)
    else:
        run = Run(pathlib.Path(WORKDIR.value).expanduser())
        export_run(run, out, step=STEP.value, dtype=DTYPE.value or "", form=FORMAT.value)


if __name__ == "__main__":
    command_line.run(main, (WeightsError, RunError, ImportError))
