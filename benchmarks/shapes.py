"""Does mixing over time preserve what pooling destroys? STORM against VILA's MLP projector.

    python -m benchmarks.shapes --out=runs/evidence --seeds=0,1,2 --steps=600

Trains each projector with the same data, seeds, steps and rates at 1x, at 4x by temporal pooling and at 4x by
spatial pooling, evaluates the 4x weights also at 8x (with temporal sampling), and writes results.json and
results.md. Finished runs are skipped, so it can be interrupted and resumed.

Last, the runs of the first seed are timed from frames to first token, in rounds of all of them, and
accuracy_latency.png shows accuracy against milliseconds. One clip does not fill a machine with a model this
small, so a call answers about 32, and its time is divided by 32.

`--projectors=storm,storm_mamba2` compares the mixers; `--settings=4x,8x` selects columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.accuracy_latency import FirstTokens, Point, plot
from benchmarks.machine import machine
from benchmarks.timing import seconds_by_round
from configs import tiny
from configs.tiny import MODEL as TINY
from storm_jax.compression import Grid, plan_clip
from storm_jax.config import CompressionConfig, ModelConfig, SourceConfig, from_dict
from storm_jax.data.sources import open_source
from storm_jax.evals.report.text import markdown
from storm_jax.evals.settings import EvalSettings
from storm_jax.files import write_atomically
from storm_jax.params import abstract_model, flat_params
from storm_jax.run import Run
from storm_jax.tasks import shapes
from storm_jax.text.sample import Sample

# Images of places teach the tower positions.
FAMILIES = ("order", "motion", "needle", "place")
FRAMES = 16
# Overrides of configs/tiny.py for each projector.
PROJECTORS: dict[str, dict[str, Any]] = {
    "storm": {"mixer": "mamba1"},
    "mlp": {"stem.kind": "mlp_downsample", "mixer": "none"},
    "storm_mamba2": {"mixer": "mamba2", "mamba.head_dim": 16, "mamba.d_state": 16},
}
TITLES = {"storm": "STORM", "mlp": "MLP", "storm_mamba2": "STORM, Mamba-2"}
PLATEAU = 0.03
# Latency: clips of a call, and how often each run is timed.
BATCH = 32
ROUNDS = 30

Accuracies = Mapping[tuple[str, str, int], Mapping[str, float]]  # by projector, setting and seed
Seconds = Mapping[tuple[str, str], Sequence[float]]  # of a clip, in each round


@dataclasses.dataclass(frozen=True)
class Setting:
    """One column of the comparison: the compression used in training and in testing."""

    name: str
    trained: CompressionConfig
    tested: CompressionConfig

    @property
    def run_name(self) -> str:
        return f"k{self.trained.temporal_pool}_p{self.trained.spatial_pool}"


_K4 = CompressionConfig(num_frames=FRAMES, temporal_pool=4)
_K1, _P2 = (
    CompressionConfig(num_frames=FRAMES),
    CompressionConfig(num_frames=FRAMES, spatial_pool=2),
)
_K4_S2 = dataclasses.replace(_K4, temporal_sample=2)
SETTINGS = {
    "4x": Setting("4x", _K4, _K4),
    "8x": Setting("8x", _K4, _K4_S2),
    "1x": Setting("1x", _K1, _K1),
    "spatial": Setting("spatial 4x", _P2, _P2),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", required=True, type=pathlib.Path, help="folder of runs and results"
    )
    parser.add_argument("--seeds", default="0", help="comma-separated; default 0")
    parser.add_argument(
        "--steps", type=int, default=600, help="training steps of each run; default 600"
    )
    parser.add_argument("--clips", type=int, default=10000, help="training clips; default 10000")
    parser.add_argument(
        "--projectors",
        type=names_of(PROJECTORS),
        default="storm,mlp",
        help=f"comma-separated, of {', '.join(PROJECTORS)}; default storm,mlp",
    )
    parser.add_argument(
        "--settings",
        type=names_of(SETTINGS),
        default=",".join(SETTINGS),
        help=f"comma-separated, of {', '.join(SETTINGS)}; default all",
    )
    args = parser.parse_args(arguments)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    data = render(args.out, args.clips)
    accuracies = {}
    for seed in seeds:
        for setting in (SETTINGS[name] for name in args.settings):
            for projector in args.projectors:
                workdir = run_folder(args, projector, setting, seed)
                train(workdir, data, projector, setting.trained, seed, args.steps)
                accuracies[projector, setting.name, seed] = evaluate(workdir, data, setting.tested)
                write_results(args, data, accuracies, {})
    seconds = time_clips(args, data, seeds[0])
    write_results(args, data, accuracies, seconds)
    plot(points(args, data, accuracies, seconds), args.out / "accuracy_latency.png")
    print((args.out / "results.md").read_text())


def names_of(known: Mapping[str, Any]) -> Callable[[str], list[str]]:
    """Returns a parser of comma-separated names that must be in `known`."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return names

    return read


