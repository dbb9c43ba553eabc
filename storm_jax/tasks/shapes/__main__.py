"""The built-in task: questions about moving shapes that pooling without memory cannot answer.

    python -m storm_jax.tasks.shapes --out=DIR --clips=N --seed=S

renders textured clips with events in them to H.264 files (PNG for image questions) and writes LLaVA
JSON for train, val and test. Families:

    order    two flashes in neighbouring frames: which came first
    motion   a shape shows for two or three frames only and moves: which way
    needle   one frame flashes: in what colour
    count    how many frames flash (multiple choice)
    recall   the colour of the shape at the start or at the end (multiple choice)
    colour, shape, place    about an image

Reversing the time of an `order` or `motion` clip gives a clip with another answer. So a model that
encodes frames apart and averages them over k frames cannot tell the two, unless the event straddles
two groups. `ceiling` computes how far such a model can get, by enumerating each family's events.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

from storm_jax.tasks.shapes.dataset import write
from storm_jax.tasks.shapes.families import FAMILIES
from storm_jax.tasks.shapes.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m storm_jax.tasks.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    every = ",".join(FAMILIES)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--clips", type=int, required=True, help="training samples, images included"
    )
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--families",
        default=every,
        help=f"comma-separated, twice for twice as many; default {every}",
    )
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip (8 at least)")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels (even)")
    parser.add_argument("--noise", type=int, default=16, help="background noise, 0 to 255")
    parser.add_argument("--event_frames", type=int, default=2, help="frames of a motion: 2 or 3")
    parser.add_argument(
        "--eval_clips", type=int, default=100, help="val and test samples per family each"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    families = tuple(args.families.split(","))
    for name, problem in {
        "families": not set(families) <= set(FAMILIES),
        "clips": args.clips < 1,
        "seed": args.seed < 0,
        "frames": args.frames < 8,
        "size": args.size < 16 or args.size % 2,
        "noise": not 0 <= args.noise <= 255,
        "event_frames": args.event_frames not in (2, 3),
        "eval_clips": args.eval_clips < 1,
        "workers": args.workers < 1,
    }.items():
        if problem:
            parser.error(f"--{name}={getattr(args, name)} is out of range (see --help)")
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)}
    try:
        write(args.out, Settings(**{**fields, "families": families}), args.workers)
    except (ValueError, OSError) as error:
        sys.exit(f"shapes: {error}")


if __name__ == "__main__":
    main()
