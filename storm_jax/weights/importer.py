"""Public weights to a run at step 0, which training starts from and `predict.py` can ask.

Everything is checked on the files' headers before a value is read. Then one parameter after another
is read into place, the largest first, and the run appears under its name when it is whole.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from storm_jax.config import DecoderConfig, RunConfig, VisionConfig, replace_model
from storm_jax.params import abstract_model, flatten, random_params, unflatten
from storm_jax.run import Run
from storm_jax.sharding import make_mesh, param_shardings
from storm_jax.text.bpe import CHATML
from storm_jax.text.conversation import ConversationEncoder
from storm_jax.text.tokenizer import check_template, read_tokenizer, save_tokenizer, stop_ids
from storm_jax.weights import WeightsError
from storm_jax.weights.architecture import read_decoder, read_projector, read_vision
from storm_jax.weights.hub import local_folder
from storm_jax.weights.mapping import Row, Table, coverage_problems, decoder_table, tables
from storm_jax.weights.output import free_folder, written_whole
from storm_jax.weights.positions import resample
from storm_jax.weights.tensors import (
    DTYPES,
    Match,
    Tensor,
    list_tensors,
    match,
    summary,
)

_POSITION = "vision/position"
_ALIGNMENT = 64  # bytes; the CPU device takes such arrays over without a copy


@dataclasses.dataclass(frozen=True)
class Sources:
    """Folders or hub ids; without a projector's, the projector starts at random."""

    vision: str
    decoder: str
    projector: str = ""

    def folders(self) -> dict[str, pathlib.Path]:
        named = {name: spec for name, spec in dataclasses.asdict(self).items() if spec}
        return {name: local_folder(spec) for name, spec in named.items()}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What fills each parameter: (row, tensor) pairs."""

    pieces: Mapping[str, Sequence[tuple[Row, Tensor]]]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    shardings: Mapping[str, NamedSharding]

    def dtype(self, path: str) -> np.dtype:
        """The files' own; fp32 where they differ within a stack."""
        dtypes = {DTYPES[tensor.dtype] for _, tensor in self.pieces[path]}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def nbytes(self, path: str) -> int:
        return self.shapes[path].size * self.dtype(path).itemsize


def import_run(
    config: RunConfig, sources: Sources, out: pathlib.Path, explicit: Collection[str] = ()
) -> RunConfig:
    """Writes a run at step 0 with imported weights, and returns its configuration.

    The tower's and the decoder's fields come from their config.json. `model.vision.image_size`
    stays: position embeddings are resampled to it.

    Args:
      explicit: dotted names of the fields of `config` that were set by hand.

    Raises:
      WeightsError, ConfigError: when anything does not fit; `out` is not touched.
    """
    began = time.monotonic()
    out = free_folder(out)
    folders = sources.folders()
    vision = read_vision(folders["vision"], config.model.vision.feature_layer)
    config = _with_architecture(config, vision, folders, explicit)
    mesh = make_mesh(config.mesh)
    with tempfile.TemporaryDirectory() as staged:
        tokenizer = pathlib.Path(staged)
        _write_tokenizer(folders["decoder"], tokenizer, config)
        plan = _make_plan(config, mesh, folders, vision.side)
        _check_space(out.parent, sum(plan.nbytes(path) for path in plan.pieces))
        params = _read(plan)
        fresh = {n: s for n, s in plan.shardings.items() if n not in plan.pieces}
        with jax.set_mesh(mesh):
            params |= random_params(config.model, config.train.seed, fresh)
        with written_whole(out) as partial:
            run = Run(partial)
            run.prepare(config, tokenizer)
            run.save_params(unflatten(params), {"imported": dataclasses.asdict(sources)})
    size = sum(leaf.nbytes for leaf in params.values())
    count = sum(leaf.size for leaf in params.values())
    print(
        f"{out}: {count:,} parameters, {size / 1e9:.1f} GB, in {time.monotonic() - began:.0f} s. "
        f"Train with --config.init_from={out}"
    )
    return config


