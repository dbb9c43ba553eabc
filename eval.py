"""Evaluates a run on a benchmark; its compression may differ from training, weights stay the same.

    python eval.py --workdir=runs/sft --benchmark=shapes
    python eval.py --workdir=runs/sft --benchmark=videomme --data_root=data/videomme --settings=storm_t_pool
    python eval.py --workdir=runs/sft --benchmark=mlvu --data_root=data/mlvu --sweep=num_frames=8,16,32
    python eval.py check --benchmark=mvbench --data_root=data/mvbench
    python eval.py score --benchmark=mvbench --predictions=FILE --parser=official

The report goes to RUN/evals/BENCHMARK/SETTINGS/: predictions, results, a contact sheet, and what the
authors' own scorers read. The same command goes on with a run that was killed. `check` looks at the files
alone, `score` scores replies again without a model. docs/evaluation.md has the layouts.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags, logging
from jax.errors import JaxRuntimeError

from storm_jax.config import CompressionConfig, RunConfig
from storm_jax.evals import predictions, sweep
from storm_jax.evals.benchmark import Benchmark, BenchmarkError
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.evals.check import check
from storm_jax.evals.judging import score_judgements
from storm_jax.evals.provenance import about_this_machine, config_hash
from storm_jax.evals.report import table
from storm_jax.evals.runner import Report, evaluate, write_report
from storm_jax.evals.scoring import Scores, parse_rows, score
from storm_jax.evals.settings import ANSWERS, PAPER_SETTINGS, EvalSettings
from storm_jax.inference.predictor import Predictor
from storm_jax.run import Run, RunError

STYLES = sorted({style for benchmark in BENCHMARKS.values() for style in benchmark.prompts})
PARSERS = sorted({parser for benchmark in BENCHMARKS.values() for parser in benchmark.parsers})
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that train.py wrote.")
BENCHMARK = flags.DEFINE_enum(
    "benchmark", None, list(BENCHMARKS), "What to evaluate on.", required=True
)
DATA_ROOT = flags.DEFINE_string(
    "data_root",
    None,
    "Folder of the benchmark's files; for shapes, the folder of the run's training data by default.",
)
SPLIT = flags.DEFINE_string("split", "", "Part of the benchmark, such as full or test.")
SUBTITLES = flags.DEFINE_bool("subtitles", False, "Subtitles of the frames stand in the prompt.")
PROMPT_STYLE = flags.DEFINE_enum(
    "prompt_style", "", ["", *STYLES], "Whose prompt; by default vila, as the paper's."
)
PARSER = flags.DEFINE_enum(
    "parser",
    "",
    ["", *PARSERS],
    "Whose way to read replies; by default that of the prompt style, and strict for vila.",
)
ANSWER = flags.DEFINE_enum(
    "answers", "generate", ANSWERS, "Replies are generated, or the likeliest letter is taken."
)
SETTINGS = flags.DEFINE_enum(
    "settings", None, list(PAPER_SETTINGS), "Frames, pooling and sampling of the paper's Table 15."
)
COMPRESSION = {
    "num_frames": "Frames taken from a video",
    "temporal_pool": "Frames whose tokens are averaged",
    "spatial_pool": "Edge of the token cells that are averaged",
    "temporal_sample": "Every which group of frames is kept",
}
for _name, _help in COMPRESSION.items():
    flags.DEFINE_integer(
        _name, None, f"{_help}; by default as --settings, else as in training.", lower_bound=1
    )
SWEEP = flags.DEFINE_multi_string(
    "sweep",
    [],
    "FIELD=VALUE,VALUE evaluates with each, and writes a table and a plot; may be given for several "
    "fields.",
)
STEP = flags.DEFINE_integer("step", None, "Checkpoint to load; the last one by default.")
LIMIT = flags.DEFINE_integer("limit", None, "Ask the first questions only.", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Length of a reply; the benchmark's own by default.", lower_bound=1
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "Questions answered together; by default 32, or fewer where they have very many visual tokens.",
    lower_bound=1,
)
SHARE = flags.DEFINE_string(
    "share", "0/1", "I/N: ask every N-th video from the I-th on; N processes make one report."
)
ALLOW_MISSING = flags.DEFINE_bool(
    "allow_missing", False, "Exit with status 0 although videos are missing."
)
REQUIRE = flags.DEFINE_list(
    "require",
    [],
    "Groups whose 95 % lower bound must be 10 points above chance; else the exit status is 1.",
)
PREDICTIONS = flags.DEFINE_string(
    "predictions", None, "score: a predictions.jsonl; with --data_root, lines of id and reply do."
)
JUDGEMENTS = flags.DEFINE_string(
    "judgements", None, "score: what a judge said, lines of id and judgement (MLVU generation)."
)
OUT = flags.DEFINE_string("out", None, "score: folder for results and submissions.")
MARGIN = 0.1
ERRORS = 3  # that are printed


def run_command() -> str:
    """Evaluates; gives what went wrong."""
    if WORKDIR.value is None:
        raise BenchmarkError("--workdir is missing: the folder of a run that train.py wrote")
    benchmark, run = BENCHMARKS[BENCHMARK.value], Run(WORKDIR.value)
    split, style = benchmark.pick_split(SPLIT.value), benchmark.pick_prompt(PROMPT_STYLE.value)
    benchmark.pick_parser(PARSER.value, style)
    if SUBTITLES.value and not benchmark.captions:
        raise BenchmarkError(f"--subtitles: {benchmark.title} has none")
    questions = benchmark.questions(data_root(benchmark, run), split)
    if ANSWER.value == "likelihood" and not all(question.options for question in questions):
        raise BenchmarkError("--answers=likelihood: some questions have no options to choose from")
    step = run.checkpoints.resolve(STEP.value)
    base = chosen_compression(run.config.compression, benchmark.name)
    swept = sweep.parse(SWEEP.value)
    ask = functools.partial(
        evaluate,
        benchmark,
        questions,
        load_model=functools.cache(lambda: Predictor(run.path, step)),
        identity={
            "step": step,
            "checkpoint_written": run.checkpoints.written_at(step),
            **how_media_are_read(run.config),
        },
        about={"config": config_hash(run.config), **about_this_machine()},
        parser=PARSER.value,
        batch_size=BATCH_SIZE.value,
        share=parse_share(SHARE.value),
    )
    usual = benchmark.pick_prompt("")
    home = run.path / "evals" / folder_of(benchmark, split)
    points: list[sweep.Point | None] = []
    problems = []
    for compression in sweep.compressions(swept, base):
        settings = eval_settings(benchmark, split, style, compression)
        if swept:
            print(", ".join(f"{name}={getattr(compression, name)}" for name in swept), flush=True)
        report = ask(settings, home / settings.folder_name(step, usual))
        points.append(sweep.point(compression, report.scores) if report else None)
        if report:
            print_report(benchmark, report)
            problems.append(problem_of(report.scores))
    if swept and all(points):
        name = eval_settings(benchmark, split, style, base).folder_name(step, usual)
        files = sweep.write(
            [point for point in points if point],
            list(swept),
            benchmark.headline,
            f"{benchmark.title} {split}, step {step}",
            home / f"sweep_{'_'.join(swept)}_{name}",
        )
        print(files[1].read_text() + "\n" + "\n".join(map(str, files)))
    elif swept:
        print("no table of the sweep: replies of other processes, or public answers, are lacking")
    return next(filter(None, problems), "")


def how_media_are_read(config: RunConfig) -> dict[str, Any]:
    """What replies depend on of a run's configuration beside its weights and compression."""
    frames = config.data.frames
    return {
        "system": config.data.system,
        "fps": frames.fps,
        "time_text": frames.time_text,
        "max_damage": frames.max_damage,
    }


