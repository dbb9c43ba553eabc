"""Every parameter of the full-size models is split, and placed where the rules say."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from storm_jax import presets
from storm_jax.config import MeshConfig
from storm_jax.run import abstract_model
from storm_jax.sharding import batch_sharding, make_mesh, param_specs
from storm_jax.train.optim import NEVER_TRAINED


@pytest.mark.parametrize("preset", ["storm_qwen2_7b", "storm_qwen2_1_5b", "storm_llama3_8b"])
def test_no_large_parameter_stays_whole(preset, caplog):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    _, params = abstract_model(getattr(presets, preset)())
    specs = param_specs(params, mesh)
    assert "replicated" not in caplog.text
    per_device = total = 0
    for path, variable in params.flat_state():
        size = math.prod(variable.shape)
        name = "/".join(map(str, path))
        axes = [(axis,) if isinstance(axis, str) else axis or () for axis in specs[name]]
        total += size
        per_device += size // math.prod(mesh.shape[a] for group in axes for a in group)
    assert per_device < 1.1 * total / 8


def test_rules_put_heads_on_tensor_and_rows_on_data():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, params = abstract_model(presets.tiny())
    specs = param_specs(params, mesh)
    assert specs["decoder/layers/query/kernel"] == PartitionSpec(None, ("fsdp",), ("tensor",), None)
    assert specs["decoder/embedding"] == PartitionSpec(("tensor", "fsdp"), None)
    assert specs["projector/mixer/layers/mixer/in_proj/kernel"] == PartitionSpec(
        None, ("fsdp",), None, ("tensor",)
    )
    assert specs["decoder/norm/scale"] == PartitionSpec(None)
    assert any(name.startswith(NEVER_TRAINED) for name in specs)
    rows = batch_sharding(mesh, np.zeros((8, 16), np.int32))
    assert rows.spec == PartitionSpec(("data", "fsdp"), None)


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = make_mesh(MeshConfig(data=8))
    assert batch_sharding(mesh, np.zeros((6, 4))).spec == PartitionSpec(None, None)


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(ValueError, match=r"needs 3 devices and 8 are here"):
        make_mesh(MeshConfig(data=3))
    assert dict(make_mesh(MeshConfig(data=2, fsdp=-1)).shape)["fsdp"] == jax.device_count() // 2
