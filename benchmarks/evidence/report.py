"""Tables and plots of the records."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.evidence.latency import Point
from benchmarks.evidence.rows import (
    BUDGETS,
    FAMILIES,
    FRAMES,
    MIXER_TESTS,
    MIXERS,
    RATES,
    TABLES,
    Row,
    compression,
    mixer_row,
)
from storm_jax.compression import Grid, VisualShape, plan_clip
from storm_jax.config import RunConfig
from storm_jax.evals.report.text import markdown
from storm_jax.flops import encode_work, prefill_work
from storm_jax.params import abstract_model, flat_params
from storm_jax.tasks import shapes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]
QUESTION = 22  # tokens of a prompt's text
EVERY, BASELINE = "storm", "mlp"
VIDEOS = [family for family in FAMILIES if not shapes.FAMILIES[family].is_image]


def specialist(budget: str) -> str:
    """The name of the row that trains with one budget only."""
    return f"storm {budget} only"


def accuracies(records: Records, row: str, budget: str, family: str) -> list[float]:
    """Of each seed."""
    found = [r["right"][family] for r in records if (r["row"], r["budget"]) == (row, budget)]
    return [right / total for right, total in found]


def write(records: Records, settings: shapes.Settings, path: pathlib.Path) -> None:
    """Writes the tables."""
    parts = [
        budget_table(records, settings),
        inside_table(records),
        mixer_table(records),
        cost_table(),
        hours(records),
    ]
    path.write_text("\n\n".join(filter(None, parts)) + "\n")


def budget_table(records: Records, settings: shapes.Settings) -> str:
    """Accuracy by family and budget of one model for all budgets, specialists, and the projector without mixing."""
    head = ["family", "tokens", "chance", "ceiling without mixing over time"]
    lines = [[*head, "STORM, every budget", "STORM, that budget only", "MLP, every budget"]]
    for family in FAMILIES:
        for budget in BUDGETS:
            lines.append(
                [
                    family,
                    budget,
                    f"{shapes.FAMILIES[family].chance:.0%}",
                    f"{ceiling(family, settings, budget):.1%}",
                    *(
                        cell(accuracies(records, row, budget, family))
                        for row in (EVERY, specialist(budget), BASELINE)
                    ),
                ]
            )
    return markdown(lines)


def inside_table(records: Records) -> str:
    """Accuracy on events whose frames are averaged into one group that is kept."""
    lines = [
        ["family", "tokens", "limit without mixing", "STORM, every budget", "MLP, every budget"]
    ]
    for family in ("order", "motion"):
        for budget, factors in BUDGETS.items():
            if factors.temporal_pool > 1:
                counts = (inside(records, row, budget, family) for row in (EVERY, BASELINE))
                lines.append([family, budget, "50%", *counts])
    return markdown(lines)


def inside(records: Records, row: str, budget: str, family: str) -> str:
    found = [
        r["inside a group"][family] for r in records if (r["row"], r["budget"]) == (row, budget)
    ]
    right, total = (sum(each) for each in zip(*found, strict=True)) if found else (0, 0)
    return f"{right / total:.1%} ({right} of {total})" if total else "-"


def mixer_table(records: Records) -> str:
    """Accuracy of each mixer with its best rate: that of the highest mean over families, budgets and seeds."""
    lines = [["mixer", "rate", "parameters", "family", *MIXER_TESTS]]
    configs = {row.name: _config(row) for table in TABLES.values() for row in table}
    for mixer in MIXERS:
        means = {rate: _mean(records, mixer_row(mixer, rate)) for rate in RATES}
        tested = {rate: mean for rate, mean in means.items() if mean is not None}
        if not tested:
            continue
        best = max(tested, key=lambda rate: tested[rate])
        name = mixer_row(mixer, best)
        about = [mixer, f"{best:g}", f"{parameter_count(configs[name]):,}"]
        for family in FAMILIES:
            cells = (cell(accuracies(records, name, budget, family)) for budget in MIXER_TESTS)
            lines.append([*about, family, *cells])
    return markdown(lines) if len(lines) > 1 + len(FAMILIES) else ""  # one is no comparison


def _mean(records: Records, row: str) -> float | None:
    """The mean accuracy of a row; None if it has not been tested."""
    found = [a for b in MIXER_TESTS for f in FAMILIES for a in accuracies(records, row, b, f)]
    return statistics.fmean(found) if found else None


def cost_table() -> str:
    """Visual tokens and forward FLOPs of a clip with a question, and parameters."""
    rows = [row for row in TABLES["budgets"] if row.name in (EVERY, BASELINE)]
    lines = [["tokens", "visual tokens", *(f"{row.title}: GFLOPs a clip" for row in rows)]]
    for budget in BUDGETS:
        cells = [f"{forward_flops(_config(row), budget) / 1e9:.3f}" for row in rows]
        lines.append([budget, str(_tokens(budget)), *cells])
    counts = ", ".join(f"{row.title} {parameter_count(_config(row)):,}" for row in rows)
    return f"{markdown(lines)}\n\nParameters: {counts}."


def forward_flops(config: RunConfig, budget: str) -> float:
    """Of encoding a clip and reading the prompt."""
    tested = compression(budget)
    plan = plan_clip(FRAMES, Grid.of(config.model), tested)
    visual = VisualShape(plan.num_groups, (tested.spatial_pool,))
    prompt = plan.num_tokens + QUESTION
    works = [encode_work(config, 1, FRAMES, visual), prefill_work(config, 1, prompt, prompt)]
    return sum(part.forward for work in works for part in work.values())


def parameter_count(config: RunConfig) -> int:
    return sum(leaf.size for leaf in flat_params(abstract_model(config.model)[1]).values())


def hours(records: Records) -> str:
    """What each row took: training once for each seed, and all of its tests."""
    lines = [["row", "seeds", "steps", "hours a seed: training", "tests"]]
    for row in (row for table in TABLES.values() for row in table):
        mine = {r["seed"]: r for r in records if r["row"] == row.name}
        if mine:
            first = next(iter(mine.values()))
            times = (
                f"{statistics.fmean(r[name] for r in mine.values()):.2f}"
                for name in ("training_hours", "test_hours")
            )
            lines.append([row.title, str(len(mine)), str(first["steps"]), *times])
    return markdown(lines)


def points(
    records: Records,
    settings: shapes.Settings,
    seconds: Mapping[tuple[str, str], Sequence[float]],
) -> list[Point]:
    """What the plot of accuracy against latency shows: families of videos only."""
    titles = {row.name: row.title for row in TABLES["budgets"]}
    return [
        Point(
            projector=titles[row],
            setting=budget,
            visual_tokens=_tokens(budget),
            is_spatial="spatial" in budget,
            seconds=found,
            accuracies={f: accuracies(records, row, budget, f) for f in VIDEOS},
            ceilings={f: ceiling(f, settings, budget) for f in VIDEOS},
        )
        for (row, budget), found in seconds.items()
    ]


def cell(values: Sequence[float]) -> str:
    """The mean over seeds, with the smallest and the largest."""
    if not values:
        return "-"
    spread = f" [{min(values):.1%}, {max(values):.1%}]" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1%}{spread}"


def ceiling(family: str, settings: shapes.Settings, budget: str) -> float:
    factors = BUDGETS[budget]
    return shapes.ceiling(family, settings, factors.temporal_pool, factors.temporal_sample)


def _config(row: Row) -> RunConfig:
    return row.config("", 0, 1)


def draw_budgets(records: Records, settings: shapes.Settings, path: pathlib.Path) -> None:
    """Accuracy over visual tokens, a panel for each family of videos; the ceiling is a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(VIDEOS), 4.2), layout="constrained")
    axes = figure.subplots(1, len(VIDEOS), sharey=True)
    line = [name for name in BUDGETS if "spatial" not in name]
    tokens = {name: _tokens(name) for name in line}
    for axis, family in zip(axes, VIDEOS, strict=True):
        chance = shapes.FAMILIES[family].chance
        axis.fill_between(
            [tokens[name] for name in line],
            chance,
            [ceiling(family, settings, name) for name in line],
            color="0.9",
            label="without mixing over time",
        )
        for row, colour, title in ((EVERY, "C0", "STORM, one model"), (BASELINE, "C3", "MLP")):
            _draw(
                axis, tokens, {b: accuracies(records, row, b, family) for b in line}, colour, title
            )
        only = {b: accuracies(records, specialist(b), b, family) for b in line}
        found = {budget: values for budget, values in only.items() if values}
        axis.plot(
            [tokens[budget] for budget in found],
            [statistics.fmean(values) for values in found.values()],
            "kx",
            label="STORM, trained for that budget only",
        )
        axis.set_xscale("log", base=2)
        axis.invert_xaxis()
        axis.set(title=family, xlabel="visual tokens of a clip of 16 frames", ylim=(0, 1.05))
        axis.set_xticks([tokens[name] for name in line], [str(tokens[name]) for name in line])
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(frameon=False, loc="lower left", fontsize=8)
    figure.savefig(path, dpi=120)


def _draw(
    axis: Axes,
    tokens: Mapping[str, int],
    values: Mapping[str, Sequence[float]],
    colour: str,
    title: str,
) -> None:
    """A line through the means, with the smallest and the largest value."""
    found = {budget: each for budget, each in values.items() if each}
    means = [statistics.fmean(each) for each in found.values()]
    low = [mean - min(each) for mean, each in zip(means, found.values(), strict=True)]
    high = [max(each) - mean for mean, each in zip(means, found.values(), strict=True)]
    places = [tokens[budget] for budget in found]
    axis.errorbar(places, means, yerr=[low, high], fmt="o-", color=colour, label=title, capsize=3)


def _tokens(budget: str) -> int:
    grid = Grid.of(_config(TABLES["budgets"][0]).model)
    return plan_clip(FRAMES, grid, compression(budget)).num_tokens
