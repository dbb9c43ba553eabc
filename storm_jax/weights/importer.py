"""Imports public weights as a run at step 0, which other runs start from.

Everything is checked on the headers of the files before any values are read. Then parameters are
read straight into place one at a time, largest first. The run folder is complete or absent.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import pathlib
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from storm_jax.config import (
    CompressionConfig,
    DataConfig,
    DecoderConfig,
    LearningRateConfig,
    ModelConfig,
    OptimConfig,
    RowConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
    differences,
    from_dict,
    replace_model,
    to_dict,
)
from storm_jax.params import abstract_model, flat_params, random_params
from storm_jax.run import Run
from storm_jax.sharding import make_mesh, param_shardings
from storm_jax.weights import WeightsError, llava, smolvlm, storm, vila
from storm_jax.weights.architecture import read_decoder, read_projector, read_vision
from storm_jax.weights.hub import local_folder
from storm_jax.weights.mapping import (
    VOCABULARY,
    Index,
    Table,
    TensorRule,
    coverage_problems,
    decoder_table,
    tables,
)
from storm_jax.weights.output import atomic_folder, check_output
from storm_jax.weights.positions import resample
from storm_jax.weights.tensors import DTYPES, Match, Tensor, list_tensors, match, summary
from storm_jax.weights.tokenizer import write_tokenizer
from storm_jax.weights.whole import WholeModel, read_json

_FAMILIES = (storm, vila, llava, smolvlm)
_POSITION = "vision/position"
_ALIGNMENT = 64  # bytes; the CPU backend uses such arrays without a copy


@dataclasses.dataclass(frozen=True)
class Sources:
    """Local folders or hub ids: of the parts, or of a whole model. Without a projector, it is randomly initialised."""

    vision: str = ""
    decoder: str = ""
    projector: str = ""
    model: str = ""

    def folders(self) -> dict[str, pathlib.Path]:
        """{component: folder} of the parts, after downloading what is not cached.

        Raises:
          WeightsError: if a folder is missing.
        """
        return {
            component: local_folder(spec)
            for component, spec in dataclasses.asdict(self).items()
            if spec and component != "model"
        }

    def whole(self) -> WholeModel | None:
        """The whole model, after downloading what is not cached; None for parts.

        Raises:
          WeightsError: if the folder is missing, of no known family, or unsupported.
        """
        if not self.model:
            return None
        root = local_folder(self.model)
        fields = read_json(root / "config.json")
        for family in _FAMILIES:
            if family.recognise(fields):
                return family.read(root, fields)
        code = "; code in its folder is never run" if "auto_map" in fields else ""
        raise WeightsError(
            f"{root} is no model of a known family (config.json: model_type={fields.get('model_type')!r}{code}): known are "
            f"NVILA and VILA (llm_cfg, vision_tower_cfg, mm_projector_cfg), LLaVA-OneVision and LLaVA-Video "
            f"(llava_onevision, llava_qwen), SmolVLM (smolvlm, idefics3), and our own exports (storm). Parts are "
            f"imported with --vision and --decoder"
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The tensors that fill each parameter, and the parameters' shapes and shardings, by path."""

    pieces: Mapping[str, Sequence[tuple[TensorRule, Tensor]]]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    shardings: Mapping[str, NamedSharding]

    def dtype(self, path: str) -> np.dtype:
        """The dtype of its tensors; float32 if they differ within a stack."""
        dtypes = {DTYPES[tensor.dtype] for _, tensor in self.pieces[path]}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def nbytes(self, path: str) -> int:
        return self.shapes[path].size * self.dtype(path).itemsize


