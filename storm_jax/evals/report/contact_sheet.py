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

from storm_jax.evals.questions import without_placeholders
from storm_jax.evals.replies import ScoredReply
from storm_jax.evals.report.thumbnails import FRAMES, Thumbnails

_WRONG, _RIGHT = 12, 4  # questions shown
_IMAGES_PER_ROW = 4
_LETTERS, _LINES = 135, 4  # of the text above a row of frames
# In inches.
_WIDTH, _MARGIN, _LINE, _TIMES, _GAP = 11.0, 0.15, 0.16, 0.16, 0.2
_FRAME = (_WIDTH - 2 * _MARGIN) / FRAMES


def draw_contact_sheet(
    path: pathlib.Path, replies: Sequence[ScoredReply], thumbnails: Mapping[str, Thumbnails]
) -> None:
    """Draws the questions that `choose_replies` picks; videos take a row each, images share one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = choose_replies([reply for reply in replies if reply.question.id in thumbnails])
    rows = arrange(chosen, thumbnails)
    captions = [[_caption(reply, len(row)) for reply in row] for row in rows]
    heights = [max(map(len, row)) * _LINE + _TIMES + _FRAME + _GAP for row in captions]
    height = sum(heights) + 2 * _MARGIN
    figure = pyplot.figure(figsize=(_WIDTH, height))
    top = height - _MARGIN
    for row, row_captions, row_height in zip(rows, captions, heights, strict=True):
        frames_top = top - row_height + _GAP + _FRAME
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
    pyplot.close(figure)


def _draw_frames(
    figure: Any, thumbnails: Thumbnails, left: float, top: float, height: float
) -> None:
    """The frames in a row at (left, top), in inches of a figure that is `height` high, with their times."""
    strip = Image.open(io.BytesIO(thumbnails.jpeg))
    count = max(1, len(thumbnails.times))
    axis = figure.add_axes(
        (left / _WIDTH, (top - _FRAME) / height, count * _FRAME / _WIDTH, _FRAME / height)
    )
    axis.imshow(
        strip, aspect="auto", interpolation="nearest" if strip.height < 64 else "antialiased"
    )
    axis.axis("off")
    for number, time in enumerate(thumbnails.times):
        centre = (left + (number + 0.5) * _FRAME) / _WIDTH
        figure.text(centre, (top + 0.02) / height, f"{time:.2f} s", fontsize=6, ha="center")


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
    return textwrap.wrap(text, letters, max_lines=_LINES)
