"""A Mamba mixer that reads a sequence in one or both directions.

    x, z = in_proj(u)                                          shared by the directions
    y_d  = direction_d(u, x)                                   conv and scan with parameters of its own
    out  = out_proj(norm((y_forward + y_backward) * silu(z)))  shared; starts at zero

Directions are those of Mamba-1 (`mamba1.py`, without the norm) or of Mamba-2 (`mamba2.py`). Their convs
and scans stop where the segment id changes. A mixer of one direction can read a sequence in blocks: it
returns the state with which the next block goes on.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import MambaConfig
from storm_jax.models.layers import Einsum, PairedLinear
from storm_jax.models.mamba1 import DirectedScan
from storm_jax.models.mamba2 import DirectedSSD
from storm_jax.sharding import constrain

State = Any  # a Mamba1State or Mamba2State


class Direction(Protocol):
    """Mixes x [B, L, E] in one direction, given the layer's input u [B, L, D] too."""

    def __call__(
        self, u: jax.Array, x: jax.Array, segment_ids: jax.Array | None, state: State = None
    ) -> tuple[jax.Array, State]:
        """y [B, L, E] and the state after the last step that it reads; `state` is that of the blocks
        so far."""

    def initial_state(self, batch: int) -> State:
        """The state before the first block."""


class MambaMixer(nnx.Module):
    """[B, L, D] -> [B, L, D]; with a zero `out_proj`, as it starts, the output is zero."""

    def __init__(self, width: int, config: MambaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        inner = config.expand * width
        make = DirectedScan if config.mixer == "mamba1" else DirectedSSD
        self.in_proj = PairedLinear(width, inner, rngs=rngs, dtype=dtype)
        self.forward: Direction = make(inner, width, config, rngs=rngs, dtype=dtype)
        self.backward: Direction | None = (
            make(inner, width, config, rngs=rngs, dtype=dtype, reverse=True)
            if config.direction == "both"
            else None
        )
        self.norm = (
            nnx.RMSNorm(inner, epsilon=1e-5, dtype=dtype, rngs=rngs)
            if config.mixer == "mamba2"
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
        """Mixes a sequence, or with `state` the next block of one.

        Args:
          u: [B, L, D].
          segment_ids: int [B, L], segments do not see each other.
          state: of the blocks so far (see `initial_state`); forward mixers only.

        Returns:
          [B, L, D] and the state after the last step in the forward direction.
        """
        if state is not None and self.backward is not None:
            raise ValueError("a mixer of both directions needs its whole sequence at once")
        u = constrain(u, "batch", None, None)  # the scan walks the whole length
        x, z = self.in_proj(u)  # 2 x [B, L, E]
        y, state = self.forward(u, x, segment_ids, state)
        if self.backward is not None:
            y += self.backward(u, x, segment_ids)[0]
        y *= jax.nn.silu(z)
        return self.out_proj(y if self.norm is None else self.norm(y)), state

    def initial_state(self, batch: int) -> State:
        """The state before the first block."""
        return self.forward.initial_state(batch)
