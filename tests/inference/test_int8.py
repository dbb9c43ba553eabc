"""int8 kernels: their error, what is stored, adapters, and answers that stay close."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import storm_qwen2_7b
from storm_jax.compression import VisualShape
from storm_jax.config import ConfigError, MeshConfig
from storm_jax.inference.predictor import Predictor
from storm_jax.inference.weights import load
from storm_jax.models.int8 import quantize, quantized_kernels, to_int8
from storm_jax.models.storm import Storm
from storm_jax.params import abstract_model, compute_dtypes, flat_params
from storm_jax.run import Run
from storm_jax.sharding import make_mesh


@pytest.mark.parametrize("axes", [(0,), (1,), (1, 2)])
def test_every_value_is_within_half_a_step(rng, axes):
    kernel = rng.standard_normal((6, 7, 8)).astype(np.float32)
    kernel[0], kernel[..., 3] = 0, 0  # scales of zero would divide by zero
    q, scale = quantize(jnp.asarray(kernel), axes)
    assert q.dtype == jnp.int8 and scale.dtype == jnp.float32
    assert scale.shape == tuple(size for axis, size in enumerate(kernel.shape) if axis not in axes)
    scale = np.expand_dims(np.asarray(scale), axes)
    assert (np.abs(np.asarray(q) * scale - kernel) <= 0.501 * scale).all()
    assert (np.abs(np.asarray(q)).max(axes) == 127).any()


def test_a_7b_model_takes_at_most_60_percent():
    def placed(int8: bool) -> int:
        _, abstract = abstract_model(storm_qwen2_7b.MODEL, int8=int8)
        leaves = compute_dtypes(flat_params(abstract), storm_qwen2_7b.MODEL).values()
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    assert placed(int8=True) < 0.6 * placed(int8=False)


def test_embeddings_norms_and_the_mixer_keep_their_dtype(small_model):
    _, abstract = abstract_model(small_model, int8=True)
    dtypes = compute_dtypes(flat_params(abstract), small_model)
    in_int8 = {name for name, leaf in dtypes.items() if leaf.dtype == jnp.int8}
    plain = nnx.eval_shape(lambda: Storm(small_model, rngs=nnx.Rngs(0)))
    assert in_int8 == quantized_kernels(plain).keys()
    assert {name.split("/")[0] for name in in_int8} == {"vision", "projector", "decoder"}
    kept = [name for name in dtypes if "/mixer/" in name or "norm" in name or "embedding" in name]
    assert kept and not in_int8 & set(kept)


def test_a_quantized_model_computes_with_the_quantized_kernels(small_model, randomise, rng):
    """It equals a model whose kernels were rounded before."""
    model = randomise(nnx.eval_shape(lambda: Storm(small_model, rngs=nnx.Rngs(0))))
    graphdef, params = nnx.split(model)
    rounded = flatten_dict(nnx.to_pure_dict(params), sep="/")
    for name, axes in quantized_kernels(model).items():
        q, scale = quantize(rounded[name], axes)
        rounded[name] = q * jnp.expand_dims(scale, axes)
    size = small_model.vision.image_size
    frames = rng.integers(0, 256, (1, 2, size, size, 3)).astype(np.uint8)
    clip, shape = np.ones((1, 2), np.int32), VisualShape(2, (1,))

    def answer(model: Storm) -> jax.Array:
        table = model.encode(frames, clip, np.array([[0, 1]]), shape)
        positions = jnp.arange(table.shape[1])[None]
        return model.decode(table, positions)[0]

    expected = nnx.jit(answer)(nnx.merge(graphdef, unflatten_dict(rounded, sep="/")))
    to_int8(model)
    found = nnx.jit(answer)(model)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_run_is_loaded_in_int8_on_several_devices(trained_run):
    run = Run(trained_run)
    step, mesh = run.checkpoints.resolve(None), make_mesh(MeshConfig(data=1, fsdp=8))
    _, plain = load(run, step, mesh, "")
    _, params = load(run, step, mesh, "int8")
    kernel, scale = (params[f"decoder/layers/down/{name}"] for name in ("kernel", "scale"))
    assert kernel.dtype == jnp.int8
    values = np.asarray(kernel) * np.asarray(scale)[:, None]
    expected = np.asarray(plain["decoder/layers/down/kernel"])
    np.testing.assert_allclose(values, expected, atol=float(np.abs(expected).max()) / 250)
    for name in ("decoder/embedding", "decoder/norm/scale"):
        np.testing.assert_array_equal(params[name], plain[name])


def test_answers_stay_close(trained_run, shapes_folder):
    video = next((shapes_folder / "media/test").glob("*.mp4"))
    plain, quantized = (Predictor(trained_run, weights=weights) for weights in ("", "int8"))
    assert quantized.weights == "int8"
    tables = [each.watch(video)._batch.table for each in (plain, quantized)]
    np.testing.assert_allclose(tables[1], tables[0], atol=0.05 * float(jnp.abs(tables[0]).max()))


def test_unknown_weights_are_refused(trained_run):
    with pytest.raises(ConfigError, match="--weights=int4: use int8"):
        Predictor(trained_run, weights="int4")
