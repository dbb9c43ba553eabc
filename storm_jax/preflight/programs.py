"""The programs of train.py and eval.py, lowered for a mesh without data or weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from storm_jax.compression import Grid, VisualShape, plan_clip
from storm_jax.config import RunConfig
from storm_jax.data.rows import RowShape, empty_frames, empty_rows
from storm_jax.flops import Work, decode_work, encode_work, prefill_work, train_work
from storm_jax.inference.engine import EngineShape
from storm_jax.inference.generate import (
    Answers,
    Choice,
    Prompts,
    decode_step,
    next_logits,
    prefill,
)
from storm_jax.inference.scenes import SceneShape, default_rows, round_up, scenes_per_call
from storm_jax.models.decoder import Cache
from storm_jax.models.storm import Storm
from storm_jax.params import abstract_model, compute_dtypes, flat_params, with_sharding
from storm_jax.sharding import batch_sharding, constrain, param_shardings
from storm_jax.train.state import StateSpec
from storm_jax.train.step import check_batch, make_train_step

_QUESTION_TOKENS = 256  # text of a prompt
_NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A program that is ready to be compiled.

    Attributes:
      name: "train", "encode", "prefill" or "decode".
      rows: of a call, over all devices.
      tokens, frames: of a row.
      arguments: trees of shapes with shardings, by kind.
      work: FLOPs by formula.
    """

    name: str
    rows: int
    tokens: int = 0
    frames: int = 0
    traced: jax.stages.Traced
    lowered: jax.stages.Lowered
    arguments: Mapping[str, Any]
    work: Work

    @property
    def title(self) -> str:
        tokens = [f"{self.tokens:,} token" + "s" * (self.tokens > 1)] * bool(self.tokens)
        frames = [f"{self.frames} frames"] * bool(self.frames)
        return f"{self.name}, {self.rows} rows of {' and '.join(tokens + frames)}"

    def argument_bytes(self) -> dict[str, int]:
        """Bytes of the arguments on each device, by kind."""
        return {
            kind: sum(
                math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(tree)
            )
            for kind, tree in self.arguments.items()
        }


def train_program(config: RunConfig, mesh: Mesh, shape: RowShape) -> Program:
    """The step that train.py runs on rows of one shape.

    Raises:
      ConfigError: if the batch does not divide over the mesh.
    """
    check_batch(config, mesh)
    rows = config.train.batch_size
    spec = StateSpec.make(config, mesh)
    state = with_sharding(spec.shapes, spec.shardings)
    batch = _rows_on(mesh, rows, empty_rows(1, 0, shape))
    traced, lowered = _build(make_train_step(spec, shape), mesh, state, batch)
    return Program(
        name="train",
        rows=rows,
        tokens=shape.tokens,
        frames=shape.frames,
        traced=traced,
        lowered=lowered,
        arguments={
            "parameters": (state.trained, state.frozen),
            "optimizer state": (state.opt_state, state.step),
            "batch": batch,
        },
        work=train_work(config, shape),
    )


def encode_program(config: RunConfig, mesh: Mesh) -> Program:
    """What eval.py runs to encode videos of `compression.num_frames`."""
    sizes = _Sizes.of(config, mesh)
    rows = _rows_on(
        mesh,
        sizes.scenes,
        empty_frames(1, sizes.scene.frames, config.model.vision.image_size),
    )
    visual = VisualShape(sizes.scene.groups, (config.compression.spatial_pool,))

    def encode(model: Storm, rows: dict[str, jax.Array]) -> jax.Array:
        table = model.encode(rows["frames"], rows["frame_clip"], rows["frame_group"], visual)
        return constrain(table, "batch", None, None)

    params, traced, lowered = _with_model(config, mesh, encode, rows)
    return Program(
        name="encode",
        rows=sizes.scenes,
        frames=sizes.scene.frames,
        traced=traced,
        lowered=lowered,
        arguments={"parameters": params, "batch": rows},
        work=encode_work(config, sizes.scenes, sizes.scene.frames, visual),
    )


