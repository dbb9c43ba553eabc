"""Tables of the records."""

from __future__ import annotations

import functools
import pathlib
import statistics
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.evidence import figures
from benchmarks.evidence.latency import Point
from benchmarks.evidence.mixers import WINDOW
from benchmarks.evidence.rows import (
    BASELINE,
    BUDGETS,
    COMBINATIONS,
    COMPRESSIONS,
    DRAWN,
    FORWARD,
    LONG,
    MIXER_TESTS,
    MIXERS,
    ON_FOOTAGE,
    RATES,
    READS,
    ROWS,
    STORM,
    TABLES,
    TASKS,
    Row,
    mixer_row,
    reader,
    specialist,
)
from benchmarks.evidence.scores import (
    Records,
    accuracies,
    accuracies_by_seed,
    any_of,
    best_rate,
    ceiling,
    forward_limit,
    frames_ceiling,
    rate_means,
    visual_tokens,
)
from storm_jax.compression import Grid, VisualShape, plan_clip
from storm_jax.config import ModelConfig, RunConfig
from storm_jax.evals.report.text import markdown
from storm_jax.flops import encode_work, prefill_work
from storm_jax.models.temporal_projector import TemporalProjector
from storm_jax.params import abstract_model, flat_params
from storm_jax.preflight.cost import count_flops
from storm_jax.tasks import shapes

QUESTION = 22  # tokens of a prompt's text
CLIP_LENGTHS = 16, 128, 1024  # frames
# The compressions whose events inside a group are counted: those that average frames.
POOLED = [name for name, compression in BUDGETS.items() if compression.temporal_pool > 1]


def write(records: Records, out: pathlib.Path) -> None:
    """Writes the tables to OUT/results.md, and the plots."""
    tables = {
        "One model for every budget": budget_table(records),
        "Sampling in training and in tests": sampling_table(records),
        "Events inside one pooled group": inside_table(
            records, (STORM, BASELINE, specialist("4x", BASELINE))
        ),
        "Combinations and what they cost": combination_table(records),
        "Forwards only": direction_table(records),
        "On real footage": footage_table(records),
        "Events inside one pooled group, on real footage": inside_table(records, ON_FOOTAGE),
        "Clips of 128 frames": frames_table(records),
        "Other mixers": mixer_table(records),
        "Learning rates of mixers": rate_table(records),
        "FLOPs of mixers for a visual token": mixer_cost_table(),
        "Hours": hours(records),
    }
    parts = [f"## {title}\n\n{table}\n" for title, table in tables.items() if table]
    (out / "results.md").write_text("\n".join(parts))
    figures.write(records, out)


def budget_table(records: Records) -> str:
    """One model for all budgets, specialists, and the projector without mixing, by family and budget."""
    head = ["family", "tokens", "chance", "ceiling without mixing over time"]
    titles = STORM.title, DRAWN.title, "STORM, that budget only", BASELINE.title
    lines = [[*head, *titles]]
    for family in TASKS["short"].videos:
        for budget, compression in BUDGETS.items():
            rows = STORM, DRAWN, specialist(budget), BASELINE
            lines.append(
                [
                    family,
                    budget,
                    f"{shapes.FAMILIES[family].chance:.0%}",
                    f"{ceiling(family, 'short', compression):.1%}",
                    *(cell(accuracies(records, row, budget, family)) for row in rows),
                ]
            )
    return markdown(lines)


def sampling_table(records: Records) -> str:
    """Models trained at 4x only and sampled in tests, as in the paper, or sampled in training too."""
    rows = specialist("4x"), specialist("4x", BASELINE), DRAWN, STORM
    lines = [["family", "tokens", "ceiling without mixing", *(row.title for row in rows)]]
    for family in TASKS["short"].videos:
        for budget in rows[0].tests:
            limit = f"{ceiling(family, 'short', BUDGETS[budget]):.1%}"
            cells = (cell(accuracies(records, row, budget, family)) for row in rows)
            lines.append([family, budget, limit, *cells])
    return markdown(lines)


def inside_table(records: Records, rows: Sequence[Row]) -> str:
    """Accuracy on events whose frames are averaged into one group that is kept."""
    lines = [["family", "tokens", "limit without mixing", *(row.title for row in rows)]]
    for family in ("order", "motion"):
        for budget in POOLED:
            counts = (inside(records, row, budget, family) for row in rows)
            lines.append([family, budget, "50%", *counts])
    return markdown(lines) if any_of(records, rows) else ""


