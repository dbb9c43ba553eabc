"""Tables and plots of the records."""

from __future__ import annotations

import functools
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.evidence.latency import Point
from benchmarks.evidence.mixers import WINDOW
from benchmarks.evidence.panels import panels
from benchmarks.evidence.rows import (
    BASELINE,
    BUDGETS,
    COMBINATIONS,
    COMPRESSIONS,
    DRAWN,
    EVAL_CLIPS,
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
from storm_jax.compression import Grid, VisualShape, plan_clip
from storm_jax.config import CompressionConfig, ModelConfig, RunConfig
from storm_jax.evals.report.text import markdown
from storm_jax.flops import encode_work, prefill_work
from storm_jax.models.temporal_projector import TemporalProjector
from storm_jax.params import abstract_model, flat_params
from storm_jax.preflight.cost import count_flops
from storm_jax.tasks import shapes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]
QUESTION = 22  # tokens of a prompt's text
CLIP_LENGTHS = 16, 128, 1024  # frames
CLIPS = 4  # test samples that the picture of footage shows, if they are videos
# The compressions whose events inside a group are counted: those that average frames.
POOLED = [name for name, compression in BUDGETS.items() if compression.temporal_pool > 1]
PLOTTED = "1x", "2x", "4x", "8x", "16x", "32x", "64x"  # one for each number of tokens


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
        "FLOPs of mixers for a visual token": mixer_cost_table(),
        "Hours": hours(records),
    }
    parts = [f"## {title}\n\n{table}\n" for title, table in tables.items() if table]
    (out / "results.md").write_text("\n".join(parts))
    compared = [(STORM, "C0"), (DRAWN, "C9"), (BASELINE, "C3")]
    draw_budgets(records, "short", compared, out / "budgets.png")
    on_footage = list(zip(ON_FOOTAGE, ("C0", "C3"), strict=True))
    draw_budgets(records, "footage", on_footage, out / "budgets_on_footage.png")
    draw_frames(records, out / "frames.png")
    if (out / "footage" / "shapes.json").exists() and (out / "videos").exists():
        draw_clips(shapes.read_settings(out / "footage"), out / "footage.png")


def accuracies(records: Records, row: Row, test: str, family: str) -> list[float]:
    """The accuracy of each seed."""
    return list(_by_seed(records, row, test, family).values())


def _by_seed(records: Records, row: Row, test: str, family: str) -> dict[int, float]:
    counts = {
        record["seed"]: record["right"][family]
        for record in records
        if (record["row"], record["test"]) == (row.name, test)
    }
    return {seed: right / total for seed, (right, total) in counts.items()}


def ceiling(family: str, task: str, compression: CompressionConfig) -> float:
    """The best expected accuracy of a model that does not mix frames, on the test clips."""
    return shapes.ceiling(family, _settings(task), compression, "test")


def forward_limit(family: str, compression: CompressionConfig) -> float:
    """The best expected accuracy of a model that scans clips of 16 frames forwards only, on the test clips: events that
    begin after the last group that is kept are guessed."""
    settings = _settings("short")
    kept = plan_clip(settings.frames, Grid.square(1), compression).frame_group >= 0
    last = int(np.flatnonzero(kept)[-1])
    events = shapes.events_of(settings, "test", family)
    is_seen = [any(label is not None for label in event.labels[: last + 1]) for event in events]
    return float(np.where(is_seen, 1, shapes.FAMILIES[family].chance).mean())


def _settings(task: str) -> shapes.Settings:
    about = TASKS[task]
    return shapes.Settings(
        clips=about.clips,
        seed=0,
        families=about.families,
        frames=about.frames,
        eval_clips=EVAL_CLIPS,
    )


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
    return markdown(lines) if _any_of(records, rows) else ""


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
                str(_plan_tokens(name)),
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
    return markdown(lines) if _any_of(records, [FORWARD]) else ""


