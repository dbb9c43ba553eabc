"""The selective scan as Pallas kernels for TPUs.

The grid is (batch, blocks of the width, blocks of the length). Its last axis follows the order of the
scan and carries the state [N, W], with the state on sublanes and channels on lanes:

  forward    Computes y for 128 steps from the state before them, and stores that state.
  backward   Visits blocks in the opposite order. It recomputes the states of a block from the stored
             one, keeps all of them in VMEM, and propagates the adjoint back over them.

The loop over steps contains almost only work on [N, W], because smaller arrays leave registers unused:

  without N  Step sizes and what derives from them are computed for the whole block before the loop. A sum
             over N is left as 8 partial rows, which are added for a group of 16 steps at once.
  without W  B and C are passed as [N, L], because TPUs pad the last axis to 128. A step is one lane of a
             block [N, 128], and is broadcast to all lanes while earlier steps are computed. The
             gradients of B and C are sums over the width: each block writes its own part, and the parts
             are summed outside of the kernel in a fixed order.

Letters: B batch, L length, E width, N state size, T steps and W channels per block.
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

SUBLANES, LANES = 8, 128  # shape of a register
STEPS = LANES  # steps per block: one per lane
UNROLL = 16  # steps per loop iteration, a multiple of 8
MAX_STATE_REGISTERS = (
    8  # a step needs several values of the state's size, and there are 64 registers
)
MAX_BLOCK_WIDTH = 512  # channels
RESET_DT = 1e30  # a step size over which any state decays to zero


def forward(
    inputs: Inputs, reset: jax.Array, h0: jax.Array, *, reverse: bool, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns y [B, L, E] in the dtype of x, the final state [B, N, E], and the state before each block."""
    plan = _plan(inputs, reverse, descending=reverse, interpret=interpret)
    y, h, block_states = _launch(
        plan,
        _forward_kernel,
        (*_operands(plan, inputs, reset), plan.operand("bne", h0)),
        (plan.result("ble", inputs.x.dtype), plan.result("bne"), plan.result("btne")),
        [plan.prepared, plan.sums],
    )
    return _crop(y, inputs.x), _crop(h, h0), block_states


