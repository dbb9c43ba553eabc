"""The parameters of one checkpoint on all devices, and the compiled programs that use them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from storm_jax.compression import VisualShape
from storm_jax.config import CompressionConfig, MeshConfig
from storm_jax.inference.generate import (
    Answers,
    Choice,
    Prompts,
    decode,
    empty_answers,
    insert,
    next_logits,
    prefill,
)
from storm_jax.inference.weights import load
from storm_jax.models.storm import StreamState
from storm_jax.run import Run
from storm_jax.sharding import batch_sharding, constrain, make_mesh


class Programs:
    """Encodes frames, generates and scores; one program is compiled per static shape.

    Every method returns its result and the seconds that the devices took, without compilation.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Mapping[str, jax.Array],
        mesh: Mesh,
        *,
        stop_ids: tuple[int, ...],
        warms_up: bool = False,
    ):
        """See `load` for a checkpoint's programs.

        Args:
          params: by path, on the devices of `mesh`.
          stop_ids: tokens that end an answer.
          warms_up: run every program once untimed, since a first run also allocates and autotunes.
        """
        self.mesh, self.stop_ids = mesh, stop_ids
        self._graphdef, self._params = graphdef, unflatten_dict(dict(params), sep="/")
        self._warms_up = warms_up
        self._compiled: dict[tuple, jax.stages.Compiled] = {}

    @classmethod
    def load(
        cls,
        run: Run,
        step: int,
        stop_ids: tuple[int, ...],
        weights: str = "",
        warms_up: bool = False,
    ) -> Programs:
        """Restores the parameters of checkpoint `step`, sharded over all devices of this process.

        Args:
          weights: one of `storm_jax.inference.weights.WEIGHTS`.

        Raises:
          RunError: if the checkpoint cannot be read.
        """
        # Processes that evaluate together answer different questions.
        mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices())
        graphdef, params = load(run, step, mesh, weights)
        return cls(graphdef, params, mesh, stop_ids=stop_ids, warms_up=warms_up)

    @property
    def compiled(self) -> tuple[jax.stages.Compiled, ...]:
        """The programs so far."""
        return tuple(self._compiled.values())

    def encode(
        self, rows: Mapping[str, np.ndarray], visual: VisualShape
    ) -> tuple[jax.Array, float]:
        """Visual tables [C, V, D] of C scenes.

        Args:
          rows: `frames`, `frame_clip` and `frame_group`, as in `storm_jax.data.rows`.
        """

        def encode(params: dict, rows: dict[str, jax.Array]) -> jax.Array:
            model = nnx.merge(self._graphdef, params)
            table = model.encode(rows["frames"], rows["frame_clip"], rows["frame_group"], visual)
            return constrain(table, "batch", None, None)

        return self._call(encode, (visual,), (self._put(rows),))

    def join(self, tables: Sequence[jax.Array]) -> jax.Array:
        """Visual tables [C, V, D] as one, [N, V, D]."""
        if len(tables) == 1:
            return tables[0]

        def join(params: dict, tables: list[jax.Array]) -> jax.Array:
            return constrain(jnp.concatenate(tables), "batch", None, None)

        return self._call(join, (), (list(tables),))[0]

    def embed(
        self,
        table: jax.Array,
        scenes: np.ndarray,
        tokens: np.ndarray,
        visual_index: np.ndarray,
    ) -> tuple[jax.Array, float]:
        """Embeds a block of P prompts, [P, C, D].

        Args:
          table: visual tables [N, V, D].
          scenes: int [P], the table of each prompt.
          tokens, visual_index: int [P, C] (see `Storm.merge`).
        """

        def embed(params: dict, table: jax.Array, prompts: dict) -> jax.Array:
            model = nnx.merge(self._graphdef, params)
            visual = constrain(table[prompts["scenes"]], "batch", None, None)
            return model.merge(prompts["tokens"], visual, prompts["visual_index"])

        prompts = {"scenes": scenes, "tokens": tokens, "visual_index": visual_index}
        return self._call(embed, (), (table, self._put(prompts)))

    def prefill(
        self,
        x: jax.Array,
        lengths: np.ndarray,
        start: int,
        prompts: Prompts | None,
        slots: int,
    ) -> tuple[Prompts, float]:
        """Reads a block of prompts (see `generate.prefill`); `prompts` cannot be used again."""

        def first(params: dict, x: jax.Array, lengths: jax.Array) -> Prompts:
            model = nnx.merge(self._graphdef, params)
            return _by_rows(prefill(model, x, lengths, slots=slots))

        def more(
            params: dict, x: jax.Array, lengths: jax.Array, start: jax.Array, prompts: Prompts
        ) -> Prompts:
            model = nnx.merge(self._graphdef, params)
            return _by_rows(prefill(model, x, lengths, start, prompts))

        if prompts is None:
            return self._call(first, (slots,), (x, lengths))
        inputs = (x, lengths, np.int32(start), prompts)
        return self._call(more, (), inputs, donate=(3,))

    def empty_answers(self, rows: int, length: int) -> Answers:
        """Rows of `length` positions, without an answer."""

        def make(params: dict) -> Answers:
            return _by_rows(empty_answers(nnx.merge(self._graphdef, params), rows, length))

        return self._call(make, (rows, length), ())[0]

    def insert(
        self,
        answers: Answers,
        prompts: Prompts,
        rows: np.ndarray,
        lengths: np.ndarray,
        limits: np.ndarray,
        choice: Choice,
    ) -> tuple[Answers, np.ndarray, float]:
        """Puts prompts into rows (see `generate.insert`); `answers` cannot be used again."""

        def insert_prompts(params: dict, answers: Answers, prompts: Prompts, rest: tuple) -> Any:
            model = nnx.merge(self._graphdef, params)
            answers, tokens = insert(model, answers, prompts, *rest, stop_ids=self.stop_ids)
            return _by_rows(answers), _replicated(tokens)

        inputs = (answers, prompts, (rows, lengths, limits, choice))
        (answers, tokens), seconds = self._call(insert_prompts, (), inputs, donate=(0,))
        return answers, np.asarray(tokens), seconds

    def decode(
        self, answers: Answers, is_kept: np.ndarray, steps: int, room: int
    ) -> tuple[Answers, np.ndarray, float]:
        """Continues all answers (see `generate.decode`); `answers` cannot be used again."""

        def extend(
            params: dict, answers: Answers, is_kept: jax.Array, steps: jax.Array
        ) -> tuple[Answers, jax.Array]:
            model = nnx.merge(self._graphdef, params)
            stops = self.stop_ids
            answers, tokens = decode(model, answers, is_kept, steps, room=room, stop_ids=stops)
            return _by_rows(answers), _replicated(tokens)

        inputs = (answers, is_kept, np.int32(steps))
        (answers, tokens), seconds = self._call(extend, (room,), inputs, donate=(0,))
        return answers, np.asarray(tokens), seconds

    def score(self, prompts: Prompts, candidates: np.ndarray) -> tuple[np.ndarray, float]:
        """Log-probabilities, fp32 [P, K], of `candidates`, int [P, K], as first tokens of the answers."""

        def score(params: dict, prompts: Prompts, candidates: jax.Array) -> jax.Array:
            model = nnx.merge(self._graphdef, params)
            scores = jax.nn.log_softmax(next_logits(model, prompts.last), axis=-1)
            return _replicated(jnp.take_along_axis(scores, candidates, axis=-1))

        scores, seconds = self._call(score, (), (prompts, candidates))
        return np.asarray(scores), seconds

    def start_stream(self) -> StreamState:
        """The state of a video before its first frame.

        Raises:
          ValueError: the projector cannot process a video in blocks.
        """

        def start(params: dict) -> StreamState:
            return _replicated(nnx.merge(self._graphdef, params).start_stream(1))

        return self._call(start, (), ())[0]

    def empty_groups(self, count: int, tokens: int) -> jax.Array:
        """Zeros [G, N', D] on all devices, for the pooled groups of a stream."""

        def make(params: dict) -> jax.Array:
            decoder = nnx.merge(self._graphdef, params).decoder
            return _replicated(jnp.zeros((count, tokens, decoder.config.width), decoder.dtype))

        return self._call(make, (count, tokens), ())[0]

    def stream_table(self, groups: jax.Array, last: jax.Array) -> jax.Array:
        """The visual table [1, V, D] of groups [G, N', D], of which the last one is replaced by `last` [N', D],
        and the newline if the layout has one."""

        def make(params: dict, groups: jax.Array, last: jax.Array) -> jax.Array:
            width = groups.shape[-1]
            table = groups.at[-1].set(last).reshape(-1, width)
            newline = nnx.merge(self._graphdef, params).projector.newline
            if newline is not None:
                table = jnp.concatenate([table, newline[...].astype(table.dtype)[None]])
            return _replicated(table[None])

        return self._call(make, (), (groups, last))[0]

    def extend_stream(
        self, frames: np.ndarray, state: StreamState, compression: CompressionConfig
    ) -> tuple[jax.Array, jax.Array, StreamState]:
        """Encodes the next frames of a video, uint8 [F, H, W, 3]. The state cannot be used again.

        Returns:
          Completed groups [G, N', D], of which the first few are valid; the mean of the incomplete group [N', D];
          and the new state.
        """

        def extend(params: dict, frames: jax.Array, state: StreamState) -> tuple:
            model = nnx.merge(self._graphdef, params)
            groups, _, partial, state = model.extend_stream(frames[None], state, compression)
            return _replicated((groups[0], partial[0], state))

        factors = (compression.temporal_pool, compression.spatial_pool)
        return self._call(extend, factors, (frames, state), donate=(1,))[0]

    def _put(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return {
            name: jax.device_put(array, batch_sharding(self.mesh, array.shape))
            for name, array in arrays.items()
        }

    def _call(
        self, function: Callable, static: tuple, inputs: tuple, donate: tuple[int, ...] = ()
    ) -> tuple[Any, float]:
        """`function(params, *inputs)` and its run time.

        Args:
          static: whatever else the program depends on.
          donate: numbers of the inputs whose memory the results may take.
        """
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(inputs))
        key = (function.__qualname__, static, shapes)
        with jax.set_mesh(self.mesh):
            jax.block_until_ready(inputs)
            if key not in self._compiled:
                donated = tuple(1 + number for number in donate)
                jitted = jax.jit(function, donate_argnums=donated)
                compiled = jitted.lower(self._params, *inputs).compile()
                if self._warms_up and not donate:
                    jax.block_until_ready(compiled(self._params, *inputs))
                self._compiled[key] = compiled
            began = time.perf_counter()
            result = jax.block_until_ready(self._compiled[key](self._params, *inputs))
            return result, time.perf_counter() - began


def _replicated(tree: Any) -> Any:
    """On all devices, so that a result can be an input of a program that was compiled for another."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


def _by_rows(tree: Any) -> Any:
    """Sharded over the devices like a batch, as inputs of another program."""

    def place(x: jax.Array) -> jax.Array:
        axes = [None, "batch"] if x.ndim == 5 else ["batch"]  # caches have layers first
        return constrain(x, *axes, *[None] * (x.ndim - len(axes)))

    return jax.tree.map(place, tree)