def inside(records: Records, row: Row, budget: str, family: str) -> str:
    """Right answers of all seeds together."""
    key = row.name, budget
    found = [r["inside a group"][family] for r in records if (r["row"], r["test"]) == key]
    right, total = (sum(each) for each in zip(*found, strict=True)) if found else (0, 0)
    return f"{right / total:.1%} ({right} of {total})" if total else "-"


def combination_table(records: Records) -> str:
    """What each combination of the three compressions costs, and what STORM answers with it."""
    families = TASKS["short"].videos
    head = ["T.Pool", "S.Pool", "T.Samp", "visual tokens", "STORM: GFLOPs a clip", *families]
    lines = [[*head, "MLP: GFLOPs a clip"]]
    for name, c in (BUDGETS | COMBINATIONS).items():
        factors = (c.temporal_pool, c.spatial_pool**2, c.temporal_sample)
        lines.append(
            [
                *("-" if factor == 1 else f"{factor}x" for factor in factors),
                str(visual_tokens(name)),
                f"{forward_flops(_config(STORM), name) / 1e9:.3f}",
                *(cell(accuracies(records, STORM, name, family)) for family in families),
                f"{forward_flops(_config(BASELINE), name) / 1e9:.3f}",
            ]
        )
    counts = (f"{row.title} {parameter_count(_config(row)):,}" for row in (STORM, BASELINE))
    return f"{markdown(lines)}\n\nParameters: {', '.join(counts)}."


def direction_table(records: Records) -> str:
    """Mamba layers that scan in both directions, or forwards only."""
    rows = STORM, FORWARD
    lines = [["family", "tokens", "both directions", "forwards only", "limit of forwards only"]]
    for family in TASKS["short"].videos:
        for budget, compression in BUDGETS.items():
            cells = (cell(accuracies(records, row, budget, family)) for row in rows)
            limit = f"{forward_limit(family, compression):.1%}"
            lines.append([family, budget, *cells, limit])
    return markdown(lines) if any_of(records, [FORWARD]) else ""


def footage_table(records: Records) -> str:
    """One model for all budgets and the projector without mixing, on real footage."""
    lines = [["family", "tokens", "ceiling without mixing, on textures", "STORM", "MLP"]]
    for family in TASKS["footage"].videos:
        for budget, compression in BUDGETS.items():
            limit = f"{ceiling(family, 'footage', compression):.1%}"
            cells = (cell(accuracies(records, row, budget, family)) for row in ON_FOOTAGE)
            lines.append([family, budget, limit, *cells])
    return markdown(lines) if any_of(records, ON_FOOTAGE) else ""


def frames_table(records: Records) -> str:
    """Long clips, by how many frames of them are read and how they are compressed."""
    head = ["family", "read", "visual tokens", "ceiling", "ceiling without mixing over time"]
    lines = [[*head, "STORM", "MLP", "STORM's gain"]]
    for family in TASKS["long"].families:
        for name in READS | LONG:
            found = [
                accuracies_by_seed(records, _reader(start, name), name, family)
                for start in (STORM, BASELINE)
            ]
            lines.append(
                [
                    family,
                    name,
                    str(visual_tokens(name)),
                    f"{frames_ceiling(family, name):.1%}",
                    f"{ceiling(family, 'long', COMPRESSIONS[name]):.1%}",
                    *(cell(list(values.values())) for values in found),
                    _gain(*found),
                ]
            )
    return markdown(lines) if any_of(records, TABLES["frames"]) else ""


def _reader(start: Row, test: str) -> Row:
    """The row that is tested with a compression of long clips."""
    return next(row for read in READS if test in (row := reader(start, read)).tests)


def _gain(ours: Mapping[int, float], baseline: Mapping[int, float]) -> str:
    """The mean gain in points over the seeds that both have."""
    gains = [ours[seed] - baseline[seed] for seed in ours if seed in baseline]
    return f"{100 * statistics.fmean(gains):+.1f}" if gains else "-"


def mixer_table(records: Records) -> str:
    """Accuracy of each mixer with its best learning rate."""
    lines = [["mixer", "parameters", "rate", "seeds", "family", *MIXER_TESTS]]
    for mixer in MIXERS:
        if (rate := best_rate(records, mixer)) is None:
            continue
        row = mixer_row(mixer, rate)
        seeds = {record["seed"] for record in records if record["row"] == row.name}
        about = [mixer, f"{parameter_count(_config(row)):,}", f"{rate:g}", str(len(seeds))]
        for family in TASKS["short"].videos:
            cells = (cell(accuracies(records, row, budget, family)) for budget in MIXER_TESTS)
            lines.append([*about, family, *cells])
    return markdown(lines) if any_of(records, TABLES["mixers"]) else ""


