"""The stems equal torch modules written from the public descriptions, on odd grids too."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from storm_jax.config import ModelConfig, StemConfig
from storm_jax.models.stems import Stem

SIDE, VISION, WIDTH = 5, 6, 8


def cells(x: torch.Tensor, r: int) -> torch.Tensor:
    """[F, S * S, C] -> [F, N, r * r * C], patches of a cell in raster order; odd grids end in zeros."""
    side = -(-SIDE // r)
    x = nn.functional.pad(
        x.reshape(len(x), SIDE, SIDE, -1), (0, 0, 0, side * r - SIDE, 0, side * r - SIDE)
    )
    rows = [
        torch.cat([x[:, r * i + a, r * j + b] for a in range(r) for b in range(r)], -1)
        for i in range(side)
        for j in range(side)
    ]
    return torch.stack(rows, 1)


def linears(kind: str, r: int, bias: bool) -> list[nn.Module]:
    merged = VISION * r * r
    return {
        "linear": [nn.Linear(merged, WIDTH, bias=bias)],
        "mlp2x_gelu": [nn.Linear(merged, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)],
        "mlp_downsample": [
            nn.LayerNorm(merged), nn.Linear(merged, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH),
        ],
        "mlp_downsample_3x3_fix": [
            nn.LayerNorm(merged), nn.Linear(merged, VISION * r), nn.GELU(), nn.LayerNorm(VISION * r),
            nn.Linear(VISION * r, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH),
        ],
    }[kind]  # fmt: skip


STEMS = [
    ("linear", 2, True), ("linear", 4, False), ("linear", 1, True), ("mlp2x_gelu", 1, True),
    ("mlp_downsample", 2, True), ("mlp_downsample_3x3_fix", 3, True),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "r", "bias"), STEMS)
def test_a_stem_equals_torch_with_its_gradients(kind, r, bias, small_model, rng):
    config = dataclasses.replace(
        small_model,
        vision=dataclasses.replace(
            small_model.vision, image_size=SIDE * 2, patch_size=2, width=VISION, num_heads=2
        ),
        decoder=dataclasses.replace(small_model.decoder, width=WIDTH),
        stem=StemConfig(kind=kind, downsample=r, bias=bias),
    )
    stem = make_stem(config)
    reference = nn.Sequential(*linears(kind, r, bias)).double()
    copy_parameters(stem, reference, rng)
    x = rng.standard_normal((2, 3, SIDE * SIDE, VISION)).astype(np.float32)
    weights = rng.standard_normal((2, 3, config.side**2, WIDTH)).astype(np.float32)
    found, grad = jax.value_and_grad(lambda x: jnp.sum(stem(x) * weights))(jnp.asarray(x))

    x64 = torch.from_numpy(x).double().requires_grad_()
    y64 = reference(cells(x64.reshape(6, SIDE * SIDE, VISION), r)).reshape(weights.shape)
    (y64 * torch.from_numpy(weights)).sum().backward()
    assert stem(jnp.asarray(x)).shape == (2, 3, config.side**2, WIDTH)
    np.testing.assert_allclose(stem(jnp.asarray(x)), y64.detach(), atol=2e-5)
    np.testing.assert_allclose(found, (y64 * torch.from_numpy(weights)).sum().item(), rtol=1e-4)
    np.testing.assert_allclose(grad, x64.grad, atol=2e-5)


def make_stem(config: ModelConfig) -> Stem:
    return Stem(config, rngs=nnx.Rngs(0), dtype=jnp.float32)


def copy_parameters(stem: Stem, reference: nn.Sequential, rng: np.random.Generator) -> None:
    """Draws all parameters of both at random."""
    names = {
        nn.Linear: iter(("linear1", "linear2", "linear3")),
        nn.LayerNorm: iter(("norm1", "norm2")),
    }
    for module in reference:
        if type(module) not in names:
            continue
        ours = getattr(stem, next(names[type(module)]))
        for name, parameter in module.named_parameters():
            value = rng.standard_normal(parameter.shape) * 0.5
            parameter.data = torch.from_numpy(value)
            kernel = "scale" if isinstance(module, nn.LayerNorm) else "kernel"
            ours_name = kernel if name == "weight" else "bias"
            getattr(ours, ours_name)[...] = jnp.asarray(value.T, jnp.float32)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize(("kind", "r", "bias"), STEMS)
def test_a_new_mixer_behind_a_stem_changes_nothing(mixer, kind, r, bias, small_model, rng):
    from storm_jax.models.temporal_projector import TemporalProjector

    config = dataclasses.replace(
        small_model,
        stem=StemConfig(kind=kind, downsample=r, bias=bias),
        mamba=dataclasses.replace(small_model.mamba, head_dim=16),
    )

    def output(mixer: str) -> np.ndarray:
        config_ = dataclasses.replace(config, mixer=mixer)
        projector = TemporalProjector(config_, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=False)
        clip = jnp.ones((1, 4), jnp.int32)
        return np.asarray(nnx.jit(lambda p, x: p(x, clip)[0])(projector, x))

    x = rng.standard_normal((1, 4, config.vision.side**2, config.vision.width)).astype(np.float32)
    np.testing.assert_array_equal(output(mixer), output("none"))
