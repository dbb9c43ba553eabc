"""Asks a model the questions of a benchmark and writes the report.

    RUN/evals/BENCHMARK/SETTINGS/answers.*.jsonl       replies as they come; an interrupted run resumes
    RUN/evals/BENCHMARK/SETTINGS/thumbnails.*.jsonl    a few small frames of each video
    RUN/evals/BENCHMARK/SETTINGS/predictions.jsonl     one line per question, failures with their cause
    RUN/evals/BENCHMARK/SETTINGS/results.json          scores, counts, settings, versions
    RUN/evals/BENCHMARK/SETTINGS/report.html           all of these, and every question, as a page
    RUN/evals/BENCHMARK/SETTINGS/contact_sheet.png     frames, question and reply of some questions

Several processes may share a folder: shard i of n asks about every n-th video, and the last to finish
writes the report.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from storm_jax.config import CompressionConfig
from storm_jax.evals.benchmark import MISSING, Benchmark, Question, parse_replies
from storm_jax.evals.dialogues import in_rounds
from storm_jax.evals.files import is_there
from storm_jax.evals.journal import Journal, JournalWriter
from storm_jax.evals.report.files import Report, write_report
from storm_jax.evals.report.thumbnails import FRAMES, Thumbnails
from storm_jax.evals.scoring import score
from storm_jax.evals.sessions import in_sessions
from storm_jax.evals.settings import EvalSettings
from storm_jax.files import digest
from storm_jax.inference.encoding import EncodedBatch
from storm_jax.inference.generate import Sampling
from storm_jax.inference.prediction import Prediction
from storm_jax.inference.streaming.stream import Stream
from storm_jax.media.media import Media, MediaError
from storm_jax.progress import with_progress
from storm_jax.text.sample import Sample, SampleError


class Model(Protocol):
    """What answers: a `Predictor`, or anything with these methods."""

    def stream(
        self,
        *,
        compression: CompressionConfig | None = None,
        fps: float = 1.0,
        budget_tokens: int = 8192,
        policy: str = "window",
        recent: int = 16,
    ) -> Stream: ...

    def encode(
        self,
        media: Sequence[Sequence[Media]],
        *,
        compression: CompressionConfig | None = None,
        batch_size: int | None = None,
        preview_frames: int = 0,
    ) -> Iterator[EncodedBatch]: ...

    def ask(
        self,
        batch: EncodedBatch,
        samples: Sequence[Sample],
        *,
        sampling: Sampling | None = None,
        choices: Sequence[Sequence[str]] | None = None,
    ) -> Iterator[tuple[int, Prediction]]: ...


def run_benchmark(
    benchmark: Benchmark,
    questions: Sequence[Question],
    settings: EvalSettings,
    folder: pathlib.Path,
    load_model: Callable[[], Model],
    *,
    identity: Mapping[str, Any],
    about: Mapping[str, Any],
    parser: str = "",
    batch_size: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Report | None:
    """Asks the questions that have no reply in `folder` yet; writes the report once all are answered.

    Args:
      questions: all questions of the split.
      load_model: called only if there is something to ask.
      identity: whatever else replies depend on. If it differs from that of the folder, it is an error.
      about: versions and the like, for results.json.
      parser: its name; defaults to that of the prompt style.
      shard: index and number of the processes that share the questions.

    Returns:
      None if other shards still have questions to ask.

    Raises:
      RunError: if the folder contains replies made with other settings.
    """
    asked = list(questions)[: settings.limit]
    parser = benchmark.pick_parser(parser, settings.prompt_style)
    journal = Journal(folder, shard)
    depends_on = {
        "benchmark": benchmark.name,
        **dataclasses.asdict(settings),
        **identity,
        "questions": _digest(questions),
    }
    journal.prepare(depends_on)
    remaining = _remaining(asked, journal, shard)
    with journal.writing() as writer:
        _ask_all(benchmark, remaining, settings, writer, load_model, batch_size)
    predictions = journal.predictions()
    if waiting := sum(question.id not in predictions for question in asked):
        print(f"{waiting:,} of {len(asked):,} questions are left to other shards (--share)")
        return None
    replies = parse_replies(asked, predictions, benchmark.parsers[parser])
    report = Report(
        benchmark=benchmark,
        split=settings.split,
        settings=settings,
        scores=score(benchmark, settings.split, replies, len(questions), settings.compression),
        replies=replies,
        about={**depends_on, "parser": parser, **about},
    )
    return write_report(report, folder)


def _digest(questions: Sequence[Question]) -> str:
    """Changes with the questions and their videos, but not with the answers or where the files are."""
    return digest(json.dumps([_identity(question) for question in questions]))


def _identity(question: Question) -> tuple[Any, ...]:
    q, path = question, question.media.path
    if q.asked_at is None:
        return q.id, q.text, q.options, path and path.stem
    watch = q.watch and dataclasses.astuple(q.watch)
    return q.id, q.text, q.options, q.video, q.asked_at, watch, q.lines, q.extra.get("context")


def _remaining(
    asked: Sequence[Question], journal: Journal, shard: tuple[int, int]
) -> list[Question]:
    """Questions of this shard's videos that have no reply yet; failures are asked again."""
    videos = {video: i for i, video in enumerate(dict.fromkeys(q.video for q in asked))}
    index, count = shard
    mine = [question for question in asked if videos[question.video] % count == index]
    answered = {key for key, found in journal.predictions().items() if not found.error}
    remaining = [question for question in mine if question.id not in answered]
    if len(remaining) < len(mine):
        print(f"{len(mine) - len(remaining):,} of {len(mine):,} questions are already answered")
    return remaining


