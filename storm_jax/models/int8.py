"""int8 kernels for inference, with one fp32 scale per output channel.

    kernel ~ scale * q,    q = round(kernel / scale),    scale = max |kernel| / 127 over the contracted axes

The kernels of the tower's and the decoder's layers and of the stem are stored like this, which are most of a model.
Embeddings, norms and the temporal mixer keep their dtype. Products are computed in the compute dtype.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.models.layers import Einsum

_PARTS = re.compile(r"(vision|decoder)/layers/|projector/stem/")


def quantize(kernel: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns an int8 kernel, and its fp32 scales without the contracted `axes`."""
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(axes, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1)
    return jnp.round(kernel / scale).astype(jnp.int8), jnp.squeeze(scale, axes)


def quantized_kernels(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The kernels to store in int8, by path, and their contracted axes."""
    return {f"{path}/kernel": _contracted_axes(module) for path, module in _modules(model)}


def to_int8(model: nnx.Module) -> None:
    """Quantizes a model's kernels in place; for shapes, inside `nnx.eval_shape`."""
    for _, module in _modules(model):
        axes, names = _contracted_axes(module), module.kernel.get_metadata("logical_axes")
        stacked = len(module.kernel.shape) - len(names)
        kernel, scale = quantize(module.kernel[...], axes)
        free = [name for axis, name in enumerate(names, stacked) if axis not in axes]
        module.kernel = nnx.Param(kernel, logical_axes=names)
        module.scale = nnx.Param(scale, logical_axes=tuple(free))


def _modules(model: nnx.Module) -> list[tuple[str, Einsum]]:
    found = (("/".join(map(str, path)), node) for path, node in nnx.iter_graph(model))
    return [
        (path, node)
        for path, node in found
        if isinstance(node, Einsum) and _PARTS.match(f"{path}/")
    ]


def _contracted_axes(module: Einsum) -> tuple[int, ...]:
    """Axes of the kernel that its product sums over; those of stacked layers come first."""
    inputs, letters = module.equation.split("->")[0].split(",")
    stacked = len(module.kernel.shape) - len(letters)
    return tuple(stacked + axis for axis, letter in enumerate(letters) if letter in inputs)
