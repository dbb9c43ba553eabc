"""Evaluates a run on a benchmark. Compression may differ from training; the weights stay the same.

    python eval.py --workdir=runs/sft --benchmark=shapes
    python eval.py --workdir=runs/sft --benchmark=videomme --data_root=data/videomme --settings=storm_t_pool
    python eval.py --workdir=runs/sft --benchmark=mlvu --data_root=data/mlvu --sweep=num_frames=8,16,32
    python eval.py --workdir=runs/sft --benchmark=streamingbench --data_root=data/streamingbench --fps=1
    python eval.py check --benchmark=mvbench --data_root=data/mvbench
    python eval.py score --benchmark=mvbench --predictions=FILE --parser=official

The report is written to RUN/evals/BENCHMARK/SETTINGS/: a page, predictions, results, a contact sheet, and
files for the authors' own scorers. The same command resumes an interrupted evaluation. `check` looks at
the files only; `score` scores replies again without a model. See docs/evaluation.md.
"""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags

from storm_jax import command_line, evals
from storm_jax.evals.benchmark import BenchmarkError
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.evals.settings import ANSWERS, MODES, PAPER_SETTINGS

if typing.TYPE_CHECKING:
    from storm_jax.evals.report.files import Report

STYLES = sorted({style for benchmark in BENCHMARKS.values() for style in benchmark.prompts})
PARSERS = sorted({parser for benchmark in BENCHMARKS.values() for parser in benchmark.parsers})
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run written by train.py.")
BENCHMARK = flags.DEFINE_enum(
    "benchmark", None, list(BENCHMARKS), "Benchmark to evaluate on.", required=True
)
DATA_ROOT = flags.DEFINE_string(
    "data_root",
    None,
    "Folder of the benchmark's files; for shapes, defaults to that of the run's training data.",
)
SPLIT = flags.DEFINE_string("split", "", "Split of the benchmark, e.g. full or test.")
SUBTITLES = flags.DEFINE_bool("subtitles", False, "Include subtitles of the sampled frames.")
PROMPT_STYLE = flags.DEFINE_enum(
    "prompt_style",
    "",
    ["", *STYLES],
    "Prompt style; defaults to vila, as in the paper, where there is one.",
)
PARSER = flags.DEFINE_enum(
    "parser",
    "",
    ["", *PARSERS],
    "How replies are parsed; defaults to the parser of the prompt style, and to strict for vila.",
)
ANSWER = flags.DEFINE_enum(
    "answers", "generate", ANSWERS, "Generate replies, or take the most likely letter."
)
SETTINGS = flags.DEFINE_enum(
    "settings", None, list(PAPER_SETTINGS), "Frames, pooling and sampling of the paper's Table 15."
)
command_line.define_process_flags()
command_line.define_compression_flags("--settings, or else to training")
MODE = flags.DEFINE_enum(
    "mode",
    "",
    ["", *MODES],
    "offline asks each question about a clip; stream watches each video once, and asks on the way. Defaults to "
    "stream for benchmarks of streaming, and to offline for the others.",
)
command_line.define_stream_flags("--mode=stream")
CONTEXT_SECONDS = flags.DEFINE_float(
    "context_seconds",
    None,
    "--mode=offline: how much of a video before a question its clip shows; everything by default.",
    lower_bound=0.001,
)
SWEEP = flags.DEFINE_multi_string(
    "sweep",
    [],
    "FIELD=VALUE,VALUE evaluates with each value, and writes a table and a plot; repeatable.",
)
STEP = flags.DEFINE_integer("step", None, "Checkpoint to load; defaults to the last one.")
WEIGHTS = command_line.define_weights_flag()
LIMIT = flags.DEFINE_integer("limit", None, "Ask only the first questions.", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Maximum length of a reply; depends on the benchmark.", lower_bound=1
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "Questions answered together; defaults to 32, fewer for many visual tokens.",
    lower_bound=1,
)
SHARE = flags.DEFINE_string(
    "share",
    None,
    "I/N: this is process I of N, which share the videos and write one report; processes that were launched "
    "together share them by themselves.",
)
ALLOW_MISSING = flags.DEFINE_bool("allow_missing", False, "Exit with 0 even if videos are missing.")
REQUIRE = flags.DEFINE_list(
    "require", [], "Groups whose 95 % lower bound must be 10 points above chance, or exit with 1."
)
PREDICTIONS = flags.DEFINE_string(
    "predictions", None, "score: a predictions.jsonl; with --data_root, lines of id and reply."
)
JUDGEMENTS = flags.DEFINE_string(
    "judgements", None, "score: a judge's output, lines of id and judgement (MLVU generation)."
)
OUT = flags.DEFINE_string("out", None, "score: folder for results and submissions.")


