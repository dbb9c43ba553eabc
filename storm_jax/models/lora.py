"""Low-rank adapters (Hu et al., arXiv 2106.09685): y = x W + (alpha / rank) (x A) B.

B starts at zero, so that a fresh adapter changes nothing. `merge` folds A and B into W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import LoraConfig

_PARAMETERS = ("/lora/a", "/lora/b")


class Lora(nnx.Module):
    """What is added to `jnp.einsum(equation, x, kernel)`; the kernel's contracted letters are first.

    Args:
      equation, shape, axes: of the kernel that is adapted (see `layers.Einsum`).
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
        split = sum(letter in x for letter in kernel)
        shared, kept = kernel[:split], kernel[split:]
        if any(letter in x for letter in kept):
            raise ValueError(f"{equation}: the kernel's contracted letters must come first")
        rest = "".join(letter for letter in x if letter not in shared)
        self.down, self.up = f"{x},{shared}r->{rest}r", f"{rest}r,r{kept}->{y}"
        self.scale, self.dtype = config.alpha / config.rank, dtype
        init = nnx.initializers.lecun_normal(in_axis=tuple(range(split)), out_axis=-1)
        self.a = nnx.Param(
            init(rngs.params(), (*shape[:split], config.rank), jnp.float32),
            logical_axes=(*axes[:split], None),
        )
        self.b = nnx.Param(
            jnp.zeros((config.rank, *shape[split:]), jnp.float32),
            logical_axes=(None, *axes[split:]),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jnp.einsum(self.down, x.astype(self.dtype), self.a[...].astype(self.dtype))
        return self.scale * jnp.einsum(self.up, hidden, self.b[...].astype(self.dtype))


def is_adapter(name: str) -> bool:
    """Whether a parameter path, such as "decoder/layers/query/lora/a", is an adapter's."""
    return name.endswith(_PARAMETERS)


def merge(params: Mapping[str, jax.Array], config: LoraConfig) -> dict[str, jax.Array]:
    """Flat parameters {path: array} of stacked layers with every adapter folded into its kernel.

    The sum is made in fp32 and rounded to the kernel's dtype.
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
        whole = kernel.astype(jnp.float32) + config.alpha / rank * update.reshape(kernel.shape)
        merged[f"{module}/kernel"] = whole.astype(kernel.dtype)
    return merged
