"""Asks a model the questions of a benchmark and writes the report.

    RUN/evals/BENCHMARK/SETTINGS/answers.*.jsonl     replies as they come; a killed run goes on with the rest
    RUN/evals/BENCHMARK/SETTINGS/predictions.jsonl   one line a question, failures with cause
    RUN/evals/BENCHMARK/SETTINGS/results.json        scores, counts, settings, versions
    RUN/evals/BENCHMARK/SETTINGS/contact_sheet.png   frames, question and reply of some questions

Several processes may share the questions of one folder: each takes every n-th video, and whichever ends
last writes the report.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from storm_jax.config import CompressionConfig
from storm_jax.evals.benchmark import Benchmark, Parser
from storm_jax.evals.contact_sheet import Panel, draw_contact_sheet
from storm_jax.evals.files import is_there
from storm_jax.evals.journal import Journal
from storm_jax.evals.predictions import to_line
from storm_jax.evals.questions import MISSING, Answer, Question, Row
from storm_jax.evals.scoring import Scores, parse_row, parse_rows, score
from storm_jax.evals.settings import EvalSettings
from storm_jax.files import digest, write_atomically, write_lines
from storm_jax.inference.generate import Sampling
from storm_jax.inference.predictor import Prediction
from storm_jax.media.contact_sheet import pick_frames
from storm_jax.media.media import MediaError
from storm_jax.progress import with_progress
from storm_jax.text.sample import Sample, SampleError

PANELS = 16
PANELS_PER_GROUP = 2


class Model(Protocol):
    """What answers: a `Predictor`, or whatever has its `predict`."""

    def predict(
        self,
        samples: Sequence[Sample],
        *,
        compression: CompressionConfig | None = None,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        choices: Sequence[Sequence[str]] | None = None,
        ask: Callable[[int, Sequence[np.ndarray]], Sample] | None = None,
        with_clips: Collection[int] = (),
    ) -> Iterator[tuple[int, Prediction]]: ...


@dataclasses.dataclass(frozen=True)
class Report:
    """Scores, and where they and the rest were written."""

    scores: Scores
    rows: Sequence[Row]
    files: Sequence[pathlib.Path]


def evaluate(
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
    share: tuple[int, int] = (0, 1),
) -> Report | None:
    """Asks what has no reply yet in `folder`, and writes the report when all questions have been asked.

    Args:
      questions: all of the split.
      load_model: called when there is something to ask.
      identity: what replies depend on beside `settings`: other values are refused.
      about: versions and the like, for results.json.
      parser: its name; "" = that of the prompt style.
      share: which of how many processes this is.

    Returns:
      None when other processes have not asked all of theirs.

    Raises:
      RunError: when the folder holds replies of other settings.
    """
    asked = list(questions)[: settings.limit]
    parser = benchmark.pick_parser(parser, settings.prompt_style)
    parse = benchmark.parsers[parser]
    journal = Journal(folder, share)
    depends_on = {
        "benchmark": benchmark.name,
        **dataclasses.asdict(settings),
        **identity,
        "questions": _digest(questions),
    }
    journal.prepare(depends_on)
    left = _open_questions(asked, journal, share)
    _ask(benchmark, left, settings, journal, load_model, batch_size, parse)
    answers = journal.answers()
    if lacking := sum(question.id not in answers for question in asked):
        print(f"{lacking:,} of {len(asked):,} questions wait for other processes (--share)")
        return None
    rows = parse_rows(asked, answers, parse)
    scores = score(benchmark, settings.split, rows, len(questions), settings.compression)
    about = {**depends_on, "parser": parser, **about}
    return Report(
        scores, rows, write_report(benchmark, settings.split, rows, scores, about, folder)
    )


def write_report(
    benchmark: Benchmark,
    split: str,
    rows: Sequence[Row],
    scores: Scores,
    about: Mapping[str, Any],
    folder: pathlib.Path,
) -> list[pathlib.Path]:
    """Writes predictions, results and what the authors' scorers read; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "predictions.jsonl", map(to_line, rows))
    results = {**about, **dataclasses.asdict(scores)}
    write_atomically(folder / "results.json", json.dumps(results, indent=2) + "\n")
    files = [folder / "results.json", folder / "predictions.jsonl"]
    if benchmark.submit:
        files += benchmark.submit(split, rows, folder)
    sheet = folder / "contact_sheet.png"
    return [*files, sheet] if sheet.exists() else files


def _digest(questions: Sequence[Question]) -> str:
    """Changes with what is asked about which video, not with the key or how the files are unpacked."""
    asked = [(q.id, q.text, q.options, q.media.path and q.media.path.stem) for q in questions]
    return digest(json.dumps(asked))


