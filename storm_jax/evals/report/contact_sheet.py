"""A picture of some questions: frames, question, right answer and reply; wrong replies come first."""

from __future__ import annotations

import os
import pathlib
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from storm_jax.evals.questions import without_placeholders
from storm_jax.evals.replies import ScoredReply
from storm_jax.evals.report.thumbnails import FRAMES, Thumbnails

_WRONG, _RIGHT = 12, 4  # questions shown
_IMAGES_PER_ROW = 4
_WIDTH = 11.0  # inches
_LETTERS, _LINES = 122, 4  # of the text above a row of frames


def draw_contact_sheet(
    path: pathlib.Path, replies: Sequence[ScoredReply], thumbnails: Mapping[str, Thumbnails]
) -> None:
    """Draws the questions that `choose_replies` picks; videos take a row each, images share one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = choose_replies([reply for reply in replies if reply.question.id in thumbnails])
    rows = arrange(chosen, thumbnails)
    texts = [[_caption(reply, len(row)) for reply in row] for row in rows]
    heights = [
        0.45 + 0.16 * max(text.count("\n") + 1 for text in row_texts) + _WIDTH / FRAMES
        for row_texts in texts
    ]
    figure = pyplot.figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(rows), height_ratios=heights, squeeze=False)[:, 0]
    for part, row, row_texts in zip(parts, rows, texts, strict=True):
        shares_row = not thumbnails[row[0].question.id].times
        columns = part.subfigures(1, _IMAGES_PER_ROW if shares_row else 1, squeeze=False)[0]
        for column, reply, text in zip(columns, row, row_texts, strict=False):
            colour = "darkgreen" if reply.right else "firebrick"
            title = column.suptitle(text, fontsize=8, color=colour, x=0.01, ha="left")
            title.set_parse_math(False)  # "$" is not the start of a formula
            _draw_frames(column, thumbnails[reply.question.id])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as a box
        partial = path.with_suffix(f".{os.getpid()}.png")
        figure.savefig(partial, dpi=110)
        partial.rename(path)
    pyplot.close(figure)


def choose_replies(replies: Sequence[ScoredReply]) -> list[ScoredReply]:
    """A few wrong replies, then fewer right ones, both spread over the groups of the first dimension."""
    wrong = _spread([reply for reply in replies if not reply.right], _WRONG)
    right = _spread([reply for reply in replies if reply.right], _WRONG + _RIGHT - len(wrong))
    return wrong + right


def _spread(replies: Sequence[ScoredReply], count: int) -> list[ScoredReply]:
    """At most `count` replies, in turn from each group, one group after another."""
    turns: dict[str, int] = defaultdict(int)
    order = []
    for number, reply in enumerate(replies):
        group = _group(reply)
        order.append((turns[group], number))
        turns[group] += 1
    chosen = [replies[number] for _, number in sorted(order)[:count]]
    places = {group: place for place, group in enumerate(turns)}
    return sorted(chosen, key=lambda reply: places[_group(reply)])


def arrange(
    replies: Sequence[ScoredReply], thumbnails: Mapping[str, Thumbnails]
) -> list[list[ScoredReply]]:
    """Rows of the sheet: a video has its own, and consecutive images share one."""
    rows: list[list[ScoredReply]] = []
    shares_row = False
    for reply in replies:
        is_image = not thumbnails[reply.question.id].times
        if is_image and shares_row and len(rows[-1]) < _IMAGES_PER_ROW:
            rows[-1].append(reply)
        else:
            rows.append([reply])
        shares_row = is_image
    return rows


def _draw_frames(figure: Any, thumbnails: Thumbnails) -> None:
    """The frames in a row, each with its time."""
    frames = thumbnails.frames()
    axes = figure.subplots(1, FRAMES if thumbnails.times else 1, squeeze=False)[0]
    for axis in axes:
        axis.axis("off")
    for axis, frame in zip(axes, frames, strict=False):
        axis.imshow(frame)
        axis.set_anchor("W")
    for axis, time in zip(axes, thumbnails.times, strict=False):
        axis.set_title(f"{time:.2f} s", fontsize=6, pad=2)


def _group(reply: ScoredReply) -> str:
    return next(iter(reply.question.groups.values()), "")


def _caption(reply: ScoredReply, in_row: int) -> str:
    """The lines above the frames."""
    question = reply.question
    letters = _LETTERS if in_row == 1 else _LETTERS // _IMAGES_PER_ROW
    options = question.list_options("({letter}) {option}")
    text = f"{_group(reply) or question.id}: {question.text} {options}"
    asked = " ".join(without_placeholders(text).split())
    said = reply.prediction.error or repr(reply.prediction.text)
    replied = f"answer {question.answer or '?'!r}, model {said}"
    lines = [*_wrap(asked, letters), *_wrap(replied, letters)]
    return "\n".join(lines)


def _wrap(text: str, letters: int) -> list[str]:
    return textwrap.wrap(text, letters, max_lines=_LINES)