def footage_table(records: Records) -> str:
    """One model for all budgets and the projector without mixing, on real footage."""
    lines = [["family", "tokens", "ceiling without mixing, on textures", "STORM", "MLP"]]
    for family in TASKS["footage"].videos:
        for budget, compression in BUDGETS.items():
            limit = f"{ceiling(family, 'footage', compression):.1%}"
            cells = (cell(accuracies(records, row, budget, family)) for row in ON_FOOTAGE)
            lines.append([family, budget, limit, *cells])
    return markdown(lines) if _any_of(records, ON_FOOTAGE) else ""


def frames_table(records: Records) -> str:
    """Long clips, by how many frames of them are read and how they are compressed."""
    head = ["family", "read", "visual tokens", "ceiling", "ceiling without mixing over time"]
    lines = [[*head, "STORM", "MLP", "STORM's gain"]]
    for family in TASKS["long"].families:
        for name in READS | LONG:
            found = [
                _by_seed(records, _reader(start, name), name, family) for start in (STORM, BASELINE)
            ]
            lines.append(
                [
                    family,
                    name,
                    str(_plan_tokens(name)),
                    f"{ceiling(family, 'long', _uncompressed(name)):.1%}",
                    f"{ceiling(family, 'long', COMPRESSIONS[name]):.1%}",
                    *(cell(list(values.values())) for values in found),
                    _gain(*found),
                ]
            )
    return markdown(lines) if _any_of(records, TABLES["frames"]) else ""


def _reader(start: Row, test: str) -> Row:
    """The row that is tested with a compression of long clips."""
    return next(row for read in READS if test in (row := reader(start, read)).tests)


def _uncompressed(name: str) -> CompressionConfig:
    return CompressionConfig(num_frames=COMPRESSIONS[name].num_frames)


def _gain(ours: Mapping[int, float], baseline: Mapping[int, float]) -> str:
    """The mean gain in points over the seeds that both have."""
    gains = [ours[seed] - baseline[seed] for seed in ours if seed in baseline]
    return f"{100 * statistics.fmean(gains):+.1f}" if gains else "-"


def mixer_table(records: Records) -> str:
    """Accuracy of each mixer with its best rate: that of the highest mean over families and budgets with the first seed,
    on the test clips."""
    lines = [["mixer", "parameters", "best rate", "seeds", "family", *MIXER_TESTS]]
    families = TASKS["short"].videos
    for mixer in MIXERS:
        means = {rate: _mean(records, mixer_row(mixer, rate)) for rate in RATES}
        tested = {rate: mean for rate, mean in means.items() if mean is not None}
        if not tested:
            continue
        best = max(tested, key=lambda rate: tested[rate])
        row = mixer_row(mixer, best)
        about = [
            mixer,
            f"{parameter_count(_config(row)):,}",
            f"{best:g} of {len(tested)}",
            str(len({record["seed"] for record in records if record["row"] == row.name})),
        ]
        for family in families:
            cells = (cell(accuracies(records, row, budget, family)) for budget in MIXER_TESTS)
            lines.append([*about, family, *cells])
    return markdown(lines) if len(lines) > 1 + len(families) else ""  # one is no comparison


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


def _mean(records: Records, row: Row) -> float | None:
    """The mean accuracy of a row with the first seed; None if it has not been tested."""
    first = min(record["seed"] for record in records)
    families = TASKS[row.task].videos
    found = [_by_seed(records, row, b, f).get(first) for b in MIXER_TESTS for f in families]
    tested = [accuracy for accuracy in found if accuracy is not None]
    return statistics.fmean(tested) if tested else None


def _any_of(records: Records, rows: Iterable[Row]) -> bool:
    names = {row.name for row in rows}
    return any(record["row"] in names for record in records)


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
            visual_tokens=_plan_tokens(budget),
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


def _plan_tokens(test: str) -> int:
    """Visual tokens of a clip."""
    compression = COMPRESSIONS[test]
    return plan_clip(compression.num_frames, Grid.of(_config(STORM).model), compression).num_tokens


