"""SigLIP: every layer equals transformers' tower with the same random weights, from uint8 frames, for images
that patches do or do not cover and for several query chunks."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import matplotlib.cbook
import numpy as np
import pytest
import torch
from flax import nnx
from flax.traverse_util import flatten_dict
from PIL import Image
from transformers import SiglipImageProcessorPil

from benchmarks.torch_models import torch_tower
from storm_jax.config import VisionConfig
from storm_jax.media.image import read_image
from storm_jax.media.media import Media
from storm_jax.models.siglip import SigLIP
from storm_jax.ops.attention.xla import BLOCK
from storm_jax.weights.architecture import preprocessor_json

MAX_ERROR = 1e-4
ODD_GRID = VisionConfig(
    image_size=42, patch_size=14, width=24, depth=3, num_heads=3, mlp_dim=40, feature_layer=-1
)  # 3 x 3 patches
CONFIGS = {
    "odd grid": ODD_GRID,
    "rest without a patch": dataclasses.replace(ODD_GRID, image_size=45),
    "two blocks": dataclasses.replace(ODD_GRID, image_size=68, patch_size=4),
}
assert CONFIGS["two blocks"].side ** 2 > BLOCK


def abstract_tower(config: VisionConfig) -> SigLIP:
    return nnx.eval_shape(lambda: SigLIP(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=False))


@pytest.mark.parametrize("case", CONFIGS)
def test_every_layer_equals_transformers(case, randomise, rng):
    config = CONFIGS[case]
    ours = randomise(abstract_tower(config))
    params = jax.device_get(nnx.to_pure_dict(nnx.split(ours)[1]))
    theirs = torch_tower(config, flatten_dict({"vision": params}, sep="/"))
    frames = rng.integers(0, 256, (2, config.image_size, config.image_size, 3)).astype(np.uint8)
    pixels = torch.from_numpy((frames / 255.0 - 0.5) / 0.5).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        output = theirs(pixels, output_hidden_states=True)
    expected = output.hidden_states
    assert len(expected) == config.depth + 1
    normed = dataclasses.replace(config, final_norm=True)
    found = nnx.jit(lambda tower: tower(frames))(with_final_norm(normed, params))
    assert max_error(found, output.last_hidden_state) <= MAX_ERROR
    for layer in range(-config.depth, 0):
        tower = shallow(config, params, layer)
        found = nnx.jit(lambda tower: tower(frames))(tower)
        assert expected[layer].abs().max() > 0.5
        assert max_error(found, expected[layer]) <= MAX_ERROR, layer


def images() -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (131, 77, 3)).astype(np.uint8)
    return {
        "photograph": Image.open(
            matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
        ),
        "portrait of odd sides": Image.fromarray(noise),
        "one pixel": Image.fromarray(noise[:1, :1]),
        "one line": Image.fromarray(noise[:1]),
        "enlarged": Image.fromarray(noise).resize((30, 20)),
        "grey": Image.fromarray(noise[..., 0]),
    }


@pytest.mark.parametrize("size", [384, 448])
@pytest.mark.parametrize("kind", images())
def test_pixels_equal_those_of_transformers(kind, size, tmp_path):
    """Compares the normalised pixels, which may differ by 1/255."""
    image = images()[kind]
    image.save(tmp_path / "image.png")
    ours = (
        read_image(Media.file("image", tmp_path / "image.png"), size).astype(np.float32) / 127.5 - 1
    )
    config = dataclasses.replace(ODD_GRID, image_size=size)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor_json(config)))
    processor = SiglipImageProcessorPil.from_pretrained(tmp_path)
    theirs = processor(image.convert("RGB"))["pixel_values"][0].transpose(1, 2, 0)
    assert np.abs(ours - theirs).max() <= 1 / 255
    plain = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.NEAREST))
    if kind == "photograph":
        assert np.abs(plain / 127.5 - 1 - theirs).max() > 0.1  # the choice of filter matters


def shallow(config: VisionConfig, params: dict, feature_layer: int) -> SigLIP:
    """Returns a tower with a different feature layer and the same weights."""
    config = dataclasses.replace(config, feature_layer=feature_layer)
    tower = abstract_tower(config)
    num_layers = config.depth + 1 + feature_layer
    moved = {
        **params,
        "layers": jax.tree.map(lambda x: x[:num_layers], params["layers"]),
        "unused": dict(params["unused"]),
    }
    if num_layers < config.depth:
        moved["unused"]["layers"] = jax.tree.map(lambda x: x[num_layers:], params["layers"])
    return nnx.merge(nnx.split(tower)[0], moved)


def with_final_norm(config: VisionConfig, params: dict) -> SigLIP:
    """Returns a tower that applies its final norm, with the same weights."""
    rest = {name: value for name, value in params.items() if name != "unused"}
    moved = {**rest, "norm": params["unused"]["norm"], "unused": {}}
    return nnx.merge(nnx.split(abstract_tower(config))[0], moved)


def max_error(found: jax.Array, expected: torch.Tensor) -> float:
    assert found.shape == tuple(expected.shape)
    return float(np.abs(np.asarray(found) - expected.detach().numpy()).max())
