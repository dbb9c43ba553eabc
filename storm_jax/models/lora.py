"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685): y = x W + (alpha / rank) (x A) B.

B is initialised to zero, so a new adapter does not change the output. `merge` folds A and B into W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import LoraConfig

_PARAMETERS = ("/lora/a", "/lora/b")


class Lora(nnx.Module):
    """The low-rank update of `jnp.einsum(equation, x, kernel)`.

    Args:
      equation, shape, axes: those of the adapted kernel (see `layers.Einsum`).

    Raises:
      ValueError: the contracted letters of the kernel do not come first.
    """

    def __init__(
        self,
        equation: str,
        shape: Sequence[int],
        axes: Sequence[str | None],
        config: LoraConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        (x, kernel), y = equation.split("->")[0].split(","), equation.split("->")[1]
        num_contracted = sum(letter in x for letter in kernel)
        contracted, free = kernel[:num_contracted], kernel[num_contracted:]
        if any(letter in x for letter in free):
            raise ValueError(f"{equation}: the contracted letters of the kernel must come first")
        batch = "".join(letter for letter in x if letter not in contracted)
        self.down, self.up = f"{x},{contracted}r->{batch}r", f"{batch}r,r{free}->{y}"
        self.scale, self.dtype = config.alpha / config.rank, dtype
        init = nnx.initializers.lecun_normal(in_axis=tuple(range(num_contracted)), out_axis=-1)
        self.a = nnx.Param(
            init(rngs.params(), (*shape[:num_contracted], config.rank), jnp.float32),
            logical_axes=(*axes[:num_contracted], None),
        )
        self.b = nnx.Param(
            jnp.zeros((config.rank, *shape[num_contracted:]), jnp.float32),
            logical_axes=(None, *axes[num_contracted:]),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jnp.einsum(self.down, x.astype(self.dtype), self.a[...].astype(self.dtype))
        return self.scale * jnp.einsum(self.up, hidden, self.b[...].astype(self.dtype))


def is_adapter(name: str) -> bool:
    """Returns whether a parameter path belongs to an adapter, e.g. "decoder/layers/query/lora/a"."""
    return name.endswith(_PARAMETERS)


def merge(params: Mapping[str, jax.Array], config: LoraConfig) -> dict[str, jax.Array]:
    """Folds every adapter into its kernel.

    Args:
      params: flat parameters {path: array} of stacked layers.

    Returns:
      The flat parameters without adapters. Kernels keep their dtype; sums are computed in fp32.
    """
    merged = {name: value for name, value in params.items() if not is_adapter(name)}
    for name, a in params.items():
        if not name.endswith("/lora/a"):
            continue
        module = name.removesuffix("/lora/a")
        kernel, b = params[f"{module}/kernel"], params[f"{module}/lora/b"]
        layers, rank = a.shape[0], a.shape[-1]
        update = jnp.einsum(
            "lcr,lrk->lck",
            a.reshape(layers, -1, rank).astype(jnp.float32),
            b.reshape(layers, rank, -1).astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        scaled = config.alpha / rank * update.reshape(kernel.shape)
        merged[f"{module}/kernel"] = (kernel.astype(jnp.float32) + scaled).astype(kernel.dtype)
    return merged
