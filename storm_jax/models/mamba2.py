"""A Mamba-2 mixer (Dao and Gu, arXiv 2405.21060) that reads a sequence in one or both directions.

    x, z   = in_proj(u)                                  shared by the directions
    B, C   = split(bc_proj_d(u)), dt = dt_proj_d(u)      own projections, for each direction d
    y_d    = ssd_d(silu(conv_d(x)), dt, silu(conv_d(B, C)))
    out    = out_proj(RMSNorm((y_forward + y_backward) * silu(z)))    shared; starts at zero

It is another model than Mamba-1: a head of `head_dim` channels decays at one rate, and B and C come
from the layer's input and are the same for all heads. In return its scan is made of matrix products.
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
from storm_jax.ops.ssd import ssd
from storm_jax.sharding import constrain


class Mamba2State(NamedTuple):
    """What a forward mixer remembers of a sequence."""

    conv_x: jax.Array  # [B, K-1, E], the last inputs of the convolutions
    conv_bc: jax.Array  # [B, K-1, 2 N]
    h: jax.Array  # [B, H, P, N] fp32


class Mamba2Mixer(nnx.Module):
    """[B, L, D] -> [B, L, D]; with a zero `out_proj`, as it starts, the output is zero."""

    def __init__(self, width: int, config: MambaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        inner = config.expand * width
        self.in_proj = PairedLinear(width, inner, rngs=rngs, dtype=dtype)
        self.forward = DirectedSSD(inner, width, config, rngs=rngs, dtype=dtype)
        self.backward = (
            DirectedSSD(inner, width, config, rngs=rngs, dtype=dtype, reverse=True)
            if config.direction == "both"
            else None
        )
        self.norm = nnx.RMSNorm(inner, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.out_proj = Einsum(
            "ble,ed->bld",
            (inner, width),
            ("inner", "embed"),
            kernel_init=nnx.initializers.zeros,
            rngs=rngs,
            dtype=dtype,
        )

    def __call__(
        self, u: jax.Array, segment_ids: jax.Array | None = None, state: Mamba2State | None = None
    ) -> tuple[jax.Array, Mamba2State]:
        """Mixes a sequence, or with `state` the next block of one (see `MambaMixer`)."""
        if state is not None and self.backward is not None:
            raise ValueError("a mixer of both directions needs its whole sequence at once")
        u = constrain(u, "batch", None, None)  # the scan walks the whole length
        x, z = self.in_proj(u)  # 2 x [B, L, E]
        y, state = self.forward(u, x, segment_ids, state)
        if self.backward is not None:
            y += self.backward(u, x, segment_ids)[0]
        return self.out_proj(self.norm(y * jax.nn.silu(z))), state

    def initial_state(self, batch: int) -> Mamba2State:
        """The state before the first block."""
        scan = self.forward
        taps, inner = scan.conv_x_kernel.shape
        heads = inner // scan.head_dim
        return Mamba2State(
            conv_x=jnp.zeros((batch, taps - 1, inner), scan.dtype),
            conv_bc=jnp.zeros((batch, taps - 1, 2 * scan.state), scan.dtype),
            h=jnp.zeros((batch, heads, scan.head_dim, scan.state), jnp.float32),
        )


class DirectedSSD(nnx.Module):
    """Convs, input-dependent (dt, B, C) and scan of one direction: [B, L, D] and [B, L, E] ->
    [B, L, E], and the state after the last step that it reads."""

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
        state, taps, heads = config.d_state, config.d_conv, inner // config.head_dim
        self.state, self.head_dim = state, config.head_dim
        self.reverse, self.dtype = reverse, dtype

        def param(value: jax.Array, *axes: str | None) -> nnx.Param:
            return nnx.Param(value, logical_axes=axes)

        def uniform(shape: tuple[int, ...], low: float, high: float) -> jax.Array:
            return jax.random.uniform(rngs.params(), shape, jnp.float32, low, high)

        bound = taps**-0.5
        self.conv_x_kernel = param(uniform((taps, inner), -bound, bound), None, "inner")
        self.conv_x_bias = param(uniform((inner,), -bound, bound), "inner")
        self.conv_bc_kernel = param(uniform((taps, 2 * state), -bound, bound), None, None)
        self.conv_bc_bias = param(uniform((2 * state,), -bound, bound), None)
        self.bc_proj = Einsum(
            "bld,dn->bln", (width, 2 * state), ("embed", None), rngs=rngs, dtype=dtype
        )
        self.dt_proj = Einsum(
            "bld,dh->blh", (width, heads), ("embed", "inner"), rngs=rngs, dtype=dtype
        )
        # Step sizes start log-uniform in [1e-3, 1e-1]; dt_bias is their inverse softplus.
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
        x, last_x = self._conv(
            x, self.conv_x_kernel, self.conv_x_bias, segment_ids, state and state.conv_x
        )
        bc, last_bc = self._conv(
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
        return y.reshape(x.shape), Mamba2State(last_x, last_bc, h)

    def _conv(
        self,
        x: jax.Array,
        kernel: nnx.Param,
        bias: nnx.Param,
        segment_ids: jax.Array | None,
        before: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        x, last = causal_conv(
            x,
            kernel[...].astype(self.dtype),
            bias[...].astype(self.dtype),
            segment_ids=segment_ids,
            reverse=self.reverse,
            before=before,
        )
        return jax.nn.silu(x), last