def run_folder(
    args: argparse.Namespace, projector: str, setting: Setting, seed: int
) -> pathlib.Path:
    return args.out / f"{projector}_{setting.run_name}_steps{args.steps}_seed{seed}"


def render(out: pathlib.Path, clips: int) -> pathlib.Path:
    """Renders the task and trains its tokenizer."""
    data = out / "data"
    command = ["storm_jax.tasks.shapes", f"--out={data}", f"--clips={clips}", "--seed=0"]
    run_module(*command, f"--families={','.join(FAMILIES)}", "--eval_clips=200")
    if not (data / "tokenizer").exists():
        tokenizer = data / "tokenizer"
        run_module(
            "storm_jax.data.tokenizer", f"--data={data / 'train.json'}", f"--out={tokenizer}"
        )
    return data


def train(
    workdir: pathlib.Path,
    data: pathlib.Path,
    projector: str,
    compression: CompressionConfig,
    seed: int,
    steps: int,
) -> None:
    """Trains or resumes one run. Row sizes hold the same number of clips at every compression."""
    tokens = 416 if compression == _K1 else 224
    fields = {
        **{f"model.{name}": value for name, value in PROJECTORS[projector].items()},
        "compression.temporal_pool": compression.temporal_pool,
        "compression.spatial_pool": compression.spatial_pool,
        "data.train[0].path": data / "train.json",
        "data.val[0].path": data / "val.json",
        "data.rows[0].tokens": tokens,
        "train.seed": seed,
        "train.steps": steps,
        "train.keep_best": 0,
    }
    run_script(
        "train.py",
        "--config=configs/tiny.py:stage=sft",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    )


def evaluate(
    workdir: pathlib.Path, data: pathlib.Path, compression: CompressionConfig
) -> dict[str, float]:
    """Returns the accuracy on the test clips by family."""
    step = Run(workdir).checkpoints.resolve(None)
    settings = EvalSettings(
        split="test", prompt_style="trained", compression=compression, max_new_tokens=64
    )
    report = workdir / "evals/shapes" / settings.folder_name(step, "trained") / "results.json"
    if not report.exists():
        run_script(
            "eval.py",
            f"--workdir={workdir}",
            "--benchmark=shapes",
            f"--data_root={data}",
            *(f"--{name}={value}" for name, value in dataclasses.asdict(compression).items()),
        )
    groups = json.loads(report.read_text())["groups"]
    return {group["group"]: group["accuracy"]["value"] for group in groups}


def time_clips(args: argparse.Namespace, data: pathlib.Path, seed: int) -> Seconds:
    """Times every run of a seed, a call each in every round; other seeds take as long."""
    samples = video_questions(data, BATCH)
    calls = {
        (projector, setting.name): FirstTokens(
            run_folder(args, projector, setting, seed), samples, setting.tested
        )
        for setting in (SETTINGS[name] for name in args.settings)
        for projector in args.projectors
    }
    return {
        key: [each / BATCH for each in found]
        for key, found in seconds_by_round(calls, ROUNDS).items()
    }


def video_questions(data: pathlib.Path, count: int) -> list[Sample]:
    """The first questions about videos of the test split; fewer than `count` are repeated."""
    source = open_source(SourceConfig(name="shapes", path=str(data / "test.json")))
    samples = (source.sample(index) for index in range(len(source)))
    videos = [each.prompt() for each in samples if each.media[0].kind == "video"]
    return list(itertools.islice(itertools.cycle(videos), count))