def backward(
    inputs: Inputs,
    reset: jax.Array,
    block_states: jax.Array,
    dy: jax.Array,
    dh_last: jax.Array,
    *,
    reverse: bool,
    interpret: bool = False,
) -> tuple[Inputs, jax.Array]:
    """Returns the gradients of the inputs and of h0, given those of the outputs."""
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
    grads, dh0 = _launch(
        plan,
        _backward_kernel,
        (
            *_operands(plan, inputs, reset),
            plan.operand("ble", dy),
            plan.operand("bne", dh_last),
            plan.operand("btne", block_states),
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
    return jax.tree.map(_crop, grads, inputs), _crop(dh0, dh_last)


# Partitioning of the work.


class _Operand(NamedTuple):
    """An input or output of a kernel."""

    array: Any
    spec: pl.BlockSpec


class _Plan(NamedTuple):
    """Sizes and static options of a launch. Width and state are zero-padded to whole registers."""

    batch: int
    length: int
    width: int
    d_state: int
    block_width: int  # W
    reverse: bool
    descending: bool  # visit blocks from last to first
    interpret: bool
    unroll: int  # steps per loop iteration
    varying: Any  # mesh axes over which results vary inside a shard_map

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.length, STEPS)

    def block_index(self, i: Any) -> Any:
        """The block of the length that is visited at grid position `i`."""
        return self.blocks - 1 - i if self.descending else i

    # Axes are given as letters: b batch, l length, n state, e width, 1 size one; t and w have one entry
    # per block of the length and of the width. Programs do not see the axes b, t and w.

    def _shape(self, axes: str) -> tuple[int, ...]:
        sizes = {"b": self.batch, "l": self.length, "n": self.d_state, "e": self.width, "1": 1}
        sizes |= {"t": self.blocks, "w": self.width // self.block_width}
        return tuple(sizes[axis] for axis in axes)

    def _spec(self, axes: str) -> pl.BlockSpec:
        sizes = {"l": STEPS, "n": self.d_state, "e": self.block_width, "1": 1}

        def index(b: Any, e: Any, i: Any) -> tuple:
            t = self.block_index(i)
            indices = {"b": b, "l": t, "t": t, "e": e, "w": e}
            return tuple(indices.get(axis, 0) for axis in axes)

        return pl.BlockSpec(tuple(sizes.get(axis) for axis in axes), index)

    def operand(self, axes: str, v: jax.Array) -> Any:
        padding = [(0, size - n) for size, n in zip(self._shape(axes), v.shape, strict=True)]
        padded = jnp.pad(v, padding) if any(map(sum, padding)) else v
        return _Operand(padded, self._spec(axes))

    def result(self, axes: str, dtype: Any = jnp.float32) -> Any:
        shape = jax.ShapeDtypeStruct(self._shape(axes), dtype, manual_axis_type=self.varying)
        return _Operand(shape, self._spec(axes))

    # fp32 scratch that contains, per step, a row [W], a column [N] on all lanes, or a state [N, W].

    @property
    def rows(self) -> Any:
        return pltpu.VMEM((STEPS // self.unroll, self.unroll, self.block_width), jnp.float32)

    @property
    def columns(self) -> Any:
        """Has a spare group at both ends, because columns are broadcast one group ahead."""
        groups, registers = STEPS // self.unroll + 2, self.d_state // SUBLANES
        return pltpu.VMEM((groups, self.unroll, registers, SUBLANES, LANES), jnp.float32)

    @property
    def states(self) -> Any:
        registers = self.d_state // SUBLANES
        return pltpu.VMEM((STEPS, registers, SUBLANES, self.block_width), jnp.float32)

    @property
    def prepared(self) -> _Prepared:
        return _Prepared(
            dt=self.rows, dtx=self.rows, decay_dt=self.rows, B=self.columns, C=self.columns
        )

    @property
    def sums(self) -> _Sums:
        parts = self.block_width // LANES * self.unroll * SUBLANES
        return _Sums(self.rows, pltpu.VMEM((parts, LANES), jnp.float32))


def _plan(inputs: Inputs, reverse: bool, descending: bool, interpret: bool) -> _Plan:
    batch, length, width = inputs.x.shape
    registers, columns = pl.cdiv(inputs.A.shape[0], SUBLANES), pl.cdiv(width, LANES)
    max_columns = max(1, min(MAX_BLOCK_WIDTH // LANES, MAX_STATE_REGISTERS // registers))
    block_columns = next(n for n in range(max_columns, 0, -1) if columns % n == 0)
    return _Plan(
        batch=batch,
        length=length,
        width=columns * LANES,
        d_state=registers * SUBLANES,
        block_width=block_columns * LANES,
        reverse=reverse,
        descending=descending,
        interpret=interpret,
        unroll=2 if interpret else UNROLL,  # XLA compiles long loop bodies slowly
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


def _crop(v: jax.Array, like: jax.Array) -> jax.Array:
    """Removes padding."""
    return v[tuple(slice(size) for size in like.shape)]


def _launch(
    plan: _Plan, kernel: Callable[..., None], operands: tuple, results: tuple, scratch: list
) -> Any:
    """Runs `kernel(plan, *operands, *results, *scratch)` for every block."""

    def pick(field: str, operands: tuple) -> tuple:
        return jax.tree.map(
            lambda v: getattr(v, field), operands, is_leaf=lambda v: isinstance(v, _Operand)
        )

    return pl.pallas_call(
        functools.partial(kernel, plan),
        out_shape=pick("array", results),
        grid=(plan.batch, plan.width // plan.block_width, plan.blocks),
        in_specs=pick("spec", operands),
        out_specs=pick("spec", results),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=plan.interpret,
        name="selective_scan" + kernel.__name__.removesuffix("_kernel"),
    )(*pick("array", operands))


# A program's view of the arrays. In registers, a state is [N/8, 8, W].


class _Prepared(NamedTuple):
    """Scratch for the inputs in the form in which steps read them."""

    dt: Any  # rows
    dtx: Any  # rows: dt * x
    decay_dt: Any  # rows: dt, or RESET_DT if the state is reset before the step
    B: Any  # columns
    C: Any  # columns

    def decay(self, now: _Step, A: jax.Array) -> jax.Array:
        return jnp.exp2(now.row(self.decay_dt) * A)

    def input(self, now: _Step) -> jax.Array:
        return now.row(self.dtx) * now.column(self.B)


class _Step(NamedTuple):
    """A step of the loop over a block."""

    group: jax.Array  # index of the loop iteration
    k: int  # index in the group
    t: jax.Array  # index in the block
    width: int  # W

    def row(self, rows: Any) -> jax.Array:
        """[1, 8, W], equal on all sublanes; a load of a single register broadcasts for free."""
        starts = range(0, self.width, LANES)
        tiles = [rows[self.group, self.k : self.k + 1, pl.ds(start, LANES)] for start in starts]
        tiles = [jnp.broadcast_to(v, (SUBLANES, LANES)) for v in tiles]
        return jnp.concatenate(tiles, axis=1)[None]

    def column(self, columns: Any) -> jax.Array:
        """[N/8, 8, W], equal on all lanes."""
        return jnp.concatenate([columns[self.group + 1, self.k]] * (self.width // LANES), axis=-1)

    def set_lane(self, out: jax.Array, v: jax.Array) -> jax.Array:
        """Sets the step's lane of `out` [N/8, 8, T] to the sum of v [N/8, 8, W] over the width."""
        lane = jax.lax.broadcasted_iota(jnp.int32, out.shape, 2)
        return jnp.where(lane == self.t, jnp.sum(v, axis=-1, keepdims=True), out)


class _Sums(NamedTuple):
    """Scratch for rows that are sums over the state.

    A step stores 8 partial rows, and `reduce` adds those of a group at once. Strided loads fetch one row
    of every step, while a sum over sublanes would need rotations.
    """

    rows: Any
    parts: Any  # [W/128 * unroll * 8, 128]

    def store(self, now: _Step, v: jax.Array) -> None:
        """Stores the partial rows of v [N/8, 8, W]."""
        rows, unroll = jnp.sum(v, axis=0), self.rows.shape[1]
        for i, tile in enumerate(jnp.split(rows, rows.shape[1] // LANES, axis=1)):
            self.parts[pl.ds((i * unroll + now.k) * SUBLANES, SUBLANES)] = tile

    def reduce(self, group: jax.Array) -> None:
        """Adds the partial rows of a group."""
        _, unroll, width = self.rows.shape
        for i in range(width // LANES):
            starts = range(i * unroll * SUBLANES, i * unroll * SUBLANES + SUBLANES)
            parts = [self.parts[pl.ds(start, unroll, stride=SUBLANES)] for start in starts]
            self.rows[group, :, pl.ds(i * LANES, LANES)] = sum(parts)


class _Block:
    """A program's part of the inputs, in fp32.

    Beyond the end of the sequence dt, x, B and C are zero, so those steps leave the state unchanged.
    """

    def __init__(self, plan: _Plan, inputs: Inputs, reset: Any, prepared: _Prepared) -> None:
        self.plan, self._inputs, self._prepared = plan, inputs, prepared
        self.position = pl.program_id(2)  # in the order of the scan
        self._start = plan.block_index(self.position) * STEPS
        self.A = _to_registers(inputs.A[...]) * math.log2(math.e)  # because TPUs compute exp2
        self.D = inputs.D[...]
        self._dt_bias = None if inputs.dt_bias is None else inputs.dt_bias[0]
        self._prepare(reset)

    def _prepare(self, reset: Any) -> None:
        dt = self.mask(step_size(self._inputs.dt[...], self._dt_bias), axis=0)
        reset = self.mask(reset[...], axis=1)  # [1, T]
        reset = jnp.broadcast_to(reset, (SUBLANES, STEPS)).T[:, :1] != 0
        _store_rows(self._prepared.dt, dt)
        _store_rows(self._prepared.dtx, dt * self.x)
        _store_rows(self._prepared.decay_dt, jnp.where(reset, RESET_DT, dt))

    def mask(self, v: jax.Array, axis: int) -> jax.Array:
        """Zeroes `v` beyond the end of the sequence, where blocks contain undefined values."""
        if self.plan.length % STEPS == 0:
            return v
        t = self._start + jax.lax.broadcasted_iota(jnp.int32, v.shape, axis)
        return jnp.where(t < self.plan.length, v, 0.0)

    def read(self, ref: Any) -> jax.Array:
        """[T, W]."""
        return self.mask(ref[...].astype(jnp.float32), axis=0)

    @property
    def x(self) -> jax.Array:
        return self.read(self._inputs.x)

    @property
    def dt(self) -> jax.Array:
        return _from_registers(self._prepared.dt[...])

    def step_size_derivative(self) -> jax.Array:
        """The derivative of the step size with respect to dt."""
        dt = self.read(self._inputs.dt)
        return (
            jnp.ones_like(dt) if self._dt_bias is None else jax.nn.sigmoid(dt + self._dt_bias[None])
        )

    def loop_over_steps(
        self,
        step: Callable[[Any, _Step], Any],
        carry: Any,
        *,
        descending: bool,
        sums: Sequence[_Sums] = (),
        broadcast: bool = False,
    ) -> Any:
        """Computes `carry = step(carry, now)` for each step of the block and returns the carry.

        Args:
          descending: loop from the last step to the first.
          sums: what `step` stores to.
          broadcast: broadcast B and C over lanes, one group ahead of the steps that read them; the
            first loop over a block has to.
        """
        unroll = self.plan.unroll
        groups = STEPS // unroll
        first, direction = (groups - 1, -1) if descending else (0, 1)
        pairs = (self._inputs.B, self._prepared.B), (self._inputs.C, self._prepared.C)
        columns = [target for _, target in pairs] if broadcast else []

        def iterate(i: jax.Array, carry_and_lanes: tuple) -> tuple:
            carry, lanes = carry_and_lanes
            group = first + direction * i
            lanes = [pltpu.roll(v, -direction * unroll % STEPS, axis=1) for v in lanes]
            _broadcast_columns(lanes, columns, group + direction)
            for k in range(unroll)[::direction]:
                now = _Step(group=group, k=k, t=group * unroll + k, width=self.plan.block_width)
                carry = step(carry, now)
            for s in sums:
                s.reduce(group)
            return carry, lanes

        lanes = [self.mask(source[...], axis=1) for source, _ in pairs] if broadcast else []
        lanes = [pltpu.roll(v, -first * unroll % STEPS, axis=1) for v in lanes]
        _broadcast_columns(lanes, columns, first)
        return jax.lax.fori_loop(0, groups, iterate, (carry, lanes))[0]


def _broadcast_columns(lanes: Sequence[jax.Array], columns: Sequence[Any], group: Any) -> None:
    """Broadcasts the first lanes of [N, T], one per step of the group, into the group's columns."""
    for v, target in zip(lanes, columns, strict=True):
        for k in range(target.shape[1]):
            column = _to_registers(v)[..., k : k + 1]
            target[group + 1, k] = jnp.broadcast_to(column, target.shape[2:])


def _store_rows(rows: Any, v: jax.Array) -> None:
    rows[...] = v.reshape(rows.shape)


def _to_registers(v: jax.Array) -> jax.Array:
    """[8 n, W] -> [n, 8, W]."""
    return v.reshape(-1, SUBLANES, v.shape[-1])


def _from_registers(v: jax.Array) -> jax.Array:
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
    block_state: Any,
    # scratch
    prepared: _Prepared,
    sums: _Sums,
) -> None:
    block = _Block(plan, inputs, reset, prepared)

    @pl.when(block.position == 0)
    def _() -> None:
        h_last[...] = h0[...]

    block_state[...] = h_last[...]

    def step(h: jax.Array, now: _Step) -> jax.Array:
        h = prepared.decay(now, block.A) * h + prepared.input(now)
        sums.store(now, h * now.column(prepared.C))
        return h

    h = _to_registers(h_last[...])
    h = block.loop_over_steps(step, h, descending=plan.reverse, sums=[sums], broadcast=True)
    h_last[...] = _from_registers(h)
    y[...] = (_from_registers(sums.rows[...]) + block.D * block.x).astype(y.dtype)


def _backward_kernel(
    plan: _Plan,
    inputs: Inputs,
    reset: Any,
    dy: Any,
    dh_last: Any,
    block_state: Any,
    # results; the gradients without an axis L are accumulated over blocks
    grads: Inputs,
    dh0: Any,
    # scratch
    prepared: _Prepared,
    dy_rows: Any,
    states: Any,
    du: _Sums,  # gradient of dt * x
    dexponent: _Sums,  # gradient of the step size in the decay, divided by log 2
) -> None:
    block = _Block(plan, inputs, reset, prepared)
    _store_rows(dy_rows, block.read(dy))

    @pl.when(block.position == 0)
    def _() -> None:
        dh0[...] = dh_last[...]
        for total in jax.tree.leaves((grads.A, grads.D, grads.dt_bias)):
            total[...] = jnp.zeros_like(total)

    def recompute(carry: tuple[jax.Array, ...], now: _Step) -> tuple[jax.Array, ...]:
        h, dC = carry
        states[now.t] = h
        h = prepared.decay(now, block.A) * h + prepared.input(now)
        return h, now.set_lane(dC, h * now.row(dy_rows))

    zero = jnp.zeros((plan.d_state // SUBLANES, SUBLANES, STEPS), jnp.float32)
    start = _to_registers(block_state[...]), zero
    _, dC = block.loop_over_steps(recompute, start, descending=plan.reverse, broadcast=True)

    def step(carry: tuple[jax.Array, ...], now: _Step) -> tuple[jax.Array, ...]:
        dh, dA, dB = carry
        dh += now.row(dy_rows) * now.column(prepared.C)
        du.store(now, dh * now.column(prepared.B))
        dB = now.set_lane(dB, dh * now.row(prepared.dtx))
        dh *= prepared.decay(now, block.A)
        log_decay = dh * states[now.t]
        dexponent.store(now, log_decay * block.A)
        return dh, dA + log_decay * now.row(prepared.dt), dB

    end = _to_registers(dh0[...]), _to_registers(grads.A[...]), zero
    dh, dA, dB = block.loop_over_steps(step, end, descending=not plan.reverse, sums=[du, dexponent])
    dh0[...], grads.A[...] = _from_registers(dh), _from_registers(dA)
    grads.B[...], grads.C[...] = _from_registers(dB), _from_registers(dC)
    _store_row_gradients(
        block, grads, *(_from_registers(v[...]) for v in (dy_rows, du.rows, dexponent.rows))
    )


def _store_row_gradients(
    block: _Block, grads: Inputs, dy: jax.Array, du: jax.Array, dexponent: jax.Array
) -> None:
    """Computes the gradients without an axis N from the sums over it."""
    x = block.x
    ddt = (du * x + dexponent * math.log(2)) * block.step_size_derivative()
    grads.x[...] = (du * block.dt + block.D * dy).astype(grads.x.dtype)
    grads.dt[...] = ddt.astype(grads.dt.dtype)
    grads.D[...] += jnp.sum(dy * x, axis=0, keepdims=True)
    if grads.dt_bias is not None:
        grads.dt_bias[...] += jnp.sum(block.mask(ddt, axis=0), axis=0, keepdims=True)
