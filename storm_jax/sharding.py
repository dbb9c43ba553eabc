"""The device mesh, and the rules that map logical axes to mesh axes.

Modules annotate each `nnx.Param` with `logical_axes`, which name its trailing dimensions; stacked layers
have additional leading ones. `RULES` lists the mesh axes that shard each logical axis, except those that shard
an earlier dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from storm_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "context", "tensor")
RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "sequence": ("context",),
    "frames": AXES,  # the tower needs no tensor parallelism
    # parameters
    "embed": ("fsdp",),
    "tower": ("fsdp", "tensor"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "inner": ("tensor",),
    "wide_inner": ("tensor", "fsdp"),  # of a kernel whose other dimension is narrow
    "vocab": ("tensor", "fsdp"),  # tables are sharded on one dimension: XLA rematerialises two
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Creates the (data, fsdp, context, tensor) mesh over the given devices, by default all.

    Raises:
      ConfigError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    requested = (config.data, config.fsdp, config.context, config.tensor)
    remaining = len(devices) // math.prod(size for size in requested if size > 0)
    shape = tuple(remaining if size == -1 else size for size in requested)
    if math.prod(shape) != len(devices):
        raise ConfigError(
            f"mesh {dict(zip(AXES, shape, strict=True))} needs {math.prod(shape)} devices but "
            f"{len(devices)} are available: set config.mesh so that the product of its axes matches"
        )
    return Mesh(_arrange(shape, devices), AXES, axis_types=(AxisType.Auto,) * 4)


def _arrange(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices by position in the mesh, so that axes run along fast links.

    Slices of a TPU pod and nodes of a GPU cluster are connected by a slower network. It is left to the axis that
    exchanges least: `data`, or `fsdp` if the slices do not divide `data`.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    for axis in (0, 1):
        if shape[axis] % slices == 0:
            outer = [slices if i == axis else 1 for i in range(len(shape))]
            inner = [size // n for size, n in zip(shape, outer, strict=True)]
            return mesh_utils.create_hybrid_device_mesh(
                inner, outer, devices, allow_split_physical_axes=True
            )
    raise ConfigError(
        f"mesh {dict(zip(AXES, shape, strict=True))} on {slices} slices: make mesh.data or mesh.fsdp a multiple "
        f"of {slices}, so that only one of them crosses the network between slices"
    )


def param_specs(params: nnx.State, mesh: Mesh) -> dict[str, PartitionSpec]:
    """Returns the PartitionSpec of every parameter by path.

    A dimension that is not divisible by its mesh axes is not sharded.
    """
    specs = {}
    for path, variable in nnx.to_flat_state(params):
        name = "/".join(map(str, path))
        shape, axes = variable.shape, variable.get_metadata().get("logical_axes") or ()
        names = _shard_vocab_or_width([None] * (len(shape) - len(axes)) + list(axes), shape, mesh)
        specs[name] = _spec(names, shape, mesh)
    return specs


def _shard_vocab_or_width(
    names: list[str | None], shape: Sequence[int], mesh: Mesh
) -> Sequence[str | None]:
    """Moves the "vocab" axis of a table to its width if the vocabulary is not divisible.

    Tables are never padded, in memory, on disk or in an export.
    """
    if "vocab" not in names:
        return names
    devices = math.prod(mesh.shape[axis] for axis in RULES["vocab"])
    return names if shape[names.index("vocab")] % devices == 0 else names[::-1]


def param_shardings(params: nnx.State, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the NamedSharding of every parameter by path."""
    return {name: NamedSharding(mesh, spec) for name, spec in param_specs(params, mesh).items()}


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Shards rows over data and fsdp, and the second dimension (tokens or frames) over context."""
    return NamedSharding(mesh, _spec(("batch", "sequence")[: len(shape)], shape, mesh))


class LocalRows(NamedTuple):
    """Rows of a batch of `total` rows: those that this process's devices hold, and those that it counts.

    A row is held by several processes if its tokens or the model are split between them; the first counts it.
    """

    total: int
    held: list[int]
    counted: frozenset[int]


def local_rows(mesh: Mesh, batch_size: int) -> LocalRows:
    """The rows of a batch that this process reads, ascending."""
    sharding = NamedSharding(mesh, _spec(("batch",), (batch_size,), mesh))
    processes: dict[int, set[int]] = {row: set() for row in range(batch_size)}
    placed: Mapping[Any, Any] = sharding.devices_indices_map((batch_size,))
    for device, (rows,) in placed.items():
        for row in range(batch_size)[rows]:
            processes[row].add(device.process_index)
    here = jax.process_index()
    held = [row for row, members in processes.items() if here in members]
    return LocalRows(
        batch_size, held, frozenset(row for row in held if min(processes[row]) == here)
    )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of `x` to the named logical axes; a no-op without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes, x.shape, mesh))


def axis_size(axis: str) -> int:
    """Returns the number of devices that a logical axis is sharded over under the context mesh; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return 1
    return math.prod(mesh.shape[name] for name in RULES[axis])


def num_shards(shape: Sequence[int], *axes: str | None) -> tuple[int, ...]:
    """Returns the number of shards along each dimension of an array with these logical axes."""
    mesh = jax.sharding.get_abstract_mesh()
    by_dimension = mesh_axes_in_context(shape, *axes)
    return tuple(math.prod(mesh.shape[name] for name in names) for names in by_dimension)


def mesh_axes_in_context(shape: Sequence[int], *axes: str | None) -> list[tuple[str, ...]]:
    """Returns the axes of the context mesh that shard each dimension of an array with these logical axes.

    There are none without a mesh, and inside a `shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return [()] * len(axes)
    return _mesh_axes(axes, shape, mesh)


def platform() -> str:
    """Returns the platform that programs are lowered for, "cpu", "gpu" or "tpu".

    It is that of the context mesh, whose devices need not be here, or else the default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def spec_in_context(shape: Sequence[int], *axes: str | None) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these logical axes under the context mesh."""
    return _spec(axes, shape, jax.sharding.get_abstract_mesh())


def _spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    return PartitionSpec(*(names or None for names in _mesh_axes(axes, shape, mesh)))


def _mesh_axes(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Any
) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension: those of its rule that divide it and that no earlier one uses."""
    found: list[tuple[str, ...]] = []
    for axis, size in zip(axes, shape, strict=False):
        used = {name for names in found for name in names}
        rule = RULES[axis] if axis else ()
        chosen = [name for name in rule if mesh.shape[name] > 1 and name not in used]
        while size % math.prod(mesh.shape[name] for name in chosen):
            chosen.pop()
        found.append(tuple(chosen))
    return found