def points(
    args: argparse.Namespace, data: pathlib.Path, accuracies: Accuracies, seconds: Seconds
) -> list[Point]:
    """What the plot shows: families of videos only, since latency is that of a video."""
    task = shapes.read_settings(data)
    families = [family for family in FAMILIES if not shapes.FAMILIES[family].is_image]
    return [
        Point(
            projector=TITLES[projector],
            setting=setting.name,
            visual_tokens=_visual_tokens(setting),
            is_spatial=setting.tested.spatial_pool > 1,
            seconds=seconds[projector, setting.name],
            accuracies={f: _values(accuracies, projector, setting.name, f) for f in families},
            ceilings={f: _ceiling(f, task, setting) for f in families},
        )
        for projector in args.projectors
        for setting in (SETTINGS[name] for name in args.settings)
    ]


def run_script(script: str, *arguments: str) -> None:
    print(f"$ python {script} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, script, *arguments], check=True)


def run_module(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def write_results(
    args: argparse.Namespace, data: pathlib.Path, accuracies: Accuracies, seconds: Seconds
) -> None:
    """Writes results.json with every number and results.md with means and spread."""
    task = shapes.read_settings(data)
    command = (
        f"python -m benchmarks.shapes --out=OUT --seeds={args.seeds} --steps={args.steps} "
        f"--clips={args.clips} --projectors={','.join(args.projectors)} "
        f"--settings={','.join(args.settings)}"
    )
    date = time.strftime("%Y-%m-%d")
    about = (
        f"Command: `{command}`; {platform.machine()}, {os.cpu_count()} CPU cores, {date}. Test clips per family: {task.eval_clips}. "
        f"Mean over seeds, minimum and maximum in brackets."
    )
    titles = [TITLES[p] for p in args.projectors]
    table = [["family", "tokens", "chance", "ceiling without temporal mixing", *titles]]
    for family in FAMILIES:
        for setting in (SETTINGS[name] for name in args.settings):
            cells = [
                family,
                setting.name,
                f"{shapes.FAMILIES[family].chance:.0%}",
                f"{_ceiling(family, task, setting):.1%}",
                *(_cell(accuracies, p, setting.name, family) for p in args.projectors),
            ]
            table.append(cells)
    lines = [about, "", markdown(table), "", *_verdicts(accuracies, task), ""]
    lines += _costs(args, seconds)
    write_atomically(args.out / "results.md", "\n".join(lines) + "\n")
    results: dict[str, Any] = {
        "command": command,
        "date": date,
        "test clips per family": task.eval_clips,
        "accuracy": [
            {"projector": p, "setting": s, "seed": seed, "accuracy": dict(value)}
            for (p, s, seed), value in accuracies.items()
        ],
    }
    if seconds:
        results["latency"] = {
            "machine": machine(),
            "clips of a call": BATCH,
            "milliseconds a clip": [
                {
                    "projector": p,
                    "setting": s,
                    "median": round(1e3 * statistics.median(found), 4),
                    "rounds": [round(1e3 * each, 4) for each in found],
                }
                for (p, s), found in seconds.items()
            ],
        }
    write_atomically(args.out / "results.json", json.dumps(results, indent=1) + "\n")


def _ceiling(family: str, task: shapes.Settings, setting: Setting) -> float:
    tested = setting.tested
    return shapes.ceiling(family, task, tested.temporal_pool, tested.temporal_sample)


def _values(accuracies: Accuracies, projector: str, setting: str, family: str) -> list[float]:
    return [v[family] for (p, s, _), v in accuracies.items() if (p, s) == (projector, setting)]


def _cell(accuracies: Accuracies, projector: str, setting: str, family: str) -> str:
    values = _values(accuracies, projector, setting, family)
    if not values:
        return "-"
    spread = f" [{min(values):.1%}, {max(values):.1%}]" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.1%}{spread}"


def _verdicts(accuracies: Accuracies, task: shapes.Settings) -> list[str]:
    """Compares at 4x; conclusive only if the baseline has reached its ceiling."""
    lines = []
    for family in ("order", "motion"):
        baseline = _values(accuracies, "mlp", "4x", family)
        storm = _values(accuracies, "storm", "4x", family)
        if not baseline or not storm:
            continue
        ceiling = shapes.ceiling(family, task, 4, 1)
        mean = sum(baseline) / len(baseline)
        found = f"STORM {sum(storm) / len(storm):.1%} against {mean:.1%} (ceiling {ceiling:.1%})"
        if mean >= ceiling - PLATEAU:
            lines.append(f"- `{family}` at 4x: {found}; the baseline has reached its ceiling.")
        else:
            lines.append(
                f"- `{family}` at 4x: {found}; inconclusive: the baseline is more than "
                f"{PLATEAU:.0%} below its ceiling and may still be learning."
            )
    return lines


def _costs(args: argparse.Namespace, seconds: Seconds) -> list[str]:
    """Parameters, forward FLOPs for a clip with a 22-token question, and milliseconds once they are known."""
    titles = [TITLES[p] for p in args.projectors]
    models = [_model(p) for p in args.projectors]
    table = [["tokens", "visual tokens", *(f"{title} GFLOPs a clip" for title in titles)]]
    if seconds:
        table[0] += [f"{title} ms a clip" for title in titles]
    for setting in (SETTINGS[name] for name in args.settings):
        visual = _visual_tokens(setting)
        cells = [f"{forward_flops(model, FRAMES, visual + 22) / 1e9:.3f}" for model in models]
        if seconds:
            cells += [_milliseconds(seconds[p, setting.name]) for p in args.projectors]
        table.append([setting.name, str(visual), *cells])
    counts = (f"{t} {parameter_count(m):,}" for t, m in zip(titles, models, strict=True))
    return [markdown(table), "", f"Parameters: {', '.join(counts)}."]


def _visual_tokens(setting: Setting) -> int:
    return plan_clip(FRAMES, Grid.of(TINY), setting.tested).num_tokens


def _milliseconds(seconds: Sequence[float]) -> str:
    """The median, and the quartiles in brackets."""
    low, middle, high = statistics.quantiles((1e3 * each for each in seconds), n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _model(projector: str) -> ModelConfig:
    config = tiny.get_config("stage=sft")
    changes = {f"model.{name}": value for name, value in PROJECTORS[projector].items()}
    config.update_from_flattened_dict(changes)
    return from_dict(ModelConfig, config.model)


def parameter_count(model: ModelConfig) -> int:
    return sum(leaf.size for leaf in flat_params(abstract_model(model)[1]).values())


def forward_flops(model: ModelConfig, frames: int, tokens: int) -> float:
    """FLOPs of a clip's forward pass: matrix products, attention and scan. A multiply-add counts as two."""
    vision, decoder, mamba = model.vision, model.decoder, model.mamba
    patches, w = vision.side**2, vision.width
    layer = patches * (4 * w * w + 2 * w * vision.mlp_dim) + 2 * patches**2 * w
    depth = vision.depth + 1 + vision.feature_layer
    vision_macs = frames * (patches * 3 * vision.patch_size**2 * w + depth * layer)

    visual, d = frames * model.side**2, decoder.width
    projector_macs = visual * w * model.stem.downsample**2 * d
    if model.stem.kind == "mlp_downsample":
        projector_macs += visual * d * d
    if model.mixer != "none":
        inner, d_state = mamba.expand * d, mamba.d_state
        if model.mixer == "mamba1":
            rank = -(-d // 16)
            scan = inner * (mamba.d_conv + 2 * rank + 2 * d_state + 3 * d_state)
        else:
            scan = inner * (mamba.d_conv + 3 * d_state) + 2 * d_state * (d + mamba.d_conv)
            scan += inner // mamba.head_dim * d
        directions = 2 if mamba.direction == "both" else 1
        projector_macs += mamba.depth * visual * (3 * d * inner + directions * scan)

    heads, kv = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    linear = 2 * d * heads + 2 * d * kv + 3 * d * decoder.mlp_dim
    decoder_macs = decoder.depth * (tokens * linear + tokens**2 * heads)
    return 2.0 * (vision_macs + projector_macs + decoder_macs + d * decoder.vocab_size)


if __name__ == "__main__":
    main()