def run_command() -> str:
    """Evaluates; returns the problem that makes the exit status 1, or ""."""
    if WORKDIR.value is None:
        raise BenchmarkError("--workdir is missing: the folder of a run written by train.py")
    options: dict[str, Any] = {
        "data_root": DATA_ROOT.value,
        "split": SPLIT.value,
        "step": STEP.value,
        "weights": WEIGHTS.value,
        "settings": SETTINGS.value or "",
        **command_line.compression_flags(),
        "mode": MODE.value,
        "stream": command_line.stream_flags(),
        "context_seconds": CONTEXT_SECONDS.value,
        "prompt_style": PROMPT_STYLE.value,
        "parser": PARSER.value,
        "answers": ANSWER.value,
        "subtitles": SUBTITLES.value,
        "max_new_tokens": MAX_NEW_TOKENS.value,
        "limit": LIMIT.value,
        "batch_size": BATCH_SIZE.value,
        "shard": parse_shard(SHARE.value) if SHARE.value else own_share(),
    }
    if not SWEEP.value:
        report = evals.evaluate(WORKDIR.value, BENCHMARK.value, **options)
        if report:
            print(report, *report.files, sep="\n")
        return problem_of(report)
    from storm_jax.evals.sweeps import parse_sweep

    swept = evals.sweep(WORKDIR.value, BENCHMARK.value, parse_sweep(SWEEP.value), **options)
    if swept.files:
        print(swept.files[1].read_text() + "\n" + "\n".join(map(str, swept.files)))
    else:
        print("no table: some replies are left to other shards, or no answer is public")
    return next(filter(None, map(problem_of, swept.reports)), "")


def check_command() -> str:
    if DATA_ROOT.value is None:
        raise BenchmarkError("--data_root is missing: the folder of the benchmark's files")
    found = evals.check(BENCHMARK.value, DATA_ROOT.value, split=SPLIT.value)
    print(found)
    return "" if found.complete else "not everything that was published is here"


def score_command() -> str:
    if PREDICTIONS.value is None:
        raise BenchmarkError("--predictions is missing: the predictions.jsonl to score")
    names: dict[str, Any] = {"data_root": DATA_ROOT.value, "split": SPLIT.value}
    if JUDGEMENTS.value:
        print(evals.judge(BENCHMARK.value, PREDICTIONS.value, JUDGEMENTS.value, **names))
        return ""
    report = evals.score(
        BENCHMARK.value,
        PREDICTIONS.value,
        prompt_style=PROMPT_STYLE.value,
        parser=PARSER.value,
        out=OUT.value,
        **names,
    )
    print(report, *report.files, sep="\n")
    return problem_of(report)


def own_share() -> tuple[int, int]:
    import jax  # not all commands need it

    return jax.process_index(), jax.process_count()


def parse_shard(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+/[1-9]\d*", text):
        raise BenchmarkError(f"--share={text}: must be I/N, e.g. 0/4")
    index, count = map(int, text.split("/"))
    if index >= count:
        raise BenchmarkError(f"--share={text}: I must be less than N")
    return index, count


def problem_of(report: Report | None) -> str:
    if report is None:
        return ""
    return report.scores.problem(REQUIRE.value, allow_missing=ALLOW_MISSING.value)


COMMANDS: Mapping[str, Callable[[], str]] = {"check": check_command, "score": score_command}


def main(argv: Sequence[str]) -> None:
    if len(argv) > 2 or (len(argv) == 2 and argv[1] not in COMMANDS):
        raise app.UsageError(
            f"unexpected arguments: {' '.join(argv[1:])}; commands are {' and '.join(COMMANDS)}"
        )
    try:
        if len(argv) == 2:
            problem = COMMANDS[argv[1]]()
        else:
            from storm_jax.distributed import processes  # imports JAX, which not all commands need

            with processes(**command_line.process_flags()):
                problem = run_command()
    except RuntimeError as error:
        from storm_jax.distributed import ProcessError
        from storm_jax.run import RunError

        if isinstance(error, RunError | ProcessError):
            sys.exit(f"eval.py: {error}")
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(
            f"eval.py: out of device memory ({str(error).splitlines()[0]}); rerun with a smaller "
            f"--batch_size to resume, or with a smaller --budget_tokens for a stream"
        )
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped; rerun the same command to resume")
    if problem:
        sys.exit(f"eval.py: {problem}")


if __name__ == "__main__":
    command_line.run(main, (ValueError, ImportError))
