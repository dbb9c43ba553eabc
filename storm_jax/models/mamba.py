"""A uni- or bidirectional Mamba mixer.

    x, z = in_proj(u)                                          shared by both directions
    y_d  = direction_d(u, x)                                   separate convolution and scan
    out  = out_proj(norm((y_forward + y_backward) * silu(z)))  shared; initialised to zero

A direction is that of Mamba-1 (`mamba1.py`, for which there is no norm) or Mamba-2 (`mamba2.py`).
Convolutions and scans do not cross segment boundaries. A unidirectional mixer can process a sequence in
blocks: it returns the state that the next block continues from.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import MambaConfig
from storm_jax.models.layers import Einsum, PairedLinear
from storm_jax.models.mamba1 import Mamba1Direction
from storm_jax.models.mamba2 import Mamba2Direction
from storm_jax.sharding import axis_size, constrain

State = Any  # a Mamba1State or Mamba2State


class Direction(Protocol):
    """Mixes x [B, L, E] along L in one direction; u [B, L, D] is the input of the mixer."""

    def __call__(
        self, u: jax.Array, x: jax.Array, segment_ids: jax.Array | None, state: State = None
    ) -> tuple[jax.Array, State]:
        """Returns y [B, L, E] and the final state; `state` is that after the previous block."""

    def initial_state(self, batch: int) -> State:
        """The state before the first block."""


class MambaMixer(nnx.Module):
    """[B, L, D] -> [B, L, D]; the output is zero at initialisation, because `out_proj` is.

    Args:
      version: "mamba1" or "mamba2".
    """

    def __init__(
        self, width: int, version: str, config: MambaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype
    ):
        inner = config.expand * width
        make = Mamba1Direction if version == "mamba1" else Mamba2Direction
        self.in_proj = PairedLinear(width, inner, rngs=rngs, dtype=dtype)
        self.forward: Direction = make(inner, width, config, rngs=rngs, dtype=dtype)
        self.backward: Direction | None = (
            make(inner, width, config, rngs=rngs, dtype=dtype, reverse=True)
            if config.direction == "both"
            else None
        )
        self.norm = (
            nnx.RMSNorm(inner, epsilon=1e-5, dtype=dtype, rngs=rngs)
            if version == "mamba2"
            else None
        )
        self.out_proj = Einsum(
            "ble,ed->bld",
            (inner, width),
            ("inner", "embed"),
            kernel_init=nnx.initializers.zeros,
            rngs=rngs,
            dtype=dtype,
        )

    def __call__(
        self, u: jax.Array, segment_ids: jax.Array | None = None, state: State = None
    ) -> tuple[jax.Array, State]:
        """Mixes a sequence, or the next block of one.

        Args:
          u: [B, L, D].
          segment_ids: int [B, L]; segments do not interact.
          state: the state after the previous block, or `initial_state`; unidirectional mixers only.

        Returns:
          [B, L, D], and the final state of the forward direction.

        Raises:
          ValueError: a bidirectional mixer was given a state.
        """
        if state is not None and self.backward is not None:
            raise ValueError("a bidirectional mixer cannot process a sequence in blocks")
        length = u.shape[1]
        if state is None:
            u, segment_ids = _pad_to_shards(u, segment_ids)
        u = constrain(u, "batch", "sequence", None)
        x, z = self.in_proj(u)  # 2 x [B, L, E]
        y, state = self.forward(u, x, segment_ids, state)
        if self.backward is not None:
            y += self.backward(u, x, segment_ids)[0]
        y *= jax.nn.silu(z)
        out = self.out_proj(y if self.norm is None else self.norm(y))
        return out[:, :length], state

    def initial_state(self, batch: int) -> State:
        """The state before the first block."""
        return self.forward.initial_state(batch)


def _pad_to_shards(
    u: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Appends a segment of zeros, so that the length is a multiple of the mesh's "context" axis."""
    missing = -u.shape[1] % axis_size("sequence")
    if not missing:
        return u, segment_ids
    if segment_ids is None:
        segment_ids = jnp.zeros(u.shape[:2], jnp.int32)
    ids = jnp.pad(segment_ids, ((0, 0), (0, missing)), constant_values=-1)
    return jnp.pad(u, ((0, 0), (0, missing), (0, 0))), ids
