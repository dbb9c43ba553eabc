"""report.html: scores, settings and every question, in one file that needs no network."""

from __future__ import annotations

import html
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from storm_jax.evals.benchmark import Benchmark, ScoredReply, Split, without_placeholders
from storm_jax.evals.report.page import SCRIPT, STYLE
from storm_jax.evals.report.text import format_counts
from storm_jax.evals.report.thumbnails import Thumbnails
from storm_jax.evals.scoring import Estimate, Scores

MAX_THUMBNAIL_BYTES = 64 * 2**20  # of all thumbnails in a page, encoded
STATUSES = ("right", "wrong", "unparsed", "missing", "failed", "unscored")
_FRAME_WIDTH = 124  # on the page, in pixels

_Card = tuple[str, Thumbnails | None]


def render_report(
    benchmark: Benchmark,
    split: str,
    replies: Sequence[ScoredReply],
    scores: Scores,
    about: Mapping[str, Any],
    thumbnails: Mapping[str, Thumbnails],
) -> str:
    """The page of an evaluation. All text from data is escaped.

    Args:
      about: settings and versions, as in results.json.
      thumbnails: by question id; left out beyond `MAX_THUMBNAIL_BYTES`, first of videos whose questions
        were all answered right.
    """
    judged = benchmark.splits[split].judged
    cards: dict[_Card, list[ScoredReply]] = {}
    for reply in replies:
        question = reply.question
        cards.setdefault((question.video, thumbnails.get(question.id)), []).append(reply)
    omitted = _omit(cards)
    groups = _number_groups(benchmark.splits[split], replies)
    statuses = Counter(_status(reply, judged) for reply in replies)
    title = f"{benchmark.title[:1].upper()}{benchmark.title[1:]}, {split}"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_escape(title)}</h1>",
        _summary(scores, about, statuses),
        _score_table(benchmark, scores),
        _settings(about, scores),
        f"<h2>Questions</h2>{_filters(groups, statuses)}",
        _omission_note(omitted),
    ]
    for (video, strip), members in cards.items():
        shown = None if (video, strip) in omitted else strip
        questions = "".join(
            _question(
                reply, _status(reply, judged), [groups[g] for g in reply.question.groups.items()]
            )
            for reply in members
        )
        kind = ' class="still"' if strip and not strip.times else ""
        parts.append(
            f'<article{kind}>{_figure(video, shown)}<div class="questions">{questions}</div></article>'
        )
    parts.append(f"<script>{SCRIPT}</script></body></html>\n")
    page = "\n".join(part for part in parts if part)
    return page.encode("utf-8", "replace").decode("utf-8")  # no lone surrogates


def _number_groups(split: Split, replies: Sequence[ScoredReply]) -> dict[tuple[str, str], str]:
    """A number for each (dimension, group), in published order."""
    found: dict[str, dict[str, None]] = {}
    for reply in replies:
        for dimension, group in reply.question.groups.items():
            found.setdefault(dimension, {})[group] = None
    pairs = [
        (dimension, group)
        for dimension, names in found.items()
        for group in split.sorted_groups(dimension, names)
    ]
    return {pair: str(number) for number, pair in enumerate(pairs)}


def _status(reply: ScoredReply, judged: bool) -> str:
    """One of `STATUSES`."""
    if reply.status != "parsed":
        return reply.status
    if judged or reply.question.answer is None:
        return "unscored"
    return "right" if reply.right else "wrong"


def _omit(cards: Mapping[_Card, Sequence[ScoredReply]]) -> set[_Card]:
    """Cards whose thumbnails exceed the limit of the page."""
    order = sorted(cards, key=lambda card: all(reply.right for reply in cards[card]))
    total = 0
    omitted: set[_Card] = set()
    for video, strip in order:
        if strip:
            total += len(strip.base64)
            if total > MAX_THUMBNAIL_BYTES:
                omitted.add((video, strip))
    return omitted


def _omission_note(omitted: set[_Card]) -> str:
    if not omitted:
        return ""
    return (
        f'<p class="note">The thumbnails of {len(omitted):,} videos are left out to keep this file '
        f"below {MAX_THUMBNAIL_BYTES // 2**20} MiB, first of videos whose questions were all answered right.</p>"
    )


