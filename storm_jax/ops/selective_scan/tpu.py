"""The selective scan as Pallas kernels for TPUs.

The grid is (batch, blocks of the width, blocks of the length). The last axis goes in the order of the
scan and hands the state [N, W] on, with states on sublanes and channels on lanes:

  forward    128 steps from the state before them -> y; the state before the block is kept.
  backward   blocks in the opposite order: the steps are solved again from the state that was kept,
             all their states stay in VMEM, and the adjoint walks back over them.

A step does what has both N and W, and little else, for only that fills registers:

  no N       the step size, and what follows from it, is made for the whole block before the steps. A
             sum over N is left as 8 rows, and those of 16 steps are added at once.
  no W       B and C come as [N, L], for TPUs pad the last axis to 128: a step is one lane of a block
             [N, 128]. It is spread over all lanes while the steps before it are taken. Gradients of
             B and C are sums over the width: each block of it writes its own, and these are summed
             outside, in one order.

Letters: B batch, L length, E width, N state size; T steps and W channels of a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from storm_jax.ops.selective_scan.inputs import Inputs, step_size

SUBLANES, LANES = 8, 128  # of a register
STEPS = LANES  # of a block: one for each lane
GROUP = 16  # steps that are unrolled, a multiple of 8
STATE_REGISTERS = 8  # at most: a step holds several of its size in the 64 there are
WIDEST = 512  # channels of a block
FORGET = 1e30  # a step so long that nothing is left of the state before it


def forward(
    inputs: Inputs, reset: jax.Array, h0: jax.Array, *, reverse: bool, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y [B, L, E] in the dtype of x, the last state [B, N, E], and the states before the blocks."""
    plan = _plan(inputs, reverse, descending=reverse, interpret=interpret)
    y, h, boundaries = _call(
        plan,
        _forward_kernel,
        (*_operands(plan, inputs, reset), plan.operand("bne", h0)),
        (plan.result("ble", inputs.x.dtype), plan.result("bne"), plan.result("btne")),
        [plan.prepared, plan.sums],
    )
    return _trim(y, inputs.x), _trim(h, h0), boundaries


def backward(
    inputs: Inputs,
    reset: jax.Array,
    boundaries: jax.Array,
    dy: jax.Array,
    dh_last: jax.Array,
    *,
    reverse: bool,
    interpret: bool = False,
) -> tuple[Inputs, jax.Array]:
    """Gradients of the inputs and of h0, given those of the outputs."""
    plan = _plan(inputs, reverse, descending=not reverse, interpret=interpret)
    results = Inputs(
        x=plan.result("ble", inputs.x.dtype),
        dt=plan.result("ble", inputs.dt.dtype),
        A=plan.result("bne"),
        B=plan.result("wbnl"),
        C=plan.result("wbnl"),
        D=plan.result("b1e"),
        dt_bias=None if inputs.dt_bias is None else plan.result("b1e"),
    )
    grads, dh0 = _call(
        plan,
        _backward_kernel,
        (
            *_operands(plan, inputs, reset),
            plan.operand("ble", dy),
            plan.operand("bne", dh_last),
            plan.operand("btne", boundaries),
        ),
        (results, plan.result("bne")),
        [plan.prepared, plan.rows, plan.states, plan.sums, plan.sums],
    )
    grads = grads._replace(
        A=grads.A.sum(axis=0),
        B=grads.B.sum(axis=0).swapaxes(1, 2).astype(inputs.B.dtype),
        C=grads.C.sum(axis=0).swapaxes(1, 2).astype(inputs.C.dtype),
        D=grads.D.sum(axis=(0, 1)),
        dt_bias=None if inputs.dt_bias is None else grads.dt_bias.sum(axis=(0, 1)),
    )
    return jax.tree.map(_trim, grads, inputs), _trim(dh0, dh_last)


# How the work is divided.


class _Part(NamedTuple):
    array: Any
    spec: pl.BlockSpec


