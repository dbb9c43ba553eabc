"""Compares the selective scan with reference implementations: time, memory and error.

    python -m benchmarks.scan --out=runs/scan                            the grid of docs/scan.md
    python -m benchmarks.scan --out=runs/scan --problems 1x4096x512x16   batch x length x width x d_state

Methods: the implementations of `storm_jax.ops.selective_scan` for this backend; `jax.lax.associative_scan`
over the whole length and, on CPU, `jax.lax.scan`, both differentiated by JAX; the recurrence in torch, as
written in transformers (short sequences only) and, faster, over unbound tensors; on a GPU the kernels of
`mamba_ssm`, if installed.

Each round times every method once, so that all of them see the same load, and the best round counts.
Errors are those of y and of the gradients of all inputs, against torch in float64, relative to the largest
value of each array. Requires `pip install -e '.[dev]'`.

Writes OUT/scan.json, OUT/scan.md and OUT/scan.png, and updates them after each problem.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from benchmarks.machine import machine
from storm_jax.ops.selective_scan import IMPLEMENTATIONS, KERNELS, fastest, selective_scan

Arrays = dict[str, Any]  # x, dt, A, B, C, D, dt_bias and the weights of y in the loss
INPUTS = ("x", "dt", "A", "B", "C", "D", "dt_bias")

MAX_TRANSFORMERS_STEPS = 1024  # its backward pass is more than quadratic in the length


class Problem(NamedTuple):
    """The sizes of a scan."""

    batch: int
    length: int
    width: int
    d_state: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


GRID = (
    Problem(1, 256, 512, 16),
    Problem(1, 1024, 512, 16),
    Problem(1, 4096, 512, 16),
    Problem(1, 16_384, 512, 16),
    Problem(4, 1024, 512, 16),
    Problem(1, 4096, 2304, 16),
)


def make_arrays(problem: Problem, dtype: Any = np.float32) -> Arrays:
    """Draws inputs like those of a new Mamba layer: decay rates 1 to N, step sizes of about 0.05."""
    batch, length, width, d_state = problem
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.standard_normal((batch, length, width)),
        "dt": 0.5 * rng.standard_normal((batch, length, width)),
        "A": -np.tile(np.arange(1.0, d_state + 1), (width, 1)),
        "B": rng.standard_normal((batch, length, d_state)),
        "C": rng.standard_normal((batch, length, d_state)),
        "D": np.ones(width),
        "dt_bias": rng.uniform(-4, -2, width),
        "weights": rng.standard_normal((batch, length, width)),
    }
    fp32 = ("A", "D", "dt_bias")
    return {k: v.astype(np.float32 if k in fp32 else dtype) for k, v in arrays.items()}


# Methods map the inputs to y [B, L, E].


def by_associative_scan(x, dt, A, B, C, D, dt_bias):
    dt = jax.nn.softplus(dt + dt_bias)
    decay = jnp.exp(dt[..., None] * A)  # [B, L, E, N]
    u = (dt * x)[..., None] * B[:, :, None]

    def combine(left: tuple, right: tuple) -> tuple:
        return right[0] * left[0], right[0] * left[1] + right[1]

    h = jax.lax.associative_scan(combine, (decay, u), axis=1)[1]
    return jnp.sum(h * C[:, :, None], axis=-1) + D * x


def by_lax_scan(x, dt, A, B, C, D, dt_bias):
    dt = jax.nn.softplus(dt + dt_bias)

    def step(h: jax.Array, now: tuple) -> tuple[jax.Array, jax.Array]:
        x, dt, B, C = now
        h = jnp.exp(dt[..., None] * A) * h + (dt * x)[..., None] * B[:, None]
        return h, jnp.sum(h * C[:, None], axis=-1)

    h = jnp.zeros((len(x), *A.shape))
    _, y = jax.lax.scan(step, h, tuple(v.swapaxes(0, 1) for v in (x, dt, B, C)))
    return y.swapaxes(0, 1) + D * x


def by_torch(x, dt, A, B, C, D, dt_bias, block=None):
    """The recurrence over unbound tensors, optionally with activations checkpointed every `block` steps."""
    dt = torch.nn.functional.softplus(dt + dt_bias)

    def steps(h, x, dt, B, C):
        decay = torch.exp(dt[..., None] * A).unbind(1)
        u = ((dt * x)[..., None] * B[:, :, None]).unbind(1)
        outputs = []
        for decay_now, u_now, C_now in zip(decay, u, C.unbind(1), strict=True):
            h = decay_now * h + u_now
            outputs.append((h @ C_now[..., None])[..., 0])
        return h, torch.stack(outputs, dim=1)

    h = torch.zeros((len(x), *A.shape), dtype=A.dtype, device=x.device)
    if block is None:
        return steps(h, x, dt, B, C)[1] + D * x
    outputs = []
    for parts in zip(*(v.split(block, dim=1) for v in (x, dt, B, C)), strict=True):
        h, y = checkpoint(steps, h, *parts, use_reentrant=False)
        outputs.append(y)
    return torch.cat(outputs, dim=1) + D * x


def by_transformers(x, dt, A, B, C, D, dt_bias):
    x, dt, B, C = (v.transpose(1, 2) for v in (x, dt, B, C))
    y = mamba_selective_scan(x, dt, A, B, C, D=D, delta_bias=dt_bias, delta_softplus=True)
    return y.transpose(1, 2)


def by_mamba_ssm(x, dt, A, B, C, D, dt_bias):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, dt, B, C = (v.transpose(1, 2).contiguous() for v in (x, dt, B, C))
    y = selective_scan_fn(x, dt, A, B, C, D=D, delta_bias=dt_bias, delta_softplus=True)
    return y.transpose(1, 2)


def ours(x, dt, A, B, C, D, dt_bias, implementation):
    return selective_scan(x, dt, A, B, C, D, dt_bias=dt_bias, implementation=implementation)[0]


# Programs are compiled methods.


class Program(NamedTuple):
    """A method with its inputs, ready to be timed."""

    forward: Callable[[], Any]  # returns y
    backward: Callable[[], dict[str, Any]]  # returns the gradients of sum(y * weights)
    forward_bytes: int | None  # None: not measured
    backward_bytes: int | None


def jax_program(method: Callable[..., jax.Array], arrays: Arrays) -> Program:
    """Compiles a JAX method. Memory is XLA's temporary memory, without arguments and results."""
    device = {name: jnp.asarray(v) for name, v in arrays.items()}
    inputs, weights = {name: device[name] for name in INPUTS}, device["weights"]

    def loss(inputs: Arrays, weights: jax.Array) -> jax.Array:
        return jnp.sum(method(**inputs).astype(jnp.float32) * weights)

    forward: Any = jax.jit(lambda inputs: method(**inputs)).lower(inputs).compile()
    backward: Any = jax.jit(jax.grad(loss)).lower(inputs, weights).compile()
    return Program(
        forward=lambda: jax.block_until_ready(forward(inputs)),
        backward=lambda: jax.block_until_ready(backward(inputs, weights)),
        forward_bytes=forward.memory_analysis().temp_size_in_bytes,
        backward_bytes=backward.memory_analysis().temp_size_in_bytes,
    )