def import_run(
    config: RunConfig | None,
    sources: Sources,
    out: pathlib.Path,
    explicit: Collection[str] = (),
    add_mixer: str = "",
) -> RunConfig:
    """Writes a run at step 0 with imported weights, and returns its configuration.

    The fields of tower and decoder come from their config.json, except `model.vision.image_size` if parts are
    imported: position embeddings are resampled to it.

    Args:
      config: None only for a whole model; the run then lists no training data.
      explicit: dotted names of the fields of `config` that the user set.
      add_mixer: "mamba1" or "mamba2", which starts as the identity behind the stem of a whole model.

    Raises:
      WeightsError, ConfigError: if anything does not match; `out` is not created.
    """
    began = time.monotonic()
    out = check_output(out)
    whole = sources.whole()
    folders = whole.folders if whole else sources.folders()
    decoder, notes = _read_decoder(folders["decoder"])
    if whole:
        if whole.vocab_size:
            decoder = dataclasses.replace(decoder, vocab_size=whole.vocab_size)
        config = config or _configuration_of(whole, decoder)
        vision = whole.vision
        model = _whole_model(config, whole, decoder, explicit, add_mixer)
        named = str(sources.model)
    else:
        assert config is not None
        ours = config.model.vision
        vision = read_vision(
            folders["vision"], feature_layer=ours.feature_layer, final_norm=ours.final_norm
        )
        model = _model_of_parts(config, vision, decoder, folders)
        named = ", ".join(map(str, folders.values()))
    for note in (*notes, *(whole.notes if whole else ())):
        print(f"note: {note}")
    config, changes = replace_model(config, model, explicit, named)
    if whole:
        config, chosen = _with_choices(config, whole, explicit)
        changes |= chosen
    for name, (before, after) in changes.items():
        print(f"{name}={after!r} of {'the model' if whole else 'config.json'} replaces {before!r}")
    _print_resampling(vision, config.model.vision)
    mesh = make_mesh(config.mesh)
    with tempfile.TemporaryDirectory() as staged:
        tokenizer, source = pathlib.Path(staged) / "tokenizer", folders["decoder"]
        if whole and whole.write_tokenizer:
            source = pathlib.Path(staged) / "stored"
            whole.write_tokenizer(source)
        write_tokenizer(source, tokenizer, config, whole.template if whole else "")
        plan = _make_plan(config, mesh, folders, vision.side, whole)
        _check_space(out.parent, sum(plan.nbytes(path) for path in plan.pieces))
        params = _read(plan)
        not_imported = {
            path: sharding for path, sharding in plan.shardings.items() if path not in plan.pieces
        }
        with jax.set_mesh(mesh):
            params |= random_params(config.model, config.train.seed, not_imported)
        with atomic_folder(out) as partial:
            run = Run(partial)
            run.prepare(config, tokenizer)
            run.checkpoints.write_params(params, {"imported": dataclasses.asdict(sources)})
    size = sum(leaf.nbytes for leaf in params.values())
    count = sum(leaf.size for leaf in params.values())
    print(
        f"{out}: {count:,} parameters, {size / 1e9:.1f} GB, in {time.monotonic() - began:.0f} s. "
        f"Train with --config.init_from={out}"
    )
    return config


def _read_decoder(folder: pathlib.Path) -> tuple[DecoderConfig, list[str]]:
    """The decoder in a folder, and notes for the user."""
    decoder, notes = read_decoder(folder)
    if decoder.tie_embeddings and _has_own_head(folder, decoder):
        notes.append(
            "tie_word_embeddings is set, but lm_head.weight differs: embeddings are untied"
        )
        decoder = dataclasses.replace(decoder, tie_embeddings=False)
    return decoder, notes


def _configuration_of(whole: WholeModel, decoder: DecoderConfig) -> RunConfig:
    """The configuration of a whole model that is asked and evaluated as it is; it lists no training data."""
    frames = max(256, whole.choices.get("compression.num_frames", 0))
    return RunConfig(
        model=ModelConfig(vision=whole.vision, decoder=decoder),
        compression=CompressionConfig(num_frames=64),
        data=DataConfig(rows=(RowConfig(tokens=16_384, frames=frames),)),
        optim=OptimConfig(
            learning_rate=LearningRateConfig(vision=1e-5, projector=1e-5, decoder=1e-5)
        ),
        train=TrainConfig(steps=1, batch_size=1),
    )


def _model_of_parts(
    config: RunConfig,
    vision: VisionConfig,
    decoder: DecoderConfig,
    folders: Mapping[str, pathlib.Path],
) -> ModelConfig:
    """The model that the folders of its parts describe."""
    model = dataclasses.replace(
        config.model,
        vision=dataclasses.replace(vision, image_size=config.model.vision.image_size),
        decoder=dataclasses.replace(decoder, lora=config.model.decoder.lora),
    )
    return read_projector(folders["projector"], model) if "projector" in folders else model


def _whole_model(
    config: RunConfig,
    whole: WholeModel,
    decoder: DecoderConfig,
    explicit: Collection[str],
    add_mixer: str,
) -> ModelConfig:
    """The model that the folder of a whole model describes, with a mixer behind its stem if there is one to add."""
    if add_mixer and whole.mixer != "none":
        raise WeightsError(
            f"--add_mixer={add_mixer}: the model has a mixer, {whole.mixer}; leave it out"
        )
    vision = whole.vision
    if "model.vision.image_size" in explicit:
        vision = dataclasses.replace(vision, image_size=config.model.vision.image_size)
    return dataclasses.replace(
        config.model,
        vision=vision,
        decoder=dataclasses.replace(decoder, lora=config.model.decoder.lora),
        stem=whole.stem,
        layout=whole.layout,
        mixer=add_mixer or whole.mixer,
        mixer_args={},
        mamba=whole.mamba or config.model.mamba,
    )


