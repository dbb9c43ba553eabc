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
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from absl import app, flags, logging

from storm_jax.config import CompressionConfig
from storm_jax.evals import sweep
from storm_jax.evals.benchmark import Benchmark, BenchmarkError, Question
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.evals.check import check
from storm_jax.evals.judging import score_judgements
from storm_jax.evals.provenance import about_this_machine, config_hash
from storm_jax.evals.report import table
from storm_jax.evals.runner import Report, evaluate, write_report
from storm_jax.evals.scoring import Answer, Scores, answer_of, from_line, parse_rows, score
from storm_jax.evals.settings import ANSWERS, PAPER_SETTINGS, EvalSettings
from storm_jax.inference.predictor import Predictor
from storm_jax.run import Run, RunError, read_lines

STYLES = ("vila", "lmms", "vlmevalkit", "official")
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
    "parser", "", ["", *STYLES], "Whose way to read replies; by default that of the prompt style."
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
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Questions answered together.", lower_bound=1)
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


def run_command() -> str:
    """Evaluates; gives what went wrong."""
    if WORKDIR.value is None:
        raise BenchmarkError("--workdir is missing: the folder of a run that train.py wrote")
    benchmark, run = BENCHMARKS[BENCHMARK.value], Run(WORKDIR.value)
    split, trained = benchmark.split(SPLIT.value), run.config.compression
    if SUBTITLES.value and not benchmark.subtitles:
        raise BenchmarkError(f"--subtitles: {benchmark.title} is asked without")
    questions = read_questions(benchmark, split, run)
    if ANSWER.value == "likelihood" and not all(question.options for question in questions):
        raise BenchmarkError("--answers=likelihood: some questions have no options to choose from")
    step = run.checkpoint_step(STEP.value)
    base = chosen_compression(trained, benchmark.name)
    swept = sweep.parse(SWEEP.value)
    identity = {
        "step": step,
        "checkpoint_written": run.checkpoint_written(step),
        "config": config_hash(run.config),
    }
    about, load = about_this_machine(), functools.cache(lambda: Predictor(run.path, step))
    home = run.path / "evals" / folder_of(benchmark, split)
    points, problem = [], ""
    for compression in sweep.compressions(swept, base):
        settings = eval_settings(benchmark, split, compression)
        folder = home / settings.folder_name(step, next(iter(benchmark.styles)))
        if swept:
            print(", ".join(f"{name}={getattr(compression, name)}" for name in swept), flush=True)
        report = evaluate(
            benchmark,
            questions,
            settings,
            folder,
            load,
            identity=identity,
            about=about,
            parser=PARSER.value,
            batch_size=BATCH_SIZE.value,
            share=parse_share(SHARE.value),
        )
        if report is None:
            print("this share is done; the process that ends last writes the report")
            continue
        print_report(benchmark, report)
        problem = problem or problem_of(report.scores)
        headline = report.scores.headline
        if headline:
            cost = report.scores.visual_tokens, report.scores.seconds
            points.append(sweep.Point(compression, headline, *cost))
    if swept and points:
        title = f"{benchmark.title} {split}, step {step}"
        folder = home / f"sweep_step{step}_{'_'.join(swept)}"
        files = sweep.write(points, list(swept), benchmark.headline, title, folder)
        print(files[1].read_text() + "\n" + "\n".join(map(str, files)))
    return problem


def check_command() -> str:
    benchmark = BENCHMARKS[BENCHMARK.value]
    split = benchmark.split(SPLIT.value)
    questions = read_questions(benchmark, split, None)
    found = check(benchmark, split, questions, pathlib.Path(DATA_ROOT.value or ""))
    print("\n".join(found.lines))
    return "" if found.complete else "not all that was published is here"


