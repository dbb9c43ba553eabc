"""Asks a run about a video or an image.

python predict.py --workdir=runs/sft --video=clip.mp4 --question="Which flash came first?"
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import app, flags

from storm_jax import command_line
from storm_jax.inference.generate import Sampling
from storm_jax.inference.predictor import Predictor
from storm_jax.run import RunError

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a run written by train.py.", required=True
)
VIDEO = flags.DEFINE_string("video", None, "A video or image file.", required=True)
QUESTION = flags.DEFINE_string("question", None, "What to ask about it.", required=True)
STEP = flags.DEFINE_integer("step", None, "Checkpoint to load; defaults to the last one.")
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 64, "Maximum length of the answer.", lower_bound=1
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "0 takes the most likely token.", lower_bound=0
)
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample from the most likely tokens whose probabilities add up to this."
)
SEED = flags.DEFINE_integer("seed", 0, "Random seed of sampling.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    sampling = Sampling(MAX_NEW_TOKENS.value, TEMPERATURE.value, TOP_P.value)
    storm = Predictor(WORKDIR.value, STEP.value)
    print(storm.answer(VIDEO.value, QUESTION.value, sampling=sampling, seed=SEED.value))


if __name__ == "__main__":
    command_line.run(main, (RunError, ValueError))