def _open_questions(
    asked: Sequence[Question], journal: Journal, share: tuple[int, int]
) -> list[Question]:
    """Those of this process's videos that have no reply yet; failures are asked again."""
    videos = {video: i for i, video in enumerate(dict.fromkeys(q.video for q in asked))}
    index, count = share
    mine = [question for question in asked if videos[question.video] % count == index]
    done = {identity for identity, answer in journal.answers().items() if not answer.error}
    left = [question for question in mine if question.id not in done]
    if len(left) < len(mine):
        print(f"{len(mine) - len(left):,} of {len(mine):,} questions are answered already")
    return left


def _ask(
    benchmark: Benchmark,
    questions: Sequence[Question],
    settings: EvalSettings,
    journal: Journal,
    load_model: Callable[[], Model],
    batch_size: int | None,
    parse: Parser,
) -> None:
    here: list[Question] = []
    absent: list[Question] = []
    for question in questions:
        path = question.media.path
        (absent if path is not None and not is_there(path) else here).append(question)
    with journal.writing() as writer:
        for question in absent:
            error = MediaError(question.media, MISSING, "there is no such file")
            writer.add(question.id, Answer(error=str(error), cause=MISSING))
        if not here:
            return
        panels = _panels(here)
        drawn: dict[int, Panel] = {}
        answered = _predict(load_model(), benchmark, here, settings, batch_size, panels)
        line = "{done:,} of {total:,} questions, {left:.0f} s left"
        for index, prediction in with_progress(answered, len(here), line, tells_end=True):
            row = parse_row(here[index], _answer(prediction), parse)
            writer.add(row.question.id, row.answer)
            if prediction.clips:
                drawn[index] = _panel(row, prediction)
    sheet = journal.folder / "contact_sheet.png"
    if drawn and not sheet.exists():
        draw_contact_sheet(sheet, [drawn[index] for index in sorted(drawn)])


def _predict(
    model: Model,
    benchmark: Benchmark,
    questions: Sequence[Question],
    settings: EvalSettings,
    batch_size: int | None,
    with_clips: Collection[int],
) -> Iterator[tuple[int, Prediction]]:
    prompt = benchmark.prompts[settings.prompt_style]

    def ask(index: int, times: Sequence[np.ndarray]) -> Sample:
        question = questions[index]
        if settings.subtitles:
            question = _with_captions(benchmark, question, times[0])
        sample = prompt(question).sample(question)
        if benchmark.captions_among_frames:
            sample = dataclasses.replace(sample, captions=question.captions or ())
        return sample

    return model.predict(
        [
            Sample(id=question.id, turns=(), media=(question.media,), extra={})
            for question in questions
        ],
        compression=settings.compression,
        sampling=Sampling(settings.max_new_tokens),
        batch_size=batch_size,
        choices=[q.letters for q in questions] if settings.answers == "likelihood" else None,
        ask=ask,
        with_clips=with_clips,
    )


def _with_captions(benchmark: Benchmark, question: Question, times: np.ndarray) -> Question:
    assert benchmark.captions is not None
    try:
        captions = tuple(benchmark.captions(question, times))
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{question.subtitles} cannot be read: {error!r}"
        raise SampleError(question.id, "subtitles", problem) from error
    return dataclasses.replace(question, captions=captions)


def _answer(prediction: Prediction) -> Answer:
    return Answer(
        reply=prediction.text,
        error=prediction.error,
        cause=prediction.cause,
        visual_tokens=prediction.visual_tokens,
        seconds=prediction.seconds,
    )


def _panels(questions: Sequence[Question]) -> set[int]:
    """Indices of the first questions of each group of the first dimension, a few in all."""
    taken: Counter[str] = Counter()
    chosen: set[int] = set()
    for index, question in enumerate(questions):
        group = next(iter(question.groups.values()), "")
        if taken[group] < PANELS_PER_GROUP and len(chosen) < PANELS:
            taken[group] += 1
            chosen.add(index)
    return chosen


def _panel(row: Row, prediction: Prediction) -> Panel:
    """With no more frames than are drawn: a whole clip is large."""
    question = row.question
    picks = pick_frames(len(prediction.clips[0]))
    return Panel(
        title=next(iter(question.groups.values()), question.id),
        frames=prediction.clips[0][picks],
        times=prediction.times[0][picks],
        question=f"{question.text}\n{question.listed('({letter}) {option}')}",
        answer=question.answer or "?",
        prediction=row.answer.reply,
        right=row.right,
    )
