"""Compares what runs on this device with float32 on CPU: scans, attention, mixers and layers, values and gradients.

    python -m benchmarks.kernels --out=runs/kernels

Inputs are ragged and packed, in float32 and bfloat16; the reference gets the same values. Errors are relative to the
largest value of each array. Writes OUT/kernels.json after each case, prints a line for each, and exits with 1 if an
error exceeds 1e-3 (float32) or 3e-2 (bfloat16).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.machine import machine
from storm_jax.config import DecoderConfig, MambaConfig, MeshConfig, VisionConfig
from storm_jax.files import write_atomically
from storm_jax.models.decoder import Decoder
from storm_jax.models.mamba import MambaMixer
from storm_jax.models.siglip import SigLIP
from storm_jax.ops.attention import KeyRange, attention, causal_keys
from storm_jax.ops.selective_scan import selective_scan
from storm_jax.ops.ssd import ssd
from storm_jax.sharding import make_mesh

LIMITS = {"float32": 1e-3, "bfloat16": 3e-2}
BATCH, WIDTH, STATE, HEADS = 2, 256, 16, 4
# Without positions, softmax does not depend on it: its gradient is rounding.
_KEY_BIAS = "['key']['bias']"

# A function of a tree of float arrays, and the arrays.
Case = tuple[str, Callable[[Any], Any], Any]


def cases(rng: np.random.Generator, length: int, dtype: Any) -> Iterator[Case]:
    ids = jnp.asarray(np.sort(rng.integers(1, 4, (BATCH, length)), axis=1).astype(np.int32))

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    x, dt = normal(BATCH, length, WIDTH), normal(BATCH, length, WIDTH)
    B, C = normal(BATCH, length, STATE), normal(BATCH, length, STATE)
    A = -np.exp(normal(WIDTH, STATE))
    scan = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": normal(WIDTH), "dt_bias": normal(WIDTH)}
    for reverse in (False, True):
        name = f"selective_scan{' reversed' * reverse}"
        yield _of_op(name, selective_scan, scan, segment_ids=ids, reverse=reverse)
    heads = {
        "x": x.reshape(BATCH, length, HEADS, -1),
        "dt": normal(BATCH, length, HEADS),
        "A": -np.exp(normal(HEADS)),
        "B": B[:, :, None],
        "C": C[:, :, None],
        "D": normal(HEADS),
        "dt_bias": normal(HEADS),
    }
    yield _of_op("ssd", ssd, heads, segment_ids=ids)
    q, k, v = (
        normal(BATCH, length, 4, 64),
        normal(BATCH, length, 2, 64),
        normal(BATCH, length, 2, 64),
    )
    qkv = {"q": q, "k": k, "v": v}
    slots = jnp.broadcast_to(jnp.arange(length)[None], ids.shape)
    ranges = {
        "all keys": None,
        "packed": causal_keys(ids),
        "cached": KeyRange(jnp.zeros_like(slots), slots),
    }
    for name, keys in ranges.items():
        yield _of_op(f"attention, {name}", attention, qkv, keys=keys)
    rngs: dict[str, Any] = {"rngs": nnx.Rngs(0), "dtype": dtype}
    for version in ("mamba1", "mamba2"):
        mixer = MambaMixer(WIDTH, version, MambaConfig(d_state=STATE, head_dim=64), **rngs)
        yield _of_module(version, mixer, lambda mixer, x: mixer(x, ids)[0], x)
    decoder = DecoderConfig(
        vocab_size=64, width=WIDTH, depth=1, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=512,
        rope_theta=1e4, qkv_bias=True, tie_embeddings=True,
    )  # fmt: skip
    model = Decoder(decoder, **rngs, remat=True)
    yield _of_module("decoder layer", model, lambda model, x: model(x, slots, ids)[0], x)
    vision = VisionConfig(
        image_size=196, patch_size=14, width=WIDTH, depth=1, num_heads=4, mlp_dim=512, feature_layer=-1
    )  # fmt: skip
    frames = jnp.asarray(rng.integers(0, 256, (2, 196, 196, 3)).astype(np.uint8))
    tower = SigLIP(vision, **rngs, remat=True)
    yield _of_module("vision layer", tower, lambda tower, _: tower(frames), x[:, :0])


def _of_op(name: str, op: Callable[..., Any], arrays: Mapping[str, Any], **others: Any) -> Case:
    return name, lambda inputs: op(**inputs, **others), arrays


def _of_module(name: str, module: nnx.Module, call: Callable[[Any, Any], Any], x: Any) -> Case:
    """A function of the module's parameters and of x."""
    graphdef, params = nnx.split(module)

    def run(inputs: Any) -> Any:
        return call(nnx.merge(graphdef, inputs["params"]), inputs["x"])

    return name, run, {"params": params, "x": x}


def results(function: Callable[[Any], Any], inputs: Any, rng: np.random.Generator) -> Any:
    """Outputs and gradients, and seconds of a second run."""
    shapes = jax.eval_shape(function, inputs)
    weights = jax.tree.map(lambda v: rng.standard_normal(v.shape, np.float32), shapes)

    def loss(inputs: Any) -> tuple[jax.Array, Any]:
        found = function(inputs)
        terms = jax.tree.map(lambda v, w: (v.astype(jnp.float32) * w).sum(), found, weights)
        return jnp.stack(jax.tree.leaves(terms)).sum(), found

    run = jax.jit(jax.grad(loss, has_aux=True))
    jax.block_until_ready(run(inputs))
    began = time.perf_counter()
    found = jax.block_until_ready(run(inputs))
    return found, time.perf_counter() - began


def compare(case: Case, reference: Case, dtype: str) -> dict[str, Any]:
    """The largest error of a case; the reference is the same in float32."""
    (name, function, inputs), (_, exact_function, _) = case, reference
    rounded = jax.tree.map(lambda v: jnp.asarray(v, dtype), inputs)
    found, seconds = results(function, rounded, np.random.default_rng(0))
    cpu = jax.devices("cpu")[:1]
    with jax.default_device(cpu[0]), jax.set_mesh(make_mesh(MeshConfig(data=1), cpu)):
        exact = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float32)), rounded)
        expected, _ = results(exact_function, exact, np.random.default_rng(0))
    errors = {}
    for (path, value), leaf in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        key, right = jax.tree_util.keystr(path), np.asarray(leaf, np.float64)
        if right.size and not (name == "vision layer" and _KEY_BIAS in key):
            difference = np.abs(np.asarray(value, np.float64) - right).max()
            errors[key] = float(difference / max(np.abs(right).max(), 1e-30))
    worst = max(errors, key=lambda path: errors[path])
    return {
        "case": name,
        "dtype": dtype,
        "error": errors[worst],
        "of": worst,
        "seconds": seconds,
        "ok": errors[worst] <= LIMITS[dtype],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=1000, help="steps of a sequence")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with jax.default_matmul_precision("highest"):
        for dtype in LIMITS:
            pairs = (
                cases(np.random.default_rng(0), args.length, jnp.dtype(each))
                for each in (dtype, "float32")
            )
            for case, reference in zip(*pairs, strict=True):
                row = compare(case, reference, dtype)
                rows.append(row)
                print(
                    f"{row['case']:<24} {dtype:<9} error {row['error']:.1e} of {row['of']}"
                    f"{'' if row['ok'] else '   TOO LARGE'}",
                    flush=True,
                )
                found = {"machine": machine(), "length": args.length, "rows": rows}
                write_atomically(args.out / "kernels.json", json.dumps(found, indent=1) + "\n")
    if not all(row["ok"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
