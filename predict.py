"""Asks a run about videos and images.

    python predict.py --workdir=runs/sft --video=clip.mp4 --question="Which flash came first?"
    python predict.py --workdir=runs/sft --image=a.png --image=b.png --question="What changed?"
    python predict.py --workdir=runs/sft --video=clip.mp4
    python predict.py --workdir=runs/sft --stream=rtsp://camera/stream --question="What is happening?" --ask_every=10

Without --question, it asks for questions until an empty line; the media are encoded once. Compression may
differ from training; the weights stay the same.

--stream watches a network stream, a camera (/dev/video0) or a file as it arrives, in constant memory (docs/streaming.md).
Questions may be typed while it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence

from absl import app, flags

from storm_jax import command_line
from storm_jax.config import CompressionConfig, StreamSettings
from storm_jax.inference.generate import Sampling
from storm_jax.inference.predictor import Predictor
from storm_jax.inference.streaming.conversation import Conversation
from storm_jax.inference.streaming.sources import Source, SourceError
from storm_jax.media.media import Media
from storm_jax.run import Run, RunError

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a run written by train.py.", required=True
)
VIDEO = flags.DEFINE_multi_string("video", [], "A video, or a folder of frames; repeatable.")
IMAGE = flags.DEFINE_multi_string("image", [], "An image, shown before the videos; repeatable.")
QUESTION = flags.DEFINE_multi_string("question", [], "What to ask about them; repeatable.")
STREAM = flags.DEFINE_string(
    "stream", None, "Video to watch as it arrives: rtsp://..., tcp://..., /dev/video0 or a file."
)
command_line.define_stream_flags("--stream")
ASK_EVERY = flags.DEFINE_float(
    "ask_every",
    0.0,
    "Seconds of --stream after which --question is asked again; 0 asks at the end.",
    lower_bound=0,
)
JSONL = flags.DEFINE_bool("jsonl", False, "Write answers about --stream as JSON, one per line.")
command_line.define_compression_flags("training")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to load; defaults to the last one.")
WEIGHTS = command_line.define_weights_flag()
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
    media = [*(Media.file("image", path) for path in IMAGE.value),
             *(Media.file("video", path) for path in VIDEO.value)]  # fmt: skip
    if STREAM.value is not None and media:
        raise ValueError(
            "--stream cannot be combined with --video and --image: ask about them separately"
        )
    if STREAM.value is None and not media:
        raise ValueError("--video, --image or --stream is missing: what to ask about")
    trained = Run(WORKDIR.value).config.compression
    chosen = dataclasses.replace(trained, **command_line.compression_flags())
    for medium in media:  # mistakes are found before the model is loaded
        medium.check_exists()
    for question in QUESTION.value:
        check_text(question)
    if STREAM.value is not None:
        watch_stream(STREAM.value, chosen, sampling)
        return
    watched = Predictor(WORKDIR.value, STEP.value, weights=WEIGHTS.value).watch(
        media, compression=chosen
    )
    for question in QUESTION.value or questions_from_stdin():
        try:
            print(watched.answer(question, sampling=sampling, seed=SEED.value), flush=True)
        except ValueError as error:
            if QUESTION.value:
                raise
            print(f"predict.py: {error}", file=sys.stderr)  # the next question may be better


def watch_stream(url: str, compression: CompressionConfig, sampling: Sampling) -> None:
    """Asks about a video while it arrives; Ctrl-C ends it."""
    size = Run(WORKDIR.value).config.model.vision.image_size
    settings = command_line.stream_flags() or StreamSettings()
    try:
        source = Source(url, settings.fps, size)  # before the model is loaded
    except SourceError as error:
        raise SourceError(f"--stream={error}") from error
    stream = Predictor(WORKDIR.value, STEP.value, weights=WEIGHTS.value).stream(
        compression=compression, **dataclasses.asdict(settings)
    )
    with source, contextlib.suppress(KeyboardInterrupt):
        conversation = Conversation(stream, source, sampling, SEED.value, JSONL.value)
        conversation.run(QUESTION.value, ASK_EVERY.value, questions_from_stdin)


def questions_from_stdin() -> Iterator[str]:
    """Lines, until an empty one or the end."""
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
            check_text(question)
        except EOFError:
            return
        except UnicodeDecodeError:
            raise ValueError("a question is not valid UTF-8") from None
        if not question:
            return
        yield question


def check_text(question: str) -> None:
    try:
        question.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the question {question!r} is not valid UTF-8") from None


if __name__ == "__main__":
    command_line.run(main, (RunError, ValueError, ImportError))