def _ask_all(
    benchmark: Benchmark,
    questions: Sequence[Question],
    settings: EvalSettings,
    writer: JournalWriter,
    load_model: Callable[[], Model],
    batch_size: int | None,
) -> None:
    """Saves a prediction for every question."""
    answerable = []
    for question in questions:
        path = question.media.path
        if path is not None and not is_there(path):
            error = MediaError(question.media, MISSING, "there is no such file")
            writer.add(question.id, Prediction(error=str(error), cause=MISSING))
        else:
            answerable.append(question)
    if not answerable:
        return
    model = load_model()
    if settings.stream is None:
        ask = functools.partial(_predict, model, benchmark, settings, writer, batch_size)
        predictions = in_rounds(answerable, ask)
    else:
        stream = model.stream(
            compression=settings.compression, **dataclasses.asdict(settings.stream)
        )
        reply = functools.partial(_reply, model, benchmark, settings)
        predictions = in_sessions(answerable, stream, settings.stream.fps, reply, writer)
    progress = with_progress(predictions, len(answerable), "answering", unit="questions")
    for question, prediction in progress:
        writer.add(question.id, prediction)


def _reply(
    model: Model,
    benchmark: Benchmark,
    settings: EvalSettings,
    batch: EncodedBatch,
    question: Question,
) -> Prediction:
    """The reply to a question about the only scene of a batch."""
    (scene,) = batch.scenes
    sample = dataclasses.replace(_sample(benchmark, settings, question, ()), media=scene.media)
    [(_, prediction)] = _ask(model, settings, batch, [question], [sample])
    return prediction


def _ask(
    model: Model,
    settings: EvalSettings,
    batch: EncodedBatch,
    questions: Sequence[Question],
    samples: Sequence[Sample],
) -> Iterator[tuple[Question, Prediction]]:
    """The reply to each of a batch's questions, of which `samples` are the prompts."""
    likelihood = settings.answers == "likelihood"
    answered = model.ask(
        batch,
        samples,
        sampling=Sampling(settings.max_new_tokens),
        choices=[question.letters for question in questions] if likelihood else None,
    )
    for index, prediction in answered:
        yield questions[index], prediction


def _predict(
    model: Model,
    benchmark: Benchmark,
    settings: EvalSettings,
    writer: JournalWriter,
    batch_size: int | None,
    questions: Sequence[Question],
) -> Iterator[tuple[Question, Prediction]]:
    """Yields the prediction of each question; thumbnails of its video have been saved before."""
    by_media: dict[Media, list[Question]] = defaultdict(list)
    for question in questions:
        by_media[question.media].append(question)
    batches = model.encode(
        [(media,) for media in by_media],
        compression=settings.compression,
        batch_size=batch_size,
        preview_frames=FRAMES,
    )
    for batch in batches:
        asked: list[Question] = []
        samples: list[Sample] = []
        for scene in batch.scenes:
            (media,) = scene.media
            if scene.previews:
                ids = [question.id for question in by_media[media] if question.watch is None]
                if ids:
                    writer.add_thumbnails(ids, Thumbnails.of(scene.previews[0], media.kind))
            for question in by_media[media]:
                try:
                    sample = _sample(benchmark, settings, question, scene.times)
                except SampleError as error:
                    yield question, Prediction(error=str(error), cause=error.cause)
                else:
                    asked.append(question)
                    samples.append(sample)
        yield from _ask(model, settings, batch, asked, samples)


def _sample(
    benchmark: Benchmark, settings: EvalSettings, question: Question, times: Sequence[np.ndarray]
) -> Sample:
    """The question as the model is asked; `times` is empty if the video could not be read.

    Raises:
      SampleError: if its subtitles cannot be read.
    """
    if settings.subtitles and times:
        assert benchmark.captions is not None
        try:
            captions = tuple(benchmark.captions(question, times[0]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{question.subtitles} cannot be read: {error!r}"
            raise SampleError(question.id, "subtitles", problem) from error
        question = dataclasses.replace(question, captions=captions)
    return benchmark.prompts[settings.prompt_style](question)