def check_command() -> str:
    benchmark = BENCHMARKS[BENCHMARK.value]
    split = benchmark.pick_split(SPLIT.value)
    root = data_root(benchmark, None)
    found = check(benchmark, split, benchmark.questions(root, split), root)
    print("\n".join(found.lines))
    return "" if found.complete else "not all that was published is here"


def score_command() -> str:
    """Scores a file of predictions; what its run was stands beside it, in results.json."""
    if PREDICTIONS.value is None:
        raise BenchmarkError("--predictions is missing: the predictions.jsonl to score")
    benchmark, path = BENCHMARKS[BENCHMARK.value], pathlib.Path(PREDICTIONS.value)
    beside = results_beside(path, benchmark)
    split = benchmark.pick_split(SPLIT.value or beside.get("split", ""))
    known = benchmark.questions(DATA_ROOT.value, split) if DATA_ROOT.value else None
    questions, answers = predictions.read(path, known)
    if JUDGEMENTS.value:
        if not benchmark.splits[split].judged:
            raise BenchmarkError(f"--judgements: no judge scores {benchmark.title} {split}")
        tasks = {question.id: question.groups["task"] for question in questions}
        print(score_judgements(tasks, pathlib.Path(JUDGEMENTS.value)).table())
        return ""
    style = PROMPT_STYLE.value or beside.get("prompt_style", "")
    parser = benchmark.pick_parser(PARSER.value, benchmark.pick_prompt(style))
    rows = parse_rows(questions, answers, benchmark.parsers[parser])
    total = beside["counts"]["rows"] if beside and known is None else len(questions)
    scores = score(benchmark, split, rows, total)
    print(table(benchmark, scores))
    if OUT.value:
        if pathlib.Path(OUT.value, "settings.json").exists():
            raise BenchmarkError(f"--out={OUT.value} is the report of a run: name another folder")
        about = {"benchmark": benchmark.name, "split": split, "parser": parser}
        about |= {"predictions": str(path), **about_this_machine()}
        files = write_report(benchmark, split, rows, scores, about, pathlib.Path(OUT.value))
        print("\n".join(map(str, files)))
    return problem_of(scores)


