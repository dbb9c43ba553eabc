"""The selective scan as Pallas kernels for NVIDIA GPUs, by the Triton route.

A program is one warp with a lane per channel: it holds a tile [N, 32] of the state in registers and
walks the length. Where rows and tiles alone are too few to fill the chip, the length is cut into
segments that programs walk at the same time:

  forward    each segment from a zero state -> its end state and decay; then each again from the state
             that those of the segments before it make: y, and the state before every 64th step.
  backward   the same two passes the other way. A program takes 64 steps at a time: it solves them
             from the stored state, parks the state before every 4th in a scratch buffer, then takes
             the fours in turn, the last first, with their states in registers.

Gradients of B and C are sums over the width: each tile writes its own and they are summed outside,
in one order, so that equal inputs give equal gradients. No sum uses atomics.

Letters: B batch, L length, E width, N state size, T tiles of the width, S segments of the length.
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

from storm_jax.ops.selective_scan.inputs import Inputs, step_size, step_size_slope

LANES = 32  # channels per program
CHUNK = 64  # steps between stored states
GROUP = 8  # steps whose loads are issued together
HELD = 4  # steps whose states the backward pass holds in registers
PROGRAMS = 2048  # enough warps to hide latency on 132 multiprocessors


class Boundaries(NamedTuple):
    """What the forward pass leaves to the backward pass."""

    states: jax.Array  # [B, ceil(L / 64), N, E], before every 64th step
    decays: jax.Array  # [B, S, N, E], of a state over a segment


def forward(
    inputs: Inputs, reset: jax.Array, h0: jax.Array, *, reverse: bool, interpret: bool = False
) -> tuple[jax.Array, jax.Array, Boundaries]:
    """y [B, L, E] in the dtype of x, the last state [B, N, E], and the boundaries."""
    plan = _plan(inputs, reverse, interpret)
    call = functools.partial(_call, plan, inputs, reset)
    per_segment = (plan.batch, plan.segments, plan.state, plan.width)
    if plan.segments > 1:
        ends, decays = call(_ends_kernel, [(per_segment, jnp.float32)] * 2)
    else:  # nobody reads them
        ends = decays = jnp.zeros_like(h0, shape=per_segment)
    y, h, states = call(
        _outputs_kernel,
        [
            (inputs.x.shape, inputs.x.dtype),
            (h0.shape, jnp.float32),
            ((plan.batch, plan.chunks, plan.state, plan.width), jnp.float32),
        ],
        h0,
        ends,
        decays,
    )
    return y, h, Boundaries(states, decays)


def backward(
    inputs: Inputs,
    reset: jax.Array,
    boundaries: Boundaries,
    dy: jax.Array,
    dh_last: jax.Array,
    *,
    reverse: bool,
    interpret: bool = False,
) -> tuple[Inputs, jax.Array]:
    """Gradients of the inputs and of h0, given those of the outputs."""
    plan = _plan(inputs, reverse, interpret)
    call = functools.partial(_call, plan, inputs, reset)
    batch, length, segments = plan.batch, plan.length, plan.segments
    per_segment = (batch, segments, plan.state, plan.width)
    if plan.segments > 1:
        (ends,) = call(_adjoint_ends_kernel, [(per_segment, jnp.float32)], dy)
    else:
        ends = jnp.zeros_like(dh_last, shape=per_segment)
    per_tile = (plan.tiles, batch, length, plan.state)
    parked = (batch, plan.tiles, segments, CHUNK // HELD, plan.state_slots, LANES)
    dx, ddt, dA, dB, dC, dD, dbias, dh0, _ = call(
        _gradients_kernel,
        [
            (inputs.x.shape, inputs.x.dtype),
            (inputs.dt.shape, inputs.dt.dtype),
            (per_segment, jnp.float32),
            (per_tile, jnp.float32),
            (per_tile, jnp.float32),
            ((batch, segments, plan.width), jnp.float32),
            ((batch, segments, plan.width), jnp.float32),
            (dh_last.shape, jnp.float32),
            (parked, jnp.float32),
        ],
        dy,
        dh_last,
        boundaries.states,
        boundaries.decays,
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


# How the work is divided.


class _Plan(NamedTuple):
    batch: int
    length: int
    width: int
    state: int
    segments: int
    span: int  # steps of a segment, a multiple of CHUNK
    reverse: bool
    softplus: bool
    interpret: bool

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.width, LANES)

    @property
    def state_slots(self) -> int:
        return pl.next_power_of_2(self.state)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, CHUNK)


def _plan(inputs: Inputs, reverse: bool, interpret: bool) -> _Plan:
    batch, length, width = inputs.x.shape
    wanted = math.ceil(PROGRAMS / (batch * pl.cdiv(width, LANES)))
    span = CHUNK * max(1, pl.cdiv(length, CHUNK) // wanted)
    return _Plan(
        batch=batch,
        length=length,
        width=width,
        state=inputs.A.shape[0],
        segments=pl.cdiv(length, span),
        span=span,
        reverse=reverse,
        softplus=inputs.dt_bias is not None,
        interpret=interpret,
    )


def _call(
    plan: _Plan,
    inputs: Inputs,
    reset: jax.Array,
    kernel: Callable[..., None],
    results: Sequence[tuple[tuple[int, ...], Any]],
    *more: jax.Array,
) -> list[jax.Array]:
    """Runs a kernel for every row, tile and segment: `kernel(tile, *more, *results)`."""
    bias = inputs.D if inputs.dt_bias is None else inputs.dt_bias  # not read without softplus
    arrays = (*inputs._replace(dt_bias=bias), reset.astype(jnp.int32))

    def body(*refs: Any) -> None:
        kernel(_Tile(plan, *refs[: len(arrays)]), *refs[len(arrays) :])

    call = pl.pallas_call(
        body,
        out_shape=[
            jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(inputs.x).mat)
            for shape, dtype in results
        ],
        grid=(plan.batch, plan.tiles, plan.segments),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=plan.interpret,
        name="selective_scan" + kernel.__name__.removesuffix("_kernel"),
    )
    with contextlib.nullcontext() if plan.interpret else _lowering_target(inputs.x):
        return call(*arrays, *more)


def _lowering_target(x: jax.Array) -> AbstractContextManager[None]:
    """A context that names the GPU to lower for if neither this machine nor the mesh has one.

    Since JAX 0.11 Pallas asks for it; what it lowers these kernels to is the same for every GPU.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    has_gpu = jax.default_backend() == "gpu" or (device and device.platform in ("gpu", "cuda"))
    # Arrays that vary over a mesh's axes cannot leave its context.
    if has_gpu or jax.typeof(x).mat.varying:
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


