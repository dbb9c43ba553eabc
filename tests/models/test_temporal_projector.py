"""Processing a clip in blocks of frames: values and gradients equal those of one pass, through convolution,
scan and pooling, for any block sizes. Also what a layer stores for its gradient."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from storm_jax.models.temporal_projector import MambaLayers, TemporalProjector
from storm_jax.ops.pooling import PartialGroup, temporal_pool, temporal_pool_block

BATCH, FRAMES, GROUP = 2, 11, 4


@pytest.fixture(params=["mamba1", "mamba2"])
def config(request, small_model):
    mamba = dataclasses.replace(small_model.mamba, direction="forward", head_dim=16)
    return dataclasses.replace(small_model, mixer=request.param, mamba=mamba)


@pytest.fixture
def projector(config, randomise) -> TemporalProjector:
    return randomise(
        nnx.eval_shape(
            lambda: TemporalProjector(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=True)
        )
    )


def in_one_pass(projector: TemporalProjector, x: jax.Array) -> jax.Array:
    """Returns [B, G, N, D]; the last group is partial."""
    x = projector(x, jnp.ones(x.shape[:2], jnp.int32))[0]
    group = jnp.broadcast_to(jnp.arange(FRAMES)[None] // GROUP, x.shape[:2])
    return temporal_pool(x, group, -(-FRAMES // GROUP))


def in_blocks(projector: TemporalProjector, x: jax.Array, cuts: list[int]) -> jax.Array:
    state, group, means, frames = projector.initial_state(BATCH), None, [], 0
    for block in jnp.split(x, cuts, axis=1):
        y, state = projector.extend(block, state)
        group = group or PartialGroup.empty(BATCH, *y.shape[2:])
        mean, _, group = temporal_pool_block(y, group, GROUP)
        frames += block.shape[1]
        expected = frames // GROUP - (frames - block.shape[1]) // GROUP
        means.append(mean[:, :expected])
    return jnp.concatenate([*means, group.mean()[:, None]], axis=1)


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2, 3))]
)
def test_random_cuts_equal_one_pass_with_their_gradients(projector, config, seed, rng):
    patches = config.vision.side**2
    x = rng.standard_normal((BATCH, FRAMES, patches, config.vision.width)).astype(np.float32)
    cuts = sorted(np.random.default_rng(seed).choice(np.arange(1, FRAMES), seed + 1, replace=False))
    weights = rng.standard_normal((BATCH, 3, config.side**2, config.decoder.width))
    graphdef, params = nnx.split(projector)

    def loss(run):
        def weighted(params, x):
            y = run(nnx.merge(graphdef, params), x)
            return jnp.sum(y * weights.astype(np.float32)), y

        (_, y), grads = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(params, x)
        return y, grads

    expected, expected_grads = loss(in_one_pass)
    found, grads = loss(lambda projector, x: in_blocks(projector, x, cuts))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)

    def compare(path, found, expected):
        scale = np.abs(expected).max() + 1e-6
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(found / scale, expected / scale, atol=2e-5, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, grads, expected_grads)


def test_the_state_matters(projector, config, rng):
    """Checks that the state affects the next block, which the test above relies on."""
    shape = (BATCH, 2, config.vision.side**2, config.vision.width)
    x = rng.standard_normal(shape).astype(np.float32)
    fresh = projector.initial_state(BATCH)
    _, state = projector.extend(x, fresh)
    again, _ = projector.extend(x, state)
    first, _ = projector.extend(x, fresh)
    assert np.abs(again - first).max() > 1e-2


def test_a_bidirectional_projector_does_not_support_blocks(small_model):
    for mixer in ("mamba1", "none"):
        config = dataclasses.replace(small_model, mixer=mixer)
        model = TemporalProjector(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=False)
        with pytest.raises(ValueError, match='direction="forward"'):
            model.initial_state(1)


def test_a_layer_stores_its_inputs_only(small_model):
    """Additional layers increase the memory of the gradient by one input each."""
    length, width = 2048, 32

    def temporary(depth: int, remat: bool) -> int:
        config = dataclasses.replace(small_model.mamba, depth=depth, direction="forward")
        graphdef, params = nnx.split(
            nnx.eval_shape(
                lambda: MambaLayers(
                    width, "mamba1", config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=remat
                )
            )
        )

        def loss(params, x):
            clip = jnp.ones(x.shape[:2], jnp.int32)
            return jnp.sum(nnx.merge(graphdef, params)(x, clip) ** 2)

        x = jax.ShapeDtypeStruct((1, length // 16, 16, width), jnp.float32)
        program = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
        return program.memory_analysis().temp_size_in_bytes

    one_input = length * width * 4
    assert temporary(8, True) - temporary(4, True) < 4 * 1.5 * one_input
    assert temporary(8, False) - temporary(4, False) > 4 * 4 * one_input
