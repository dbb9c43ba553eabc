"""Training throughput for clips of 32 and 128 frames by compression, next to the same step in torch.

    python -m benchmarks.training --out=runs/training                           storm_small, on 2 CPU cores
    python -m benchmarks.training --preset=storm_qwen2_7b --out=runs/training   on an accelerator

A row holds one video and 64 tokens of text, half of which are answers; everything is trained. torch runs the tower and
decoder of transformers with the same weights and SDPA, merges patches, projects them with a linear layer, averages
groups of frames and updates with AdamW: our step without the Mamba layers. float32 on CPU, bfloat16 products on GPU.
Both compute layers again in the backward pass, as train.py does by default; `--no-remat` stores all activations.

FLOPs are those that the model needs, by formula. MFU is their part of the peak, where that is known. Memory is that of our
compiled step, and the most that torch held on a GPU. Each round runs
every step once, after one round that is not counted. Prints medians, and writes OUT/training.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
import transformers

from benchmarks.machine import machine
from benchmarks.memory import program_bytes, reset_torch_bytes, torch_bytes
from benchmarks.models import COMPRESSIONS, PRESETS, TEXT, parse_compressions, parse_numbers
from benchmarks.timing import Call, seconds_by_round
from benchmarks.torch_models import feature_tower, features, torch_decoder
from storm_jax.chips import chip_of
from storm_jax.compression import Grid, plan_clip
from storm_jax.config import (
    CompressionConfig,
    DataConfig,
    LearningRateConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RowConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from storm_jax.data.rows import RowSample, RowShape, empty_rows, fill_row
from storm_jax.files import write_atomically
from storm_jax.flops import train_work
from storm_jax.sharding import local_rows, make_mesh
from storm_jax.text.conversation import Encoded
from storm_jax.train.state import StateSpec
from storm_jax.train.step import make_train_step, place


class Row:
    """A batch of one row with a random video, and what both programs need to know of it.

    Attributes:
      arrays: as in `storm_jax.data.rows`.
    """

    def __init__(self, model: ModelConfig, frames: int, compression: CompressionConfig):
        rng, grid, size = np.random.default_rng(0), Grid.of(model), model.vision.image_size
        visual = plan_clip(frames, grid, compression).num_tokens
        self.shape = RowShape(
            tokens=visual + TEXT,
            frames=frames,
            image_size=size,
            grid=grid,
            compressions=(compression,),
        )
        media = np.where(np.arange(self.shape.tokens) < visual, 0, -1)
        tokens = rng.integers(0, model.decoder.vocab_size, self.shape.tokens).astype(np.int32)
        answer = np.arange(self.shape.tokens) >= visual + TEXT // 2
        clip = rng.integers(0, 256, (frames, size, size, 3)).astype(np.uint8)
        self.arrays = empty_rows(1, 0, self.shape)
        row = {name: array[0] for name, array in self.arrays.items()}
        fill_row(row, [RowSample(Encoded(tokens, answer, media), [clip], compression)], self.shape)


def run_config(model: ModelConfig, row: Row, remat: bool) -> RunConfig:
    return RunConfig(
        model=model,
        compression=row.shape.compressions[0],
        data=DataConfig(
            train=(SourceConfig(name="random", path=""),),
            rows=(RowConfig(tokens=row.shape.tokens, frames=row.shape.frames),),
        ),
        optim=OptimConfig(
            learning_rate=LearningRateConfig(vision=1e-5, projector=1e-5, decoder=1e-5)
        ),
        train=TrainConfig(steps=1000, batch_size=1, remat=remat),
        mesh=MeshConfig(data=1),
    )


def our_step(config: RunConfig, row: Row) -> tuple[Call, dict[str, Any], int]:
    """A step of train.py, the parameters that it starts from, and the bytes that it needs."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    spec = StateSpec.make(config, mesh)
    state = spec.init()
    params = jax.device_get(state.params())
    with jax.set_mesh(mesh):
        batch = place(row.arrays, mesh, local_rows(mesh, 1))
        jitted: Any = make_train_step(spec, row.shape)
        step = jitted.lower(state, batch).compile()

    def call() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))

    return call, params, program_bytes(step)


