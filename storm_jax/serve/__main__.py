"""Serves a run with OpenAI's chat API.

    python -m storm_jax.serve --workdir=runs/sft

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" -d '{"model": "sft",
        "messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,..."}},
        {"type": "text", "text": "What happens?"}]}]}'

It listens on this machine only, unless --host says otherwise. SIGTERM finishes the open requests. See docs/serving.md.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from absl import app, flags

from storm_jax import command_line
from storm_jax.inference.predictor import Predictor
from storm_jax.run import RunError

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a run written by train.py.", required=True
)
STEP = flags.DEFINE_integer("step", None, "Checkpoint to load; defaults to the last one.")
WEIGHTS = command_line.define_weights_flag()
NAME = flags.DEFINE_string("name", None, "Name of the model; defaults to that of the folder.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
PORT = flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one.", 0, 65535)
API_KEY = flags.DEFINE_string(
    "api_key", "", "Key that clients must send; defaults to the variable STORM_API_KEY."
)
DECODER = flags.DEFINE_string(
    "decoder",
    None,
    "API of a vLLM server that writes the answers, as http://host:8000/v1; by default they are written here.",
)
DECODER_MODEL = flags.DEFINE_string(
    "decoder_model", "decoder", "Name of the exported decoder on that server."
)
ROWS = flags.DEFINE_integer("rows", 8, "Answers that are written at once.", lower_bound=1)
LENGTH = flags.DEFINE_integer(
    "length", 8192, "Tokens of a prompt and its answer at most.", lower_bound=64
)
BLOCK = flags.DEFINE_integer(
    "block",
    1024,
    "Tokens of a prompt that are read at once, while the other answers wait.",
    lower_bound=32,
)
CACHE_GB = flags.DEFINE_float(
    "cache_gb", 1.0, "Device memory for encoded media, for further questions.", lower_bound=0
)
WORKERS = flags.DEFINE_integer("workers", 2, "Processes that decode media.", lower_bound=1)
FOLDER = flags.DEFINE_string(
    "allowed_media_folder", None, "Folder whose files clients may name with file: URLs."
)
DOMAINS = flags.DEFINE_list(
    "allowed_media_domains",
    [],
    "Hosts to download media from: example.org, or .example.org for all below it.",
)
MAX_FRAMES = flags.DEFINE_integer("max_frames", 128, "Frames of a video.", lower_bound=1)
MAX_SECONDS = flags.DEFINE_float("max_seconds", 4 * 3600.0, "Length of a video.", lower_bound=0)
MAX_MEDIA = flags.DEFINE_integer("max_media", 8, "Images and videos of a request.", lower_bound=0)
MAX_MEGABYTES = flags.DEFINE_integer(
    "max_megabytes", 64, "Size of a request, and of its media.", lower_bound=1
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 1024, "Tokens of an answer.", lower_bound=1)
MAX_QUEUED = flags.DEFINE_integer(
    "max_queued", 64, "Requests that wait; further ones get status 429.", lower_bound=0
)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        from storm_jax.serve import server
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: pip install 'storm-jax[serve]'") from error
    from storm_jax.serve.limits import Limits
    from storm_jax.serve.service import Service
    from storm_jax.serve.sources import Sources

    folder = None if FOLDER.value is None else pathlib.Path(FOLDER.value)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--allowed_media_folder={folder} is not a folder")
    listening = server.listen(
        HOST.value, PORT.value
    )  # mistakes are found before the model is loaded
    megabytes = MAX_MEGABYTES.value * 2**20
    limits = Limits(
        body_bytes=megabytes * 4 // 3 + 2**20,  # in base64
        media=MAX_MEDIA.value,
        media_bytes=megabytes,
        frames=MAX_FRAMES.value,
        seconds=MAX_SECONDS.value,
        new_tokens=MAX_NEW_TOKENS.value,
        queued=MAX_QUEUED.value,
    )
    predictor = Predictor(
        WORKDIR.value, STEP.value, weights=WEIGHTS.value, num_workers=WORKERS.value
    )
    length = min(LENGTH.value, predictor.config.model.decoder.max_positions)
    _check_memory(predictor, ROWS.value, length)
    service = Service(
        predictor,
        Sources(limits=limits, folder=folder, domains=DOMAINS.value),
        name=NAME.value or pathlib.Path(WORKDIR.value).resolve().name,
        rows=ROWS.value,
        length=length,
        block=BLOCK.value,
        cache_bytes=int(CACHE_GB.value * 1e9),
        decoder=(DECODER.value, DECODER_MODEL.value) if DECODER.value else None,
    )
    key = API_KEY.value or os.environ.get("STORM_API_KEY", "")
    server.run(service, listening, key)


def _check_memory(predictor: Predictor, rows: int, length: int) -> None:
    """Says what the cache takes on each device.

    Raises:
      ValueError: more than is free.
    """
    import jax

    needed = predictor.cache_bytes(rows, length)
    print(
        f"cache: {needed / 1e9:.2f} GB a device for {rows} answers of {length:,} tokens", flush=True
    )
    stats = jax.local_devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", needed) - stats.get("bytes_in_use", 0)
    if needed > free:
        raise ValueError(
            f"--rows={rows} and --length={length} need {needed / 1e9:.1f} GB a device, and {free / 1e9:.1f} are free: "
            f"lower one of them, or use --weights=int8"
        )


if __name__ == "__main__":
    command_line.run(main, (RunError, ValueError, ImportError))