def _with_architecture(
    config: RunConfig,
    vision: VisionConfig,
    folders: Mapping[str, pathlib.Path],
    explicit: Collection[str],
) -> RunConfig:
    here = config.model
    decoder, notes = read_decoder(folders["decoder"])
    if decoder.tie_embeddings and _has_own_head(folders["decoder"], decoder):
        notes.append("tie_word_embeddings is set, but lm_head.weight differs: it is kept")
        decoder = dataclasses.replace(decoder, tie_embeddings=False)
    model = dataclasses.replace(
        here,
        vision=dataclasses.replace(vision, image_size=here.vision.image_size),
        decoder=dataclasses.replace(decoder, lora=here.decoder.lora),
    )
    if "projector" in folders:
        model = read_projector(folders["projector"], model)
    for note in notes:
        print(f"note: {note}")
    whole, changes = replace_model(config, model, explicit, ", ".join(map(str, folders.values())))
    for name, (before, now) in changes.items():
        print(f"{name}={now!r} of config.json replaces {before!r}")
    if vision.side != model.vision.side:
        print(
            f"position embeddings are resampled from {vision.side} x {vision.side} to "
            f"{model.vision.side} x {model.vision.side} patches (model.vision.image_size="
            f"{model.vision.image_size})"
        )
    return whole


