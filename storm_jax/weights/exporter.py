"""Exports a run to three folders of safetensors, or to one folder that PyTorch runs.

    OUT/vision     a SiglipVisionModel of transformers, with its preprocessor
    OUT/decoder    a Qwen2, Qwen3 or Llama of transformers, with tokenizer and generation config
    OUT/projector  our own format (docs/weights.md)

or

    OUT            the whole model, with its code (`storm_jax.weights.one_folder`)

LoRA adapters are merged. At most one parameter and one shard are in memory.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from storm_jax.models.lora import is_adapter, merge
from storm_jax.run import Run
from storm_jax.text.tokenizer import read_tokenizer, save_tokenizer, stop_ids
from storm_jax.weights import WeightsError, mapping, one_folder
from storm_jax.weights.architecture import (
    decoder_json,
    preprocessor_json,
    projector_json,
    vision_json,
)
from storm_jax.weights.mapping import VOCABULARY, TensorRule, coverage_problems, tables
from storm_jax.weights.output import atomic_folder, check_output
from storm_jax.weights.tensors import ShardWriter, file_name

FORMATS = ("folders", "hf")


def export_run(
    run: Run,
    out: pathlib.Path,
    *,
    step: int | None = None,
    dtype: str = "",
    form: str = "folders",
) -> None:
    """Writes the three folders, or the one.

    Args:
      step: step of the checkpoint; defaults to the latest one.
      dtype: dtype of all tensors; defaults to the run's `model.dtype`.
      form: one of `FORMATS`.

    Raises:
      RunError, WeightsError: if the run is incomplete or cannot be exported; `out` is not created.
    """
    out = check_output(out)
    model, step = run.config.model, run.checkpoints.resolve(step)
    dtype = dtype or model.dtype
    stored = run.checkpoints.shapes(step)
    parts = {name: table.rules for name, table in tables(model, stored).items()}
    problems = coverage_problems([rule for rules in parts.values() for rule in rules], stored)
    if problems:
        raise WeightsError(f"checkpoint {step} of {run.path} is incomplete:", problems)
    write = _write_one_folder if form == "hf" else _write_folders
    with atomic_folder(out) as partial:
        for name, count, size in write(run, step, dtype, partial, parts, stored):
            print(f"{out / name}: {count} tensors, {size / 1e9:.2f} GB ({dtype})", flush=True)


Parts = Mapping[str, tuple[TensorRule, ...]]
Written = Iterator[tuple[str, int, int]]  # folder, tensors, bytes


def _write_folders(
    run: Run, step: int, dtype: str, out: pathlib.Path, parts: Parts, stored: Mapping[str, Any]
) -> Written:
    configs = _configs(run, dtype)
    for part, rules in parts.items():
        folder = out / part
        folder.mkdir()
        for name, content in configs[part].items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        if part == "decoder":  # the run's own generation config, if any, replaces ours
            source = run.tokenizer_path
            save_tokenizer(read_tokenizer(source), source, folder)
        writer = ShardWriter(folder)
        for rule, value in _tensors(run, step, rules, stored, dtype):
            writer.add(rule.tensor, value)
        writer.close()
        yield part, len(rules), _size(folder)


def _write_one_folder(
    run: Run, step: int, dtype: str, out: pathlib.Path, parts: Parts, stored: Mapping[str, Any]
) -> Written:
    rows = one_folder.write_files(run, step, dtype, out, _token_ids(run))
    prefixes = mapping.one_folder(run.config.model)
    writer = ShardWriter(out)
    for part, rules in parts.items():
        for rule, value in _tensors(run, step, rules, stored, dtype):
            if rule.path in VOCABULARY and rows > len(value):
                value = one_folder.add_rows(value, rows)
            writer.add(file_name(rule.tensor, prefixes[part]), value)
    writer.close()
    yield "", sum(map(len, parts.values())), _size(out)


def _size(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _token_ids(run: Run) -> dict[str, Any]:
    tokenizer = run.tokenizer()
    stops = list(stop_ids(run.tokenizer_path, tokenizer))
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _configs(run: Run, dtype: str) -> dict[str, dict[str, Any]]:
    """The JSON files of each folder."""
    model, ids = run.config.model, _token_ids(run)
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
    run: Run, step: int, rules: tuple[TensorRule, ...], stored: Mapping[str, Any], dtype: str
) -> Iterator[tuple[TensorRule, np.ndarray]]:
    """Yields every tensor, reading one parameter at a time."""
    by_path: dict[str, list[TensorRule]] = {}
    for rule in rules:
        by_path.setdefault(rule.path, []).append(rule)
    # Overflow is detected in the cast from float32 to float16.
    wide = jnp.dtype("float32" if dtype == "float16" else dtype)
    for path, members in by_path.items():
        adapters = [name for name in stored if is_adapter(name) and _kernel_of(name) == path]
        value = run.checkpoints.read(step, path, None if adapters else wide)
        if adapters:
            value = _merged(run, step, path, value, adapters, wide)
        for rule in members:
            tensor = rule.to_tensor(value)
            with np.errstate(over="ignore"):
                cast = tensor.astype(jnp.dtype(dtype))
            if wide != cast.dtype and np.isinf(cast).sum() > np.isinf(tensor).sum():
                raise WeightsError(
                    f"{rule.tensor} has values beyond the range of float16: use --dtype=bfloat16"
                )
            yield rule, cast


def _kernel_of(adapter: str) -> str:
    return adapter.rpartition("/lora/")[0] + "/kernel"


def _merged(
    run: Run, step: int, path: str, kernel: np.ndarray, adapters: list[str], dtype: np.dtype
) -> np.ndarray:
    """The kernel with its adapter merged: summed in float32 and rounded once.

    Layer by layer, since a whole stack in float32 might not fit into host memory.
    """
    stacks = {name: run.checkpoints.read(step, name) for name in adapters}
    lora = run.config.model.decoder.lora
    merged = np.empty(kernel.shape, dtype)
    for i in range(len(kernel)):
        layer = {name: jnp.asarray(value[i : i + 1]) for name, value in stacks.items()}
        layer[path] = jnp.asarray(kernel[i : i + 1], jnp.float32)
        merged[i] = jax.device_get(merge(layer, lora)[path])[0]
    return merged
