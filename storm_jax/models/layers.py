"""Building blocks shared by the models: linear maps with logical axes, and layer stacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer

from storm_jax.config import LoraConfig
from storm_jax.models.lora import Lora

Layer = TypeVar("Layer", bound=nnx.Module)


class Einsum(nnx.Module):
    """`jnp.einsum(equation, x, kernel) + bias` with logical axes and an optional LoRA adapter.

    Unlike `nnx.Einsum`, it derives the fan-in of the initializer and the shape and axes of the bias
    from the equation.

    Args:
      equation: for example "bsd,dhk->bshk". Kernel letters that are also letters of x are contracted.
      shape: shape of the kernel.
      axes: logical axis of each kernel dimension (see `storm_jax.sharding`); None is not sharded.
      bias: adds a bias over the kernel letters that are not contracted.
      lora: adds a low-rank adapter.
    """

    def __init__(
        self,
        equation: str,
        shape: Sequence[int],
        axes: Sequence[str | None],
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        bias: bool = False,
        kernel_init: Initializer | None = None,
        lora: LoraConfig | None = None,
    ):
        inputs, kernel = equation.split("->")[0].split(",")
        self.equation, self.dtype = equation, dtype
        contracted = [i for i, letter in enumerate(kernel) if letter in inputs]
        free = [i for i, letter in enumerate(kernel) if letter not in inputs]
        if kernel_init is None:
            kernel_init = nnx.initializers.lecun_normal(in_axis=contracted, out_axis=free)
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), tuple(shape), jnp.float32), logical_axes=tuple(axes)
        )
        self.bias = (
            nnx.Param(
                jnp.zeros([shape[i] for i in free], jnp.float32),
                logical_axes=tuple(axes[i] for i in free),
            )
            if bias
            else None
        )
        self.lora = Lora(equation, shape, axes, lora, rngs=rngs, dtype=dtype) if lora else None
        self.scale: nnx.Param | None = nnx.data(
            None
        )  # of an int8 kernel (see `storm_jax.models.int8`)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.einsum(self.equation, x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        if self.scale is not None:
            y = (y * _like(self.scale[...], y)).astype(self.dtype)
        if self.bias is not None:
            y += _like(self.bias[...].astype(self.dtype), y)
        return y if self.lora is None else y + self.lora(x)


def _like(channels: jax.Array, y: jax.Array) -> jax.Array:
    """Adds leading axes to a value per output channel."""
    return channels.reshape((1,) * (y.ndim - channels.ndim) + channels.shape)


class PairedLinear(nnx.Module):
    """Two linear maps of one input, [..., D] -> 2 x [..., E], with one kernel [D, 2, E].

    The pair has its own axis, so that sharding E needs no communication. The two are separate matmuls,
    so that their results are not split and their gradients not concatenated.
    """

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        init = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        kernel = init(rngs.params(), (width, 2, inner), jnp.float32)
        self.kernel = nnx.Param(kernel, logical_axes=("embed", None, "inner"))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, second = jnp.unstack(self.kernel[...].astype(self.dtype), axis=1)  # 2 x [D, E]
        x = x.astype(self.dtype)
        return x @ first, x @ second


def stack_layers(make: Callable[[nnx.Rngs], Layer], depth: int, rngs: nnx.Rngs) -> Layer:
    """Creates `depth` layers as one module whose parameters have a leading layer axis."""
    return nnx.vmap(make)(rngs.split(depth))


def run_layers(
    layers: Any, x: Any, layer_fn: Callable[[Any, Any], tuple], remat: bool
) -> tuple[Any, Any]:
    """Scans `x, result = layer_fn(layer, x)` over stacked layers; x is a tree of arrays.

    Args:
      layers: a module, or a tree of modules and arrays, with a leading layer axis.
      remat: store only the inputs of the layers for the backward pass.

    Returns:
      The last x, and the results with a leading layer axis.
    """

    def body(x: Any, layer: Any) -> tuple[Any, Any]:
        return layer_fn(layer, x)

    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, layers)