def score_command() -> str:
    """Scores a file of predictions."""
    if PREDICTIONS.value is None:
        raise BenchmarkError("--predictions is missing: the predictions.jsonl to score")
    benchmark, path = BENCHMARKS[BENCHMARK.value], pathlib.Path(PREDICTIONS.value)
    split = benchmark.split(SPLIT.value)
    try:
        lines = read_lines(path)
        if DATA_ROOT.value:
            questions = read_questions(benchmark, split, None)
            nothing = Answer(error=f"{path} has no reply", cause="no_reply")
            answers = {question.id: nothing for question in questions}
            answers |= {str(line["id"]): answer_of(line) for line in lines}
        else:
            pairs = [from_line(line) for line in lines]
            questions = [question for question, _ in pairs]
            answers = {question.id: answer for question, answer in pairs}
    except KeyError as error:
        raise BenchmarkError(
            f"{path}: a line has no {error}; with --data_root, id and reply are enough"
        ) from error
    if JUDGEMENTS.value:
        tasks = {question.id: question.groups["task"] for question in questions}
        print(score_judgements(tasks, pathlib.Path(JUDGEMENTS.value)).table())
        return ""
    style = PARSER.value or PROMPT_STYLE.value
    rows = parse_rows(questions, answers, benchmark.style(style).parse)
    scores = score(benchmark, split, rows, len(questions))
    print(table(benchmark, scores))
    if OUT.value:
        about = {
            "benchmark": benchmark.name,
            "split": split,
            "parser": style,
            **about_this_machine(),
        }
        files = write_report(benchmark, split, rows, scores, about, pathlib.Path(OUT.value))
        print("\n".join(map(str, files)))
    return problem_of(scores)


def read_questions(benchmark: Benchmark, split: str, run: Run | None) -> list[Question]:
    root: str | pathlib.Path | None = DATA_ROOT.value
    if root is None and run is not None and benchmark.name == "shapes":
        root = pathlib.Path(run.config.data.train[0].path).parent
    if root is None:
        raise BenchmarkError(f"--data_root is missing: the folder of {benchmark.title}'s files")
    return benchmark.questions(root, split)


def chosen_compression(trained: CompressionConfig, benchmark: str) -> CompressionConfig:
    """What the flags say, what --settings say where they say nothing, and what training used."""
    name = SETTINGS.value
    base = PAPER_SETTINGS[name].compression(name, benchmark) if name else trained
    values = {field: flags.FLAGS[field].value or getattr(base, field) for field in COMPRESSION}
    return CompressionConfig(**values)


def eval_settings(benchmark: Benchmark, split: str, compression: CompressionConfig) -> EvalSettings:
    style = PROMPT_STYLE.value or next(iter(benchmark.styles))
    benchmark.style(style)
    benchmark.style(PARSER.value)
    return EvalSettings(
        split,
        style,
        compression,
        MAX_NEW_TOKENS.value or benchmark.splits[split].max_new_tokens,
        SUBTITLES.value,
        ANSWER.value,
        LIMIT.value,
    )


def folder_of(benchmark: Benchmark, split: str) -> str:
    """Of its reports: its name, and the split unless it is the default."""
    default = next(iter(benchmark.splits))
    return benchmark.name if split == default else f"{benchmark.name}_{split}"


def parse_share(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+/[1-9]\d*", text):
        raise BenchmarkError(f"--share={text}: it must be I/N, such as 0/4")
    index, count = map(int, text.split("/"))
    if index >= count:
        raise BenchmarkError(f"--share={text}: I must be below N")
    return index, count


def print_report(benchmark: Benchmark, report: Report) -> None:
    print(table(benchmark, report.scores))
    failed = [row for row in report.rows if row.answer.error]
    for row in failed[:3]:
        print(f"  {row.answer.error}")
    print("\n".join(map(str, report.files)))


def problem_of(scores: Scores) -> str:
    if scores.counts.missing and not ALLOW_MISSING.value:
        return f"{scores.counts.missing:,} questions have no video; --allow_missing accepts that"
    missed = unproven(scores, REQUIRE.value)
    return f"not {MARGIN:.0%} above chance: {', '.join(missed)}" if missed else ""


def unproven(scores: Scores, required: Sequence[str]) -> list[str]:
    """The required groups that are not clearly above chance."""
    proven = {group.group for group in scores.groups if group.low >= group.chance + MARGIN}
    return [name for name in dict.fromkeys(required) if name not in proven]


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
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped; the same command goes on with the rest")
    if problem:
        sys.exit(f"eval.py: {problem}")


if __name__ == "__main__":
    app.run(main)