def draw_budgets(
    records: Records, task: str, rows: Sequence[tuple[Row, str]], path: pathlib.Path
) -> None:
    """Accuracy over visual tokens, a line for each row, in its colour; the ceiling is a band."""
    if not _any_of(records, [row for row, _ in rows]):
        return
    families = TASKS[task].videos
    line = {name: _plan_tokens(name) for name in PLOTTED}
    figure, axes = panels(families)
    for axis, family in zip(axes, families, strict=True):
        limits = [ceiling(family, task, BUDGETS[name]) for name in line]
        _draw_band(axis, list(line.values()), family, limits)
        for row, colour in rows:
            values = {line[b]: accuracies(records, row, b, family) for b in line}
            _draw_line(axis, values, colour, row.title)
        if task == STORM.task:
            only = {line[b]: accuracies(records, specialist(b), b, family) for b in line}
            found = {tokens: values for tokens, values in only.items() if values}
            means = [statistics.fmean(values) for values in found.values()]
            axis.plot(list(found), means, "kx", label="STORM, that budget only")
        _label(axis, f"visual tokens of a clip of {TASKS[task].frames} frames", line.values())
        axis.invert_xaxis()
    _save(figure, path)


def draw_frames(records: Records, path: pathlib.Path) -> None:
    """Accuracy over the frames that are read of a long clip, with equal numbers of visual tokens."""
    if not _any_of(records, TABLES["frames"]):
        return
    families = TASKS["long"].families
    frames = {read: compression.num_frames for read, compression in READS.items()}
    figure, axes = panels(families)
    for axis, family in zip(axes, families, strict=True):
        limits = [ceiling(family, "long", compression) for compression in READS.values()]
        _draw_band(axis, list(frames.values()), family, limits)
        best = [ceiling(family, "long", _uncompressed(read)) for read in READS]
        axis.plot(list(frames.values()), best, "k:", label="what the frames show")
        for start, colour, title in ((STORM, "C0", "STORM"), (BASELINE, "C3", "MLP")):
            values = {
                frames[read]: accuracies(records, reader(start, read), read, family)
                for read in READS
            }
            _draw_line(axis, values, colour, title)
        tokens = _plan_tokens(next(iter(READS)))
        _label(axis, f"frames read of 128, {tokens} visual tokens", frames.values())
    _save(figure, path)


def _draw_band(axis: Axes, places: Sequence[int], family: str, limits: Sequence[float]) -> None:
    chance = shapes.FAMILIES[family].chance
    axis.fill_between(places, chance, limits, color="0.9", label="without mixing, on textures")


def _draw_line(axis: Axes, values: Mapping[int, Sequence[float]], colour: str, title: str) -> None:
    """A line through the means, with the smallest and the largest value."""
    found = {place: each for place, each in values.items() if each}
    means = [statistics.fmean(each) for each in found.values()]
    low = [mean - min(each) for mean, each in zip(means, found.values(), strict=True)]
    high = [max(each) - mean for mean, each in zip(means, found.values(), strict=True)]
    axis.errorbar(
        list(found), means, yerr=[low, high], fmt="o-", color=colour, label=title, capsize=3
    )


def _label(axis: Axes, places_are: str, places: Iterable[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set(xlabel=places_are, ylim=(0, 1.05))
    axis.set_xticks(list(places), [str(place) for place in places])


def _save(figure: Figure, path: pathlib.Path) -> None:
    """With one legend for all panels, below them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=120)


def draw_clips(settings: shapes.Settings, path: pathlib.Path) -> None:
    """The first test clips of a task about videos, a line of frames each."""
    from matplotlib.figure import Figure

    samples = [shapes.render(settings, "test", index) for index in range(CLIPS)]
    videos = [sample for sample in samples if len(sample.frames) > 1]
    figure = Figure(figsize=(settings.frames * 0.6, len(videos) * 0.85), layout="constrained")
    axes = figure.subplots(len(videos), 1)
    for axis, sample in zip(axes, videos, strict=True):
        axis.imshow(np.concatenate(list(sample.frames), axis=1))
        axis.set_title(f"{sample.question} {sample.answer}", fontsize=8, loc="left", pad=2)
        axis.set_axis_off()
    figure.savefig(path, dpi=120)
