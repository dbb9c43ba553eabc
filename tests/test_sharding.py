"""Every parameter of the full-size models is sharded according to the rules."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import PartitionSpec

from configs.storm_qwen2_7b import MODEL as QWEN2_7B
from configs.tiny import MODEL as TINY
from storm_jax.config import ConfigError, LoraConfig, MeshConfig
from storm_jax.models.decoder import Decoder
from storm_jax.ops.cross_entropy import cross_entropy
from storm_jax.params import abstract_model, flat_params
from storm_jax.sharding import (
    AXES,
    _arrange,
    batch_sharding,
    make_mesh,
    param_shardings,
    param_specs,
)
from storm_jax.train.optim import NEVER_TRAINED

MESHES = {
    "128 TPU v5p": (1, 128, 1, 1),
    "256 TPU v5e": (2, 32, 2, 2),
    "8 GPUs": (1, 4, 1, 2),
}
PRESETS = ("storm_qwen2_7b", "storm_qwen2_1_5b", "storm_llama3_8b")
GOLDEN = pathlib.Path(__file__).parent / "golden"
_MAX_REPLICATED = 2**20  # parameters


def shardings_of(preset: str) -> str:
    """A table of the shardings of all parameters of a preset on every mesh."""
    _, params = abstract_model(importlib.import_module(f"configs.{preset}").MODEL)
    meshes = {name: jax.sharding.AbstractMesh(sizes, AXES) for name, sizes in MESHES.items()}
    lines = [f"{name}: {dict(mesh.shape)}" for name, mesh in meshes.items()] + [""]
    by_mesh = [param_specs(params, mesh) for mesh in meshes.values()]
    for name, leaf in flat_params(params).items():
        specs = [
            " x ".join("+".join(axes or "-") for axes in map(as_tuple, s[name])) for s in by_mesh
        ]
        lines.append(f"{name} {list(leaf.shape)}: " + " | ".join(specs))
    return "\n".join(lines) + "\n"


def as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


@pytest.mark.parametrize("preset", PRESETS)
def test_shardings_of_full_size_models_are_those_in_the_golden_file(preset):
    """After a change on purpose: python -m tests.test_sharding"""
    assert shardings_of(preset) == (GOLDEN / f"shardings_{preset}.txt").read_text()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_large_parameter_of_full_size_models_is_sharded(preset):
    _, params = abstract_model(importlib.import_module(f"configs.{preset}").MODEL)
    for sizes in MESHES.values():
        specs = param_specs(params, jax.sharding.AbstractMesh(sizes, AXES))
        per_device = total = 0
        for name, leaf in flat_params(params).items():
            shards = math.prod(
                dict(zip(AXES, sizes, strict=True))[a] for s in specs[name] for a in as_tuple(s)
            )
            assert shards > 1 or leaf.size < _MAX_REPLICATED, name
            total += leaf.size
            per_device += leaf.size / shards
        assert per_device < 1.15 * total / (math.prod(sizes) / sizes[0] / sizes[2]), sizes


class FakeDevice:
    """A device of a GPU node or TPU slice."""

    platform = device_kind = "fake"

    def __init__(self, number: int, per_slice: int):
        self.id, self.slice_index = number, number // per_slice


def test_only_one_axis_crosses_the_network_between_slices():
    """It is data if possible, else fsdp; the devices of a slice are neighbours along the other axes."""
    devices = [FakeDevice(number, per_slice=8) for number in range(16)]

    def slices(**sizes: int) -> np.ndarray:
        shape = tuple(sizes.get(axis, 1) for axis in AXES)
        return np.vectorize(lambda device: device.slice_index)(_arrange(shape, devices))

    assert (slices(data=2, fsdp=2, context=2, tensor=2) == np.arange(2).reshape(2, 1, 1, 1)).all()
    assert (slices(fsdp=8, tensor=2)[0, :, 0] == np.arange(2).repeat(4)[:, None]).all()
    with pytest.raises(
        ConfigError, match=r"on 2 slices: make mesh.data or mesh.fsdp a multiple of 2"
    ):
        slices(tensor=16)


def test_rules_put_heads_on_tensor_and_rows_on_data():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, params = abstract_model(TINY)
    specs = param_specs(params, mesh)
    assert specs["decoder/layers/query/kernel"] == PartitionSpec(None, ("fsdp",), ("tensor",), None)
    assert specs["decoder/embedding"] == PartitionSpec(("tensor", "fsdp"), None)
    assert specs["projector/mixer/layers/mixer/in_proj/kernel"] == PartitionSpec(
        None, ("fsdp",), None, ("tensor",)
    )
    assert specs["decoder/norm/scale"] == PartitionSpec(None)
    assert any(name.startswith(NEVER_TRAINED) for name in specs)
    rows = batch_sharding(mesh, (8, 16))
    assert rows.spec == PartitionSpec(("data", "fsdp"), None)


def test_adapters_are_sharded_like_their_kernels():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    decoder = dataclasses.replace(TINY.decoder, lora=LoraConfig(rank=4))
    specs = param_specs(abstract_model(dataclasses.replace(TINY, decoder=decoder))[1], mesh)
    layers = "decoder/layers"
    assert specs[f"{layers}/query/lora/a"] == PartitionSpec(None, ("fsdp",), None)
    assert specs[f"{layers}/query/lora/b"] == PartitionSpec(None, None, ("tensor",), None)
    assert specs[f"{layers}/out/lora/a"] == PartitionSpec(None, ("tensor",), None, None)


def test_tables_of_an_indivisible_vocabulary_are_sharded_along_the_width():
    """They are neither padded nor replicated; 151,936 is 2**7 * 1187."""
    mesh = jax.sharding.AbstractMesh((1, 256, 1, 2), AXES)
    for size, sharded in ((151_936, "width"), (152_064, "vocab"), (128_257, "width")):
        decoder = dataclasses.replace(QWEN2_7B.decoder, vocab_size=size)
        specs = param_specs(abstract_model(dataclasses.replace(QWEN2_7B, decoder=decoder))[1], mesh)
        axes = ("tensor", "fsdp")
        table = (axes, None) if sharded == "vocab" else (None, axes)
        assert specs["decoder/embedding"] == PartitionSpec(*table)
        assert specs["decoder/lm_head"] == PartitionSpec(*table[::-1])


@pytest.mark.parametrize("tied", [True, False])
def test_an_indivisible_vocabulary_on_a_mesh_equals_one_device(tied, capfd, rng):
    """Compares the loss and the gradients of both tables, in the shardings in which they are stored."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    config = dataclasses.replace(TINY.decoder, vocab_size=307, tie_embeddings=tied)
    decoder = Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=False)
    graphdef, params = nnx.split(decoder)
    tokens = rng.integers(0, 307, (8, 16)).astype(np.int32)
    positions = jnp.broadcast_to(jnp.arange(16)[None], tokens.shape)

    def loss(params, tokens):
        model = nnx.merge(graphdef, unflatten_dict(params, sep="/"))
        hidden, _ = model(model.embed(tokens), positions)
        return cross_entropy(hidden, model.head(), tokens, jnp.ones(tokens.shape))[0]

    flat = flat_params(params)
    expected = jax.jit(jax.value_and_grad(loss))(flat, tokens)
    shardings = param_shardings(params, mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
        rows = jax.device_put(tokens, batch_sharding(mesh, tokens.shape))
        found = step(jax.device_put(flat, shardings), rows)
    for ours, one in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, one, rtol=1e-4, atol=1e-4)
    assert "rematerialization" not in capfd.readouterr().err


def test_an_indivisible_dimension_is_not_sharded():
    mesh = make_mesh(MeshConfig(data=8))
    assert batch_sharding(mesh, (6, 4)).spec == PartitionSpec(None, None)


def test_a_mesh_that_does_not_match_the_devices_is_rejected():
    with pytest.raises(ValueError, match=r"needs 3 devices but 8 are available"):
        make_mesh(MeshConfig(data=3))
    assert dict(make_mesh(MeshConfig(data=2, fsdp=-1)).shape)["fsdp"] == jax.device_count() // 2


if __name__ == "__main__":
    for preset in PRESETS:
        (GOLDEN / f"shardings_{preset}.txt").write_text(shardings_of(preset))
