"""Measures time and memory of import, reading and export on a random bfloat16 checkpoint of full size.

    python -m benchmarks.weights_memory --preset=storm_qwen2_1_5b --out=runs/weights_memory

Writes a checkpoint as on the Hub (bfloat16 shards of 2 GB), imports it and exports the run, each in
a separate process whose memory is sampled. An import should need at most the parameters placed on
the devices (here: host memory) plus 1.3 times the largest stacked parameter. Needs free disk space
of twice the checkpoint, which is deleted at the end.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

from storm_jax.params import abstract_model, flat_params
from storm_jax.run import Run
from storm_jax.text.bpe import train_tokenizer
from storm_jax.weights.architecture import decoder_json, vision_json
from storm_jax.weights.mapping import tables
from storm_jax.weights.tensors import ShardWriter

BOUND = 1.3  # times the largest stacked parameter, on top of what is placed
# The memory of Python and the libraries.
IDLE = "import storm_jax.weights.__main__, jax; jax.devices()"


def write_checkpoint(preset: str, folder: pathlib.Path) -> None:
    """Writes a tower and a decoder of a preset's sizes; norms are around one, the rest around zero."""
    model = importlib.import_module(f"configs.{preset}").MODEL
    shapes = flat_params(abstract_model(model)[1])
    block = np.random.default_rng(0).normal(0, 0.02, 2**24).astype(ml_dtypes.bfloat16)
    configs = {
        "vision": vision_json(model.vision, "bfloat16"),
        "decoder": decoder_json(model.decoder, "bfloat16"),
    }
    for part, config in configs.items():
        path = folder / part
        path.mkdir(parents=True)
        writer = ShardWriter(path)
        for rule in tables(model, shapes)[part].rules:
            shape = rule.tensor_shape(shapes[rule.path].shape)
            noise = np.resize(block, shape)
            writer.add(rule.tensor, noise + 1 if "norm" in rule.tensor else noise)
        writer.close()
        (path / "config.json").write_text(json.dumps(config))
    train_tokenizer(["a small tokenizer"], 300).save_pretrained(folder / "decoder")


def watch(command: list[str]) -> tuple[float, dict[str, float]]:
    """Runs a command and returns its seconds and peak memory in GB.

    RssAnon are anonymous pages. VmRSS also counts pages of open files, which the kernel may drop.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    peak = {"RssAnon": 0.0, "VmRSS": 0.0}
    while process.poll() is None:
        try:
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(value.split()[0]) * 1024 / 1e9)
        time.sleep(0.01)
    if process.wait():
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}")
    return time.monotonic() - began, peak


def time_reading(run: pathlib.Path) -> tuple[float, float]:
    """Seconds to compare all digests of a run's parameters, and to read the parameters one by one."""
    checkpoints = Run(run).checkpoints
    began = time.monotonic()
    checkpoints.verify(0, "params")
    verified = time.monotonic()
    for name in checkpoints.shapes(0):
        checkpoints.read(0, name)
    return verified - began, time.monotonic() - verified


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weights_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", default="storm_qwen2_1_5b", help="model in configs/")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="working folder")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    hub, run = args.out / "hub", args.out / "run"
    write_checkpoint(args.preset, hub)
    size = sum(path.stat().st_size for path in hub.rglob("*.safetensors"))
    print(f"checkpoint: {size / 1e9:.2f} GB of bfloat16", flush=True)
    _, idle = watch([sys.executable, "-c", IDLE])
    seconds, peak = watch(
        [
            sys.executable, "-m", "storm_jax.weights", "import",
            f"--vision={hub}/vision", f"--decoder={hub}/decoder",
            f"--config=configs/{args.preset}.py:stage=align", f"--out={run}",
        ]
    )  # fmt: skip
    shutil.rmtree(hub)
    sizes = [
        leaf.size * leaf.dtype.itemsize / 1e9 for leaf in Run(run).checkpoints.shapes(0).values()
    ]
    placed, largest = sum(sizes), max(sizes)
    verify_seconds, read_seconds = time_reading(run)
    export_seconds, export_peak = watch(
        [
            sys.executable, "-m", "storm_jax.weights", "export",
            f"--workdir={run}", f"--out={args.out}/exported",
        ]
    )  # fmt: skip
    result = {
        "preset": args.preset,
        "placed_gb": round(placed, 2),
        "largest_parameter_gb": round(largest, 2),
        "idle_anonymous_gb": round(idle["RssAnon"], 2),
        "import_seconds": round(seconds),
        "import_peak_anonymous_gb": round(peak["RssAnon"], 2),
        "import_peak_resident_gb": round(peak["VmRSS"], 2),
        "import_bound_gb": round(placed + BOUND * largest, 2),
        "verify_seconds": round(verify_seconds, 1),
        "read_seconds": round(read_seconds, 1),
        "export_seconds": round(export_seconds),
        "export_peak_anonymous_gb": round(export_peak["RssAnon"], 2),
        "export_peak_resident_gb": round(export_peak["VmRSS"], 2),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
    }
    shutil.rmtree(run)
    shutil.rmtree(args.out / "exported")
    (args.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
