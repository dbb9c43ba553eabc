"""One direction of a Mamba-1 mixer (Gu and Dao, arXiv 2312.00752).

    x = silu(conv(x))
    dt, B, C = split(x_proj(x))
    y = selective_scan(x, dt_proj(dt), A, B, C, D)

Each channel has `d_state` decay rates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import MambaConfig
from storm_jax.models.layers import Einsum
from storm_jax.ops.causal_conv import causal_conv
from storm_jax.ops.selective_scan import selective_scan


class Mamba1State(NamedTuple):
    """The state of a direction between two blocks of a sequence."""

    conv: jax.Array  # [B, K-1, E], the `cache` of the convolution
    h: jax.Array  # [B, E, N] fp32


class Mamba1Direction(nnx.Module):
    """Convolution, input-dependent (dt, B, C) and selective scan."""

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
        d_state, taps = config.d_state, config.d_conv
        dt_rank = math.ceil(width / 16)
        self.d_state, self.dt_rank = d_state, dt_rank
        self.reverse, self.dtype = reverse, dtype

        def param(value: jax.Array, *axes: str | None) -> nnx.Param:
            return nnx.Param(value, logical_axes=axes)

        def uniform(shape: tuple[int, ...], bound: float) -> jax.Array:
            return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)

        self.conv_kernel = param(uniform((taps, inner), taps**-0.5), None, "inner")
        self.conv_bias = param(uniform((inner,), taps**-0.5), "inner")
        self.x_proj = Einsum(
            "ble,er->blr",
            (inner, dt_rank + 2 * d_state),
            ("wide_inner", None),
            rngs=rngs,
            dtype=dtype,
        )
        self.dt_proj = Einsum(
            "blr,re->ble",
            (dt_rank, inner),
            (None, "wide_inner"),
            kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            rngs=rngs,
            dtype=dtype,
        )
        # Initial step sizes are log-uniform in [1e-3, 1e-1]; dt_bias is their inverse softplus.
        low, high = math.log(1e-3), math.log(1e-1)
        step = jnp.exp(jax.random.uniform(rngs.params(), (inner,), minval=low, maxval=high))
        self.dt_bias = param(step + jnp.log(-jnp.expm1(-step)), "inner")
        rates = jnp.arange(1, d_state + 1, dtype=jnp.float32)
        self.A_log = param(jnp.log(jnp.tile(rates, (inner, 1))), "inner", None)
        self.D = param(jnp.ones((inner,), jnp.float32), "inner")

    def __call__(
        self,
        u: jax.Array,
        x: jax.Array,
        segment_ids: jax.Array | None,
        state: Mamba1State | None = None,
    ) -> tuple[jax.Array, Mamba1State]:
        """See `storm_jax.models.mamba.Direction`; `u` is not used."""
        x, conv_cache = causal_conv(
            x,
            self.conv_kernel[...].astype(self.dtype),
            self.conv_bias[...].astype(self.dtype),
            segment_ids=segment_ids,
            reverse=self.reverse,
            cache=None if state is None else state.conv,
        )
        x = jax.nn.silu(x)
        dt, B, C = jnp.split(self.x_proj(x), [self.dt_rank, self.dt_rank + self.d_state], axis=-1)
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
        return y, Mamba1State(conv_cache, h)

    def initial_state(self, batch: int) -> Mamba1State:
        """The state before the first block."""
        taps, inner = self.conv_kernel.shape
        return Mamba1State(
            conv=jnp.zeros((batch, taps - 1, inner), self.dtype),
            h=jnp.zeros((batch, inner, self.d_state), jnp.float32),
        )
