"""Puts the parameters of a checkpoint on the devices, as trained or in int8."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from storm_jax.config import ConfigError, LoraConfig, ModelConfig
from storm_jax.models.int8 import quantize, quantized_kernels
from storm_jax.models.lora import merge
from storm_jax.models.storm import Storm
from storm_jax.params import abstract_model, compute_dtypes, flat_params, with_sharding
from storm_jax.run import Run
from storm_jax.sharding import param_shardings

WEIGHTS = ("", "int8")  # "" is as trained


def load(
    run: Run, step: int, mesh: Mesh, weights: str
) -> tuple[nnx.GraphDef, dict[str, jax.Array]]:
    """The model's structure and its parameters by path.

    With "int8", adapters are merged, and one parameter after the other is read and quantized.

    Raises:
      ConfigError: unknown `weights`.
      RunError: if the checkpoint cannot be read.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"--weights={weights}: use int8, or leave it out for weights as trained")
    config = run.config.model
    if weights == "int8":
        decoder = dataclasses.replace(config.decoder, lora=LoraConfig())
        config = dataclasses.replace(config, decoder=decoder)
    graphdef, abstract = abstract_model(config, int8=weights == "int8")
    shardings = param_shardings(abstract, mesh)
    target = with_sharding(compute_dtypes(flat_params(abstract), config), shardings)
    if weights == "int8":
        return graphdef, _load_int8(run, step, config, target)
    return graphdef, run.checkpoints.restore(target, step)


def _load_int8(
    run: Run, step: int, config: ModelConfig, target: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    kernels = quantized_kernels(nnx.eval_shape(lambda: Storm(config, rngs=nnx.Rngs(0))))
    scales = {name: f"{name.removesuffix('/kernel')}/scale" for name in kernels}
    params: dict[str, jax.Array] = {}
    for name in target.keys() - set(scales.values()):
        value, sharding = _read(run, step, name), target[name].sharding
        if name in kernels:
            shardings = (sharding, target[scales[name]].sharding)
            make = functools.partial(_quantize, axes=kernels[name])
            params[name], params[scales[name]] = jax.jit(make, out_shardings=shardings)(value)
        else:
            params[name] = jax.device_put(value.astype(target[name].dtype), sharding)
    return params


def _quantize(kernel: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Quantizes stacked layers one at a time: in float32, all of them take four times the result."""
    if 0 in axes:
        return quantize(kernel, axes)
    of_layer = tuple(axis - 1 for axis in axes)
    return jax.lax.map(lambda layer: quantize(layer, of_layer), kernel)


def _read(run: Run, step: int, name: str) -> np.ndarray:
    """A parameter in host memory, with its adapter merged."""
    value = run.checkpoints.read(step, name)
    module = name.removesuffix("/kernel")
    adapter = (f"{module}/lora/a", f"{module}/lora/b")
    if adapter[0] in run.checkpoints.stored_names(step):
        parts = {part: jnp.asarray(run.checkpoints.read(step, part)) for part in adapter}
        kernel = {name: jnp.asarray(value)}
        value = np.asarray(merge(kernel | parts, run.config.model.decoder.lora)[name])
    if not np.isfinite(value).all():
        raise run.checkpoints.damaged(step, f"contains {name} with values that are not finite")
    return value