def _with_choices(
    config: RunConfig, whole: WholeModel, explicit: Collection[str]
) -> tuple[RunConfig, dict[str, tuple[Any, Any]]]:
    """`config` with the pooling, frames and system text of a whole model, except those that the user set; and what
    changed."""
    choices = {name: value for name, value in whole.choices.items() if name not in explicit}
    if "compression.num_frames" in choices:
        most = config.data.largest_row.frames
        choices["compression.num_frames"] = min(choices["compression.num_frames"], most)
    fields = to_dict(config)
    for name, value in choices.items():
        *parents, leaf = name.split(".")
        functools.reduce(operator.getitem, parents, fields)[leaf] = value
    changes = differences(to_dict(config), fields)
    return from_dict(RunConfig, fields), changes


def _print_resampling(stored: VisionConfig, vision: VisionConfig) -> None:
    if stored.side != vision.side:
        print(
            f"position embeddings are resampled from {stored.side} x {stored.side} to {vision.side} x "
            f"{vision.side} patches (model.vision.image_size={vision.image_size})"
        )


def _has_own_head(folder: pathlib.Path, decoder: DecoderConfig) -> bool:
    """Whether there is a head that differs from the embeddings; transformers then unties them."""
    table = decoder_table(dataclasses.replace(decoder, tie_embeddings=False))
    tensors = match(table, list_tensors(folder))[0].tensors
    head, embedding = (
        tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight")
    )
    if head is None or embedding is None:
        return False
    return not np.array_equal(head.read(), embedding.read())


def _make_plan(
    config: RunConfig,
    mesh: Mesh,
    folders: Mapping[str, pathlib.Path],
    side: int,
    whole: WholeModel | None,
) -> _Plan:
    """Finds a tensor for every rule, and checks its shape and dtype.

    Args:
      side: patches along one edge of the tower's image, before any resampling.
      whole: the whole model that is read, if it is one; a mixer that is added to it has no tensors.

    Raises:
      WeightsError: listing every missing, unknown or mismatched tensor.
    """
    _, abstract = abstract_model(config.model)
    shapes = flat_params(abstract)
    model, expected = config.model, shapes
    if whole and whole.mixer == "none":
        model = dataclasses.replace(model, mixer="none")
        expected = {k: v for k, v in shapes.items() if not k.startswith("projector/mixer/")}
    pieces: dict[str, list[tuple[TensorRule, Tensor]]] = {}
    problems: list[str] = []
    used = {
        component: table
        for component, table in tables(model, expected).items()
        if component in folders
    }
    listed = {folder: list_tensors(folder) for folder in set(folders.values())}
    matches = {part: match(table, listed[folders[part]]) for part, table in used.items()}
    for component, table in used.items():
        found, missing = matches[component]
        if whole and whole.vocab_size:
            found = _without_placeholders(table, found, whole.vocab_size)
        wrong = [f"{name} is missing" for name in missing]
        wrong += [f"{name} is unknown" for name in _unclaimed(component, folders, matches)]
        wrong += _mismatches(table, found, shapes, side)
        part = {path: leaf for path, leaf in expected.items() if path.startswith(f"{component}/")}
        wrong += coverage_problems(table.rules, part)
        problems += [f"{component}: {problem}" for problem in wrong]
        for rule in table.rules:
            if rule.tensor in found.tensors:
                pieces.setdefault(rule.path, []).append((rule, found.tensors[rule.tensor]))
        _print_match(component, folders[component], found)
    if problems:
        named = ", ".join(f"{name} {folder}" for name, folder in folders.items())
        raise WeightsError(f"the weights ({named}) do not match the model:", problems)
    return _Plan(pieces, shapes, param_shardings(abstract, mesh))


def _unclaimed(
    component: str,
    folders: Mapping[str, pathlib.Path],
    matches: Mapping[str, tuple[Match, Sequence[str]]],
) -> list[str]:
    """Unknown tensors of a component that are not those of another component in the same folder."""
    others = [
        found for other, (found, _) in matches.items() if folders[other] == folders[component]
    ]
    claimed = {tensor.name for found in others for tensor in found.tensors.values()}
    claimed |= {name for found in others for name in found.ignored}
    return [name for name in matches[component][0].unknown if name not in claimed]