def rate_table(records: Records) -> str:
    """The mean accuracy of each mixer with each learning rate."""
    lines = [["mixer", *(f"rate {rate:g}" for rate in sorted(RATES))]]
    for mixer in MIXERS:
        means = rate_means(records, mixer)
        cells = (f"{means[rate]:.1%}" if rate in means else "-" for rate in sorted(RATES))
        lines.append([mixer, *cells])
    return markdown(lines) if any_of(records, TABLES["mixers"]) else ""


@functools.cache
def mixer_cost_table() -> str:
    """FLOPs of each mixer for a visual token, as the clip grows."""
    lines = [["mixer", *(f"{frames:,} frames" for frames in CLIP_LENGTHS)]]
    for mixer in MIXERS:
        model = _config(mixer_row(mixer, RATES[0])).model
        counts = (mixer_flops(model, frames) for frames in CLIP_LENGTHS)
        lines.append([mixer, *(f"{count / 1e3:,.0f}k" for count in counts)])
    return markdown(lines)


def mixer_flops(model: ModelConfig, frames: int) -> float:
    """Forward FLOPs of a visual token in a clip of some frames."""
    if model.mixer.endswith(":WindowAttention"):
        frames = min(frames, WINDOW)  # longer clips have more windows, at the same cost each
    tokens = frames * model.video_side**2
    x = jax.ShapeDtypeStruct((1, frames, model.video_side**2, model.decoder.width), jnp.float32)
    clip = jax.ShapeDtypeStruct((1, frames), jnp.int32)
    dtype = jnp.dtype(model.dtype)
    mixer = nnx.eval_shape(
        lambda: TemporalProjector(model, rngs=nnx.Rngs(0), dtype=dtype, remat=False).mixer
    )
    graph, state = nnx.split(mixer)

    def mix(state: nnx.State, x: jax.Array, clip: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x, clip)  # type: ignore[misc]  # it is not None

    return count_flops(jax.make_jaxpr(mix)(state, x, clip)) / tokens


def forward_flops(config: RunConfig, test: str) -> float:
    """Of encoding a clip and reading the prompt."""
    compression = COMPRESSIONS[test]
    plan = plan_clip(compression.num_frames, Grid.of(config.model), compression)
    visual = VisualShape(plan.num_groups, (compression.spatial_pool,))
    prompt = plan.num_tokens + QUESTION
    works = [
        encode_work(config, 1, compression.num_frames, visual),
        prefill_work(config, 1, prompt, prompt),
    ]
    return sum(part.forward for work in works for part in work.values())


def parameter_count(config: RunConfig) -> int:
    return sum(leaf.size for leaf in flat_params(abstract_model(config.model)[1]).values())


def hours(records: Records) -> str:
    """What each row took: training once for each seed, and all of its tests."""
    lines = [["row", "seeds", "steps", "hours a seed: training", "tests"]]
    for row in ROWS.values():
        mine = {r["seed"]: r for r in records if r["row"] == row.name}
        if mine:
            first = next(iter(mine.values()))
            times = (
                f"{statistics.fmean(r[name] for r in mine.values()):.2f}"
                for name in ("training_hours", "test_hours")
            )
            lines.append([row.title, str(len(mine)), str(first["steps"]), *times])
    return markdown(lines)


def points(records: Records, seconds: Mapping[tuple[str, str], Sequence[float]]) -> list[Point]:
    """What the plot of accuracy against latency shows: families of videos only."""
    families = TASKS["short"].videos
    return [
        Point(
            projector=ROWS[row].title,
            setting=budget,
            visual_tokens=visual_tokens(budget),
            is_spatial=BUDGETS[budget].spatial_pool > 1,
            seconds=found,
            accuracies={f: accuracies(records, ROWS[row], budget, f) for f in families},
            ceilings={f: ceiling(f, "short", BUDGETS[budget]) for f in families},
        )
        for (row, budget), found in seconds.items()
    ]


def cell(values: Sequence[float]) -> str:
    """The mean over seeds, with the smallest and the largest."""
    if not values:
        return "-"
    spread = f" [{min(values):.1%}, {max(values):.1%}]" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1%}{spread}"


def _config(row: Row) -> RunConfig:
    return row.config(pathlib.Path(), 0)
