"""Evaluates a run on a benchmark."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from storm_jax.config import CompressionConfig, RunConfig, StreamSettings
from storm_jax.evals.benchmark import Benchmark, BenchmarkError, Question
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.evals.provenance import about_this_machine, config_hash
from storm_jax.evals.report.files import Report
from storm_jax.evals.runner import run_benchmark
from storm_jax.evals.settings import ANSWERS, MODES, PAPER_SETTINGS, EvalSettings
from storm_jax.inference.predictor import Predictor
from storm_jax.run import Run

COMPRESSION_FIELDS = tuple(field.name for field in dataclasses.fields(CompressionConfig))


class LazyPredictor:
    """A checkpoint that is loaded when it is first needed.

    Attributes:
      run, step: of the checkpoint; step defaults to the last one.
      weights: "int8", or "" as trained.
    """

    def __init__(
        self, run: str | pathlib.Path | Predictor, step: int | None = None, weights: str = ""
    ):
        if isinstance(run, Predictor):
            self.run, self.step, self.weights = run.run, run.step, run.weights
            self.load = lambda: run
        else:
            self.run, self.weights = Run(run), weights
            self.step = self.run.checkpoints.resolve(step)
            self.load = functools.cache(
                lambda: Predictor(self.run.path, self.step, weights=weights, is_timed=True)
            )


def evaluate(
    run: str | pathlib.Path | Predictor | LazyPredictor,
    benchmark: str,
    *,
    data_root: str | pathlib.Path | None = None,
    split: str = "",
    step: int | None = None,
    weights: str = "",
    settings: str = "",
    num_frames: int | None = None,
    temporal_pool: int | None = None,
    spatial_pool: int | None = None,
    temporal_sample: int | None = None,
    mode: str = "",
    stream: StreamSettings | None = None,
    context_seconds: float | None = None,
    prompt_style: str = "",
    parser: str = "",
    answers: str = "generate",
    subtitles: bool = False,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Report | None:
    """Asks a run the questions of a benchmark and scores the replies.

        report = storm_jax.evals.evaluate("runs/sft", "videomme", data_root="data/videomme", num_frames=64)
        print(report)                               # the table that eval.py prints
        report.scores.headline.value                # the authors' main metric
        [r for r in report.replies if not r.right]  # every wrong reply with its question

    Files are written to RUN/evals/BENCHMARK/SETTINGS. The same call resumes an interrupted evaluation, and
    returns at once if all questions have been answered.

    Args:
      run: folder of a run, or a loaded model (`storm_jax.load`).
      benchmark: its name, e.g. "videomme".
      data_root: folder of the benchmark's files. For "shapes" it defaults to that of the training data.
      split: defaults to the benchmark's first.
      step: checkpoint to load; defaults to the last one.
      weights: "int8" stores the kernels of most layers in int8.
      settings: name of a row of the paper's Table 15, e.g. "storm_t_pool".
      num_frames, temporal_pool, spatial_pool, temporal_sample: compression; each defaults to `settings`,
        or else to the value used in training.
      mode: "offline" asks each question about a clip of `num_frames` frames; "stream" watches each video once, and
        asks its questions on the way. Defaults to what the benchmark is for.
      stream: how a video is watched in mode "stream"; defaults to `StreamSettings()`.
      context_seconds: how much of a video before a question its clip shows, in mode "offline", of benchmarks whose
        questions have times. Defaults to everything.
      prompt_style, parser: names; default to the benchmark's first prompt style and the parser of the style.
      answers: "generate", or "likelihood" of each option's letter.
      subtitles: whether the prompt contains the subtitles of the sampled frames.
      max_new_tokens: maximum length of a reply; the default depends on the benchmark.
      limit: ask only the first questions.
      batch_size: questions answered together (see `Predictor.encode`).
      shard: index and number of the processes that share the questions.

    Returns:
      The report; None if other shards still have questions to ask.

    Raises:
      BenchmarkError: if the files cannot be used or the benchmark does not support an option.
      RunError: if there is no such checkpoint, or the folder contains replies made with other settings.
    """
    model = run if isinstance(run, LazyPredictor) else LazyPredictor(run, step, weights)
    found = BENCHMARKS[benchmark]
    split, style = found.pick_split(split), found.pick_prompt(prompt_style)
    found.pick_parser(parser, style)
    if subtitles and not found.captions:
        raise BenchmarkError(f"--subtitles: {found.title} has no subtitles")
    if answers not in ANSWERS:
        raise BenchmarkError(f"--answers={answers}: must be one of {', '.join(ANSWERS)}")
    mode = mode or ("stream" if found.is_streaming else "offline")
    refused = {
        "num_frames": num_frames,
        "settings": settings or None,
        "batch_size": batch_size,
        "context_seconds": context_seconds,
        "subtitles": subtitles or None,
    }
    _check_mode(mode, stream, refused)
    questions = found.questions(_data_root(data_root, found, model.run), split)
    if mode == "stream":
        _check_videos(questions, found)
    elif context_seconds is not None:
        questions = _with_context(questions, context_seconds, found)
    if answers == "likelihood" and not all(question.options for question in questions):
        raise BenchmarkError("--answers=likelihood: some questions have no options")
    overrides = (num_frames, temporal_pool, spatial_pool, temporal_sample)
    chosen = EvalSettings(
        split=split,
        prompt_style=style,
        compression=resolve_compression(
            model.run.config.compression,
            benchmark,
            settings,
            dict(zip(COMPRESSION_FIELDS, overrides, strict=True)),
        ),
        max_new_tokens=max_new_tokens or found.splits[split].max_new_tokens,
        stream=(stream or StreamSettings()) if mode == "stream" else None,
        context_seconds=context_seconds,
        subtitles=subtitles,
        answers=answers,
        limit=limit,
    )
    return run_benchmark(
        found,
        questions,
        chosen,
        report_folder(model, found, chosen),
        model.load,
        identity={
            "step": model.step,
            "checkpoint_written": model.run.checkpoints.written_at(model.step),
            **_media_settings(model.run.config),
            **({"weights": model.weights} if model.weights else {}),
        },
        about={"config": config_hash(model.run.config), **about_this_machine()},
        parser=parser,
        batch_size=batch_size,
        shard=shard,
    )


def _check_mode(mode: str, stream: StreamSettings | None, of_offline: Mapping[str, object]) -> None:
    """Raises BenchmarkError for options that the mode does not use.

    Args:
      of_offline: options that only "offline" uses; None if they are not set.
    """
    if mode not in MODES:
        raise BenchmarkError(f"--mode={mode}: must be one of {', '.join(MODES)}")
    if mode == "offline" and stream is not None:
        raise BenchmarkError("--fps, --budget_tokens, --policy and --recent need --mode=stream")
    given = [f"--{name}={value}" for name, value in of_offline.items() if value is not None]
    if mode == "stream" and given:
        raise BenchmarkError(
            f"{given[0]} needs --mode=offline: a stream takes --fps frames per second, and shows what fits into "
            f"--budget_tokens"
        )


def _check_videos(questions: Sequence[Question], benchmark: Benchmark) -> None:
    """Raises BenchmarkError if a medium cannot be watched from its beginning."""
    for question in questions:
        medium = question.media
        is_file = medium.path is not None and medium.span is None and medium.data is None
        is_file = is_file and not medium.is_folder()
        if medium.kind != "video" or not is_file or (medium.start and not question.watch):
            raise BenchmarkError(
                f"--mode=stream: {medium.name} of {benchmark.title} is not a whole video in a file; "
                f"use --mode=offline"
            )


def _with_context(
    questions: Sequence[Question], seconds: float, benchmark: Benchmark
) -> list[Question]:
    """The same questions about the last seconds before them; those with a `watch` begin when that begins.

    Raises:
      BenchmarkError: no question has a time to count from.
    """
    if all(question.asked_at is None or question.watch for question in questions):
        raise BenchmarkError(
            f"--context_seconds={seconds:g}: the questions of {benchmark.title} have no times to count from"
        )
    found = []
    for question in questions:
        if question.asked_at is not None and not question.watch:
            start = max(0.0, question.asked_at - seconds)
            media = dataclasses.replace(question.media, start=start)
            question = dataclasses.replace(question, media=media)
        found.append(question)
    return found


def resolve_compression(
    trained: CompressionConfig, benchmark: str, settings: str, overrides: Mapping[str, int | None]
) -> CompressionConfig:
    """The compression of an evaluation: `overrides`, then the paper's `settings`, then training."""
    if settings and settings not in PAPER_SETTINGS:
        raise BenchmarkError(f"--settings={settings}: must be one of {', '.join(PAPER_SETTINGS)}")
    base = PAPER_SETTINGS[settings].compression(settings, benchmark) if settings else trained
    given = {name: value for name, value in overrides.items() if value is not None}
    return dataclasses.replace(base, **given)


def report_folder(
    model: LazyPredictor, benchmark: Benchmark, settings: EvalSettings
) -> pathlib.Path:
    """RUN/evals/BENCHMARK/SETTINGS; the benchmark's name includes a split that is not the default."""
    name = benchmark.name
    if settings.split != benchmark.pick_split(""):
        name += f"_{settings.split}"
    folder = settings.folder_name(model.step, benchmark.pick_prompt(""))
    return model.run.path / "evals" / name / "_".join(filter(None, (folder, model.weights)))


def _media_settings(config: RunConfig) -> dict[str, Any]:
    """What replies depend on in a run's configuration, besides its weights and compression."""
    frames = config.data.frames
    return {
        "system": config.data.system,
        "fps": frames.fps,
        "time_text": frames.time_text,
        "max_damage": frames.max_damage,
    }


def _data_root(
    data_root: str | pathlib.Path | None, benchmark: Benchmark, run: Run
) -> pathlib.Path:
    if data_root is not None:
        return pathlib.Path(data_root)
    if benchmark.name == "shapes" and run.config.data.train:
        return pathlib.Path(run.config.data.train[0].path).parent
    raise BenchmarkError(f"--data_root is missing: the folder of {benchmark.title}'s files")