def torch_program(method: Callable[..., torch.Tensor], arrays: Arrays) -> Program:
    """Prepares a torch method. Memory is what autograd saves for the backward pass."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves = {name: torch.tensor(arrays[name], device=device) for name in INPUTS}
    weights = torch.tensor(arrays["weights"], device=device)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            y = method(**leaves)
        if device == "cuda":
            torch.cuda.synchronize()
        return y

    def backward() -> dict[str, Any]:
        tracked = {name: v.detach().requires_grad_() for name, v in leaves.items()}
        (method(**tracked) * weights).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return {name: v.grad for name, v in tracked.items()}

    return Program(
        forward=forward,
        backward=backward,
        forward_bytes=None,
        backward_bytes=saved_bytes(method, leaves),
    )


def saved_bytes(method: Callable[..., torch.Tensor], leaves: dict[str, torch.Tensor]) -> int:
    """Returns the size of the tensors that autograd saves, without the inputs."""
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = method(**{name: v.detach().requires_grad_() for name, v in leaves.items()})
    inputs = sum(v.untyped_storage().nbytes() for v in leaves.values())
    del y
    return max(0, sum(saved.values()) - inputs)


def methods(problem: Problem) -> dict[str, Callable[[Arrays], Program]]:
    """Returns the methods for this backend; the first one is the default of `selective_scan`."""
    backend = jax.default_backend()
    default = fastest(backend, problem.d_state)
    names = [default] + [n for n in IMPLEMENTATIONS if n != default and n not in KERNELS]
    if backend != "cpu":
        names.remove("sequential")  # launches kernels for every step
    found: dict[str, Callable[[Arrays], Program]] = {
        name: functools.partial(jax_program, functools.partial(ours, implementation=name))
        for name in names
    }
    found["jax.lax.associative_scan"] = functools.partial(jax_program, by_associative_scan)
    if backend == "cpu":
        found["jax.lax.scan"] = functools.partial(jax_program, by_lax_scan)
    found["torch, unbind"] = functools.partial(torch_program, by_torch)
    if problem.batch * problem.length <= MAX_TRANSFORMERS_STEPS:
        found["torch, transformers"] = functools.partial(torch_program, by_transformers)
    if torch.cuda.is_available():
        try:
            import mamba_ssm  # noqa: F401
        except ImportError:
            print("skipping mamba_ssm: not installed", flush=True)
        else:
            found["mamba_ssm"] = functools.partial(torch_program, by_mamba_ssm)
    return found


# Measurements.


def exact(arrays: Arrays) -> Arrays:
    """Returns y and the gradients in float64."""
    leaves = {
        name: torch.tensor(np.asarray(arrays[name], np.float64), requires_grad=True)
        for name in INPUTS
    }
    y = by_torch(**leaves, block=256)
    weights = torch.tensor(np.asarray(arrays["weights"], np.float64))
    gradients = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
    named = dict(zip(INPUTS, gradients, strict=True))
    return {name: v.detach().numpy() for name, v in (named | {"y": y}).items()}


def error(found: Any, expected: np.ndarray) -> float:
    """Returns the largest error, relative to the largest expected value."""
    if isinstance(found, torch.Tensor):
        found = found.cpu().numpy()
    difference = np.abs(np.asarray(found, np.float64) - expected).max()
    return float(difference / np.abs(expected).max())


def seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """Returns one row of results per method."""
    arrays = make_arrays(problem)
    expected = exact(arrays)
    rounded = make_arrays(problem, jnp.bfloat16)
    expected_rounded = exact(rounded)["y"]
    programs: dict[str, Program] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in methods(problem).items():
        print(f"{problem}: {name}", flush=True)
        program = programs[name] = make(arrays)
        gradients = program.backward()
        rows[name] = {
            "problem": str(problem),
            "method": name,
            "forward_bytes": program.forward_bytes,
            "backward_bytes": program.backward_bytes,
            "error_y": error(program.forward(), expected["y"]),
            "error_gradients": max(error(gradients[k], expected[k]) for k in INPUTS),
        }
        if name in IMPLEMENTATIONS:
            y = jax_program(functools.partial(ours, implementation=name), rounded).forward()
            rows[name]["error_y_bfloat16"] = error(y.astype(jnp.float32), expected_rounded)
    for _ in range(rounds):
        for name, program in programs.items():
            for key, function in (("forward", program.forward), ("backward", program.backward)):
                rows[name].setdefault(f"{key}_seconds", []).append(seconds(function))
    return list(rows.values())


# Reports.


def best(row: dict[str, Any], key: str) -> float:
    return min(row[f"{key}_seconds"])


def table(rows: list[dict[str, Any]]) -> str:
    """Formats rows as a Markdown table; ratios are to the first method of each problem."""
    lines = [
        "| batch x length x width x state | method | forward, s | ratio | with gradients, s | ratio "
        "| memory, MB | ratio | error of y | of gradients | of y in bfloat16 |",
        "| --- | --- " + "| --- " * 9 + "|",
    ]
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        ours = first.setdefault(row["problem"], row)
        memory = row["backward_bytes"]
        rounded = row.get("error_y_bfloat16")
        cells = [
            row["problem"].replace("x", " x "),
            row["method"],
            f"{best(row, 'forward'):.4f}",
            f"{best(row, 'forward') / best(ours, 'forward'):.1f}",
            f"{best(row, 'backward'):.4f}",
            f"{best(row, 'backward') / best(ours, 'backward'):.1f}",
            f"{memory / 1e6:.1f}",
            f"{memory / ours['backward_bytes']:.1f}",
            f"{row['error_y']:.1e}",
            f"{row['error_gradients']:.1e}",
            "" if rounded is None else f"{rounded:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Plots time and memory of the gradients over the length, for the most common other sizes."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    sizes = [Problem(*map(int, row["problem"].split("x"))) for row in rows]
    common = max(
        {s._replace(length=0) for s in sizes},
        key=lambda other: len({s for s in sizes if s._replace(length=0) == other}),
    )
    for name in dict.fromkeys(row["method"] for row in rows):
        points = sorted(
            (size.length, best(row, "backward"), row["backward_bytes"] / 1e6)
            for size, row in zip(sizes, rows, strict=True)
            if row["method"] == name and size._replace(length=0) == common
        )
        if points:
            lengths, times, memory = zip(*points, strict=True)
            axes[0].loglog(lengths, times, marker="o", label=name)
            axes[1].loglog(lengths, memory, marker="o", label=name)
    for axis, label in zip(axes, ("seconds", "temporary memory, MB"), strict=True):
        axis.set_xlabel("length")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(
        f"Forward and backward, batch {common.batch}, width {common.width}, d_state {common.d_state}, fp32"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_problem(text: str) -> Problem:
    try:
        problem = Problem(*map(int, text.split("x")))
    except (TypeError, ValueError):
        problem = Problem(0, 0, 0, 0)
    if min(problem) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form BATCHxLENGTHxWIDTHxSTATE, for example 1x4096x512x16"
        )
    return problem


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="output folder")
    parser.add_argument(
        "--problems",
        type=parse_problem,
        nargs="+",
        default=GRID,
        metavar="BxLxExN",
        help=f"batch x length x width x d_state (default: {' '.join(map(str, GRID))})",
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of timings per method")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for problem in args.problems:
        rows += measure(problem, args.rounds)
        report = {
            "machine": machine(),
            "versions": {"jax": jax.__version__, "torch": torch.__version__},
            "rounds": args.rounds,
            "rows": rows,
        }
        (args.out / "scan.json").write_text(json.dumps(report, indent=2) + "\n")
        (args.out / "scan.md").write_text(f"{machine()}\n\n{table(rows)}")
        plot(rows, args.out / "scan.png")
    print(table(rows))


if __name__ == "__main__":
    main()