class TorchModel(torch.nn.Module):
    """Tower, linear stem, pooling over time, decoder."""

    def __init__(self, model: ModelConfig, params: dict[str, Any], row: Row, remat: bool):
        super().__init__()
        tower: Any = feature_tower(model.vision, params)
        decoder: Any = torch_decoder(model.decoder, params)
        merged = model.vision.width * model.stem.downsample**2
        self.stem = torch.nn.Linear(merged, model.decoder.width)
        self._side, self._merge = model.vision.side, model.stem.downsample
        self._pool, self._frames = row.shape.compressions[0].temporal_pool, row.shape.frames
        self.tower, self.decoder = tower, decoder
        if remat:
            tower.gradient_checkpointing_enable()
            decoder.gradient_checkpointing_enable()

    def forward(self, frames: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor) -> Any:
        """frames uint8 [F, H, W, 3]; tokens [1, S] whose first ones are visual; labels [1, S]."""
        x = features(self.tower, frames, torch.float32)  # [F, P, Dv]
        side, merge = self._side // self._merge, self._merge
        x = x[:, : self._side**2].reshape(self._frames, side, merge, side, merge, -1)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(self._frames, side * side, -1)
        x = self.stem(x)  # [F, N, D]
        x = x.reshape(-1, self._pool, *x.shape[1:]).mean(1).reshape(1, -1, x.shape[-1])
        text = self.decoder.get_input_embeddings()(tokens[:, x.shape[1] :])
        return self.decoder(inputs_embeds=torch.cat([x, text], dim=1), labels=labels).loss


def torch_step(model: TorchModel, row: Row) -> Call:
    """A training step in torch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    frames = torch.from_numpy(row.arrays["frames"][0]).to(device)
    tokens = torch.from_numpy(row.arrays["tokens"]).long().to(device)
    weights = torch.from_numpy(row.arrays["loss_weights"]).to(device)
    targets = torch.from_numpy(row.arrays["targets"]).long().to(device)
    # transformers shifts labels by one itself.
    labels = torch.full_like(tokens, -100)
    labels[:, 1:] = torch.where(weights > 0, targets, -100)[:, :-1]

    def call() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(frames, tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def measure(
    model: ModelConfig, frames: int, name: str, rounds: int, remat: bool, with_torch: bool
) -> dict[str, Any]:
    """One row of the table."""
    row = Row(model, frames, COMPRESSIONS[name])
    config = run_config(model, row, remat)
    step, params, size = our_step(config, row)
    calls = {"storm": step}
    reset_torch_bytes()
    if with_torch:
        calls["torch"] = torch_step(TorchModel(model, params, row, remat), row)
    times = seconds_by_round(calls, rounds)
    flops = sum(part.model for part in train_work(config, row.shape).values())
    return {
        "frames": frames,
        "compression": name,
        "tokens": row.shape.tokens,
        "flops": flops,
        "seconds": times,
        "bytes": {"storm": size, "torch": torch_bytes() if with_torch else None},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    chip = chip_of(jax.devices()[0])
    lines = [
        "frames        tokens   seconds   tokens/s    TFLOP/s     MFU      GB"
        "   torch: seconds   ratio      GB"
    ]
    for row in rows:
        seconds = {whose: statistics.median(times) for whose, times in row["seconds"].items()}
        ours = seconds["storm"]
        speed = row["flops"] / ours
        mfu = f"{speed / chip.flops:.1%}" if chip and chip.flops else "-"
        line = (
            f"{row['frames']:>6} {row['compression']:>4} {row['tokens']:>8,} {ours:>9.2f} "
            f"{row['tokens'] / ours:>10,.0f} {speed / 1e12:>10.3f} {mfu:>7} {row['bytes']['storm'] / 1e9:>7.2f}"
        )
        if "torch" in seconds:
            line += f" {seconds['torch']:>16.2f} {ours / seconds['torch']:>7.2f}"
            theirs = row["bytes"]["torch"]
            line += f" {theirs / 1e9:>7.2f}" if theirs else f" {'-':>7}"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="storm_small")
    parser.add_argument("--frames", type=parse_numbers, default=(32, 128), help="32,128")
    parser.add_argument("--compress", type=parse_compressions, default=("1x", "4x"), help="1x,4x")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-remat", action="store_true", help="store all activations")
    parser.add_argument("--no-torch", action="store_true", help="only our step")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for frames in args.frames:
        for name in args.compress:
            print(f"{frames} frames, {name}", flush=True)
            model = PRESETS[args.preset]
            rows.append(
                measure(model, frames, name, args.rounds, not args.no_remat, not args.no_torch)
            )
            results = {
                "preset": args.preset,
                "machine": machine(),
                "remat": not args.no_remat,
                "rows": rows,
            }
            write_atomically(args.out / "training.json", json.dumps(results, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