def results_beside(path: pathlib.Path, benchmark: Benchmark) -> Mapping[str, Any]:
    """The results of the run that a file of predictions is from; empty where it is from elsewhere."""
    results = path.with_name("results.json")
    if path.name != "predictions.jsonl" or not results.exists():
        return {}
    beside = json.loads(results.read_text())
    if beside["benchmark"] != benchmark.name:
        raise BenchmarkError(
            f"--benchmark={benchmark.name}: {path} has replies to {beside['benchmark']}"
        )
    return beside


def data_root(benchmark: Benchmark, run: Run | None) -> pathlib.Path:
    """The folder of the benchmark's files; the built-in task's may be that of the run's training data."""
    if DATA_ROOT.value is not None:
        return pathlib.Path(DATA_ROOT.value)
    if run is not None and benchmark.name == "shapes":
        return pathlib.Path(run.config.data.train[0].path).parent
    raise BenchmarkError(f"--data_root is missing: the folder of {benchmark.title}'s files")


def chosen_compression(trained: CompressionConfig, benchmark: str) -> CompressionConfig:
    """What the flags say, what --settings say where they say nothing, and what training used."""
    name = SETTINGS.value
    base = PAPER_SETTINGS[name].compression(name, benchmark) if name else trained
    values = {field: flags.FLAGS[field].value or getattr(base, field) for field in COMPRESSION}
    return CompressionConfig(**values)


def eval_settings(
    benchmark: Benchmark, split: str, style: str, compression: CompressionConfig
) -> EvalSettings:
    return EvalSettings(
        split=split,
        prompt_style=style,
        compression=compression,
        max_new_tokens=MAX_NEW_TOKENS.value or benchmark.splits[split].max_new_tokens,
        subtitles=SUBTITLES.value,
        answers=ANSWER.value,
        limit=LIMIT.value,
    )


def folder_of(benchmark: Benchmark, split: str) -> str:
    """Of its reports: its name, and the split unless it is the default."""
    return benchmark.name if split == benchmark.pick_split("") else f"{benchmark.name}_{split}"


def parse_share(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+/[1-9]\d*", text):
        raise BenchmarkError(f"--share={text}: it must be I/N, such as 0/4")
    index, count = map(int, text.split("/"))
    if index >= count:
        raise BenchmarkError(f"--share={text}: I must be below N")
    return index, count


def print_report(benchmark: Benchmark, report: Report) -> None:
    print(table(benchmark, report.scores))
    errors = list(dict.fromkeys(row.answer.error for row in report.rows if row.answer.error))
    for error in errors[:ERRORS]:
        print(f"  {error}")
    if len(errors) > ERRORS:
        print(f"  ... and {len(errors) - ERRORS:,} more, in predictions.jsonl")
    print("\n".join(map(str, report.files)))


def problem_of(scores: Scores) -> str:
    """Why the exit status is 1, "" = it is 0."""
    counts = scores.counts
    if counts.missing and not ALLOW_MISSING.value:
        return f"{counts.missing:,} questions have no video; --allow_missing accepts that"
    if not counts.parsed + counts.unparsed:
        return "no question could be answered"
    groups = {group.group: group for group in scores.groups}
    if unknown := [name for name in REQUIRE.value if name not in groups]:
        return f"--require={unknown[0]}: the groups are {', '.join(groups)}"
    missed = [
        name
        for name in dict.fromkeys(REQUIRE.value)
        if groups[name].accuracy.low < groups[name].chance + MARGIN
    ]
    return f"not {MARGIN:.0%} above chance: {', '.join(missed)}" if missed else ""


COMMANDS: Mapping[str, Callable[[], str]] = {"check": check_command, "score": score_command}


def main(argv: Sequence[str]) -> None:
    if len(argv) > 2 or (len(argv) == 2 and argv[1] not in COMMANDS):
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    command = COMMANDS[argv[1]] if len(argv) == 2 else run_command
    try:
        problem = command()
    except (RunError, ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(
            f"eval.py: the device has too little memory ({str(error).splitlines()[0]}); a smaller "
            f"--batch_size needs less, and the same command goes on"
        )
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped; the same command goes on with the rest")
    if problem:
        sys.exit(f"eval.py: {problem}")


if __name__ == "__main__":
    app.run(main)
