"""A run to three folders of safetensors.

    OUT/vision     a SiglipVisionModel of transformers, with its preprocessor
    OUT/decoder    a Qwen2, Qwen3 or Llama of transformers, with tokenizer and generation config
    OUT/projector  ours (docs/weights.md has its names)

Adapters are merged. One parameter is in memory at a time, beside one shard that is being filled.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.config import ModelConfig
from storm_jax.models.lora import is_adapter, merge
from storm_jax.run import Run
from storm_jax.text.tokenizer import read_tokenizer, save_tokenizer, stop_ids
from storm_jax.weights import WeightsError
from storm_jax.weights.architecture import (
    decoder_json,
    preprocessor_json,
    projector_json,
    vision_json,
)
from storm_jax.weights.mapping import Row, coverage_problems, tables
from storm_jax.weights.output import free_folder, written_whole
from storm_jax.weights.tensors import ShardWriter


def export_run(run: Run, out: pathlib.Path, *, step: int | None = None, dtype: str = "") -> None:
    """Writes the three folders.

    Args:
      step: of the checkpoint; the last one by default.
      dtype: of every tensor; the run's `model.dtype` by default.

    Raises:
      RunError, WeightsError: when the run is not whole; `out` is not touched.
    """
    out = free_folder(out)
    model, step = run.config.model, run.checkpoint_step(step)
    dtype = dtype or model.dtype
    stored = run.stored_params(step)
    parts = {name: table.rows for name, table in tables(model, stored).items()}
    problems = coverage_problems([row for rows in parts.values() for row in rows], stored)
    if problems:
        raise WeightsError(f"checkpoint {step} of {run.path} is not whole:", problems)
    configs = _configs(run, dtype)
    with written_whole(out) as partial:
        for part, rows in parts.items():
            folder = partial / part
            folder.mkdir()
            for name, content in configs[part].items():
                (folder / name).write_text(json.dumps(content, indent=2) + "\n")
            if part == "decoder":  # over our generation config, if the weights came with one
                source = run.tokenizer_path
                save_tokenizer(read_tokenizer(source), source, folder)
            writer = ShardWriter(folder)
            for row, value in _tensors(run, step, rows, stored, dtype):
                writer.add(row.tensor, value)
            writer.close()
            size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
            print(f"{out / part}: {len(rows)} tensors, {size / 1e9:.2f} GB ({dtype})", flush=True)


def _configs(run: Run, dtype: str) -> dict[str, dict[str, Any]]:
    """The JSON files of each folder. A generation_config.json that came with the weights is kept."""
    model: ModelConfig = run.config.model
    tokenizer = run.tokenizer()
    stops = list(stop_ids(run.tokenizer_path, tokenizer))
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {
        "vision": {
            "config.json": vision_json(model.vision, dtype),
            "preprocessor_config.json": preprocessor_json(model.vision),
        },
        "decoder": {
            "config.json": decoder_json(model.decoder, dtype, **ids),
            "generation_config.json": ids,
        },
        "projector": {"config.json": projector_json(model)},
    }


def _tensors(
    run: Run, step: int, rows: tuple[Row, ...], stored: Mapping[str, Any], dtype: str
) -> Iterator[tuple[Row, np.ndarray]]:
    """Every tensor, parameter by parameter."""
    by_path: dict[str, list[Row]] = {}
    for row in rows:
        by_path.setdefault(row.path, []).append(row)
    # What overflows float16 is seen on the way from float32.
    wide = jnp.dtype("float32" if dtype == "float16" else dtype)
    for path, members in by_path.items():
        adapters = [name for name in stored if is_adapter(name) and _kernel_of(name) == path]
        value = run.read_param(step, path, None if adapters else wide)
        if adapters:
            value = _merged(run, step, path, value, adapters, wide)
        for row in members:
            tensor = row.to_theirs(value)
            with np.errstate(over="ignore"):
                cast = tensor.astype(jnp.dtype(dtype))
            if wide != cast.dtype and np.isinf(cast).sum() > np.isinf(tensor).sum():
                raise WeightsError(f"{row.tensor} has values beyond float16; use --dtype=bfloat16")
            yield row, cast


def _kernel_of(adapter: str) -> str:
    return adapter.rpartition("/lora/")[0] + "/kernel"


def _merged(
    run: Run, step: int, path: str, kernel: np.ndarray, adapters: list[str], dtype: np.dtype
) -> np.ndarray:
    """The kernel with its adapter, summed in fp32 and rounded once, one layer after
    another: a stack in fp32 could fill the host."""
    others = {name: run.read_param(step, name) for name in adapters}
    lora = run.config.model.decoder.lora
    merged = np.empty(kernel.shape, dtype)
    for i in range(len(kernel)):
        layer = {name: jnp.asarray(value[i : i + 1]) for name, value in others.items()}
        layer[path] = jnp.asarray(kernel[i : i + 1], jnp.float32)
        merged[i] = jax.device_get(merge(layer, lora)[path])[0]
    return merged
