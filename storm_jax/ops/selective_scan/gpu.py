"""The selective scan as Pallas kernels for NVIDIA GPUs, lowered through Triton.

A program is one warp with one lane per channel. It holds a tile [N, 32] of the state in registers and
iterates over the steps. If rows and tiles alone do not fill the GPU, the sequence is also divided into
splits, which programs process in parallel:

  forward    A first pass computes the end state, from a zero state, and the decay of each split. A
             second pass combines them into the initial state of each split, and computes y and the
             state before every 64th step.
  backward   The same two passes over the adjoint, in the opposite direction. A program processes chunks
             of 64 steps: it recomputes their states from the stored one, writes every 4th to a scratch
             buffer, and then walks back 4 steps at a time with their states in registers.

The gradients of B and C are sums over the width. Each tile writes its own part, and the parts are summed
outside of the kernel. Nothing uses atomics, so the results are deterministic.

Letters: B batch, L length, E width, N state size, T tiles of the width, S splits of the length.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from storm_jax.ops.selective_scan.inputs import Inputs, step_size, step_size_derivative

LANES = 32  # channels per program
CHUNK = 64  # steps between stored states
UNROLL = 8  # see `_Plan`; interpreted kernels use less
SUBCHUNK = 4
MIN_PROGRAMS = 2048  # enough warps to hide latency on 132 multiprocessors


class SavedStates(NamedTuple):
    """What the forward pass stores for the backward pass."""

    chunk_states: jax.Array  # [B, ceil(L / 64), N, E], the state before every 64th step
    split_decays: jax.Array  # [B, S, N, E], the decay of a state over each split


def forward(
    inputs: Inputs, reset: jax.Array, h0: jax.Array, *, reverse: bool, interpret: bool = False
) -> tuple[jax.Array, jax.Array, SavedStates]:
    """Returns y [B, L, E] in the dtype of x, the final state [B, N, E], and the saved states."""
    plan = _plan(inputs, reverse, interpret)
    call = functools.partial(_launch, plan, inputs, reset)
    per_split = (plan.batch, plan.splits, plan.d_state, plan.width)
    if plan.splits > 1:
        ends, decays = call(_ends_kernel, [(per_split, jnp.float32)] * 2)
    else:  # unused
        ends = decays = jnp.zeros_like(h0, shape=per_split)
    y, h, states = call(
        _outputs_kernel,
        [
            (inputs.x.shape, inputs.x.dtype),
            (h0.shape, jnp.float32),
            ((plan.batch, plan.chunks, plan.d_state, plan.width), jnp.float32),
        ],
        h0,
        ends,
        decays,
    )
    return y, h, SavedStates(states, decays)


def backward(
    inputs: Inputs,
    reset: jax.Array,
    saved: SavedStates,
    dy: jax.Array,
    dh_last: jax.Array,
    *,
    reverse: bool,
    interpret: bool = False,
) -> tuple[Inputs, jax.Array]:
    """Returns the gradients of the inputs and of h0, given those of the outputs."""
    plan = _plan(inputs, reverse, interpret)
    call = functools.partial(_launch, plan, inputs, reset)
    batch, length, splits = plan.batch, plan.length, plan.splits
    per_split = (batch, splits, plan.d_state, plan.width)
    if plan.splits > 1:
        (ends,) = call(_adjoint_ends_kernel, [(per_split, jnp.float32)], dy)
    else:
        ends = jnp.zeros_like(dh_last, shape=per_split)
    per_tile = (plan.tiles, batch, length, plan.d_state)
    scratch = (batch, plan.tiles, splits, CHUNK // plan.subchunk, plan.padded_d_state, LANES)
    dx, ddt, dA, dB, dC, dD, dbias, dh0, _ = call(
        _gradients_kernel,
        [
            (inputs.x.shape, inputs.x.dtype),
            (inputs.dt.shape, inputs.dt.dtype),
            (per_split, jnp.float32),
            (per_tile, jnp.float32),
            (per_tile, jnp.float32),
            ((batch, splits, plan.width), jnp.float32),
            ((batch, splits, plan.width), jnp.float32),
            (dh_last.shape, jnp.float32),
            (scratch, jnp.float32),
        ],
        dy,
        dh_last,
        saved.chunk_states,
        saved.split_decays,
        ends,
    )
    grads = Inputs(
        x=dx,
        dt=ddt,
        A=dA.sum(axis=(0, 1)),
        B=dB.sum(axis=0).astype(inputs.B.dtype),
        C=dC.sum(axis=0).astype(inputs.C.dtype),
        D=dD.sum(axis=(0, 1)),
        dt_bias=None if inputs.dt_bias is None else dbias.sum(axis=(0, 1)),
    )
    return grads, dh0


# Partitioning of the work.


class _Plan(NamedTuple):
    """Sizes and static options of a launch."""

    batch: int
    length: int
    width: int
    d_state: int
    splits: int
    split_steps: int  # steps per split, a multiple of CHUNK
    unroll: int  # steps whose loads are issued together
    subchunk: int  # steps whose states the backward pass keeps in registers
    reverse: bool
    softplus: bool
    interpret: bool

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.width, LANES)

    @property
    def padded_d_state(self) -> int:
        return pl.next_power_of_2(self.d_state)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, CHUNK)


def _plan(inputs: Inputs, reverse: bool, interpret: bool) -> _Plan:
    batch, length, width = inputs.x.shape
    wanted = math.ceil(MIN_PROGRAMS / (batch * pl.cdiv(width, LANES)))
    split_steps = CHUNK * max(1, pl.cdiv(length, CHUNK) // wanted)
    return _Plan(
        batch=batch,
        length=length,
        width=width,
        d_state=inputs.A.shape[0],
        splits=pl.cdiv(length, split_steps),
        split_steps=split_steps,
        # XLA compiles long loop bodies slowly.
        unroll=2 if interpret else UNROLL,
        subchunk=2 if interpret else SUBCHUNK,
        reverse=reverse,
        softplus=inputs.dt_bias is not None,
        interpret=interpret,
    )


def _launch(
    plan: _Plan,
    inputs: Inputs,
    reset: jax.Array,
    kernel: Callable[..., None],
    results: Sequence[tuple[tuple[int, ...], Any]],
    *extra: jax.Array,
) -> list[jax.Array]:
    """Runs `kernel(tile, *extra, *results)` for every row, tile and split.

    Args:
      results: shape and dtype of each result.
    """
    bias = inputs.D if inputs.dt_bias is None else inputs.dt_bias  # a placeholder without softplus
    arrays = (*inputs._replace(dt_bias=bias), reset.astype(jnp.int32))

    def body(*refs: Any) -> None:
        kernel(_Tile(plan, *refs[: len(arrays)]), *refs[len(arrays) :])

    call = pl.pallas_call(
        body,
        out_shape=[
            jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(inputs.x).mat)
            for shape, dtype in results
        ],
        grid=(plan.batch, plan.tiles, plan.splits),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=plan.interpret,
        name="selective_scan" + kernel.__name__.removesuffix("_kernel"),
    )
    with contextlib.nullcontext() if plan.interpret else _lowering_target(inputs.x):
        return call(*arrays, *extra)


def _lowering_target(x: jax.Array) -> AbstractContextManager[None]:
    """Returns a context with an abstract GPU if neither this machine nor the context mesh has a GPU.

    Since JAX 0.11, Pallas looks up the GPU that it lowers a kernel for. The model does not matter here:
    these kernels lower to the same code for all of them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    has_gpu = jax.default_backend() == "gpu" or (device and device.platform in ("gpu", "cuda"))
    # Arrays that vary over mesh axes cannot be used outside of the context of their mesh.
    if has_gpu or jax.typeof(x).mat.varying:
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


