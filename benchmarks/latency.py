"""Latency of the first token by part and compression, as in table 13 of the paper, next to transformers.

    python -m benchmarks.latency --out=runs/latency                             storm_small: under 10 minutes on 2 cores
    python -m benchmarks.latency --preset=storm_qwen2_7b --out=runs/latency     on an accelerator

Random weights; one video per prompt, with 64 tokens of text. `storm_small` divides its FLOPs between vision tower,
projector and decoder like the 7B model, within 10 % at 128 frames. Compression 4x averages 4 frames; 8x also drops
every second group. A token is the mean of 32 after the first one.

transformers runs the same tower and decoder with the same weights, SDPA and the same number of tokens, in float32 on
CPU and bfloat16 on GPU, with as many layers as ours. It has no temporal projector, so its total is that of a model which
does not compress. With `--torch-compile`, tower and prefill also run compiled by torch, and ratios are to the faster of
the two.

Each round runs every program once, so that all see the same load, after one round that is not counted.

Writes OUT/latency.json and OUT/latency.png after each number of frames, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from flax.traverse_util import unflatten_dict

from benchmarks.machine import machine
from benchmarks.memory import program_bytes, reset_torch_bytes, torch_bytes
from benchmarks.models import (
    COMPRESSIONS,
    PRESETS,
    TEXT,
    parse_compressions,
    parse_numbers,
    random_params,
)
from benchmarks.timing import Call, seconds_by_round
from benchmarks.torch_models import feature_tower, features, torch_decoder
from storm_jax.compression import Grid, VisualShape, plan_clip
from storm_jax.config import CompressionConfig, MeshConfig, ModelConfig
from storm_jax.data.rows import UsedSlots, empty_frames, place_clips
from storm_jax.files import write_atomically
from storm_jax.inference.engine import Engine, EngineShape, Request
from storm_jax.inference.generate import Sampling
from storm_jax.inference.programs import Programs
from storm_jax.models.storm import Storm
from storm_jax.params import abstract_model
from storm_jax.sharding import make_mesh

NEW = 32  # tokens after the first one

Key = tuple[str, str, str]  # whose ("storm" or "torch"), part, compression ("" = independent of it)


class Prompt:
    """A prompt about one random video, and the visual table it refers to.

    Attributes:
      frames: `frames`, `frame_clip` and `frame_group` of a row, with a batch axis.
      tokens: length of the prompt.
      index: the `visual_index` of its tokens.
    """

    def __init__(self, model: ModelConfig, frames: int, compression: CompressionConfig):
        grid, size = Grid.of(model), model.vision.image_size
        groups = plan_clip(frames, grid, compression).num_groups
        row = {name: array[0] for name, array in empty_frames(1, frames, size).items()}
        rng = np.random.default_rng(0)
        clip = rng.integers(0, 256, (frames, size, size, 3)).astype(np.uint8)
        self.shape = VisualShape(groups, (compression.spatial_pool,))
        (entries,) = place_clips(row, [clip], self.shape, grid, compression, UsedSlots())
        self.frames = {name: jnp.asarray(array[None]) for name, array in row.items()}
        self.tokens = len(entries) + TEXT
        self.index = np.concatenate([entries, np.full(TEXT, -1)]).astype(np.int32)

    def request(self, table: jax.Array, new: int) -> Request:
        """Asks for `new` tokens."""
        tokens = np.ones(self.tokens, np.int32)
        sampling = Sampling(max_new_tokens=new)
        return Request(tokens=tokens, visual_index=self.index, table=table, sampling=sampling)


class OurPrograms:
    """The parts of our model."""

    def __init__(self, config: ModelConfig, params: dict[str, jax.Array]):
        self._graphdef, _ = abstract_model(config)
        self._params = unflatten_dict(params, sep="/")
        never = (config.decoder.vocab_size,)  # a token that is never generated
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
        self._decoder = Programs(self._graphdef, params, mesh, stop_ids=never)

    def calls(self, prompts: dict[str, Prompt]) -> tuple[dict[Key, Call], int]:
        """The parts of a latency by compression, and the bytes of the largest program."""
        (first, *_) = prompts.values()
        before = set(self._decoder.compiled)

        def vision(model: Storm, frames: jax.Array) -> jax.Array:
            with jax.named_scope("vision"):
                return model.vision.encode_clips(frames)

        frames = first.frames["frames"]
        encode = self._compile(vision, frames)
        see = self._call(encode, frames)
        patches = see()
        found: dict[Key, Call] = {("storm", "vision", ""): see}
        programs = [encode]
        for name, prompt in prompts.items():

            def project(
                model: Storm, patches: jax.Array, frames: dict, prompt: Prompt = prompt
            ) -> jax.Array:
                return model.compress(
                    patches, frames["frame_clip"], frames["frame_group"], prompt.shape
                )

            pool = self._compile(project, patches, prompt.frames)
            programs.append(pool)
            compress = self._call(pool, patches, prompt.frames)
            table = compress()
            found["storm", "projector", name] = compress
            found["storm", "prefill", name] = self._answer(prompt, table, 1)
            found["storm", "answer", name] = self._answer(prompt, table, 1 + NEW)
            found["storm", "answer", name]()  # compiles
        programs += set(self._decoder.compiled) - before
        return found, max(map(program_bytes, programs))

    def _answer(self, prompt: Prompt, table: jax.Array, new: int) -> Call:
        shape = EngineShape.for_batch(1, prompt.tokens, 1 + NEW, devices=1)

        def answer() -> None:
            engine = Engine(self._decoder, shape, pad_id=0, steps=NEW)
            for _ in engine.run([prompt.request(table, new)]):
                pass

        return answer

    def _compile(self, function: Callable[..., Any], *inputs: Any) -> jax.stages.Compiled:
        """The function of a model and inputs, for inputs like these."""

        def run(params: dict, *inputs: Any) -> Any:
            return function(nnx.merge(self._graphdef, params), *inputs)

        return jax.jit(run).lower(self._params, *inputs).compile()

    def _call(self, compiled: jax.stages.Compiled, *inputs: Any) -> Call:
        return lambda: jax.block_until_ready(compiled(self._params, *inputs))


class TorchPrograms:
    """The tower and the decoder of transformers, also compiled by torch if that is asked for and works."""

    def __init__(self, config: ModelConfig, params: dict[str, Any], compiles: bool):
        device, dtype = (
            ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        )
        self._tower = feature_tower(config.vision, params).to(device, dtype)
        self._decoder: Any = torch_decoder(config.decoder, params).to(device, dtype)
        self._device, self._dtype = device, dtype
        models = (self._tower, self._decoder)
        self._compiled = [torch.compile(model) for model in models] if compiles else []

    def calls(self, prompts: dict[str, Prompt]) -> dict[Key, Call]:
        (first, *_) = prompts.values()
        frames = torch.from_numpy(np.array(first.frames["frames"][0])).to(self._device)
        found: dict[Key, Call] = {("torch", "vision", ""): self._vision(self._tower, frames)}
        width = self._decoder.config.hidden_size
        inputs = {
            name: torch.randn(1, prompt.tokens, width, device=self._device, dtype=self._dtype)
            for name, prompt in prompts.items()
        }
        for name, x in inputs.items():
            found["torch", "prefill", name] = self._answer(self._decoder, x, 1)
            found["torch", "answer", name] = self._answer(self._decoder, x, 1 + NEW)
        if self._compiled:
            tower, decoder = self._compiled
            compiled = {("compiled", "vision", ""): self._vision(tower, frames)} | {
                ("compiled", "prefill", name): self._answer(decoder, x, 1)
                for name, x in inputs.items()
            }
            try:
                for call in compiled.values():
                    call()
            except Exception as error:  # no C++ compiler, or a graph that it does not take
                (reason, *_) = str(error).strip().splitlines() or [""]
                print(f"without torch.compile: {type(error).__name__}: {reason}", flush=True)
                self._compiled = []
            else:
                found |= compiled
        return found

    def _vision(self, tower: Any, frames: Any) -> Call:
        return self._timed(lambda: features(tower, frames, self._dtype))

    def _answer(self, decoder: Any, x: Any, count: int) -> Call:
        """Greedy tokens with a key-value cache."""

        def answer() -> None:
            out = decoder(inputs_embeds=x, use_cache=True, logits_to_keep=1)
            for _ in range(count - 1):
                token = out.logits[:, -1:].argmax(-1)
                out = decoder(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            out.logits[:, -1:].argmax(-1)

        return self._timed(answer)

    def _timed(self, function: Call) -> Call:
        def call() -> None:
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of renamed arguments
                function()
            if self._device == "cuda":
                torch.cuda.synchronize()

        return call


def cells(
    times: dict[Key, list[float]], prompts: dict[str, Prompt], frames: int
) -> list[dict[str, Any]]:
    """One row of the table for each compression."""
    middle = {key: statistics.median(values) for key, values in times.items()}
    spread = {key: (max(values) - min(values)) / middle[key] for key, values in times.items()}
    rows = []
    for name, prompt in prompts.items():
        row: dict[str, Any] = {"frames": frames, "compression": name, "tokens": prompt.tokens}
        for whose in dict.fromkeys(key[0] for key in times):
            keys = ((whose, "vision", ""), (whose, "projector", name), (whose, "prefill", name))
            parts = {key[1]: middle[key] for key in keys if key in middle}
            row[whose] = {
                **parts,
                "total": sum(parts.values()),
                "spread": max(
                    value
                    for key, value in spread.items()
                    if key[0] == whose and key[2] in ("", name)
                ),
            }
            if (whose, "answer", name) in middle:
                token = (middle[whose, "answer", name] - parts["prefill"]) / NEW
                row[whose]["token"] = token
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds of each part; ratios of the total to 1x, and of every part to transformers', eager or compiled,
    whichever is faster; memory of our largest program, and the most that torch held, for a number of frames."""
    lines = [
        "frames        tokens    vision  projector   prefill     total   of 1x     token"
        "     GB   torch: vision  prefill   token      GB   spread"
    ]
    totals = {row["frames"]: row["storm"]["total"] for row in rows if row["compression"] == "1x"}
    for row in rows:
        ours, theirs = row["storm"], [row[each] for each in ("torch", "compiled") if each in row]
        parts = "".join(
            f"{1e3 * ours[part]:>10,.1f}" for part in ("vision", "projector", "prefill", "total")
        )
        of_1x = ours["total"] / totals[row["frames"]] if row["frames"] in totals else float("nan")
        line = f"{row['frames']:>6} {row['compression']:>4} {row['tokens']:>8,}{parts}{of_1x:>8.2f}{1e3 * ours['token']:>10.2f}{row['bytes']['storm'] / 1e9:>7.2f}"
        if theirs:
            ratios = [
                ours[part] / min(each[part] for each in theirs if part in each)
                for part in ("vision", "prefill", "token")
            ]
            line += "        " + "".join(f"{ratio:>8.2f}" for ratio in ratios)
            size = row["bytes"]["torch"]
            line += f"{size / 1e9:>8.2f}" if size else f"{'-':>8}"
        lines.append(f"{line}{100 * ours['spread']:>7.0f} %")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """The parts of each latency as a bar, for every number of frames and compression."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axis = figure.subplots()
    labels = [f"{row['frames']}\n{row['compression']}" for row in rows]
    below = np.zeros(len(rows))
    for part in ("vision", "projector", "prefill"):
        seconds = np.array([row["storm"][part] for row in rows])
        axis.bar(labels, seconds, bottom=below, label=part)
        below += seconds
    for number, row in enumerate(rows):
        if row["compression"] == "1x" and "torch" in row:
            label = "transformers, no compression" if not number else None
            axis.plot([number - 0.4, number + 0.4], [row["torch"]["total"]] * 2, "k--", label=label)
    axis.set(ylabel="seconds to the first token", xlabel="frames, compression", yscale="linear")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="storm_small")
    parser.add_argument(
        "--frames", type=parse_numbers, default=(4, 8, 16, 32, 64, 128), help="4,8,16"
    )
    parser.add_argument(
        "--compress", type=parse_compressions, default=tuple(COMPRESSIONS), help="1x,4x,8x"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-torch", action="store_true", help="only our model")
    parser.add_argument(
        "--torch-compile",
        action="store_true",
        help="also torch.compile of tower and prefill; minutes on a CPU",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    config = PRESETS[args.preset]
    params = random_params(config)
    ours = OurPrograms(config, params)
    theirs = (
        None if args.no_torch else TorchPrograms(config, jax.device_get(params), args.torch_compile)
    )
    rows: list[dict[str, Any]] = []
    for frames in args.frames:
        print(f"{frames} frames", flush=True)
        prompts = {
            name: Prompt(config, frames, COMPRESSIONS[name])
            for name in args.compress
            if frames >= COMPRESSIONS[name].temporal_pool * COMPRESSIONS[name].temporal_sample
        }
        reset_torch_bytes()
        calls, size = ours.calls(prompts)
        calls |= theirs.calls(prompts) if theirs else {}
        found = cells(seconds_by_round(calls, args.rounds), prompts, frames)
        memory = {"storm": size, "torch": torch_bytes() if theirs else None}
        rows += [row | {"bytes": memory} for row in found]
        results = {
            "preset": args.preset,
            "machine": machine(),
            "rounds": args.rounds,
            "rows": rows,
        }
        write_atomically(args.out / "latency.json", json.dumps(results, indent=1) + "\n")
        plot(rows, args.out / "latency.png")
    print(table(rows))


if __name__ == "__main__":
    main()
