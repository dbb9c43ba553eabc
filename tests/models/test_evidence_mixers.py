"""The mixers that Mamba is compared with: clips apart, all frames seen, and as many parameters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.evidence import mixers
from configs.tiny import MODEL
from storm_jax.params import abstract_model, flat_params

MIXING = ("FrameAttention", "WindowAttention", "TemporalConv")


@pytest.fixture(params=MIXING)
def mixer(request) -> nnx.Module:
    return with_random_outputs(
        getattr(mixers, request.param)(96, rngs=nnx.Rngs(0), dtype=jnp.float32)
    )


def with_random_outputs(mixer: nnx.Module) -> nnx.Module:
    """Random values in the parameters that start at zero."""
    rng = np.random.default_rng(0)
    for layer in mixer.layers:
        layer.out.kernel[...] = 0.1 * rng.standard_normal(layer.out.kernel.shape).astype(np.float32)
    return mixer


def test_clips_and_padding_do_not_mix(mixer, rng):
    x = rng.standard_normal((1, 12, 4, 96)).astype(np.float32)
    clips = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    together = mixer(jnp.asarray(x), clips)
    for part in (slice(0, 5), slice(5, 9)):
        alone = mixer(jnp.asarray(x[:, part]), jnp.ones((1, part.stop - part.start), jnp.int32))
        np.testing.assert_allclose(together[:, part], alone, atol=2e-5)


@pytest.mark.parametrize("frame", [0, 7, 15])
def test_all_frames_of_a_clip_see_each_other(mixer, rng, frame: int):
    """A mixer whose reach ends before the clip does could not win with few tokens."""
    assert (changes(mixer, rng, frame) > 1e-5).all()


def test_tokens_do_not_mix_in_the_mlp(rng):
    made = with_random_outputs(mixers.GatedMLP(96, rngs=nnx.Rngs(0), dtype=jnp.float32))
    assert np.flatnonzero(changes(made, rng, 7)).tolist() == [7]


def changes(mixer: nnx.Module, rng, frame: int) -> np.ndarray:
    """How much each of 16 frames changes with one of them."""
    x = rng.standard_normal((1, 16, 4, 96)).astype(np.float32)
    clips = jnp.ones((1, 16), jnp.int32)
    before = np.asarray(mixer(jnp.array(x), clips))
    x[:, frame] = rng.standard_normal((1, 4, 96))
    return np.abs(np.asarray(mixer(jnp.array(x), clips)) - before).max(axis=(0, 2, 3))


def test_the_order_of_frames_matters(mixer, rng):
    x = jnp.asarray(rng.standard_normal((1, 6, 4, 96)).astype(np.float32))
    clips = jnp.ones((1, 6), jnp.int32)
    forward, backward = mixer(x, clips), mixer(x[:, ::-1], clips)[:, ::-1]
    assert np.abs(np.asarray(forward - backward)).max() > 1e-3


@pytest.mark.parametrize("name", [*MIXING, "GatedMLP"])
def test_they_start_as_the_identity_with_as_many_parameters_as_mamba(name):
    made = getattr(mixers, name)(96, rngs=nnx.Rngs(0), dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 8, 4, 96))
    np.testing.assert_array_equal(made(x, jnp.ones((2, 8), jnp.int32)), x)
    counts = []
    for mixer in (f"benchmarks.evidence.mixers:{name}", "mamba1"):
        params = flat_params(abstract_model(dataclasses.replace(MODEL, mixer=mixer))[1])
        counts.append(sum(v.size for k, v in params.items() if k.startswith("projector/mixer")))
    assert abs(counts[0] / counts[1] - 1) < 0.05


def test_frames_are_numbered_within_their_clips():
    clips = jnp.array([[3, 3, 3, 1, 1, 2, 0, 0]])
    assert mixers._in_clip(clips).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
