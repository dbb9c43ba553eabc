"""Model parameters: shapes, random initialisation, dtypes and shardings.

Parameters are flat dicts {"decoder/layers/query/kernel": array}. They are nested only in models and
on disk (`flax.traverse_util.unflatten_dict(params, sep="/")`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding

from storm_jax.config import ConfigError, ModelConfig
from storm_jax.models.int8 import to_int8
from storm_jax.models.storm import Storm


def abstract_model(
    config: ModelConfig, *, remat: bool = False, int8: bool = False
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and the shapes of its parameters; allocates nothing.

    Args:
      int8: with int8 kernels (see `storm_jax.models.int8`).

    Raises:
      ConfigError: if the projector has variables other than parameters.
    """

    def make() -> Storm:
        model = Storm(config, rngs=nnx.Rngs(0), remat=remat)
        if int8:
            to_int8(model)
        return model

    model = nnx.eval_shape(make)
    graphdef, params, *rest = nnx.split(model, nnx.Param, ...)
    other = nnx.to_flat_state(rest[0])
    if other:
        kinds = ", ".join(f"{'/'.join(map(str, p))} ({type(v).__name__})" for p, v in other)
        raise ConfigError(
            f"model.mixer={config.mixer!r} has state that is not an nnx.Param: {kinds}. Only "
            f"parameters are trained and saved"
        )
    return graphdef, params


def flat_params(params: nnx.State) -> dict[str, Any]:
    """Parameters by path. Indices of an `nnx.List` become text: "projector/mixer/layers/0/kernel"."""
    flat = flatten_dict(nnx.to_pure_dict(params))
    return {"/".join(map(str, path)): leaf for path, leaf in flat.items()}


def init_params(config: ModelConfig, seed: int) -> dict[str, jax.Array]:
    """All parameters of a newly initialised model by path, in float32."""
    model = Storm(config, rngs=nnx.Rngs(seed))
    return flat_params(nnx.split(model, nnx.Param, ...)[1])


def random_params(
    config: ModelConfig, seed: int, shardings: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
    """The parameters named by `shardings`, initialised as in a new model, in float32.

    Only these are allocated.
    """

    def make() -> dict[str, jax.Array]:
        params = init_params(config, seed)
        return {name: params[name] for name in shardings}

    return jax.jit(make, out_shardings=dict(shardings))()


_MATRICES = ("/kernel", "/embedding", "/lm_head", "/position", "/lora/a", "/lora/b")


def compute_dtypes(
    params: Mapping[str, Any], model: ModelConfig
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes that the forward pass needs: matrices in the compute dtype or int8, the rest
    in float32."""
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, _compute_dtype(name, leaf, model))
        for name, leaf in params.items()
    }


def _compute_dtype(name: str, leaf: Any, model: ModelConfig) -> Any:
    if leaf.dtype == jnp.int8:
        return jnp.int8
    return model.dtype if name.endswith(_MATRICES) else jnp.float32


def with_sharding(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of `tree` with the given shardings: the target of a restore."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
