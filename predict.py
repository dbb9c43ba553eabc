"""Asks a run about a video or an image.

python predict.py --workdir=runs/sft --video=clip.mp4 --question="Which flash came first?"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import app, flags, logging

from storm_jax.inference.generate import Sampling
from storm_jax.inference.predictor import Predictor
from storm_jax.run import RunError

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a run that train.py wrote.", required=True
)
VIDEO = flags.DEFINE_string("video", None, "A video file, or an image.", required=True)
QUESTION = flags.DEFINE_string("question", None, "What to ask about it.", required=True)
STEP = flags.DEFINE_integer("step", None, "Checkpoint to load; the last one by default.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Length limit.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", lower_bound=0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "Probability that the sampled tokens share, above 0.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    try:
        sampling = Sampling(MAX_NEW_TOKENS.value, TEMPERATURE.value, TOP_P.value)
        storm = Predictor(WORKDIR.value, STEP.value)
        print(storm.answer(VIDEO.value, QUESTION.value, sampling=sampling, seed=SEED.value))
    except (RunError, ValueError, OSError) as error:
        sys.exit(f"predict.py: {error}")


if __name__ == "__main__":
    app.run(main)