def prefill_program(config: RunConfig, mesh: Mesh) -> Program:
    """What eval.py runs on the last block of the prompts about these videos, with the logits of the first tokens."""
    sizes, model = _Sizes.of(config, mesh), config.model
    engine, (size, slots) = sizes.engine, sizes.block
    block = {
        "x": np.zeros((1, size, model.decoder.width), model.dtype),
        "lengths": np.zeros(1, np.int32),
    }
    block = _rows_on(mesh, engine.prompts, block)
    width = _rows_on(
        mesh, engine.prompts, {"last": np.zeros((1, model.decoder.width), model.dtype)}
    )
    cache = _cache(config, mesh, engine.prompts, slots)
    before = Prompts(cache, width["last"]) if size < slots else None

    def fill(model: Storm, block: dict[str, jax.Array], before: Prompts | None) -> Any:
        start = slots - size
        read = prefill(model, block["x"], block["lengths"], start, before, slots=slots)
        return read, next_logits(model, read.last)

    params, traced, lowered = _with_model(config, mesh, fill, block, before, donate_argnums=2)
    return Program(
        name="prefill",
        rows=engine.prompts,
        tokens=size,
        traced=traced,
        lowered=lowered,
        arguments={"parameters": params, "cache": before, "batch": block},
        work=prefill_work(config, engine.prompts, size, slots),
    )


def decode_program(config: RunConfig, mesh: Mesh) -> Program:
    """What eval.py runs for each new token of the answers."""
    engine = _Sizes.of(config, mesh).engine
    numbers = {name: np.zeros(1, np.int32) for name in ("token", "position", "written", "left")}
    choices = {
        "temperature": np.zeros(1, np.float32),
        "top_p": np.zeros(1, np.float32),
        "seed": np.zeros(1, np.uint32),
    }
    answers = Answers(
        cache=_cache(config, mesh, engine.rows, engine.length),
        choice=Choice(**_rows_on(mesh, engine.rows, choices)),
        **_rows_on(mesh, engine.rows, numbers),
    )

    def extend(model: Storm, answers: Answers) -> Any:
        return decode_step(model, answers, stop_ids=(0,))

    params, traced, lowered = _with_model(config, mesh, extend, answers, donate_argnums=1)
    return Program(
        name="decode",
        rows=engine.rows,
        tokens=1,
        traced=traced,
        lowered=lowered,
        arguments={"parameters": params, "cache": answers},
        work=decode_work(config, engine.rows, engine.length),
    )


def _cache(config: RunConfig, mesh: Mesh, rows: int, length: int) -> Cache:
    decoder = config.model.decoder
    shape = (decoder.depth, rows, length, decoder.num_kv_heads, decoder.head_dim)
    spec = PartitionSpec(None, *batch_sharding(mesh, (rows,)).spec)
    keys: Any = jax.ShapeDtypeStruct(shape, config.model.dtype, sharding=NamedSharding(mesh, spec))
    return Cache(keys, keys)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Sizes of the batches of eval.py, for videos of `compression.num_frames`.

    Attributes:
      scenes: encoded together.
      engine: answers the prompts.
      block: tokens of a block, and of all blocks, of a prompt.
    """

    scene: SceneShape
    scenes: int
    engine: EngineShape
    block: tuple[int, int]

    @classmethod
    def of(cls, config: RunConfig, mesh: Mesh) -> _Sizes:
        compression, grid = config.compression, Grid.of(config.model)
        plan = plan_clip(compression.num_frames, grid, compression)
        scene = SceneShape(round_up(compression.num_frames, 3), round_up(plan.num_groups, 3))
        rows = -(-default_rows(plan.num_tokens, mesh.size) // mesh.size) * mesh.size
        prompt = plan.num_tokens + _QUESTION_TOKENS
        engine = EngineShape.for_batch(rows, prompt, _NEW_TOKENS, mesh.size)
        return cls(
            scene=scene,
            scenes=scenes_per_call(scene, rows, mesh.size),
            engine=engine,
            block=engine.cut(prompt),
        )


def _with_model(
    config: RunConfig, mesh: Mesh, function: Callable, *inputs: Any, **options: Any
) -> tuple[Any, jax.stages.Traced, jax.stages.Lowered]:
    """Builds `function(model, *inputs)`; the first result is the shapes and shardings of the parameters."""
    graphdef, abstract = abstract_model(config.model)
    shapes = compute_dtypes(flat_params(abstract), config.model)
    params = unflatten_dict(with_sharding(shapes, param_shardings(abstract, mesh)), sep="/")

    def program(params: dict, *inputs: Any) -> Any:
        return function(nnx.merge(graphdef, params), *inputs)

    return params, *_build(jax.jit(program, **options), mesh, params, *inputs)


def _build(function: Any, mesh: Mesh, *inputs: Any) -> tuple[jax.stages.Traced, jax.stages.Lowered]:
    with jax.set_mesh(mesh):
        traced = function.trace(*inputs)
        return traced, traced.lower()


def _rows_on(mesh: Mesh, count: int, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Shapes and shardings of `count` rows like the one in `row`."""
    shapes: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((count, *array.shape[1:]), array.dtype)
        for name, array in row.items()
    }
    return {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=batch_sharding(mesh, leaf.shape)
        )
        for name, leaf in shapes.items()
    }