def _without_placeholders(table: Table, found: Match, rows: int) -> Match:
    """`found` with only the first rows of the vocabulary's tensors."""
    names = {rule.tensor for rule in table.rules if rule.path in VOCABULARY}
    tensors = {k: v.first(rows) if k in names else v for k, v in found.tensors.items()}
    return dataclasses.replace(found, tensors=tensors)


def _mismatches(table: Table, found: Match, shapes: Mapping[str, Any], side: int) -> list[str]:
    """Tensors of a wrong shape or dtype."""
    problems = []
    for rule in table.rules:
        tensor = found.tensors.get(rule.tensor)
        if tensor is None:
            continue
        expected = rule.tensor_shape(shapes[rule.path].shape)
        if rule.path == _POSITION:
            expected = side**2, expected[1]
        if tensor.shape != expected:
            problems.append(f"{tensor.name} is {tensor.shape}, not {expected}")
        if tensor.dtype not in DTYPES:
            problems.append(f"{tensor.name} is {tensor.dtype}, not one of {', '.join(DTYPES)}")
    return problems


def _print_match(component: str, folder: pathlib.Path, found: Match) -> None:
    dtypes = ", ".join(sorted({tensor.dtype for tensor in found.tensors.values()}))
    line = f"{component}: {len(found.tensors)} tensors ({dtypes}) from {folder}"
    if found.ignored:
        line += f"; not needed: {summary(found.ignored)}"
    if found.outside:
        line += f"; of other components: {summary(found.outside)}"
    print(line)


def _check_space(folder: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(
            f"{folder} has {free / 1e9:.1f} GB free, but the run needs {needed / 1e9:.1f} GB"
        )


def _read(plan: _Plan) -> dict[str, jax.Array]:
    """Reads every parameter that has tensors. The largest come first, while memory is still free for
    their buffers."""
    total, done, last_print = sum(map(plan.nbytes, plan.pieces)), 0, time.monotonic()
    params = {}
    for path in sorted(plan.pieces, key=plan.nbytes, reverse=True):
        params[path] = _read_parameter(
            plan.shapes[path].shape, plan.dtype(path), plan.shardings[path], plan.pieces[path]
        )
        done += plan.nbytes(path)
        if time.monotonic() - last_print > 5:
            print(f"read {done / 1e9:.1f} of {total / 1e9:.1f} GB", flush=True)
            last_print = time.monotonic()
    return params


def _read_parameter(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: NamedSharding,
    pieces: Sequence[tuple[TensorRule, Tensor]],
) -> jax.Array:
    """One parameter on its devices. Each tensor is read once and copied into every shard's buffer."""
    shards = {
        device: tuple(slice(*s.indices(n)[:2]) for s, n in zip(index or (), shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    buffers = {str(shard): (shard, _aligned_array(shard, dtype)) for shard in shards.values()}
    for rule, tensor in pieces:
        value = tensor.read()
        if rule.path == _POSITION:
            value = resample(value, round(shape[0] ** 0.5))
        value = rule.to_parameter(value)
        for shard, buffer in buffers.values():
            _copy_to_shard(value, rule.index, shard, buffer)
    return jax.make_array_from_single_device_arrays(
        shape,
        sharding,
        [jax.device_put(buffers[str(shard)][1], device) for device, shard in shards.items()],
    )


def _aligned_array(shard: Sequence[slice], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array of a shard's shape, aligned to `_ALIGNMENT`."""
    shape = tuple(part.stop - part.start for part in shard)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy_to_shard(
    value: np.ndarray, index: Index, shard: Sequence[slice], buffer: np.ndarray
) -> None:
    """Copies the part of `value` that belongs to a shard.

    Args:
      value: `parameter[index]`.
      shard: the slice of the parameter along each axis that `buffer` contains.
    """
    target: list[int | slice] = []
    source: list[slice] = []
    for axis, part in enumerate(shard):
        entry = index[axis] if axis < len(index) else slice(None)
        if isinstance(entry, slice):
            target.append(slice(None))
            source.append(part)
        elif part.start <= entry < part.stop:
            target.append(entry - part.start)
        else:
            return
    to_copy, destination = value[tuple(source)], buffer[tuple(target)]
    if to_copy.dtype == destination.dtype:  # as integers: NumPy copies bfloat16 element by element
        integer = f"u{destination.dtype.itemsize}"
        to_copy, destination = to_copy.view(integer), destination.view(integer)
    destination[...] = to_copy
