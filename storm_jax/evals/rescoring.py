"""Scores replies again, without a model."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from storm_jax.evals import predictions as predictions_lib
from storm_jax.evals.benchmark import Benchmark, BenchmarkError, parse_replies
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.evals.judging import Judged, score_judgements
from storm_jax.evals.provenance import about_this_machine
from storm_jax.evals.report.files import Report, write_report
from storm_jax.evals.scoring import score as compute_scores
from storm_jax.files import describe_change


def score(
    benchmark: str,
    predictions: str | pathlib.Path,
    *,
    data_root: str | pathlib.Path | None = None,
    split: str = "",
    prompt_style: str = "",
    parser: str = "",
    out: str | pathlib.Path | None = None,
) -> Report:
    """Scores a file of predictions.

        print(storm_jax.evals.score("mvbench", "predictions.jsonl", parser="official"))

    Args:
      benchmark: its name.
      predictions: predictions.jsonl of an evaluation, whose results.json provides defaults for the split
        and the prompt style. With `data_root`, any lines of `id` and `reply`.
      data_root: folder of the benchmark's files.
      split, prompt_style, parser: as in `evaluate`.
      out: folder for results, submissions and report.html; None writes nothing.

    Raises:
      BenchmarkError: if the file cannot be scored, or `out` is the folder of an evaluation.
    """
    found, path = BENCHMARKS[benchmark], pathlib.Path(predictions)
    results = _results_of(path, found)
    split = found.pick_split(split or results.get("split", ""))
    known = found.questions(data_root, split) if data_root else None
    questions, replied = predictions_lib.read(path, known)
    style = found.pick_prompt(prompt_style or results.get("prompt_style", ""))
    parser = found.pick_parser(parser, style)
    replies = parse_replies(questions, replied, found.parsers[parser])
    total = results["counts"]["rows"] if results and known is None else len(questions)
    about = {"benchmark": found.name, "split": split, "parser": parser, "predictions": str(path)}
    report = Report(
        benchmark=found,
        split=split,
        settings=None,
        scores=compute_scores(found, split, replies, total),
        replies=replies,
        about={**about, **about_this_machine()},
    )
    if out is None:
        return report
    out = pathlib.Path(out)
    if (out / "settings.json").exists():
        raise BenchmarkError(f"--out={out} is the report of an evaluation: use another folder")
    return write_report(report, out, thumbnails_from=path.parent)


def judge(
    benchmark: str,
    predictions: str | pathlib.Path,
    judgements: str | pathlib.Path,
    *,
    data_root: str | pathlib.Path | None = None,
    split: str = "",
) -> Judged:
    """Scores free-text replies from the judgements of a judge model; no model is called.

    Args:
      benchmark, predictions, data_root, split: as in `score`.
      judgements: lines of `id` and `judgement`.

    Raises:
      BenchmarkError: if no judge scores this split, or a line is malformed.
    """
    found, path = BENCHMARKS[benchmark], pathlib.Path(predictions)
    split = found.pick_split(split or _results_of(path, found).get("split", ""))
    if not found.splits[split].judged:
        raise BenchmarkError(f"--judgements: {found.title} {split} is not scored by a judge")
    known = found.questions(data_root, split) if data_root else None
    questions, _ = predictions_lib.read(path, known)
    tasks = {question.id: question.groups["task"] for question in questions}
    return score_judgements(tasks, pathlib.Path(judgements))


def _results_of(path: pathlib.Path, benchmark: Benchmark) -> Mapping[str, Any]:
    """results.json of the evaluation that wrote a file of predictions; {} for other files."""
    results = path.with_name("results.json")
    if path.name != "predictions.jsonl" or not results.exists():
        return {}
    if change := describe_change(path.parent):
        raise BenchmarkError(change)
    try:
        found = dict(json.loads(results.read_text()))
    except (ValueError, TypeError) as error:
        raise BenchmarkError(f"{results} is damaged: {error}; remove it to score {path}") from error
    if found.get("benchmark") != benchmark.name:
        raise BenchmarkError(
            f"--benchmark={benchmark.name}: {path} contains replies to {found.get('benchmark')}"
        )
    return found
