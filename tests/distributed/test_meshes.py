"""The loss and every gradient are the same on every mesh, and nothing is exchanged that need not be."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx

from storm_jax.compression import Grid, plan_clip
from storm_jax.config import CompressionConfig, MeshConfig
from storm_jax.data.rows import RowSample, RowShape
from storm_jax.models import siglip
from storm_jax.models.storm import Storm
from storm_jax.ops import cross_entropy, sequence_shards
from storm_jax.ops.attention import xla as attention
from storm_jax.params import flat_params
from storm_jax.sharding import AXES, local_rows, make_mesh, param_shardings
from storm_jax.text.conversation import Encoded
from storm_jax.train.step import make_loss_sums, place
from tests.hlo import collectives
from tests.rows_by_hand import build_rows

ROWS, TOKENS, FRAMES = 8, 64, 16
CHUNK = 5  # smaller than what a device has


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", CHUNK)
        patch.setattr(cross_entropy, "TOKEN_CHUNK", CHUNK)
        patch.setattr(sequence_shards, "CHUNK", CHUNK)
        patch.setattr(siglip, "FRAME_CHUNK", CHUNK)
        yield


@pytest.fixture(scope="module")
def model(small_model, randomise) -> tuple[nnx.GraphDef, dict]:
    """The graph and the parameters of a model whose heads divide over 8 devices."""
    decoder = dataclasses.replace(small_model.decoder, num_heads=8, num_kv_heads=8)
    config = dataclasses.replace(small_model, decoder=decoder)
    made = nnx.eval_shape(lambda: Storm(config, rngs=nnx.Rngs(0), remat=True))
    graphdef, params = nnx.split(randomise(made))
    return graphdef, params


@pytest.fixture(scope="module")
def shape(small_model) -> RowShape:
    return RowShape(
        tokens=TOKENS,
        frames=FRAMES,
        image_size=small_model.vision.image_size,
        grid=Grid.of(small_model),
        compressions=(CompressionConfig(num_frames=8, temporal_pool=3),),
    )


@pytest.fixture(scope="module")
def batch(shape) -> dict[str, np.ndarray]:
    """Two clips a row, whose edges and lengths differ between rows."""
    rng = np.random.default_rng(0)

    def sample(frames: int) -> RowSample:
        visual = plan_clip(frames, shape.grid, shape.compressions[0]).num_tokens
        tokens = rng.integers(1, 500, visual + 9).astype(np.int32)
        media = np.where(np.arange(len(tokens)) < visual, 0, -1)
        size = (frames, shape.image_size, shape.image_size, 3)
        clip = rng.integers(0, 256, size).astype(np.uint8)
        return RowSample(Encoded(tokens, media < 0, media), [clip], shape.compressions[0])

    return build_rows([[sample(3 + row % 4), sample(9 - row % 3)] for row in range(ROWS)], 0, shape)


def gradients(model, shape, arrays: dict, mesh_sizes: tuple[int, ...]):
    """Sums, gradients by parameter and the compiled program on a mesh."""
    graphdef, params = model
    axes = dict(zip(AXES, mesh_sizes, strict=True))
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: math.prod(mesh_sizes)])
    sums = make_loss_sums(graphdef, shape)

    def loss(params: dict, batch: dict):
        found = sums(params, batch)
        return found["loss"] / found["weight"], found

    shardings = param_shardings(params, mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, has_aux=True), out_shardings=(shardings, None))
        args = (
            jax.device_put(flat_params(params), shardings),
            place(arrays, mesh, local_rows(mesh, ROWS)),
        )
        compiled = step.lower(*args).compile()
        grads, found = jax.device_get(compiled(*args))
    return found, grads, compiled


@pytest.fixture(scope="module")
def one_device(model, shape, batch):
    return gradients(model, shape, batch, (1, 1, 1, 1))


@pytest.fixture(scope="module")
def on_mesh(model, shape, batch):
    """`gradients` on eight devices, compiled once per mesh."""
    return functools.cache(functools.partial(gradients, model, shape, batch))


@pytest.mark.parametrize(
    "sizes", [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (2, 2, 2, 1), (1, 2, 2, 2)]
)
def test_loss_and_gradients_equal_one_devices(on_mesh, one_device, sizes):
    sums, grads, _ = on_mesh(sizes)
    for name, value in one_device[0].items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    for name, value in one_device[1].items():
        scale = max(np.abs(value).max(), 1e-3)
        np.testing.assert_allclose(grads[name] / scale, value / scale, atol=1e-4, err_msg=name)


def test_tensor_parallelism_exchanges_what_the_textbook_does(on_mesh, small_model):
    """Shoeybi et al., arXiv 1909.08053, section 3: all-reduces after the row-parallel products, and in the
    backward pass before the column-parallel ones. Nothing is gathered, permuted or transposed."""
    found = collectives(on_mesh((1, 1, 1, 8))[2])
    found = [each for each in found if re.search(r"decoder|jvp\((loss)?\)|_take", each.name)]
    assert any("jvp(loss)" in each.name for each in found)
    assert {each.kind for each in found} == {"all-reduce"}
    width = small_model.decoder.width
    counts: collections.Counter[str] = collections.Counter()
    for each in found:
        last = each.name.rsplit("closed_call")[-1]
        primitive = re.search(r"[a-z]+,[a-z]+->[a-z]+|gather|pmax|psum", last)[0]
        whole = each.shapes.count((ROWS, TOKENS, width))
        counts[primitive] += whole
        if not whole:  # of a chunk of the loss
            assert each.bytes <= ROWS * CHUNK * width * 4
    assert counts == {
        "gather": 1,  # the embedding
        "bshk,hkd->bsd": 2,  # once more when the layer is recomputed
        "bsm,md->bsd": 1,
        "bsd,djm->bsjm": 1,
        "bsd,dhk->bshk": 3,  # queries, keys and values
        "bsd,dv->bsv": 0,
        "pmax": 0,
        "psum": 0,
    }


def test_context_parallelism_gathers_only_keys_and_values_of_the_decoder(on_mesh, small_model):
    found = collectives(on_mesh((1, 1, 8, 1))[2])
    gathered = [each for each in found if each.kind == "all-gather" and "decoder" in each.name]
    keys = (ROWS, TOKENS, 8, small_model.decoder.head_dim)
    ids = (ROWS, TOKENS)
    assert {shape for each in gathered for shape in each.shapes} == {keys, ids}
    assert not any(each.kind == "all-to-all" for each in found)
    (pooled,) = [each for each in found if "bgf,bfnd->bgnd" in each.name]
    assert pooled.kind == "all-reduce"  # groups may span devices


def test_memory_of_the_tower_grows_with_features_and_not_with_activations(model, small_model):
    """The backward pass stores frames and features; the activations of one chunk do not depend on their number."""
    graphdef, params = model
    size = small_model.vision.image_size

    def temporary_bytes(frames: int) -> int:
        def loss(params, frames):
            features = nnx.merge(graphdef, params).vision.encode_clips(frames)
            return (features.astype("float32") ** 2).sum()

        shape = jax.ShapeDtypeStruct((1, frames, size, size, 3), np.uint8)
        compiled = jax.jit(jax.grad(loss)).lower(params, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    features = small_model.vision.side**2 * small_model.vision.width * 4
    stored = 120 * (3 * size**2 + features)
    assert temporary_bytes(240) - temporary_bytes(120) < 2 * stored  # 16 times as much without