def _summary(scores: Scores, about: Mapping[str, Any], statuses: Counter[str]) -> str:
    lines = []
    described = [
        f"{name} {about[name]}" for name in ("step", "prompt_style", "parser") if name in about
    ]
    if "compression" in about:
        described += [f"{name} {value}" for name, value in about["compression"].items()]
    lines.append(f'<div class="muted">{_escape(", ".join(described).replace("_", " "))}</div>')
    if scores.headline:
        lines.append(
            f'<div class="headline">{scores.headline.value:.1%}</div>'
            f'<div class="muted">{_escape(scores.headline_name)}, 95 % interval '
            f"{scores.headline.low:.1%} to {scores.headline.high:.1%}</div>"
        )
    counted = [f"<li><b>{sum(statuses.values()):,}</b> asked</li>"]
    counted += [f"<li><b>{statuses[s]:,}</b> {s}</li>" for s in STATUSES if statuses[s]]
    lines.append(f'<ul class="counts">{"".join(counted)}</ul>')
    counts = scores.counts
    if counts.published and counts.published != counts.rows:
        lines.append(
            f'<p class="note">The files contain {counts.rows:,} of {counts.published:,} published '
            f"questions: do not compare this score with others.</p>"
        )
    return "".join(lines)


def _score_table(benchmark: Benchmark, scores: Scores) -> str:
    if not scores.micro:
        return ""
    ceiling = benchmark.ceiling is not None
    head = ["", "accuracy", "95 % interval", "", "chance", *(["ceiling"] if ceiling else []), "n"]
    rows = []
    dimensions = list(dict.fromkeys(group.dimension for group in scores.groups))
    for dimension in dimensions:
        if len(dimensions) > 1:
            mean = f"mean of groups {scores.macro[dimension]:.1%}"
            label = _escape(dimension.replace("_", " "))
            rows.append(f'<tr><th colspan="{len(head)}">{label}: {mean}</th></tr>')
        for group in scores.groups:
            if group.dimension == dimension:
                known = "?" if group.ceiling is None else f"{group.ceiling:.1%}"
                cells = [f"{group.chance:.1%}", *([known] if ceiling else []), f"{group.total:,}"]
                bar = _bar(group.accuracy, group.chance, group.ceiling)
                rows.append(_row(group.group, group.accuracy, bar, cells))
    empty = [""] * ceiling
    total = f"{scores.counts.asked - scores.counts.without_key:,}"
    if scores.headline:
        rows.append(
            _row(
                scores.headline_name,
                scores.headline,
                _bar(scores.headline),
                ["", *empty, total],
                True,
            )
        )
    if benchmark.headline_over:
        rows.append(
            _row("mean over questions", scores.micro, _bar(scores.micro), ["", *empty, total], True)
        )
    legend = (
        '<p class="legend muted"><span class="bar"><i class="value" style="left:50%"></i></span>accuracy'
        '<span class="bar"><i class="interval" style="left:0;right:0"></i></span>95 % interval'
        '<span class="bar"><i class="chance" style="left:50%"></i></span>chance'
    )
    if ceiling:
        legend += (
            '<span class="bar"><i class="ceiling" style="left:50%"></i></span>ceiling: best expected '
            "accuracy without temporal mixing"
        )
    header = "".join(f"<th>{name}</th>" for name in head)
    return (
        f'<h2>Scores</h2><div class="table"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{legend}</p>"
    )


def _row(name: str, found: Estimate, bar: str, cells: Sequence[str], is_total: bool = False) -> str:
    interval = f"{found.low:.1%} to {found.high:.1%}"
    listed = [_escape(name), f"{found.value:.1%}", interval, bar, *cells]
    kind = ' class="total"' if is_total else ""
    return f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in listed)}</tr>"


def _bar(found: Estimate, chance: float | None = None, ceiling: float | None = None) -> str:
    marks = [
        f'<i class="interval" style="left:{found.low:.2%};right:{1 - found.high:.2%}"></i>',
        f'<i class="value" style="left:{found.value:.2%}"></i>',
    ]
    for name, value in (("chance", chance), ("ceiling", ceiling)):
        if value is not None:
            marks.append(f'<i class="{name}" style="left:{value:.2%}"></i>')
    return f'<div class="bar">{"".join(marks)}</div>'


