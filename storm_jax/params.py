"""Trees of parameters: as shapes, at random, flat by path, and with dtypes and shardings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from storm_jax.config import ConfigError, ModelConfig
from storm_jax.models.storm import Storm


def abstract_model(config: ModelConfig, *, remat: bool = False) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and its parameters as shapes; nothing is allocated.

    Raises:
      ConfigError: for a projector with other variables than parameters.
    """
    model = nnx.eval_shape(lambda: Storm(config, rngs=nnx.Rngs(0), remat=remat))
    graphdef, params, *rest = nnx.split(model, nnx.Param, ...)
    other = nnx.to_flat_state(rest[0])
    if other:
        kinds = ", ".join(f"{'/'.join(map(str, p))} ({type(v).__name__})" for p, v in other)
        raise ConfigError(
            f"model.projector={config.projector!r} keeps state that is no nnx.Param: {kinds}. Only "
            f"parameters are trained and saved"
        )
    return graphdef, params


def init_params(config: ModelConfig, seed: int) -> dict[str, jax.Array]:
    """All parameters of a fresh model by path, in fp32."""
    model = Storm(config, rngs=nnx.Rngs(seed))
    return flatten(nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1]))


def random_params(
    config: ModelConfig, seed: int, shardings: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
    """The parameters with these paths as a fresh model has them, in fp32; no others are made."""

    def make() -> dict[str, jax.Array]:
        params = init_params(config, seed)
        return {name: params[name] for name in shardings}

    return jax.jit(make, out_shardings=dict(shardings))()


_MATRICES = ("/kernel", "/embedding", "/lm_head", "/position", "/lora/a", "/lora/b")


def compute_dtypes(tree: Any, model: ModelConfig) -> Any:
    """Shapes of parameters as the forward pass reads them: matrices in the compute dtype."""

    def leaf_dtype(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        is_matrix = "/".join(str(key.key) for key in path).endswith(_MATRICES)
        return jax.ShapeDtypeStruct(leaf.shape, model.dtype if is_matrix else jnp.float32)

    return jax.tree.map_with_path(leaf_dtype, tree)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict to {"a/b/c": leaf}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def with_sharding(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of `tree` with the given shardings, the target of a restore."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