# What a program sees.


class _Step(NamedTuple):
    """A step of a tile, in fp32; one that lies beyond the length leaves the state as it is."""

    t: jax.Array  # where it lies in the length
    inside: jax.Array
    x: jax.Array  # [32]
    dt: jax.Array  # [32]
    B: jax.Array  # [N]
    C: jax.Array  # [N]
    keep: jax.Array  # false where the state is reset

    def recurrence(self, A: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decay and input [N, 32]; A is in units of log 2, since the chip has exp2."""
        decay = jnp.where(self.keep, jnp.exp2(self.dt[None, :] * A), 0.0)
        return decay, (self.dt * self.x)[None, :] * self.B[:, None]


class _Tile:
    """A program's part of the arrays. Steps and segments are counted in the order of the scan."""

    def __init__(
        self, plan: _Plan, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, reset: Any
    ) -> None:
        self.plan = plan
        self.x, self.dt, self.B, self.C, self.reset = x, dt, B, C, reset
        self.row, self.number, self.segment = (pl.program_id(axis) for axis in range(3))
        self.columns = self.number * LANES + jnp.arange(LANES)
        self.states = jnp.arange(plan.state_slots)
        self.shape = (self.states.size, LANES)
        # Masks of what exists; None where everything does, for whole loads.
        wide, deep = self.columns < plan.width, self.states < plan.state
        self.wide = None if plan.width % LANES == 0 else wide
        self.deep = None if plan.state == self.states.size else deep
        self.both = None
        if self.wide is not None or self.deep is not None:
            self.both = deep[:, None] & wide[None, :]
        self.A = self.load_state(A, ()) * math.log2(math.e)
        self.D = self.load_vector(D, ())
        self.dt_bias = self.load_vector(dt_bias, ()) if plan.softplus else None

    def load_vector(self, ref: Any, index: tuple) -> jax.Array:
        """[32]."""
        return _load(ref.at[(*index, self.columns)], self.wide)

    def store_vector(self, ref: Any, index: tuple, v: jax.Array, inside: jax.Array) -> None:
        mask = inside if self.wide is None else self.wide & inside
        _store(ref.at[(*index, self.columns)], v, mask)

    def load_coefficients(self, ref: Any, index: tuple) -> jax.Array:
        """[N]."""
        return _load(ref.at[(*index, self.states)], self.deep)

    def store_coefficients(self, ref: Any, index: tuple, v: jax.Array, inside: jax.Array) -> None:
        mask = inside if self.deep is None else self.deep & inside
        _store(ref.at[(*index, self.states)], v, mask)

    def load_state(self, ref: Any, index: tuple) -> jax.Array:
        """[N, 32]."""
        return _load(ref.at[(*index, self.states[:, None], self.columns[None, :])], self.both)

    def store_state(self, ref: Any, index: tuple, h: jax.Array) -> None:
        _store(ref.at[(*index, self.states[:, None], self.columns[None, :])], h, self.both)

    def parked(self, ref: Any, group: jax.Array) -> Any:
        """Where the program parks the state before a group of steps."""
        at = (self.row, self.number, self.segment, group)
        return ref.at[(*at, self.states[:, None], jnp.arange(LANES)[None, :])]

    def chunks(self) -> tuple[jax.Array, jax.Array]:
        """The first chunk of the segment and the one after its last."""
        per_segment = self.plan.span // CHUNK
        first = self.segment * per_segment
        return first, jnp.minimum(first + per_segment, self.plan.chunks)

    def load_steps(self, start: jax.Array, count: int) -> list[_Step]:
        """The steps [start, start + count)."""
        return [self._load_step(start + k) for k in range(count)]

    def _load_step(self, i: jax.Array) -> _Step:
        plan = self.plan
        inside = i < plan.length
        i = jnp.minimum(i, plan.length - 1)
        t = plan.length - 1 - i if plan.reverse else i
        at = (self.row, t)
        return _Step(
            t=t,
            inside=inside,
            x=self.load_vector(self.x, at),
            dt=jnp.where(inside, step_size(self.load_vector(self.dt, at), self.dt_bias), 0.0),
            B=self.load_coefficients(self.B, at),
            C=self.load_coefficients(self.C, at),
            keep=(plgpu.load(self.reset.at[at]) == 0) | ~inside,
        )


def _load(at: Any, mask: jax.Array | None) -> jax.Array:
    """In fp32, zero where masked."""
    other = None if mask is None else jnp.zeros((), at.dtype)
    return plgpu.load(at, mask=mask, other=other).astype(jnp.float32)


def _store(at: Any, v: jax.Array, mask: jax.Array | None) -> None:
    mask = None if mask is None else jnp.broadcast_to(mask, v.shape)
    plgpu.store(at, v.astype(at.dtype), mask=mask)


def _through(tile: _Tile, step: Callable[[Any, _Step], Any], carry: Any) -> Any:
    """Takes the steps of the tile's segment in turn."""
    first, last = tile.chunks()

    def group(g: jax.Array, carry: Any) -> Any:
        for now in tile.load_steps(g * GROUP, GROUP):
            carry = step(carry, now)
        return carry

    return jax.lax.fori_loop(first * CHUNK // GROUP, last * CHUNK // GROUP, group, carry)


# Forward kernels.


def _ends_kernel(tile: _Tile, ends: Any, decays: Any) -> None:
    """The state after each segment, from zero, and what a state decays by over it."""

    def step(carry: tuple, now: _Step) -> tuple:
        h, total, kept = carry
        decay, u = now.recurrence(tile.A)
        return decay * h + u, total + now.dt, kept & now.keep

    zero = jnp.zeros(tile.shape, jnp.float32)
    carry = (zero, jnp.zeros((LANES,), jnp.float32), jnp.bool_(True))
    h, total, kept = _through(tile, step, carry)
    tile.store_state(ends, (tile.row, tile.segment), h)
    decay = jnp.where(kept, jnp.exp2(total[None, :] * tile.A), 0.0)
    tile.store_state(decays, (tile.row, tile.segment), decay)


def _outputs_kernel(
    tile: _Tile, h0: Any, ends: Any, decays: Any, y: Any, last: Any, states: Any
) -> None:
    def enter(s: jax.Array, h: jax.Array) -> jax.Array:
        at = (tile.row, s)
        return tile.load_state(decays, at) * h + tile.load_state(ends, at)

    h = jax.lax.fori_loop(0, tile.segment, enter, tile.load_state(h0, (tile.row,)))

    def chunk(c: jax.Array, h: jax.Array) -> jax.Array:
        tile.store_state(states, (tile.row, c), h)

        def group(g: jax.Array, h: jax.Array) -> jax.Array:
            outputs = []
            for now in tile.load_steps(c * CHUNK + g * GROUP, GROUP):
                decay, u = now.recurrence(tile.A)
                h = decay * h + u
                out = jnp.sum(h * now.C[:, None], axis=0) + tile.D * now.x
                outputs.append((now, out))
            for now, out in outputs:  # a store before a load would make the load wait
                tile.store_vector(y, (tile.row, now.t), out, now.inside)
            return h

        return jax.lax.fori_loop(0, CHUNK // GROUP, group, h)

    h = jax.lax.fori_loop(*tile.chunks(), chunk, h)

    @pl.when(tile.segment == tile.plan.segments - 1)
    def _() -> None:
        tile.store_state(last, (tile.row,), h)


# Backward kernels: the adjoint of the state goes from the last step to the first.


def _adjoint_ends_kernel(tile: _Tile, dy: Any, ends: Any) -> None:
    """The adjoint of the state before each segment, were that of the state after it zero."""
    first, last = tile.chunks()
    stop = last * CHUNK // GROUP

    def group(k: jax.Array, dh: jax.Array) -> jax.Array:
        steps = tile.load_steps((stop - 1 - k) * GROUP, GROUP)
        sources = [_load_cotangent(tile, dy, now) for now in steps]
        for now, source in zip(reversed(steps), reversed(sources), strict=True):
            decay, _ = now.recurrence(tile.A)
            dh = decay * (dh + source[None, :] * now.C[:, None])
        return dh

    dh = jax.lax.fori_loop(
        0, stop - first * CHUNK // GROUP, group, jnp.zeros(tile.shape, jnp.float32)
    )
    tile.store_state(ends, (tile.row, tile.segment), dh)


def _load_cotangent(tile: _Tile, dy: Any, now: _Step) -> jax.Array:
    return jnp.where(now.inside, tile.load_vector(dy, (tile.row, now.t)), 0.0)


class _Sums(NamedTuple):
    """Gradients that a program sums over its steps."""

    A: jax.Array  # [N, 32]
    D: jax.Array  # [32]
    dt_bias: jax.Array  # [32]


class _Backward(NamedTuple):
    """References to what the last kernel reads and writes."""

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
    parked: Any


def _gradients_kernel(tile: _Tile, *arrays: Any) -> None:
    refs = _Backward(*arrays)
    segments = tile.plan.segments

    def enter(k: jax.Array, dh: jax.Array) -> jax.Array:
        at = (tile.row, segments - 1 - k)
        return tile.load_state(refs.decays, at) * dh + tile.load_state(refs.ends, at)

    dh = tile.load_state(refs.dh_last, (tile.row,))
    dh = jax.lax.fori_loop(0, segments - 1 - tile.segment, enter, dh)

    groups = CHUNK // HELD
    first, last = tile.chunks()

    def chunk(k: jax.Array, carry: tuple) -> tuple:
        c = last - 1 - k
        _park(tile, refs, c)

        def group(i: jax.Array, carry: tuple) -> tuple:
            return _group_back(tile, refs, c, groups - 1 - i, *carry)

        return jax.lax.fori_loop(0, groups, group, carry)

    zero = jnp.zeros((LANES,), jnp.float32)
    sums = _Sums(jnp.zeros(tile.shape, jnp.float32), zero, zero)
    dh, sums = jax.lax.fori_loop(0, last - first, chunk, (dh, sums))
    at, always = (tile.row, tile.segment), jnp.bool_(True)
    tile.store_state(refs.dA, at, sums.A)
    tile.store_vector(refs.dD, at, sums.D, always)
    tile.store_vector(refs.dbias, at, sums.dt_bias, always)

    @pl.when(tile.segment == 0)
    def _() -> None:
        tile.store_state(refs.dh0, (tile.row,), dh)


def _park(tile: _Tile, refs: _Backward, c: jax.Array) -> None:
    """Solves chunk `c` and leaves the state before every fourth step in the program's scratch."""

    def group(g: jax.Array, h: jax.Array) -> jax.Array:
        plgpu.store(tile.parked(refs.parked, g), h)
        for now in tile.load_steps(c * CHUNK + g * HELD, HELD):
            decay, u = now.recurrence(tile.A)
            h = decay * h + u
        return h

    jax.lax.fori_loop(0, CHUNK // HELD, group, tile.load_state(refs.states, (tile.row, c)))
    if not tile.plan.interpret:  # other lanes may read what a lane has parked
        plgpu.debug_barrier()


def _group_back(
    tile: _Tile, refs: _Backward, c: jax.Array, g: jax.Array, dh: jax.Array, sums: _Sums
) -> tuple[jax.Array, _Sums]:
    """The adjoint through the four steps of group `g` in chunk `c`."""
    steps = tile.load_steps(c * CHUNK + g * HELD, HELD)
    sources = [_load_cotangent(tile, refs.dy, now) for now in steps]
    held = [plgpu.load(tile.parked(refs.parked, g))]
    for now in steps:
        decay, u = now.recurrence(tile.A)
        held.append(decay * held[-1] + u)
    for k in reversed(range(HELD)):
        dh, sums = _step_back(tile, refs, steps[k], sources[k], held[k], held[k + 1], dh, sums)
    return dh, sums


def _step_back(
    tile: _Tile,
    refs: _Backward,
    now: _Step,
    dy: jax.Array,
    h_before: jax.Array,
    h: jax.Array,
    dh: jax.Array,
    sums: _Sums,
) -> tuple[jax.Array, _Sums]:
    """One step of the adjoint (see `xla._local_gradients`); stores the gradients of the step."""
    decay, _ = now.recurrence(tile.A)
    dh += dy[None, :] * now.C[:, None]
    log_decay = dh * decay * h_before
    du = jnp.sum(dh * now.B[:, None], axis=0)  # of dt * x
    dstep = du * now.x + jnp.sum(log_decay * tile.A, axis=0) * math.log(2)
    draw = jnp.where(now.inside, dstep * step_size_slope(now.dt, tile.dt_bias), 0.0)
    dB = jnp.sum(dh * (now.dt * now.x)[None, :], axis=1)
    dC = jnp.sum(h * dy[None, :], axis=1)
    at, at_tile = (tile.row, now.t), (tile.number, tile.row, now.t)
    tile.store_vector(refs.dx, at, du * now.dt + tile.D * dy, now.inside)
    tile.store_vector(refs.ddt, at, draw, now.inside)
    tile.store_coefficients(refs.dB, at_tile, dB, now.inside)
    tile.store_coefficients(refs.dC, at_tile, dC, now.inside)
    sums = _Sums(
        A=sums.A + log_decay * now.dt[None, :],
        D=sums.D + dy * now.x,
        dt_bias=sums.dt_bias + draw,
    )
    return decay * dh, sums
