"""The parameters of one checkpoint on all devices, and the compiled programs that use them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from storm_jax.config import MeshConfig
from storm_jax.inference.generate import Sampling, generate, score_first
from storm_jax.inference.weights import load
from storm_jax.models.storm import VisualShape
from storm_jax.run import Run
from storm_jax.sharding import batch_sharding, constrain, make_mesh

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

        slots = max(_MIN_SLOTS, 1 << (sampling.max_new_tokens - 1).bit_length())

        def answer(
            params: dict, prompts: dict, tables: list, seed: jax.Array, sampling: Sampling
        ) -> jax.Array:
            model = nnx.merge(self._graphdef, params)
            visual = _select_tables(prompts, tables)
            key = jax.random.key(seed)
            return generate(
                model, prompts, visual, key, sampling, slots=slots, stop_ids=self._stop_ids
            )

        (seed,) = np.random.SeedSequence([each % 2**32 for each in seeds]).generate_state(1)
        inputs = (self._put(prompts), list(tables), seed, sampling.as_arrays())
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

    def _put(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return {
            name: jax.device_put(array, batch_sharding(self.mesh, array.shape))
            for name, array in arrays.items()
        }

    def _call(self, function: Callable, static: tuple, inputs: tuple) -> tuple[jax.Array, float]:
        """`function(params, *inputs)` and its run time; `static` is whatever else the program depends on."""
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(inputs))
        key = (function.__qualname__, static, shapes)
        with jax.set_mesh(self.mesh):
            jax.block_until_ready(inputs)
            if key not in self._compiled:
                compiled = jax.jit(function).lower(self._params, *inputs).compile()
                if self._warms_up:
                    jax.block_until_ready(compiled(self._params, *inputs))
                self._compiled[key] = compiled
            began = time.perf_counter()
            result = jax.block_until_ready(self._compiled[key](self._params, *inputs))
            return result, time.perf_counter() - began


def _select_tables(prompts: dict[str, jax.Array], tables: Sequence[jax.Array]) -> jax.Array:
    """The visual table of each prompt's scene, [B, V, D]."""
    visual = jnp.concatenate(list(tables))[prompts["scenes"]]
    return constrain(visual, "batch", None, None)
