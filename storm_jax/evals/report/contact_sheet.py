"""A picture of some questions: frames, question, right answer and reply; wrong replies come first."""

from __future__ import annotations

import io
import os
import pathlib
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from storm_jax.evals.benchmark import ScoredReply, without_placeholders
from storm_jax.evals.report.thumbnails import COLUMNS, Thumbnails

_WRONG, _RIGHT = 12, 4  # questions shown
_IMAGES_PER_ROW = 4
_LETTERS, _LINES = 135, 4  # of the text above a row of frames
# In inches.
_WIDTH, _MARGIN, _LINE, _GAP = 11.0, 0.15, 0.17, 0.25
_FRAME = (_WIDTH - 2 * _MARGIN) / COLUMNS


def draw_contact_sheet(
    path: pathlib.Path, replies: Sequence[ScoredReply], thumbnails: Mapping[str, Thumbnails]
) -> None:
    """Draws the questions that `choose_replies` picks; videos take a row each, images share one."""
    from matplotlib.figure import Figure

    chosen = choose_replies([reply for reply in replies if reply.question.id in thumbnails])
    rows = arrange(chosen, thumbnails)
    captions = [[_caption(reply, len(row)) for reply in row] for row in rows]
    heights = [
        max(map(len, lines)) * _LINE + thumbnails[row[0].question.id].grid[1] * _FRAME + _GAP
        for row, lines in zip(rows, captions, strict=True)
    ]
    height = sum(heights) + 2 * _MARGIN
    figure = Figure(figsize=(_WIDTH, height))
    top = height - _MARGIN
    for row, row_captions, row_height in zip(rows, captions, heights, strict=True):
        frames_top = top - max(map(len, row_captions)) * _LINE
        for column, (reply, lines) in enumerate(zip(row, row_captions, strict=True)):
            left = _MARGIN + column * (_WIDTH - 2 * _MARGIN) / _IMAGES_PER_ROW
            text = figure.text(
                left / _WIDTH,
                top / height,
                "\n".join(lines),
                fontsize=8,
                color="darkgreen" if reply.right else "firebrick",
                verticalalignment="top",
            )
            text.set_parse_math(False)  # "$" is not the start of a formula
            _draw_frames(figure, thumbnails[reply.question.id], left, frames_top, height)
        top -= row_height
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as a box
        partial = path.with_suffix(f".{os.getpid()}.png")
        figure.savefig(partial, dpi=110)
        partial.rename(path)


def _draw_frames(
    figure: Any, thumbnails: Thumbnails, left: float, top: float, height: float
) -> None:
    """The frames at (left, top), in inches of a figure that is `height` high, with their times."""
    image = Image.open(io.BytesIO(thumbnails.jpeg))
    columns, rows = thumbnails.grid
    width = columns * _FRAME
    axis = figure.add_axes(
        (left / _WIDTH, (top - rows * _FRAME) / height, width / _WIDTH, rows * _FRAME / height)
    )
    smooth = "nearest" if image.height < 64 * rows else "antialiased"
    axis.imshow(image, extent=(0, columns, rows, 0), aspect="auto", interpolation=smooth)
    axis.axis("off")
    for line in range(1, columns):
        axis.axvline(line, color="white", linewidth=1.5)
    for line in range(1, rows):
        axis.axhline(line, color="white", linewidth=1.5)
    for number, time in enumerate(thumbnails.times):
        place = number % COLUMNS + 0.04, number // COLUMNS + 0.95
        box = {"facecolor": "black", "alpha": 0.5, "pad": 1, "linewidth": 0}
        axis.text(*place, f"{time:.2f} s", color="white", fontsize=6, bbox=box)


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
    """Rows of the sheet: wrong replies before right ones, and among these videos, with a row each, before
    images, which share rows."""
    rows: list[list[ScoredReply]] = []
    images: list[ScoredReply] = []
    for reply in sorted(replies, key=lambda r: (r.right, not thumbnails[r.question.id].times)):
        if thumbnails[reply.question.id].times:
            rows.append([reply])
            images = []
        elif 0 < len(images) < _IMAGES_PER_ROW:
            images.append(reply)
        else:
            rows.append(images := [reply])
    return rows


def _group(reply: ScoredReply) -> str:
    return next(iter(reply.question.groups.values()), "")


def _caption(reply: ScoredReply, in_row: int) -> list[str]:
    """The lines above the frames."""
    question = reply.question
    letters = _LETTERS if in_row == 1 else _LETTERS // _IMAGES_PER_ROW
    options = question.list_options("({letter}) {option}")
    text = f"{_group(reply) or question.id}: {question.text} {options}"
    asked = " ".join(without_placeholders(text).split())
    said = reply.prediction.error or repr(reply.prediction.text)
    replied = f"answer {question.answer or '?'!r}, model {said}"
    return [*_wrap(asked, letters), *_wrap(replied, letters)]


def _wrap(text: str, letters: int) -> list[str]:
    text = text.encode("utf-8", "replace").decode("utf-8")  # no lone surrogates
    return textwrap.wrap(text, letters, max_lines=_LINES)
