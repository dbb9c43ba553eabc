"""The complete model, with all parameters nonzero: packing, clip boundaries, compression, projectors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rows_by_hand import build_rows

from configs.tiny import MODEL as TINY
from storm_jax.compression import Grid, VisualShape, plan_clip
from storm_jax.config import CompressionConfig, ConfigError, LayoutConfig, ModelConfig, StemConfig
from storm_jax.data.rows import RowSample, RowShape
from storm_jax.models.storm import Storm
from storm_jax.models.temporal_projector import TemporalProjector
from storm_jax.params import abstract_model
from storm_jax.text.conversation import Encoded


def row_shape(compression: CompressionConfig, tokens: int = 96, frames: int = 24) -> RowShape:
    return RowShape(
        tokens=tokens,
        frames=frames,
        image_size=TINY.vision.image_size,
        grid=Grid.of(TINY),
        compressions=(compression,),
    )


def make_sample(rng, shape: RowShape, frames: int, words: int) -> RowSample:
    """Creates a clip of `frames` frames with `words` text tokens before and after it."""
    visual = plan_clip(frames, shape.grid, shape.compressions[0]).num_tokens
    text = rng.integers(1, 500, 2 * words)
    tokens = np.concatenate([text[:words], np.zeros(visual, int), text[words:]]).astype(np.int32)
    media = np.full(len(tokens), -1, np.int32)
    media[words : words + visual] = 0
    clip = rng.integers(0, 256, (frames, shape.image_size, shape.image_size, 3)).astype(np.uint8)
    return RowSample(Encoded(tokens, media < 0, media), [clip], shape.compressions[0])


jitted = nnx.jit(lambda model, batch, shape: model(batch, shape), static_argnames="shape")


def random_storm(randomise, config: ModelConfig) -> Storm:
    return randomise(nnx.eval_shape(lambda: Storm(config, rngs=nnx.Rngs(0))))


def hidden_states(
    model: Storm, samples_per_row: list[list[RowSample]], shape: RowShape
) -> np.ndarray:
    batch = build_rows(samples_per_row, 0, shape)
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    visual = shape.visual
    return np.asarray(jitted(model, batch, shape=visual))


@pytest.fixture(params=["mamba1", "no mixer", "forward", "mamba2"])
def model(request, small_model, randomise) -> Storm:
    config = small_model
    if request.param == "no mixer":
        stem = StemConfig(kind="mlp_downsample_3x3_fix", downsample=3)
        config = dataclasses.replace(config, stem=stem, mixer="none")
    if request.param == "forward":
        mamba = dataclasses.replace(config.mamba, direction="forward")
        config = dataclasses.replace(config, mamba=mamba)
    if request.param == "mamba2":
        mamba = dataclasses.replace(config.mamba, head_dim=16)
        config = dataclasses.replace(config, mixer="mamba2", mamba=mamba)
    return random_storm(randomise, config)


def test_images_keep_their_grid_beside_videos_with_a_smaller_one(small_model, randomise, rng):
    """An image is mixed over its own tokens, and only where there is one; the newline is the last entry."""
    stem = StemConfig(kind="mlp2x_gelu", downsample=1, video_pool="bilinear")
    layout = LayoutConfig(image_newline=True, video_newline="row")
    config = dataclasses.replace(small_model, stem=stem, layout=layout)
    model = random_storm(randomise, config)
    compression = CompressionConfig(num_frames=8, temporal_pool=3)
    shape = dataclasses.replace(row_shape(compression), grid=Grid.of(config))
    samples = [make_sample(rng, shape, frames, words) for frames, words in [(1, 3), (8, 5), (1, 4)]]
    packed, *unpacked = hidden_states(model, [samples, *([sample] for sample in samples)], shape)
    start = 0
    for sample, hidden in zip(samples, unpacked, strict=True):
        size = len(sample.encoded)
        np.testing.assert_allclose(packed[start : start + size], hidden[:size], atol=2e-4)
        start += size
    frames = jnp.asarray(samples[0].clips[0])[None]
    ones = jnp.ones((1, 1), jnp.int32)
    table = nnx.jit(lambda m, x: m.encode(x, ones, ones - 1, VisualShape(1, (1,))))(model, frames)
    side = config.side
    patches = nnx.jit(lambda m, x: m.vision(x))(model, frames[0])[None]
    image = nnx.jit(lambda m, x: m.projector.mixer(m.projector.stem(x), ones))(model, patches)
    np.testing.assert_allclose(table[0, -1 - side**2 : -1], image[0, 0], atol=1e-4)
    np.testing.assert_array_equal(table[0, -1], model.projector.newline[...])
    unmixed = nnx.jit(lambda m, x: m.projector.stem(x))(model, patches)
    assert np.abs(np.asarray(unmixed - image)).max() > 0.1


@pytest.mark.parametrize(
    "compression",
    [
        CompressionConfig(num_frames=8, temporal_pool=4),
        CompressionConfig(num_frames=8, temporal_pool=3, spatial_pool=2),
        CompressionConfig(num_frames=8, temporal_pool=2, temporal_sample=2),
    ],
    ids=["k4", "k3p2", "k2s2"],
)
def test_packed_samples_equal_unpacked_ones(model, compression, rng):
    shape = row_shape(compression)
    samples = [make_sample(rng, shape, frames, words) for frames, words in [(8, 5), (1, 3), (7, 4)]]
    rows = [samples, *([sample] for sample in samples)]
    packed, *unpacked = hidden_states(model, rows, shape)
    start = 0
    for sample, hidden in zip(samples, unpacked, strict=True):
        size = len(sample.encoded)
        np.testing.assert_allclose(packed[start : start + size], hidden[:size], atol=2e-4)
        start += size


def test_samples_of_different_compressions_share_a_row(model, rng):
    """Each is what it is in a row of its compression alone; so are images, which are never pooled."""
    factors = [
        {"temporal_pool": 4},
        {"spatial_pool": 2, "temporal_sample": 2},
        {"temporal_pool": 3},
    ]
    compressions = [CompressionConfig(num_frames=8, **each) for each in factors]
    mixed = dataclasses.replace(row_shape(compressions[0]), compressions=tuple(compressions))
    assert mixed.visual.spatial_pools == (1, 2)
    shapes = [row_shape(each) for each in compressions]
    for frames in ((8, 7, 8), (1, 8, 1)):
        samples = [make_sample(rng, *each, 4) for each in zip(shapes, frames, strict=True)]
        (packed,) = hidden_states(model, [samples], mixed)
        start = 0
        for sample, shape in zip(samples, shapes, strict=True):
            (alone,) = hidden_states(model, [[sample]], shape)
            size = len(sample.encoded)
            np.testing.assert_allclose(packed[start : start + size], alone[:size], atol=2e-4)
            start += size


def test_the_projector_mixes_time_before_pooling(small_model, randomise, rng):
    """Checks that the mixer affects the output, which the other tests rely on."""
    shape = row_shape(CompressionConfig(num_frames=8, temporal_pool=4))
    sample = make_sample(rng, shape, 8, 4)
    swapped = dataclasses.replace(sample, clips=[sample.clips[0][[1, 0, 2, 3, 4, 5, 6, 7]]])
    for mixer, sees_order in (("mamba1", True), ("none", False)):
        config = dataclasses.replace(small_model, mixer=mixer)
        model = random_storm(randomise, config)
        original, other = hidden_states(model, [[sample], [swapped]], shape)
        difference = np.abs(original - other).max()
        assert (difference > 1e-2) == sees_order, (mixer, difference)


def test_causal_projector_never_looks_ahead(small_model, randomise, rng):
    mamba = dataclasses.replace(small_model.mamba, direction="forward")
    frames = rng.integers(0, 256, (1, 8, 32, 32, 3)).astype(np.uint8)
    changed = frames.copy()
    changed[:, 5:] = 0
    clip = jnp.ones((1, 8), jnp.int32)
    group = jnp.arange(8)[None]
    for config, expected in (
        (dataclasses.replace(small_model, mamba=mamba), True),
        (small_model, False),
    ):
        model = random_storm(randomise, config)
        encode = nnx.jit(lambda m, f: m.encode(f, clip, group, VisualShape(8, (1,))))
        before = np.asarray(encode(model, frames)).reshape(8, -1)[:5]
        after = np.asarray(encode(model, changed)).reshape(8, -1)[:5]
        assert np.allclose(before, after, atol=1e-5) == expected


def test_a_new_storm_projector_does_not_mix_time(small_model, rng):
    """out_proj is initialised to zero, so that training starts from independent frames."""
    projector = TemporalProjector(small_model, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=False)
    shape = (1, 8, small_model.vision.side**2, small_model.vision.width)
    x = rng.standard_normal(shape).astype(np.float32)
    order = np.array([3, 2, 1, 0, 4, 5, 6, 7])
    clip = jnp.ones((1, 8), jnp.int32)
    y, permuted = (nnx.jit(lambda p, x: p(x, clip)[0])(projector, v) for v in (x, x[:, order]))
    np.testing.assert_allclose(permuted, y[:, order], atol=1e-5)


def test_sampled_out_frames_still_reach_the_kept_tokens(small_model, randomise, rng):
    """Temporal sampling drops tokens after the scan, not frames before it."""
    model = random_storm(randomise, small_model)
    shape = row_shape(CompressionConfig(num_frames=8, temporal_pool=2, temporal_sample=2))
    sample = make_sample(rng, shape, 8, 4)
    changed = sample.clips[0].copy()
    changed[2:4] = 255  # the second group, which is dropped
    changed = dataclasses.replace(sample, clips=[changed])
    original, other = hidden_states(model, [[sample], [changed]], shape)
    assert np.abs(original - other).max() > 1e-2


def test_gradients_reach_every_trained_parameter(small_model, randomise, rng):
    model = random_storm(randomise, small_model)
    shape = row_shape(CompressionConfig(num_frames=8, temporal_pool=4))
    batch = build_rows([[make_sample(rng, shape, 8, 6)]], 0, shape)
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    graphdef, params = nnx.split(model)

    def loss(params):
        hidden = nnx.merge(graphdef, params)(batch, shape.visual)
        return jnp.sum(jnp.sin(hidden))

    grads = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
    silent = [
        jax.tree_util.keystr(path)
        for path, grad in jax.tree_util.tree_leaves_with_path(grads)
        if not np.abs(grad).max() > 0
    ]
    # `unused` follows the feature layer.
    assert [name for name in silent if "unused" not in name] == []


class Normalised(nnx.Module):
    """A mixer with running statistics."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.norm = nnx.BatchNorm(width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, frame_clip: jax.Array) -> jax.Array:
        return self.norm(x)


def test_a_projector_with_state_other_than_parameters_is_rejected(small_model):
    config = dataclasses.replace(small_model, mixer=f"{__name__}:Normalised")
    with pytest.raises(ConfigError, match=r"projector/mixer/norm/mean \(BatchStat\)"):
        abstract_model(config)