def _settings(about: Mapping[str, Any], scores: Scores) -> str:
    facts = {name: value for name, value in about.items() if value not in (None, "")}
    facts["visual tokens per question"] = f"{scores.visual_tokens:,.0f}"
    facts["model seconds per question"] = f"{scores.seconds:.3g}"
    listed = "".join(
        f"<dt>{_escape(str(name).replace('_', ' '))}</dt><dd>{_escape(_plain(value))}</dd>"
        for name, value in facts.items()
    )
    counts = "".join(f"<div>{_escape(line)}</div>" for line in format_counts(scores.counts))
    return f"<details><summary>Settings, versions and counts</summary><dl>{listed}</dl>{counts}</details>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _filters(groups: Mapping[tuple[str, str], str], statuses: Counter[str]) -> str:
    options = ['<option value="">all groups</option>']
    for dimension in dict.fromkeys(dimension for dimension, _ in groups):
        members = "".join(
            f'<option value="{number}">{_escape(group)}</option>'
            for (of, group), number in groups.items()
            if of == dimension
        )
        options.append(
            f'<optgroup label="{_escape(dimension.replace("_", " "))}">{members}</optgroup>'
        )
    boxes = "".join(
        f'<label><input type="checkbox" name="status" value="{s}" checked> {s} '
        f'<span class="muted">{statuses[s]:,}</span></label>'
        for s in STATUSES
        if statuses[s]
    )
    hidden = "" if groups else " hidden"
    return (
        f'<form><select name="group" aria-label="group"{hidden}>{"".join(options)}</select>{boxes}'
        f'<input type="search" name="search" placeholder="Search questions, replies, videos" '
        f'aria-label="search"><span id="shown" class="muted"></span></form>'
    )


def _figure(video: str, thumbnails: Thumbnails | None) -> str:
    if thumbnails is None:
        return ""
    columns, rows = thumbnails.grid
    width, height = columns * _FRAME_WIDTH, rows * _FRAME_WIDTH
    pixels = Image.open(io.BytesIO(thumbnails.jpeg)).width // columns
    small = ' class="small"' if pixels < 64 else ""
    times = "".join(f"<span>{time:.1f} s</span>" for time in thumbnails.times)
    caption = f"<figcaption>{times}</figcaption>" if times else ""
    return (
        f'<figure style="width:{width}px;--columns:{columns}"><img{small} loading="lazy" '
        f'width="{width}" height="{height}" alt="{_escape(f"frames of {video}")}" '
        f'src="data:image/jpeg;base64,{thumbnails.base64}">{caption}</figure>'
    )


def _question(reply: ScoredReply, status: str, groups: Iterable[str]) -> str:
    question, prediction = reply.question, reply.prediction
    listed = " · ".join(question.groups.values())
    options = "".join(
        f'<li class="{" ".join(_option_classes(reply, letter))}">{letter}. {_escape(option)}</li>'
        for letter, option in question.lettered.items()
    )
    facts = []
    if prediction.error:
        facts.append(f"error: {_escape(prediction.error)}")
    else:
        facts.append(f"reply <q>{_escape(prediction.text) or '(empty)'}</q>")
        facts.append(f"parsed as {_escape(reply.parsed or 'nothing')}")
    if question.answer is not None:
        facts.append(f"answer {_escape(question.answer or 'not among the options')}")
    text = _escape(without_placeholders(question.text).strip())
    return (
        f'<section class="question {status}" data-status="{status}" data-groups="{" ".join(groups)}" '
        f'data-video="{_escape(question.video)}"><header><span class="badge">{status}</span>'
        f"<code>{_escape(question.id)}</code>"
        f'<span class="muted">{_escape(listed)}</span></header><p>{text}</p>'
        + (f"<ol>{options}</ol>" if options else "")
        + f'<div class="reply muted">{" · ".join(facts)}</div></section>'
    )


def _option_classes(reply: ScoredReply, letter: str) -> list[str]:
    found = {"key": reply.question.answer, "chosen": reply.parsed}
    return [name for name, value in found.items() if value == letter]


def _escape(text: str) -> str:
    return html.escape(str(text))
