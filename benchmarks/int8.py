"""What int8 kernels change: the distribution of the next token of a text, and the bytes of the parameters.

    python -m benchmarks.int8 --workdir=RUN --out=runs/int8

Reads the text with the decoder of RUN, as trained and with `--weights=int8`. The divergence is KL(as trained || int8) in
nats, of every next token, in windows of 512 tokens. Writes OUT/int8.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from benchmarks.machine import machine
from storm_jax.config import MeshConfig
from storm_jax.files import write_atomically
from storm_jax.inference.weights import load
from storm_jax.run import Run
from storm_jax.sharding import make_mesh

WINDOW = 512  # tokens
TEXTS = ("README.md", "CONTRIBUTING.md", "docs/data.md", "docs/evaluation.md", "docs/weights.md")


def reader(run: Run, weights: str) -> tuple[Callable[[jax.Array], jax.Array], int]:
    """A function from tokens [S] to the log-probabilities of the token after each, fp32 [S, V]; bytes of the
    parameters."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    graphdef, flat = load(run, run.checkpoints.resolve(None), mesh, weights)
    params = unflatten_dict(flat, sep="/")

    @jax.jit
    def read(params: dict, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        x = model.decoder.embed(tokens[None])  # [1, S, D]
        hidden, _ = model.decode(x, jnp.arange(len(tokens))[None])
        logits = jnp.einsum(
            "sd,dv->sv", hidden[0], model.decoder.head(), preferred_element_type=jnp.float32
        )
        return jax.nn.log_softmax(logits)

    return lambda tokens: read(params, tokens), sum(leaf.nbytes for leaf in flat.values())


def compare(run: Run, text: str) -> dict[str, Any]:
    tokens = np.array(run.tokenizer().encode(text, add_special_tokens=False))
    windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    if not len(windows):
        raise SystemExit(f"the text has {len(tokens)} tokens: at least {WINDOW} are needed")
    read, size = reader(run, "")
    read_int8, int8_size = reader(run, "int8")
    divergences, is_same, losses = [], [], []
    for window in map(jnp.asarray, windows):
        p, q = read(window), read_int8(window)
        divergences.append(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
        is_same.append(p.argmax(-1) == q.argmax(-1))
        losses.append([-each[np.arange(WINDOW - 1), window[1:]].mean() for each in (p, q)])
    divergence = np.concatenate(divergences)
    loss, int8_loss = np.mean(losses, axis=0)
    return {
        "tokens": windows.size,
        "divergence": float(divergence.mean()),
        "divergence_99": float(np.percentile(divergence, 99)),
        "same_first_choice": float(np.concatenate(is_same).mean()),
        "loss": float(loss),
        "loss_int8": float(int8_loss),
        "bytes": size,
        "bytes_int8": int8_size,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="run with a checkpoint")
    parser.add_argument(
        "--text", type=pathlib.Path, nargs="+", default=TEXTS, help="files; default: the docs"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    text = "\n".join(pathlib.Path(path).read_text() for path in args.text)
    found = compare(Run(args.workdir), text)
    args.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine(), **found}
    write_atomically(args.out / "int8.json", json.dumps(results, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name:>18} {value:,.5g}" if isinstance(value, float) else f"{name:>18} {value:,}")


if __name__ == "__main__":
    main()
