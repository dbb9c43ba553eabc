"""The parameters of one checkpoint on all devices, and the compiled programs that use them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from storm_jax.config import CompressionConfig, MeshConfig
from storm_jax.inference.generate import (
    Generation,
    Sampling,
    begin,
    extend,
    generate,
    score_first,
)
from storm_jax.inference.weights import load
from storm_jax.models.storm import StreamState, VisualShape
from storm_jax.run import Run
from storm_jax.sharding import batch_sharding, constrain, make_mesh

_TOKENS_AT_ONCE = 4  # of an answer that is shown while it is written
_MIN_SLOTS = 64  # for new tokens; above that, powers of two: few programs fit every token limit


class Programs:
    """Encodes frames, generates and scores; one program is compiled per static shape.

    Every method returns its result and the seconds that the devices took, without compilation.
    """

    def __init__(
        self, run: Run, step: int, stop_ids: tuple[int, ...], weights: str, warms_up: bool
    ):
        """Restores the parameters of checkpoint `step`, sharded over all devices.

        Args:
          stop_ids: tokens that end an answer.
          weights: one of `storm_jax.inference.weights.WEIGHTS`.
          warms_up: run every program once untimed, since a first run also allocates and autotunes.

        Raises:
          RunError: if the checkpoint cannot be read.
        """
        # Processes that evaluate together answer different questions.
        self.mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices())
        self._stop_ids, self._warms_up = stop_ids, warms_up
        self._graphdef, params = load(run, step, self.mesh, weights)
        self._params = unflatten_dict(params, sep="/")
        self._compiled: dict[tuple, Callable] = {}

    @property
    def count(self) -> int:
        """Programs that were compiled so far."""
        return len(self._compiled)

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

    def generate(
        self,
        prompts: Mapping[str, np.ndarray],
        tables: Sequence[jax.Array],
        seeds: tuple[int, ...],
        sampling: Sampling,
    ) -> tuple[np.ndarray, float]:
        """Generated ids, int [B, N]; after an answer, a row is padded with the first stop token.

        Args:
          prompts: `tokens` and `visual_index` [B, S], `lengths` [B] (0 = empty row), and `scenes` [B],
            the row of each prompt's scene in the concatenated `tables`.
          tables: visual tables [C, V, D].
          seeds: of sampling; other ones draw other tokens.
        """
        slots = _slots(sampling)

        def answer(
            params: dict, prompts: dict, tables: list, seed: jax.Array, sampling: Sampling
        ) -> jax.Array:
            model = nnx.merge(self._graphdef, params)
            visual = _select_tables(prompts, tables)
            key = jax.random.key(seed)
            return generate(
                model, prompts, visual, key, sampling, slots=slots, stop_ids=self._stop_ids
            )

        inputs = (self._put(prompts), list(tables), _seed(seeds), sampling.as_arrays())
        ids, seconds = self._call(answer, (slots,), inputs)
        return np.asarray(ids), seconds

    def score_first(
        self, prompts: Mapping[str, np.ndarray], tables: Sequence[jax.Array]
    ) -> tuple[np.ndarray, float]:
        """Log-probabilities [B, K] of `prompts["candidates"]`, int [B, K], as first token of each answer.
        Other arguments as in `generate`."""

        def score(params: dict, prompts: dict, tables: list) -> jax.Array:
            model = nnx.merge(self._graphdef, params)
            visual = _select_tables(prompts, tables)
            return score_first(model, prompts, visual, prompts["candidates"])

        scores, seconds = self._call(score, (), (self._put(prompts), list(tables)))
        return np.asarray(scores), seconds

    def write(
        self,
        prompts: Mapping[str, np.ndarray],
        tables: Sequence[jax.Array],
        seeds: tuple[int, ...],
        sampling: Sampling,
    ) -> Iterator[np.ndarray]:
        """Yields the ids of one answer, int [n], as they are generated, a few at a time; arguments as in `generate`,
        for one prompt."""
        slots, seed = _slots(sampling), _seed(seeds)

        def first(
            params: dict, prompts: dict, tables: list, seed: jax.Array, sampling: Sampling
        ) -> Generation:
            model, visual = nnx.merge(self._graphdef, params), _select_tables(prompts, tables)
            key = jax.random.key(seed)
            stops = self._stop_ids
            return _replicated(
                begin(model, prompts, visual, key, sampling, slots=slots, stop_ids=stops)
            )

        def more(
            params: dict,
            state: Generation,
            seed: jax.Array,
            sampling: Sampling,
            limit: jax.Array,
        ) -> Generation:
            model, key = nnx.merge(self._graphdef, params), jax.random.key(seed)
            return _replicated(extend(model, state, key, sampling, limit, stop_ids=self._stop_ids))

        settings = (seed, sampling.as_arrays())
        inputs = (self._put(prompts), list(tables), *settings)
        state, _ = self._call(first, (slots,), inputs)
        done, limit = 0, 1
        while True:
            step = int(state.step)
            yield np.asarray(state.tokens)[0, done:step]
            done, limit = step, min(step + _TOKENS_AT_ONCE, sampling.max_new_tokens)
            if bool(state.is_done.all()) or done == limit:
                return
            state, _ = self._call(more, (slots,), (state, *settings, np.int32(limit)), donate=(0,))

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


def _slots(sampling: Sampling) -> int:
    """Room for new tokens."""
    return max(_MIN_SLOTS, 1 << (sampling.max_new_tokens - 1).bit_length())


def _seed(seeds: tuple[int, ...]) -> np.uint32:
    (seed,) = np.random.SeedSequence([each % 2**32 for each in seeds]).generate_state(1)
    return seed


def _replicated(tree: Any) -> Any:
    """On all devices, so that a result can be an input of a program that was compiled for another."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


def _select_tables(prompts: dict[str, jax.Array], tables: Sequence[jax.Array]) -> jax.Array:
    """The visual table of each prompt's scene, [B, V, D]."""
    visual = jnp.concatenate(list(tables))[prompts["scenes"]]
    return constrain(visual, "batch", None, None)
