"""Measures what encoding a video once for all its questions saves, in questions per second.

    python -m benchmarks.eval_throughput --out=OUT

A model with random weights answers `--questions` questions about each of `--videos` H.264 clips with
`Predictor.predict` (decoding in a worker process, encoding, prefill, generation). For comparison, each
question gets its own copy of its clip, as in a harness that processes questions one by one. Both are
run in turn, after a round that is not counted. The ratio is that of the medians over rounds. Results
are written to OUT/eval_throughput.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import shutil
import statistics
import time
from typing import Any

import jax
import numpy as np

from configs import tiny
from configs.tiny import MODEL as TINY
from storm_jax.config import ModelConfig, RunConfig, from_dict, to_dict
from storm_jax.files import write_atomically
from storm_jax.inference.generate import Sampling
from storm_jax.inference.predictor import Predictor
from storm_jax.media.media import Media
from storm_jax.media.video import write_video
from storm_jax.params import init_params
from storm_jax.run import Run
from storm_jax.text.bpe import train_tokenizer
from storm_jax.text.sample import Sample, Turn

QUESTION = (
    "Select the best answer, {}. What does the person do?\nA. runs\nB. sits\nC. eats\nD. sleeps"
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.eval_throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", required=True, type=pathlib.Path, help="folder for clips, the run and results"
    )
    parser.add_argument("--videos", type=int, default=16, help="default 16")
    parser.add_argument("--questions", type=int, default=3, help="per video; default 3")
    parser.add_argument("--frames", type=int, default=32, help="per video; default 32")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--batch_size", type=int, default=8, help="default 8")
    args = parser.parse_args(argv)
    model = scaled_model()
    predictor = make_predictor(args.out / "run", model, args.frames)
    shared, separate = make_samples(args.out / "clips", args)
    ways = {"shared": shared, "not shared": separate}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    replies = {}
    for number in range(args.rounds + 1):
        for way, samples in ways.items():
            began = time.perf_counter()
            answered = dict(
                predictor.predict(samples, sampling=Sampling(8), batch_size=args.batch_size)
            )
            took = time.perf_counter() - began
            assert not any(prediction.error for prediction in answered.values())
            replies[way] = [answered[index].text for index in range(len(samples))]
            if number:
                rates[way].append(len(samples) / took)
                seconds[way].append(sum(p.seconds for p in answered.values()) / len(samples))
    assert replies["shared"] == replies["not shared"]
    results = summary(args, model, rates, seconds)
    write_atomically(args.out / "eval_throughput.json", json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def scaled_model() -> ModelConfig:
    """A model small enough for two cores that spends most time in the tower, as the 7B model does."""
    preset = TINY
    return dataclasses.replace(
        preset,
        vision=dataclasses.replace(
            preset.vision, image_size=112, patch_size=14, width=128, depth=4, mlp_dim=512
        ),
        decoder=dataclasses.replace(preset.decoder, width=192, depth=4, head_dim=48, mlp_dim=512),
    )


def make_predictor(folder: pathlib.Path, model: ModelConfig, frames: int) -> Predictor:
    """Creates and loads a run with random weights."""
    shutil.rmtree(folder, ignore_errors=True)
    config = tiny.get_config("stage=sft")
    config.model.update(to_dict(model))
    config.compression.num_frames = frames
    config.data.num_workers = 1
    run = Run(folder)
    tokenizer = folder.with_name("tokenizer")
    train_tokenizer([QUESTION] * 4, 400).save_pretrained(tokenizer)
    run.prepare(from_dict(RunConfig, config), tokenizer)
    run.checkpoints.write_params(init_params(model, 0), {})
    return Predictor(folder)


def make_samples(
    folder: pathlib.Path, args: argparse.Namespace
) -> tuple[list[Sample], list[Sample]]:
    """The same questions about one file per video, and about one file per question."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shared: list[Sample] = []
    separate: list[Sample] = []
    for video in range(args.videos):
        base = rng.integers(0, 256, (1, 8, 8, 3)) + rng.integers(-9, 9, (60, 8, 8, 3)).cumsum(0)
        frames = base.clip(0, 255).astype(np.uint8).repeat(28, axis=1).repeat(28, axis=2)
        original = folder / f"{video}.mp4"
        write_video(original, frames, 10)
        for question in range(args.questions):
            copy = folder / f"{video}_{question}.mp4"
            shutil.copy(original, copy)
            turns = (Turn("user", f"<video>\n{QUESTION.format(question)}"),)
            for samples, path in ((shared, original), (separate, copy)):
                samples.append(
                    Sample(id=path.name, turns=turns, media=(Media.file("video", path),), extra={})
                )
    return shared, separate


def summary(
    args: argparse.Namespace,
    model: ModelConfig,
    rates: dict[str, list[float]],
    seconds: dict[str, list[float]],
) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(rates["shared"], rates["not shared"], strict=True)]
    return {
        "command": f"python -m benchmarks.eval_throughput --videos={args.videos} "
        f"--questions={args.questions} --frames={args.frames} --rounds={args.rounds} "
        f"--batch_size={args.batch_size}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}",
        "visual tokens": args.frames // 4 * model.side**2,
        "questions a second": {way: round(statistics.median(r), 2) for way, r in rates.items()},
        "rounds": {way: [round(rate, 2) for rate in r] for way, r in rates.items()},
        "model seconds a question": {
            way: round(statistics.median(s), 4) for way, s in seconds.items()
        },
        "ratio": round(
            statistics.median(rates["shared"]) / statistics.median(rates["not shared"]), 2
        ),
        "ratio of each round": [round(ratio, 2) for ratio in ratios],
    }


if __name__ == "__main__":
    main()
