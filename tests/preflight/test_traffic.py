"""What is read from the text of compiled programs: loops, collectives, memory traffic."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from storm_jax.preflight.hlo import Program
from storm_jax.preflight.traffic import Collectives, collectives, memory_bytes

ROWS, WIDTH, TIMES = 64, 256, 5
SIZE = ROWS * WIDTH * 4  # bytes of a device's part
# As a TPU and a GPU write them: the mesh of the groups, the tuple of a start, a collective in two fusions, and a
# loop that counts in its condition.
LOOP = """HloModule m

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%x, %y)
}

%half (p: f32[8,16]) -> f32[16,16] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  ROOT %gather.1 = f32[16,16]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
}

%other_half (p.1: f32[8,16]) -> f32[16,16] {
  %p.1 = f32[8,16]{1,0:T(8,128)} parameter(0)
  ROOT %gather.2 = f32[16,16]{1,0} all-gather(%p.1), channel_id=3, replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
}

%all-reduce-scatter.1 (p.2: f32[16,16]) -> f32[4,16] {
  %p.2 = f32[16,16]{1,0} parameter(0)
  %reduce = f32[16,16]{1,0} all-reduce(%p.2), channel_id=4, replica_groups=[1,4]<=[4], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[4,16]{1,0} dynamic-slice(%reduce, %zero, %zero), dynamic_slice_sizes={4,16}
}

%body (c: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %c = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %v = f32[8,16]{1,0} get-tuple-element(%c), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %fast = f32[16,16]{1,0:T(8,128)S(1)} fusion(%v), kind=kCustom, calls=%half
  %again = f32[16,16]{1,0:T(8,128)S(1)} fusion(%v), kind=kCustom, calls=%other_half
  %scatter = f32[4,16]{1,0} fusion(%fast), kind=kCustom, calls=%all-reduce-scatter.1
  %start = ((f32[16,16]{1,0}), f32[8,16]{1,0}) reduce-scatter-start(%again), channel_id=5, replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, dimensions={0}, to_apply=%add
  %done = f32[8,16]{1,0} reduce-scatter-done(%start)
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%next, %done)
}

%condition (c.1: (s32[], f32[8,16])) -> pred[] {
  %c.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %end = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (w: f32[8,16]) -> f32[8,16] {
  %w = f32[8,16]{1,0} parameter(0)
  %begin = s32[] constant(0)
  %init = (s32[], f32[8,16]{1,0}) tuple(%begin, %w)
  %while = (s32[], f32[8,16]{1,0}, /*index=2*/s32[]) while(%init), condition=%condition, body=%body
  %moved = (f32[8,16]{1,0}, f32[8,16]{1,0}, u32[], u32[]) collective-permute-start(%w), channel_id=6, source_target_pairs={{0,1},{1,0}}
  ROOT %last = f32[8,16]{1,0} get-tuple-element(%while), index=1
}
"""


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def compiled_text(mesh, function) -> str:
    """`function` on the part [ROWS, WIDTH] of each device, TIMES times in a loop."""

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")))
    def program(x):
        return jax.lax.fori_loop(0, TIMES, lambda _, x: jnp.sin(function(x)), x)

    sharding = NamedSharding(mesh, P(("a", "b")))
    x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=sharding)
    return program.lower(x).compile().as_text()


def gather_and_scatter(x):
    whole = jax.lax.all_gather(x, "b", tiled=True)
    return jax.lax.psum_scatter(whole * whole, "b", tiled=True)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (gather_and_scatter, {"all-gather": 3 * SIZE, "reduce-scatter": 3 * SIZE}),
        (lambda x: jax.lax.pcast(jax.lax.psum(x, "a"), "a", to="varying"), {"all-reduce": SIZE}),
        (
            lambda x: jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]),
            {"collective-permute": SIZE},
        ),
        (
            lambda x: jax.lax.all_to_all(x, "b", 0, 0, tiled=True),
            {"all-to-all": 0.75 * SIZE},
        ),
    ],
    ids=["all-gather and reduce-scatter", "all-reduce", "collective-permute", "all-to-all"],
)
def test_collectives_of_a_loop_count_in_every_iteration(function, expected, mesh):
    found = collectives(Program(compiled_text(mesh, function)), 8)
    assert found == {kind: Collectives(TIMES, TIMES * size) for kind, size in expected.items()}


def test_text_of_other_compilers():
    """All arrays are [16, 16] or half of it, 512 bytes."""
    assert collectives(Program(LOOP), 4) == {
        "all-gather": Collectives(7, 7 * 512),  # once in two fusions
        "collective-permute": Collectives(1, 512),
        "reduce-scatter": Collectives(14, 7 * (0.75 * 1024 + 512)),
    }


def test_fast_memory_is_not_traffic():
    """%fast and %again are in the fast memory, so only their inputs and the results of both scatters are traffic."""
    in_loop = 2 * 512 + 256 + (1024 + 512) + 3 * 4  # and the counter: two operands, one result
    compared = 2 * 4 + 1
    assert memory_bytes(Program(LOOP)) == pytest.approx(7 * in_loop + 2 * 512, abs=7 * compared)


def test_memory_traffic_is_that_of_xla_without_loops():
    def function(x, w):
        return jnp.tanh(x @ w) @ w

    x, w = jnp.zeros((512, 512)), jnp.zeros((512, 512))
    compiled = jax.jit(function).lower(x, w).compile()
    expected = compiled.cost_analysis()["bytes accessed"]
    assert memory_bytes(Program(compiled.as_text())) == pytest.approx(expected, rel=0.05)


def test_a_loop_over_stacked_weights_reads_each_once():
    def function(x, ws):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

    x, ws = jnp.zeros((1, 512)), jnp.zeros((20, 512, 512))
    program = Program(jax.jit(function).lower(x, ws).compile().as_text())
    # Read from the stack, written, and read by the product.
    assert 1 <= memory_bytes(program) / ws.nbytes < 3.2