# A program's view of the arrays.


class _Step(NamedTuple):
    """One step of a tile, in fp32. A step beyond the end of the sequence leaves the state unchanged."""

    t: jax.Array  # index into the sequence
    valid: jax.Array  # false beyond the end of the sequence
    x: jax.Array  # [32]
    dt: jax.Array  # [32]
    B: jax.Array  # [N]
    C: jax.Array  # [N]
    no_reset: jax.Array  # false if the state is reset before the step

    def recurrence(self, A: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns decay and input [N, 32]; A is scaled by log2(e), because GPUs compute exp2."""
        decay = jnp.where(self.no_reset, jnp.exp2(self.dt[None, :] * A), 0.0)
        return decay, (self.dt * self.x)[None, :] * self.B[:, None]


class _Tile:
    """The part of the arrays that a program reads and writes.

    Steps and splits are numbered in scan order.
    """

    def __init__(
        self, plan: _Plan, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, reset: Any
    ) -> None:
        self.plan = plan
        self.x, self.dt, self.B, self.C, self.reset = x, dt, B, C, reset
        self.row, self.index, self.split = (pl.program_id(axis) for axis in range(3))
        self.channels = self.index * LANES + jnp.arange(LANES)
        self.states = jnp.arange(plan.padded_d_state)
        self.shape = (self.states.size, LANES)
        # Masks of the valid entries; None if all are valid, for unmasked loads.
        channel_mask, state_mask = self.channels < plan.width, self.states < plan.d_state
        self.channel_mask = None if plan.width % LANES == 0 else channel_mask
        self.state_mask = None if plan.d_state == self.states.size else state_mask
        self.tile_mask = None
        if self.channel_mask is not None or self.state_mask is not None:
            self.tile_mask = state_mask[:, None] & channel_mask[None, :]
        self.A = self.load_state(A, ()) * math.log2(math.e)
        self.D = self.load_channels(D, ())
        self.dt_bias = self.load_channels(dt_bias, ()) if plan.softplus else None

    def load_channels(self, ref: Any, index: tuple) -> jax.Array:
        """[32]."""
        return _load(ref.at[(*index, self.channels)], self.channel_mask)

    def store_channels(self, ref: Any, index: tuple, v: jax.Array, valid: jax.Array) -> None:
        mask = valid if self.channel_mask is None else self.channel_mask & valid
        _store(ref.at[(*index, self.channels)], v, mask)

    def load_d_state(self, ref: Any, index: tuple) -> jax.Array:
        """[N]."""
        return _load(ref.at[(*index, self.states)], self.state_mask)

    def store_d_state(self, ref: Any, index: tuple, v: jax.Array, valid: jax.Array) -> None:
        mask = valid if self.state_mask is None else self.state_mask & valid
        _store(ref.at[(*index, self.states)], v, mask)

    def load_state(self, ref: Any, index: tuple) -> jax.Array:
        """[N, 32]."""
        return _load(ref.at[(*index, self.states[:, None], self.channels[None, :])], self.tile_mask)

    def store_state(self, ref: Any, index: tuple, h: jax.Array) -> None:
        _store(ref.at[(*index, self.states[:, None], self.channels[None, :])], h, self.tile_mask)

    def scratch(self, ref: Any, group: jax.Array) -> Any:
        """A reference to the program's scratch state before a subchunk."""
        at = (self.row, self.index, self.split, group)
        return ref.at[(*at, self.states[:, None], jnp.arange(LANES)[None, :])]

    def chunks(self) -> tuple[jax.Array, jax.Array]:
        """The range of the split's chunks: first, and one past the last."""
        per_split = self.plan.split_steps // CHUNK
        first = self.split * per_split
        return first, jnp.minimum(first + per_split, self.plan.chunks)

    def load_steps(self, start: jax.Array, count: int) -> list[_Step]:
        """Loads the steps [start, start + count)."""
        return [self._load_step(start + k) for k in range(count)]

    def _load_step(self, i: jax.Array) -> _Step:
        plan = self.plan
        valid = i < plan.length
        i = jnp.minimum(i, plan.length - 1)
        t = plan.length - 1 - i if plan.reverse else i
        at = (self.row, t)
        return _Step(
            t=t,
            valid=valid,
            x=self.load_channels(self.x, at),
            dt=jnp.where(valid, step_size(self.load_channels(self.dt, at), self.dt_bias), 0.0),
            B=self.load_d_state(self.B, at),
            C=self.load_d_state(self.C, at),
            no_reset=(plgpu.load(self.reset.at[at]) == 0) | ~valid,
        )


def _load(at: Any, mask: jax.Array | None) -> jax.Array:
    """Loads as fp32, with zeros for masked entries."""
    other = None if mask is None else jnp.zeros((), at.dtype)
    return plgpu.load(at, mask=mask, other=other).astype(jnp.float32)


def _store(at: Any, v: jax.Array, mask: jax.Array | None) -> None:
    mask = None if mask is None else jnp.broadcast_to(mask, v.shape)
    plgpu.store(at, v.astype(at.dtype), mask=mask)


def _fold_steps(tile: _Tile, step: Callable[[Any, _Step], Any], carry: Any) -> Any:
    """Computes `carry = step(carry, now)` over the steps of the tile's split."""
    first, last = tile.chunks()

    def group(g: jax.Array, carry: Any) -> Any:
        for now in tile.load_steps(g * tile.plan.unroll, tile.plan.unroll):
            carry = step(carry, now)
        return carry

    return jax.lax.fori_loop(
        first * CHUNK // tile.plan.unroll, last * CHUNK // tile.plan.unroll, group, carry
    )


# Forward kernels.


def _ends_kernel(tile: _Tile, ends: Any, decays: Any) -> None:
    """Computes the state after each split from a zero state, and the decay over the split."""

    def step(carry: tuple, now: _Step) -> tuple:
        h, total, no_reset = carry
        decay, u = now.recurrence(tile.A)
        return decay * h + u, total + now.dt, no_reset & now.no_reset

    zero = jnp.zeros(tile.shape, jnp.float32)
    carry = (zero, jnp.zeros((LANES,), jnp.float32), jnp.bool_(True))
    h, total, no_reset = _fold_steps(tile, step, carry)
    tile.store_state(ends, (tile.row, tile.split), h)
    decay = jnp.where(no_reset, jnp.exp2(total[None, :] * tile.A), 0.0)
    tile.store_state(decays, (tile.row, tile.split), decay)


def _outputs_kernel(
    tile: _Tile, h0: Any, ends: Any, decays: Any, y: Any, last: Any, states: Any
) -> None:
    def enter(s: jax.Array, h: jax.Array) -> jax.Array:
        at = (tile.row, s)
        return tile.load_state(decays, at) * h + tile.load_state(ends, at)

    h = jax.lax.fori_loop(0, tile.split, enter, tile.load_state(h0, (tile.row,)))

    def chunk(c: jax.Array, h: jax.Array) -> jax.Array:
        tile.store_state(states, (tile.row, c), h)

        def group(g: jax.Array, h: jax.Array) -> jax.Array:
            outputs = []
            for now in tile.load_steps(c * CHUNK + g * tile.plan.unroll, tile.plan.unroll):
                decay, u = now.recurrence(tile.A)
                h = decay * h + u
                out = jnp.sum(h * now.C[:, None], axis=0) + tile.D * now.x
                outputs.append((now, out))
            for now, out in outputs:  # after all loads: a load waits for earlier stores
                tile.store_channels(y, (tile.row, now.t), out, now.valid)
            return h

        return jax.lax.fori_loop(0, CHUNK // tile.plan.unroll, group, h)

    h = jax.lax.fori_loop(*tile.chunks(), chunk, h)

    @pl.when(tile.split == tile.plan.splits - 1)
    def _() -> None:
        tile.store_state(last, (tile.row,), h)


# Backward kernels. The adjoint of the state runs from the last step to the first.


def _adjoint_ends_kernel(tile: _Tile, dy: Any, ends: Any) -> None:
    """Computes the adjoint of the state before each split from a zero adjoint after it."""
    first, last = tile.chunks()
    stop = last * CHUNK // tile.plan.unroll

    def group(k: jax.Array, dh: jax.Array) -> jax.Array:
        steps = tile.load_steps((stop - 1 - k) * tile.plan.unroll, tile.plan.unroll)
        sources = [_load_dy(tile, dy, now) for now in steps]
        for now, source in zip(reversed(steps), reversed(sources), strict=True):
            decay, _ = now.recurrence(tile.A)
            dh = decay * (dh + source[None, :] * now.C[:, None])
        return dh

    dh = jax.lax.fori_loop(
        0, stop - first * CHUNK // tile.plan.unroll, group, jnp.zeros(tile.shape, jnp.float32)
    )
    tile.store_state(ends, (tile.row, tile.split), dh)


def _load_dy(tile: _Tile, dy: Any, now: _Step) -> jax.Array:
    return jnp.where(now.valid, tile.load_channels(dy, (tile.row, now.t)), 0.0)


class _Sums(NamedTuple):
    """Gradients accumulated over a program's steps."""

    A: jax.Array  # [N, 32]
    D: jax.Array  # [32]
    dt_bias: jax.Array  # [32]


class _Backward(NamedTuple):
    """References to the arrays that `_gradients_kernel` reads and writes."""

    dy: Any
    dh_last: Any
    states: Any
    decays: Any
    ends: Any
    # results
    dx: Any
    ddt: Any
    dA: Any
    dB: Any
    dC: Any
    dD: Any
    dbias: Any
    dh0: Any
    scratch: Any


def _gradients_kernel(tile: _Tile, *arrays: Any) -> None:
    refs = _Backward(*arrays)
    splits = tile.plan.splits

    def enter(k: jax.Array, dh: jax.Array) -> jax.Array:
        at = (tile.row, splits - 1 - k)
        return tile.load_state(refs.decays, at) * dh + tile.load_state(refs.ends, at)

    dh = tile.load_state(refs.dh_last, (tile.row,))
    dh = jax.lax.fori_loop(0, splits - 1 - tile.split, enter, dh)

    groups = CHUNK // tile.plan.subchunk
    first, last = tile.chunks()

    def chunk(k: jax.Array, carry: tuple) -> tuple:
        c = last - 1 - k
        _fill_scratch(tile, refs, c)

        def group(i: jax.Array, carry: tuple) -> tuple:
            return _subchunk_backward(tile, refs, c, groups - 1 - i, *carry)

        return jax.lax.fori_loop(0, groups, group, carry)

    zero = jnp.zeros((LANES,), jnp.float32)
    sums = _Sums(jnp.zeros(tile.shape, jnp.float32), zero, zero)
    dh, sums = jax.lax.fori_loop(0, last - first, chunk, (dh, sums))
    at, always = (tile.row, tile.split), jnp.bool_(True)
    tile.store_state(refs.dA, at, sums.A)
    tile.store_channels(refs.dD, at, sums.D, always)
    tile.store_channels(refs.dbias, at, sums.dt_bias, always)

    @pl.when(tile.split == 0)
    def _() -> None:
        tile.store_state(refs.dh0, (tile.row,), dh)


def _fill_scratch(tile: _Tile, refs: _Backward, c: jax.Array) -> None:
    """Recomputes chunk `c` and writes the state before every subchunk to the scratch buffer."""

    def group(g: jax.Array, h: jax.Array) -> jax.Array:
        plgpu.store(tile.scratch(refs.scratch, g), h)
        for now in tile.load_steps(c * CHUNK + g * tile.plan.subchunk, tile.plan.subchunk):
            decay, u = now.recurrence(tile.A)
            h = decay * h + u
        return h

    jax.lax.fori_loop(
        0, CHUNK // tile.plan.subchunk, group, tile.load_state(refs.states, (tile.row, c))
    )
    if not tile.plan.interpret:  # other lanes read what a lane has written
        plgpu.debug_barrier()


def _subchunk_backward(
    tile: _Tile, refs: _Backward, c: jax.Array, g: jax.Array, dh: jax.Array, sums: _Sums
) -> tuple[jax.Array, _Sums]:
    """Propagates the adjoint through subchunk `g` of chunk `c`."""
    steps = tile.load_steps(c * CHUNK + g * tile.plan.subchunk, tile.plan.subchunk)
    sources = [_load_dy(tile, refs.dy, now) for now in steps]
    states = [plgpu.load(tile.scratch(refs.scratch, g))]
    for now in steps:
        decay, u = now.recurrence(tile.A)
        states.append(decay * states[-1] + u)
    for k in reversed(range(tile.plan.subchunk)):
        dh, sums = _step_backward(
            tile, refs, steps[k], sources[k], states[k], states[k + 1], dh, sums
        )
    return dh, sums


def _step_backward(
    tile: _Tile,
    refs: _Backward,
    now: _Step,
    dy: jax.Array,
    h_before: jax.Array,
    h: jax.Array,
    dh: jax.Array,
    sums: _Sums,
) -> tuple[jax.Array, _Sums]:
    """Propagates the adjoint through one step and stores the step's gradients.

    The formulas are those of `xla._local_gradients`.
    """
    decay, _ = now.recurrence(tile.A)
    dh += dy[None, :] * now.C[:, None]
    log_decay = dh * decay * h_before
    du = jnp.sum(dh * now.B[:, None], axis=0)  # gradient of dt * x
    d_step_size = du * now.x + jnp.sum(log_decay * tile.A, axis=0) * math.log(2)
    ddt = jnp.where(now.valid, d_step_size * step_size_derivative(now.dt, tile.dt_bias), 0.0)
    dB = jnp.sum(dh * (now.dt * now.x)[None, :], axis=1)
    dC = jnp.sum(h * dy[None, :], axis=1)
    at, at_tile = (tile.row, now.t), (tile.index, tile.row, now.t)
    tile.store_channels(refs.dx, at, du * now.dt + tile.D * dy, now.valid)
    tile.store_channels(refs.ddt, at, ddt, now.valid)
    tile.store_d_state(refs.dB, at_tile, dB, now.valid)
    tile.store_d_state(refs.dC, at_tile, dC, now.valid)
    sums = _Sums(
        A=sums.A + log_decay * now.dt[None, :],
        D=sums.D + dy * now.x,
        dt_bias=sums.dt_bias + ddt,
    )
    return decay * dh, sums
