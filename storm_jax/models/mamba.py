"""A Mamba-1 mixer (Gu and Dao, arXiv 2312.00752) that reads a sequence in one or both directions.

    x, z = in_proj(u)                                    shared by the directions
    y_d  = scan_d(silu(conv_d(x)))                       own conv, x_proj, dt_proj, A, D
    out  = out_proj((y_forward + y_backward) * silu(z))  shared; starts at zero

Both conv and scan stop where the segment id changes. A mixer of one direction can read a sequence in
blocks: it returns the state with which the next block goes on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import MambaConfig
from storm_jax.models.layers import Einsum, PairedLinear
from storm_jax.ops.causal_conv import causal_conv
from storm_jax.ops.selective_scan import selective_scan
from storm_jax.sharding import constrain


class MambaState(NamedTuple):
    """What a forward mixer remembers of a sequence."""

    conv: jax.Array  # [B, K-1, E], the last inputs of the convolution
    h: jax.Array  # [B, E, N] fp32


class MambaMixer(nnx.Module):
    """[B, L, D] -> [B, L, D]; with a zero `out_proj`, as it starts, the output is zero."""

    def __init__(self, width: int, config: MambaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        inner = config.expand * width
        self.in_proj = PairedLinear(width, inner, rngs=rngs, dtype=dtype)
        self.forward = DirectedScan(inner, width, config, rngs=rngs, dtype=dtype)
        self.backward = (
            DirectedScan(inner, width, config, rngs=rngs, dtype=dtype, reverse=True)
            if config.direction == "both"
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
        self, u: jax.Array, segment_ids: jax.Array | None = None, state: MambaState | None = None
    ) -> tuple[jax.Array, MambaState]:
        """Mixes a sequence, or with `state` the next block of one.

        Args:
          u: [B, L, D].
          segment_ids: int [B, L], segments do not see each other.
          state: of the blocks so far; forward mixers only.

        Returns:
          [B, L, D] and the state after the last step in the forward direction.
        """
        if state is not None and self.backward is not None:
            raise ValueError("a mixer of both directions needs its whole sequence at once")
        u = constrain(u, "batch", None, None)  # the scan walks the whole length
        x, z = self.in_proj(u)  # 2 x [B, L, E]
        y, state = self.forward(x, segment_ids, state)
        if self.backward is not None:
            y += self.backward(x, segment_ids)[0]
        return self.out_proj(y * jax.nn.silu(z)), state

    def initial_state(self, batch: int) -> MambaState:
        """The state before the first block."""
        taps, inner = self.forward.conv_kernel.shape
        return MambaState(
            conv=jnp.zeros((batch, taps - 1, inner), self.forward.dtype),
            h=jnp.zeros((batch, inner, self.forward.state), jnp.float32),
        )


class DirectedScan(nnx.Module):
    """Conv, input-dependent (dt, B, C) and scan of one direction: [B, L, E] -> [B, L, E], and the
    state after the last step that it reads."""

    def __init__(
        self,
        inner: int,
        width: int,
        config: MambaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        reverse: bool = False,
    ):
        state, taps = config.d_state, config.d_conv
        rank = math.ceil(width / 16)
        self.state, self.rank, self.reverse, self.dtype = state, rank, reverse, dtype

        def param(value: jax.Array, *axes: str | None) -> nnx.Param:
            return nnx.Param(value, logical_axes=axes)

        def uniform(shape: tuple[int, ...], bound: float) -> jax.Array:
            return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)

        self.conv_kernel = param(uniform((taps, inner), taps**-0.5), None, "inner")
        self.conv_bias = param(uniform((inner,), taps**-0.5), "inner")
        self.x_proj = Einsum(
            "ble,er->blr", (inner, rank + 2 * state), ("inner", None), rngs=rngs, dtype=dtype
        )
        self.dt_proj = Einsum(
            "blr,re->ble",
            (rank, inner),
            (None, "inner"),
            kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            rngs=rngs,
            dtype=dtype,
        )
        # Step sizes start log-uniform in [1e-3, 1e-1]; dt_bias is their inverse softplus.
        low, high = math.log(1e-3), math.log(1e-1)
        step = jnp.exp(jax.random.uniform(rngs.params(), (inner,), minval=low, maxval=high))
        self.dt_bias = param(step + jnp.log(-jnp.expm1(-step)), "inner")
        rates = jnp.arange(1, state + 1, dtype=jnp.float32)
        self.A_log = param(jnp.log(jnp.tile(rates, (inner, 1))), "inner", None)
        self.D = param(jnp.ones((inner,), jnp.float32), "inner")

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, state: MambaState | None = None
    ) -> tuple[jax.Array, MambaState]:
        x, last = causal_conv(
            x,
            self.conv_kernel[...].astype(self.dtype),
            self.conv_bias[...].astype(self.dtype),
            segment_ids=segment_ids,
            reverse=self.reverse,
            before=None if state is None else state.conv,
        )
        x = jax.nn.silu(x)
        dt, B, C = jnp.split(self.x_proj(x), [self.rank, self.rank + self.state], axis=-1)
        y, h = selective_scan(
            x,
            self.dt_proj(dt),
            -jnp.exp(self.A_log[...]),
            B,
            C,
            self.D[...],
            dt_bias=self.dt_bias[...],
            reverse=self.reverse,
            segment_ids=segment_ids,
            h0=None if state is None else state.h,
        )
        return y, MambaState(last, h)
