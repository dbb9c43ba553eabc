"""Renders the built-in task: questions about short events, some of which pooling without memory cannot answer.

    python -m storm_jax.tasks.shapes --out=DIR --clips=N --seed=S

Writes textured clips with short events as H.264 files (PNG for image questions), and LLaVA JSON for train,
val and test. Families of questions:

    order    two flashes in consecutive frames: which came first?
    apart    two flashes, at least a quarter of the clip apart: which came first?
    motion   a shape appears for two or three frames and moves: in which direction?
    needle   one frame flashes: in what colour?
    count    how many frames flash? (multiple choice)
    recall   what colour was the shape at the start, or at the end? (multiple choice)
    colour, shape, place    questions about an image

An `order` or `motion` clip played backwards has another answer. A model that encodes frames independently
and averages groups of k cannot distinguish the two, unless the event straddles two groups.
`shapes.ceiling` computes the best accuracy of such a model by enumerating all events of a family.
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
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument(
        "--clips", type=int, required=True, help="number of training samples, including images"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed; default 0")
    parser.add_argument(
        "--families",
        default=every,
        help=f"comma-separated; repeat a family for more samples of it; default {every}",
    )
    parser.add_argument(
        "--frames",
        type=int,
        default=16,
        help="frames per clip, at least 8, and at most 32 with the family count; default 16",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=32,
        help="height and width in pixels, even, at least 16; default 32",
    )
    parser.add_argument(
        "--noise", type=int, default=16, help="noise of a texture, 0 to 255; default 16"
    )
    parser.add_argument(
        "--event_frames",
        type=int,
        default=2,
        help="frames of a motion, and of each flash of `apart`, 2 or 3; default 2",
    )
    parser.add_argument(
        "--footage",
        metavar="DIR",
        type=os.path.abspath,
        help="folder of videos to use as backgrounds, moving and in changing light; they are kept in memory. val and "
        "test show the last quarter of the first minute of each. Default: a texture with noise",
    )
    parser.add_argument(
        "--eval_clips",
        type=int,
        default=100,
        help="samples per family in each of val and test, in addition to --clips; default 100",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="number of processes; default: all cores",
    )
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
    except KeyboardInterrupt:
        sys.exit("shapes: stopped; rerun the same command to finish")


if __name__ == "__main__":
    main()
