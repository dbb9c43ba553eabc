"""One direction of a Mamba-2 mixer (Dao and Gu, arXiv 2405.21060).

    B, C = split(silu(conv(bc_proj(u))))
    y = ssd(silu(conv(x)), dt_proj(u), A, B, C, D)

This is a different model than Mamba-1: a head of `head_dim` channels has a single decay rate, and B and C
are computed from the input of the mixer and shared by all heads. In return, the scan consists of matrix
products.
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
from storm_jax.ops.ssd import ssd


class Mamba2State(NamedTuple):
    """The state of a direction between two blocks of a sequence."""

    conv_x: jax.Array  # [B, K-1, E], the `cache` of the convolutions
    conv_bc: jax.Array  # [B, K-1, 2 N]
    h: jax.Array  # [B, H, P, N] fp32


class Mamba2Direction(nnx.Module):
    """Convolutions, input-dependent (dt, B, C) and SSD."""

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
        d_state, taps, heads = config.d_state, config.d_conv, inner // config.head_dim
        self.d_state, self.head_dim = d_state, config.head_dim
        self.reverse, self.dtype = reverse, dtype

        def param(value: jax.Array, *axes: str | None) -> nnx.Param:
            return nnx.Param(value, logical_axes=axes)

        def uniform(shape: tuple[int, ...], low: float, high: float) -> jax.Array:
            return jax.random.uniform(rngs.params(), shape, jnp.float32, low, high)

        bound = taps**-0.5
        self.conv_x_kernel = param(uniform((taps, inner), -bound, bound), None, "inner")
        self.conv_x_bias = param(uniform((inner,), -bound, bound), "inner")
        self.conv_bc_kernel = param(uniform((taps, 2 * d_state), -bound, bound), None, None)
        self.conv_bc_bias = param(uniform((2 * d_state,), -bound, bound), None)
        self.bc_proj = Einsum(
            "bld,dn->bln", (width, 2 * d_state), ("embed", None), rngs=rngs, dtype=dtype
        )
        self.dt_proj = Einsum(
            "bld,dh->blh", (width, heads), ("embed", "inner"), rngs=rngs, dtype=dtype
        )
        # Initial step sizes are log-uniform in [1e-3, 1e-1]; dt_bias is their inverse softplus.
        step = jnp.exp(uniform((heads,), math.log(1e-3), math.log(1e-1)))
        self.dt_bias = param(step + jnp.log(-jnp.expm1(-step)), "inner")
        self.A_log = param(jnp.log(uniform((heads,), 1, 16)), "inner")
        self.D = param(jnp.ones((heads,), jnp.float32), "inner")

    def __call__(
        self,
        u: jax.Array,
        x: jax.Array,
        segment_ids: jax.Array | None,
        state: Mamba2State | None = None,
    ) -> tuple[jax.Array, Mamba2State]:
        """See `storm_jax.models.mamba.Direction`."""
        x, conv_x = self._conv(
            x, self.conv_x_kernel, self.conv_x_bias, segment_ids, state and state.conv_x
        )
        bc, conv_bc = self._conv(
            self.bc_proj(u),
            self.conv_bc_kernel,
            self.conv_bc_bias,
            segment_ids,
            state and state.conv_bc,
        )
        B, C = jnp.split(bc[:, :, None], 2, axis=-1)  # 2 x [B, L, 1, N]
        y, h = ssd(
            x.reshape(*x.shape[:2], -1, self.head_dim),  # [B, L, H, P]
            self.dt_proj(u),
            -jnp.exp(self.A_log[...]),
            B,
            C,
            self.D[...],
            dt_bias=self.dt_bias[...],
            reverse=self.reverse,
            segment_ids=segment_ids,
            h0=state and state.h,
        )
        return y.reshape(x.shape), Mamba2State(conv_x, conv_bc, h)

    def initial_state(self, batch: int) -> Mamba2State:
        """The state before the first block."""
        taps, inner = self.conv_x_kernel.shape
        heads = inner // self.head_dim
        return Mamba2State(
            conv_x=jnp.zeros((batch, taps - 1, inner), self.dtype),
            conv_bc=jnp.zeros((batch, taps - 1, 2 * self.d_state), self.dtype),
            h=jnp.zeros((batch, heads, self.head_dim, self.d_state), jnp.float32),
        )

    def _conv(
        self,
        x: jax.Array,
        kernel: nnx.Param,
        bias: nnx.Param,
        segment_ids: jax.Array | None,
        cache: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        x, next_cache = causal_conv(
            x,
            kernel[...].astype(self.dtype),
            bias[...].astype(self.dtype),
            segment_ids=segment_ids,
            reverse=self.reverse,
            cache=cache,
        )
        return jax.nn.silu(x), next_cache