def _has_own_head(folder: pathlib.Path, decoder: DecoderConfig) -> bool:
    """Whether tied embeddings come with a head that is another matrix; transformers then unties."""
    table = decoder_table(dataclasses.replace(decoder, tie_embeddings=False))
    tensors = match(table, list_tensors(folder))[0].tensors
    pair = [tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight")]
    if pair[0] is None or pair[1] is None:
        return False
    return not np.array_equal(pair[0].read(), pair[1].read())


def _write_tokenizer(source: pathlib.Path, folder: pathlib.Path, config: RunConfig) -> None:
    """Saves the decoder's tokenizer as it is, without a token more. Where its template cannot train
    several turns, and it has ChatML's markers, it gets ChatML."""
    tokenizer = read_tokenizer(source)
    if len(tokenizer) > config.model.decoder.vocab_size:
        raise WeightsError(
            f"{source}: the tokenizer has {len(tokenizer)} entries, and config.json says "
            f"vocab_size={config.model.decoder.vocab_size}"
        )
    try:
        check_template(tokenizer)
    except Exception as error:  # also what a template's own code raises
        if not {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_added_vocab().keys():
            raise WeightsError(f"{source}: the chat template cannot be used: {error}") from error
        tokenizer.chat_template = CHATML
        print("note: the chat template is ChatML; the tokenizer's own cannot train several turns")
    stop_ids(source, tokenizer)
    ConversationEncoder(tokenizer, config.data.system)
    save_tokenizer(tokenizer, source, folder)


def _make_plan(
    config: RunConfig, mesh: Mesh, folders: Mapping[str, pathlib.Path], side: int
) -> _Plan:
    """Finds a tensor for every row of every component's table, and checks its shape and dtype.

    Args:
      side: patches along an edge of the tower's own images, before any resampling.
    """
    _, abstract = abstract_model(config.model)
    shapes = flatten(nnx.to_pure_dict(abstract))
    pieces: dict[str, list[tuple[Row, Tensor]]] = {}
    problems: list[str] = []
    for component, table in tables(config.model, shapes).items():
        if component not in folders:
            continue
        found, missing = match(table, list_tensors(folders[component]))
        wrong = missing + _wrong_tensors(table, found, shapes, side)
        part = {name: leaf for name, leaf in shapes.items() if name.startswith(f"{component}/")}
        wrong += coverage_problems(table.rows, part)
        problems += [f"{component}: {problem}" for problem in wrong]
        for row in table.rows:
            if row.tensor in found.tensors:
                pieces.setdefault(row.path, []).append((row, found.tensors[row.tensor]))
        _describe(component, folders[component], found)
    if problems:
        named = ", ".join(f"{name} {folder}" for name, folder in folders.items())
        raise WeightsError(f"the weights ({named}) do not fit the model:", problems)
    return _Plan(pieces, shapes, flatten(param_shardings(abstract, mesh)))


def _wrong_tensors(table: Table, found: Match, shapes: Mapping[str, Any], side: int) -> list[str]:
    problems = []
    for row in table.rows:
        tensor = found.tensors.get(row.tensor)
        if tensor is None:
            continue
        expected = row.tensor_shape(shapes[row.path].shape)
        if row.path == _POSITION:
            expected = side**2, expected[1]
        if tensor.shape != expected:
            problems.append(f"{tensor.name} is {tensor.shape}, not {expected}")
        if tensor.dtype not in DTYPES:
            problems.append(f"{tensor.name} is {tensor.dtype}, not one of {', '.join(DTYPES)}")
    return problems


def _describe(component: str, folder: pathlib.Path, found: Match) -> None:
    dtypes = ", ".join(sorted({tensor.dtype for tensor in found.tensors.values()}))
    line = f"{component}: {len(found.tensors)} tensors ({dtypes}) of {folder}"
    if found.ignored:
        line += f"; not needed: {summary(found.ignored)}"
    if found.outside:
        line += f"; of other parts: {summary(found.outside)}"
    print(line)


def _check_space(folder: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(
            f"{folder} has {free / 1e9:.1f} GB free, and the run needs {needed / 1e9:.1f}"
        )


def _read(plan: _Plan) -> dict[str, jax.Array]:
    """Places every parameter that has tensors, the largest first: what is still to come is then
    smaller than what was needed on top."""
    total, done, shown = sum(map(plan.nbytes, plan.pieces)), 0, time.monotonic()
    params = {}
    for path in sorted(plan.pieces, key=plan.nbytes, reverse=True):
        params[path] = _place(
            plan.shapes[path].shape, plan.dtype(path), plan.shardings[path], plan.pieces[path]
        )
        done += plan.nbytes(path)
        if time.monotonic() - shown > 5:
            print(f"read {done / 1e9:.1f} of {total / 1e9:.1f} GB", flush=True)
            shown = time.monotonic()
    return params


def _place(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: NamedSharding,
    pieces: Sequence[tuple[Row, Tensor]],
) -> jax.Array:
    """One parameter on its devices: each tensor is read once and copied into every shard's buffer."""
    spans = {
        device: tuple(slice(*s.indices(n)[:2]) for s, n in zip(index or (), shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    buffers = {str(span): (span, _aligned(_size(span), dtype)) for span in spans.values()}
    for row, tensor in pieces:
        value = tensor.read()
        if row.path == _POSITION:
            value = resample(value, round(shape[0] ** 0.5))
        value = row.to_ours(value)
        for span, buffer in buffers.values():
            _copy(value, row.index, span, buffer)
    return jax.make_array_from_single_device_arrays(
        shape, sharding, [jax.device_put(buffers[str(s)][1], d) for d, s in spans.items()]
    )


def _size(span: Sequence[slice]) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in span)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(
    value: np.ndarray, place: Sequence[int | slice], span: Sequence[slice], buffer: np.ndarray
) -> None:
    """Writes what `buffer`, the part `span` of a parameter, holds of a value at `parameter[place]`."""
    target: list[int | slice] = []
    source: list[slice] = []
    for axis, part in enumerate(span):
        fixed = place[axis] if axis < len(place) else slice(None)
        if isinstance(fixed, slice):
            target.append(slice(None))
            source.append(part)
        elif part.start <= fixed < part.stop:
            target.append(fixed - part.start)
        else:
            return
    wanted, into = value[tuple(source)], buffer[tuple(target)]
    if wanted.dtype == into.dtype:  # as plain integers: NumPy copies bfloat16 one by one
        plain = f"u{into.dtype.itemsize}"
        wanted, into = wanted.view(plain), into.view(plain)
    into[...] = wanted
