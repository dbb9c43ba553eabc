"""Shows one sample as the model sees it: its frames, its tokens, and which tokens are trained on."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np

from storm_jax.data.check import describe as describe_compression
from storm_jax.data.mixture import Mixture, Ref
from storm_jax.media.contact_sheet import MAX_FRAMES, draw_frames, sheet_height
from storm_jax.media.frames import Clip
from storm_jax.media.reader import MediaReader
from storm_jax.text.conversation import Encoded

TRAINED, CONTEXT, VISUAL = "#bfe8bf", "#eeeeee", "#bcd4f5"
_COLUMNS = 175  # characters per line of the picture
_LINES = 60
_LINE_HEIGHT = 0.17  # inches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Token:
    """A text token, or adjacent visual tokens of one medium; the colour is one of those above."""

    position: int
    text: str
    ids: str
    colour: str


def show(mixture: Mixture, ref: Ref, reader: MediaReader, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes a text file and a picture of one sample to `out` and returns their paths.

    Raises:
      MediaError, SampleError: the sample cannot be used.
    """
    part = mixture.parts[ref.source]
    sample = mixture.sample(ref)
    clips = reader.read_all(sample.media, part.lengths.counts_of(ref.item))
    encoder = mixture.encoders[ref.compression]
    encoded = encoder.encode(sample, [clip.times for clip in clips])
    is_truncated = len(encoded) > mixture.shapes[-1].tokens
    encoded = encoded.truncated(mixture.shapes[-1].tokens)
    tokens = describe(encoded, mixture)
    title = f"{part.config.name} {ref.item}: sample {sample.id}, {part.source.where(ref.item)}"
    facts = (
        f"{len(encoded):,} tokens{', truncated' if is_truncated else ''}, {int((encoded.media >= 0).sum()):,} of "
        f"them visual, {int(encoded.answer.sum()):,} trained on"
    )
    if len(mixture.encoders) > 1:
        facts += f"; {describe_compression(encoder.compression)}"
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{part.config.name}_{ref.item}"
    if len(mixture.encoders) > 1:
        stem = stem.with_name(f"{stem.name}_{ref.compression}")
    text, picture = stem.with_suffix(".txt"), stem.with_suffix(".png")
    lines = [title, facts]
    lines += [f"{m.kind} {m.name}: {len(clip.frames)} frames at {_listed(clip.times)} s"
              for m, clip in zip(sample.media, clips, strict=True)]  # fmt: skip
    lines += ["", "position       id  loss  text"]
    lines += [
        f"{token.position:>8} {token.ids:>8}  {'*' if token.colour == TRAINED else ' ':>4}  {token.text!r}"
        for token in tokens
    ]
    text.write_text("\n".join(lines) + "\n")
    legend = "green: trained on; blue: visual tokens"
    _draw(picture, f"{title}\n{facts} ({legend})", _sheets(clips), tokens)
    return [text, picture]


def _sheets(clips: Sequence[Clip]) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Returns (frames, times) of the contact sheets: one per video; adjacent images share them."""
    sheets: list[tuple[np.ndarray, np.ndarray | None]] = []
    for is_image, group in itertools.groupby(clips, key=lambda clip: len(clip.frames) == 1):
        if is_image:
            images = np.concatenate([clip.frames for clip in group])
            starts = range(0, len(images), MAX_FRAMES)
            sheets += [(images[start : start + MAX_FRAMES], None) for start in starts]
        else:
            sheets += [(clip.frames, clip.times) for clip in group]
    return sheets


def _listed(times: np.ndarray) -> str:
    return ", ".join(f"{time:.2f}" for time in times)


def describe(encoded: Encoded, mixture: Mixture) -> list[Token]:
    """Returns the tokens in order, with adjacent visual tokens of one medium as one entry."""
    tokenizer = mixture.tokenizer
    found: list[Token] = []
    position = 0
    while position < len(encoded):
        medium = encoded.media[position]
        if medium < 0:
            number = int(encoded.tokens[position])
            colour = TRAINED if encoded.answer[position] else CONTEXT
            found.append(
                Token(
                    position=position,
                    text=str(tokenizer.decode([number])),
                    ids=str(number),
                    colour=colour,
                )
            )
            position += 1
            continue
        end = position
        while end < len(encoded) and encoded.media[end] == medium:
            end += 1
        text = f"[{end - position} visual tokens of medium {medium}]"
        found.append(Token(position=position, text=text, ids="", colour=VISUAL))
        position = end
    return found


def _draw(
    path: pathlib.Path,
    title: str,
    sheets: Sequence[tuple[np.ndarray, np.ndarray | None]],
    tokens: list[Token],
) -> None:
    from matplotlib.figure import Figure

    lines = _wrapped(tokens)
    heights = [sheet_height(len(frames)) for frames, _ in sheets] + [
        _LINE_HEIGHT * len(lines) + 0.3
    ]
    figure = Figure(figsize=(11, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=9)
    parts = figure.subfigures(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    for part, (frames, times) in zip(parts, sheets, strict=False):
        draw_frames(part, frames, times)
    axis = parts[-1].subplots()
    axis.set(xlim=(0, _COLUMNS), ylim=(len(lines), 0))
    axis.axis("off")
    for row, line in enumerate(lines):
        for column, text, colour in line:
            axis.text(
                column, row + 0.5, text.replace("$", r"\$"), family="monospace", fontsize=7, va="center",
                bbox={"facecolor": colour, "edgecolor": "white", "pad": 1.0, "linewidth": 0.5},
            )  # fmt: skip
    figure.savefig(path, dpi=120)


def _wrapped(tokens: list[Token]) -> list[list[tuple[int, str, str]]]:
    """Wraps tokens into lines of (column, text, colour), up to the height of the picture."""
    lines: list[list[tuple[int, str, str]]] = [[]]
    column = 0
    for token in tokens:
        text = token.text.replace("\n", "\\n").replace("\t", "\\t")
        if column and column + len(text) > _COLUMNS:
            lines.append([])
            column = 0
        if len(lines) > _LINES:
            lines[-1] = [
                (0, f"... continues at position {token.position}: see the text file", CONTEXT)
            ]
            return lines
        lines[-1].append((column, text, token.colour))
        column += len(text)
    return lines