class _Plan(NamedTuple):
    """Width and state are those of whole registers; what the arrays lack is zero."""

    batch: int
    length: int
    width: int
    state: int
    block: int  # W
    reverse: bool
    descending: bool  # blocks from the last to the first
    interpret: bool
    group: int  # steps that are unrolled
    varying: Any  # the mesh axes over which results vary, inside a shard_map

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.length, STEPS)

    def number(self, i: Any) -> Any:
        """The block of the length at place `i` of the order."""
        return self.blocks - 1 - i if self.descending else i

    # Axes of arrays: b batch, l length, n state, e width, 1; t and w, one entry for each block of the
    # length and of the width. A program sees no axis of which it gets one entry.

    def _shape(self, axes: str) -> tuple[int, ...]:
        sizes = {"b": self.batch, "l": self.length, "n": self.state, "e": self.width, "1": 1}
        sizes |= {"t": self.blocks, "w": self.width // self.block}
        return tuple(sizes[axis] for axis in axes)

    def _spec(self, axes: str) -> pl.BlockSpec:
        sizes = {"l": STEPS, "n": self.state, "e": self.block, "1": 1}

        def index(b: Any, e: Any, i: Any) -> tuple:
            at = {"b": b, "l": self.number(i), "t": self.number(i), "e": e, "w": e}
            return tuple(at.get(axis, 0) for axis in axes)

        return pl.BlockSpec(tuple(sizes.get(axis) for axis in axes), index)

    def operand(self, axes: str, v: jax.Array) -> Any:
        padding = [(0, size - have) for size, have in zip(self._shape(axes), v.shape, strict=True)]
        return _Part(jnp.pad(v, padding) if any(map(sum, padding)) else v, self._spec(axes))

    def result(self, axes: str, dtype: Any = jnp.float32) -> Any:
        shape = jax.ShapeDtypeStruct(self._shape(axes), dtype, manual_axis_type=self.varying)
        return _Part(shape, self._spec(axes))

    # Scratch of fp32: a row [W] for each step, a column [N] of 128 equal lanes, or a state.

    @property
    def rows(self) -> Any:
        return pltpu.VMEM((STEPS // self.group, self.group, self.block), jnp.float32)

    @property
    def columns(self) -> Any:
        """With a group to spare on either side, into which a walk spreads beyond its last."""
        groups, registers = STEPS // self.group + 2, self.state // SUBLANES
        return pltpu.VMEM((groups, self.group, registers, SUBLANES, LANES), jnp.float32)

    @property
    def states(self) -> Any:
        return pltpu.VMEM((STEPS, self.state // SUBLANES, SUBLANES, self.block), jnp.float32)

    @property
    def prepared(self) -> _Prepared:
        return _Prepared(self.rows, self.rows, self.rows, self.columns, self.columns)

    @property
    def sums(self) -> _Sums:
        parts = self.block // LANES * self.group * SUBLANES
        return _Sums(self.rows, pltpu.VMEM((parts, LANES), jnp.float32))


def _plan(inputs: Inputs, reverse: bool, descending: bool, interpret: bool) -> _Plan:
    batch, length, width = inputs.x.shape
    state, columns = pl.cdiv(inputs.A.shape[0], SUBLANES), pl.cdiv(width, LANES)
    most = max(1, min(WIDEST // LANES, STATE_REGISTERS // state))
    return _Plan(
        batch=batch,
        length=length,
        width=columns * LANES,
        state=state * SUBLANES,
        block=LANES * next(n for n in range(most, 0, -1) if columns % n == 0),
        reverse=reverse,
        descending=descending,
        interpret=interpret,
        group=2 if interpret else GROUP,  # XLA compiles long code slowly
        varying=jax.typeof(inputs.x).mat,
    )


def _operands(plan: _Plan, inputs: Inputs, reset: jax.Array) -> tuple[Inputs, Any]:
    bias = inputs.dt_bias
    B, C = (v.astype(jnp.float32).swapaxes(1, 2) for v in (inputs.B, inputs.C))
    operands = Inputs(
        x=plan.operand("ble", inputs.x),
        dt=plan.operand("ble", inputs.dt),
        A=plan.operand("ne", inputs.A),
        B=plan.operand("bnl", B),
        C=plan.operand("bnl", C),
        D=plan.operand("1e", inputs.D[None]),
        dt_bias=None if bias is None else plan.operand("1e", bias[None]),
    )
    return operands, plan.operand("b1l", reset.astype(jnp.float32)[:, None])


def _trim(v: jax.Array, like: jax.Array) -> jax.Array:
    return v[tuple(slice(size) for size in like.shape)]


def _call(
    plan: _Plan, kernel: Callable[..., None], operands: tuple, results: tuple, scratch: list
) -> Any:
    """Runs `kernel(plan, *operands, *results, *scratch)` for every block."""

    def pick(field: str, parts: tuple) -> tuple:
        return jax.tree.map(
            lambda part: getattr(part, field), parts, is_leaf=lambda v: isinstance(v, _Part)
        )

    return pl.pallas_call(
        functools.partial(kernel, plan),
        out_shape=pick("array", results),
        grid=(plan.batch, plan.width // plan.block, plan.blocks),
        in_specs=pick("spec", operands),
        out_specs=pick("spec", results),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=plan.interpret,
        name="selective_scan" + kernel.__name__.removesuffix("_kernel"),
    )(*pick("array", operands))


# What a program sees. Registers hold a state as [N/8, 8, W].


class _Prepared(NamedTuple):
    """Scratch for what steps read of the inputs."""

    dt: Any  # rows
    dtx: Any  # rows: dt * x
    until: Any  # rows: dt, or FORGET where the state is reset
    B: Any  # columns
    C: Any  # columns

    def decay(self, now: _Step, A: jax.Array) -> jax.Array:
        return jnp.exp2(now.row(self.until) * A)

    def input(self, now: _Step) -> jax.Array:
        return now.row(self.dtx) * now.column(self.B)


class _Step(NamedTuple):
    group: jax.Array
    k: int  # in the group
    t: jax.Array  # in the block
    width: int  # W

    def row(self, rows: Any) -> jax.Array:
        """[1, 8, W], equal on all sublanes: a load does that by itself if it is of one register."""
        starts = range(0, self.width, LANES)
        tiles = [rows[self.group, self.k : self.k + 1, pl.ds(at, LANES)] for at in starts]
        tiles = [jnp.broadcast_to(v, (SUBLANES, LANES)) for v in tiles]
        return jnp.concatenate(tiles, axis=1)[None]

    def column(self, columns: Any) -> jax.Array:
        """[N/8, 8, W], equal on all lanes."""
        return jnp.concatenate([columns[self.group + 1, self.k]] * (self.width // LANES), axis=-1)

    def into_lane(self, v: jax.Array, whole: jax.Array) -> jax.Array:
        """Puts sums of v [N/8, 8, W] over the width into the step's lane of `whole` [N/8, 8, T]."""
        lane = jax.lax.broadcasted_iota(jnp.int32, whole.shape, 2)
        return jnp.where(lane == self.t, jnp.sum(v, axis=-1, keepdims=True), whole)


class _Sums(NamedTuple):
    """Scratch for rows that are sums over the state. A step leaves 8 rows to add; those of a group
    are added at once, since a load can pick one row of each, where a sum over sublanes rotates."""

    rows: Any
    parts: Any  # [W/128 * group * 8, 128]

    def put(self, now: _Step, v: jax.Array) -> None:
        """v: [N/8, 8, W]."""
        rows, group = jnp.sum(v, axis=0), self.rows.shape[1]
        for i, tile in enumerate(jnp.split(rows, rows.shape[1] // LANES, axis=1)):
            self.parts[pl.ds((i * group + now.k) * SUBLANES, SUBLANES)] = tile

    def finish(self, number: jax.Array) -> None:
        """Adds what the steps of a group have put."""
        _, group, width = self.rows.shape
        for i in range(width // LANES):
            starts = range(i * group * SUBLANES, i * group * SUBLANES + SUBLANES)
            parts = [self.parts[pl.ds(at, group, stride=SUBLANES)] for at in starts]
            self.rows[number, :, pl.ds(i * LANES, LANES)] = sum(parts)


class _Block:
    """A program's part of the inputs, in fp32. Steps beyond the length have dt, x, B and C zero, and
    so leave the state as it is."""

    def __init__(self, plan: _Plan, inputs: Inputs, reset: Any, prepared: _Prepared) -> None:
        self.plan, self._inputs, self._prepared = plan, inputs, prepared
        self.place = pl.program_id(2)
        self._start = plan.number(self.place) * STEPS
        self.A = _split(inputs.A[...]) * math.log2(math.e)  # for exp2, which the chip has
        self.D = inputs.D[...]
        self._dt_bias = None if inputs.dt_bias is None else inputs.dt_bias[0]
        self._prepare(reset)

    def _prepare(self, reset: Any) -> None:
        dt = self.inside(step_size(self._inputs.dt[...], self._dt_bias), axis=0)
        forget = self.inside(reset[...], axis=1)  # [1, T]
        forget = jnp.broadcast_to(forget, (SUBLANES, STEPS)).T[:, :1] != 0
        _put_rows(self._prepared.dt, dt)
        _put_rows(self._prepared.dtx, dt * self.x)
        _put_rows(self._prepared.until, jnp.where(forget, FORGET, dt))

    def inside(self, v: jax.Array, axis: int) -> jax.Array:
        """`v` with zero beyond the length, where a block reads whatever lies there."""
        if self.plan.length % STEPS == 0:
            return v
        t = self._start + jax.lax.broadcasted_iota(jnp.int32, v.shape, axis)
        return jnp.where(t < self.plan.length, v, 0.0)

    def read(self, ref: Any) -> jax.Array:
        """[T, W]."""
        return self.inside(ref[...].astype(jnp.float32), axis=0)

    @property
    def x(self) -> jax.Array:
        return self.read(self._inputs.x)

    @property
    def dt(self) -> jax.Array:
        return _merge(self._prepared.dt[...])

    def slope(self) -> jax.Array:
        """Derivative of the step size with respect to dt."""
        dt = self.read(self._inputs.dt)
        return (
            jnp.ones_like(dt) if self._dt_bias is None else jax.nn.sigmoid(dt + self._dt_bias[None])
        )

    def walk(
        self,
        step: Callable[[Any, _Step], Any],
        carry: Any,
        *,
        descending: bool,
        sums: Sequence[_Sums] = (),
        spread: bool = False,
    ) -> Any:
        """Takes the steps in turn by `carry = step(carry, now)`, which may put to `sums`. The first
        walk has to `spread` B and C, which it does a group ahead of the steps that read them."""
        size = self.plan.group
        groups = STEPS // size
        first, onward = (groups - 1, -1) if descending else (0, 1)
        pairs = (self._inputs.B, self._prepared.B), (self._inputs.C, self._prepared.C)
        columns = [to for _, to in pairs] if spread else []

        def group(i: jax.Array, both: tuple) -> tuple:
            carry, lanes = both
            number = first + onward * i
            lanes = [pltpu.roll(v, -onward * size % STEPS, axis=1) for v in lanes]
            _spread(lanes, columns, number + onward)
            for k in range(size)[::onward]:
                carry = step(carry, _Step(number, k, number * size + k, self.plan.block))
            for s in sums:
                s.finish(number)
            return carry, lanes

        lanes = [self.inside(v[...], axis=1) for v, _ in pairs] if spread else []
        lanes = [pltpu.roll(v, -first * size % STEPS, axis=1) for v in lanes]
        _spread(lanes, columns, first)
        return jax.lax.fori_loop(0, groups, group, (carry, lanes))[0]


def _spread(lanes: Sequence[jax.Array], columns: Sequence[Any], group: Any) -> None:
    """Puts the first lanes of [N, T], one for each step of the group, on all lanes of its columns."""
    for v, to in zip(lanes, columns, strict=True):
        for k in range(to.shape[1]):
            to[group + 1, k] = jnp.broadcast_to(_split(v)[..., k : k + 1], to.shape[2:])


def _put_rows(rows: Any, v: jax.Array) -> None:
    rows[...] = v.reshape(rows.shape)


def _split(v: jax.Array) -> jax.Array:
    """[8 n, W] -> [n, 8, W]."""
    return v.reshape(-1, SUBLANES, v.shape[-1])


def _merge(v: jax.Array) -> jax.Array:
    """[n, 8, W] -> [8 n, W]."""
    return v.reshape(-1, v.shape[-1])


# Kernels.


def _forward_kernel(
    plan: _Plan,
    inputs: Inputs,
    reset: Any,
    h0: Any,
    # results
    y: Any,
    h_last: Any,
    boundary: Any,
    # scratch
    prepared: _Prepared,
    sums: _Sums,
) -> None:
    block = _Block(plan, inputs, reset, prepared)

    @pl.when(block.place == 0)
    def _() -> None:
        h_last[...] = h0[...]

    boundary[...] = h_last[...]

    def step(h: jax.Array, now: _Step) -> jax.Array:
        h = prepared.decay(now, block.A) * h + prepared.input(now)
        sums.put(now, h * now.column(prepared.C))
        return h

    h = _split(h_last[...])
    h = block.walk(step, h, descending=plan.reverse, sums=[sums], spread=True)
    h_last[...] = _merge(h)
    y[...] = (_merge(sums.rows[...]) + block.D * block.x).astype(y.dtype)


def _backward_kernel(
    plan: _Plan,
    inputs: Inputs,
    reset: Any,
    dy: Any,
    dh_last: Any,
    boundary: Any,
    # results; of grads, those without L are sums over the blocks
    grads: Inputs,
    dh0: Any,
    # scratch
    prepared: _Prepared,
    dy_rows: Any,
    states: Any,
    du: _Sums,  # gradient of dt * x
    dexponent: _Sums,  # and of the step size in the decay, over log 2
) -> None:
    block = _Block(plan, inputs, reset, prepared)
    _put_rows(dy_rows, block.read(dy))

    @pl.when(block.place == 0)
    def _() -> None:
        dh0[...] = dh_last[...]
        for total in jax.tree.leaves((grads.A, grads.D, grads.dt_bias)):
            total[...] = jnp.zeros_like(total)

    def replay(carry: tuple[jax.Array, ...], now: _Step) -> tuple[jax.Array, ...]:
        h, dC = carry
        states[now.t] = h
        h = prepared.decay(now, block.A) * h + prepared.input(now)
        return h, now.into_lane(h * now.row(dy_rows), dC)

    zero = jnp.zeros((plan.state // SUBLANES, SUBLANES, STEPS), jnp.float32)
    begin = _split(boundary[...]), zero
    _, dC = block.walk(replay, begin, descending=plan.reverse, spread=True)

    def step(carry: tuple[jax.Array, ...], now: _Step) -> tuple[jax.Array, ...]:
        dh, dA, dB = carry
        dh += now.row(dy_rows) * now.column(prepared.C)
        du.put(now, dh * now.column(prepared.B))
        dB = now.into_lane(dh * now.row(prepared.dtx), dB)
        dh *= prepared.decay(now, block.A)
        log_decay = dh * states[now.t]
        dexponent.put(now, log_decay * block.A)
        return dh, dA + log_decay * now.row(prepared.dt), dB

    end = _split(dh0[...]), _split(grads.A[...]), zero
    dh, dA, dB = block.walk(step, end, descending=not plan.reverse, sums=[du, dexponent])
    dh0[...], grads.A[...] = _merge(dh), _merge(dA)
    grads.B[...], grads.C[...] = _merge(dB), _merge(dC)
    _finish_rows(block, grads, *(_merge(v[...]) for v in (dy_rows, du.rows, dexponent.rows)))


def _finish_rows(
    block: _Block, grads: Inputs, dy: jax.Array, du: jax.Array, dexponent: jax.Array
) -> None:
    """The gradients that have no N, from what the steps have summed over it."""
    x = block.x
    ddt = (du * x + dexponent * math.log(2)) * block.slope()
    grads.x[...] = (du * block.dt + block.D * dy).astype(grads.x.dtype)
    grads.dt[...] = ddt.astype(grads.dt.dtype)
    grads.D[...] += jnp.sum(dy * x, axis=0, keepdims=True)
    if grads.dt_bias is not None:
        grads.dt_bias[...] += jnp.sum(block.inside(ddt, axis=0), axis=0, keepdims=True)
