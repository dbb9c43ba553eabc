"""Mamba mixers over a sharded sequence equal one device's, and exchange only states and halos."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from storm_jax.config import MambaConfig, MeshConfig
from storm_jax.models.mamba import MambaMixer
from storm_jax.ops.causal_conv import causal_conv
from storm_jax.ops.selective_scan import selective_scan
from storm_jax.ops.ssd import ssd
from storm_jax.sharding import batch_sharding, make_mesh
from tests.hlo import collectives
from tests.scan_checks import assert_close

MESHES = {
    "context": MeshConfig(data=1, context=8),
    "data, context and tensor": MeshConfig(data=2, context=2, tensor=2),
}
BATCH, CHANNELS, STATES, HEADS = 2, 8, 4, 4


def scan_inputs(rng, op, length):
    """Arrays of an op by name, with segments that start anywhere, also on the borders of shards."""
    steps, state = (BATCH, length), (STATES,)
    shapes = {
        "selective_scan": {
            "x": (*steps, CHANNELS), "dt": (*steps, CHANNELS), "A": (CHANNELS, *state),
            "B": (*steps, *state), "C": (*steps, *state), "D": (CHANNELS,), "dt_bias": (CHANNELS,),
            "h0": (BATCH, CHANNELS, *state),
        },
        "ssd": {
            "x": (*steps, HEADS, 2), "dt": (*steps, HEADS), "A": (HEADS,),
            "B": (*steps, 2, *state), "C": (*steps, 2, *state), "D": (HEADS,), "dt_bias": (HEADS,),
            "h0": (BATCH, HEADS, 2, *state),
        },
        "causal_conv": {
            "x": (*steps, CHANNELS), "kernel": (4, CHANNELS), "bias": (CHANNELS,),
            "cache": (BATCH, 3, CHANNELS),
        },
    }[op]  # fmt: skip
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    if op != "causal_conv":  # decays are slow enough for states to cross shards
        arrays["A"] = -rng.uniform(0.05, 0.5, shapes["A"]).astype(np.float32)
        arrays["dt_bias"] = rng.uniform(-4, -2, shapes["dt_bias"]).astype(np.float32)
    return arrays


OPS = {"selective_scan": selective_scan, "ssd": ssd, "causal_conv": causal_conv}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", MESHES)
def test_values_and_gradients_equal_one_devices(rng, name, op, reverse):
    """With one step per device and several, and segments that start on borders, inside, or never."""
    mesh = make_mesh(MESHES[name])
    many, one = np.arange(48) // 9, np.zeros(48, int)
    segments = {48: np.stack([many, one]), 8: np.arange(16).reshape(2, 8) // 3, 16: None}
    for length, ids in list(segments.items())[: 3 if name == "context" else 1]:
        arrays = scan_inputs(rng, op, length)
        run = functools.partial(OPS[op], reverse=reverse, segment_ids=ids)
        weights = jax.tree.map(
            lambda v: rng.standard_normal(v.shape, np.float32),
            jax.eval_shape(lambda v, run=run: run(**v), arrays),
        )

        def loss(arrays, run=run, weights=weights):
            found = run(**arrays)
            return sum(
                jax.tree.leaves(jax.tree.map(lambda v, w: (v * w).sum(), found, weights))
            ), found

        expected = jax.jit(jax.grad(loss, has_aux=True))(arrays)
        with jax.set_mesh(mesh):
            found = jax.jit(jax.grad(loss, has_aux=True))(arrays)
        assert_close(found, jax.tree.map(np.asarray, expected))


@pytest.mark.parametrize("version", ["mamba1", "mamba2"])
def test_what_a_mixer_exchanges_does_not_grow_with_the_length(rng, randomise, version):
    """And a length that the devices do not divide is padded, not gathered."""
    mesh = make_mesh(MESHES["context"])
    width = 16
    mixer = MambaMixer(
        width, version, MambaConfig(d_state=4, head_dim=8), rngs=nnx.Rngs(0), dtype=jnp.float32
    )
    randomise(mixer, rng)
    graphdef, params = nnx.split(mixer)

    def loss(params, u, ids, weights):
        y, _ = nnx.merge(graphdef, params)(u, ids)
        return (y * weights).sum(), y

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    sizes = {}
    for length in (64, 512, 61):
        u, weights = rng.standard_normal((2, BATCH, length, width), np.float32)
        ids = np.sort(rng.integers(1, 4, (BATCH, length)), axis=1).astype(np.int32)
        arrays = (params, u, ids, weights)
        with jax.set_mesh(mesh):
            placed = (params, *jax.device_put(arrays[1:], batch_sharding(mesh, ids.shape)))
            compiled = step.lower(*placed).compile()
        sizes[length] = sorted(found.bytes for found in collectives(compiled))
    assert_close(compiled(*placed), jax.tree.map(np.asarray, step(*arrays)))
    assert sizes[64] == sizes[512]
    assert len(sizes[64]) > 5  # they were found
    state = BATCH * 2 * width * 4 * 4 * 8  # of 8 devices, in bytes
    assert max(sizes[512]) <= 2 * state  # decays and states
