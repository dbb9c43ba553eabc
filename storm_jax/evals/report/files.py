"""Writes the files of an evaluation."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from storm_jax.evals.benchmark import Benchmark, ScoredReply
from storm_jax.evals.predictions import to_line
from storm_jax.evals.report.contact_sheet import draw_contact_sheet
from storm_jax.evals.report.html import render_report
from storm_jax.evals.report.text import format_table
from storm_jax.evals.report.thumbnails import read_thumbnails
from storm_jax.evals.scoring import Scores
from storm_jax.evals.settings import EvalSettings
from storm_jax.files import rewriting, write_atomically, write_lines

_ERRORS = 3  # printed after the table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of an evaluation; `print` shows its table.

    Attributes:
      settings: None if replies of unknown origin were scored.
      replies: every question that was asked, with prediction and parsed reply.
      about: settings and versions, as in results.json.
      files: those written to `folder`.
    """

    benchmark: Benchmark
    split: str
    settings: EvalSettings | None
    scores: Scores
    replies: Sequence[ScoredReply]
    about: Mapping[str, Any]
    folder: pathlib.Path | None = None
    files: Sequence[pathlib.Path] = ()

    def __str__(self) -> str:
        """The table and the first errors."""
        errors = list(dict.fromkeys(filter(None, (r.prediction.error for r in self.replies))))
        lines = [format_table(self.benchmark, self.scores)]
        lines += [f"  {error}" for error in errors[:_ERRORS]]
        if len(errors) > _ERRORS:
            lines.append(f"  ... and {len(errors) - _ERRORS:,} more, in predictions.jsonl")
        return "\n".join(lines)


def write_report(
    report: Report, folder: pathlib.Path, thumbnails_from: pathlib.Path | None = None
) -> Report:
    """Writes a report into `folder`; returns it with the list of files.

    Args:
      thumbnails_from: the folder of the evaluation; defaults to `folder`.
    """
    benchmark, scores, replies = report.benchmark, report.scores, report.replies
    folder.mkdir(parents=True, exist_ok=True)
    thumbnails = read_thumbnails(thumbnails_from or folder)
    results = {**report.about, **dataclasses.asdict(scores)}
    page = render_report(benchmark, report.split, replies, scores, report.about, thumbnails)
    with rewriting(folder, ["predictions.jsonl", "results.json"]):
        write_lines(folder / "predictions.jsonl", map(to_line, replies))
        write_atomically(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_atomically(folder / "report.html", page)
    files = [folder / name for name in ("results.json", "predictions.jsonl", "report.html")]
    if any(reply.question.id in thumbnails for reply in replies):
        files.append(folder / "contact_sheet.png")
        draw_contact_sheet(files[-1], replies, thumbnails)
    if benchmark.submit:
        files += benchmark.submit(report.split, replies, folder)
    return dataclasses.replace(report, folder=folder, files=files)
