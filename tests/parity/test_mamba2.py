"""The Mamba-2 mixer: values and gradients of one and both directions, with and without clip boundaries,
equal transformers' torch implementation with the same weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from mixer_checks import gradient_of, max_error
from transformers import Mamba2Config as TorchConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TorchMixer

from storm_jax.config import MambaConfig
from storm_jax.models.mamba import MambaMixer

MAX_ERROR = 1e-4
WIDTH, HEADS, STATE = 20, 5, 16  # heads of 8 channels
LENGTHS = (1, 5, 64, 65, 130)  # a step, less than a chunk, one chunk, two and three chunks


def make_config(direction: str) -> MambaConfig:
    return MambaConfig(d_state=STATE, head_dim=8, direction=direction)


def torch_mixer(params: dict, direction: str) -> TorchMixer:
    config = TorchConfig(
        hidden_size=WIDTH,
        num_heads=HEADS,
        head_dim=8,
        state_size=STATE,
        n_groups=1,
        expand=2,
        conv_kernel=4,
        chunk_size=32,
    )
    mixer = TorchMixer(config, layer_idx=0).eval()
    scan, pair = params[direction], params["in_proj"]["kernel"]
    inputs = [pair[:, 1], pair[:, 0], scan["bc_proj"]["kernel"], scan["dt_proj"]["kernel"]]
    convs = [scan["conv_x_kernel"], scan["conv_bc_kernel"]]
    biases = [scan["conv_x_bias"], scan["conv_bc_bias"]]
    names = {
        "in_proj.weight": np.concatenate(inputs, axis=1).T,  # z, x, B and C, dt
        "conv1d.weight": np.concatenate(convs, axis=1).T[:, None],
        "conv1d.bias": np.concatenate(biases),
        "dt_bias": scan["dt_bias"],
        "A_log": scan["A_log"],
        "D": scan["D"],
        "norm.weight": params["norm"]["scale"],
        "out_proj.weight": params["out_proj"]["kernel"].T,
    }
    weights = {name: torch.from_numpy(np.array(value)) for name, value in names.items()}
    mixer.load_state_dict(weights, strict=True)
    return mixer


def jax_mixer(randomise, direction: str) -> tuple[MambaMixer, dict]:
    mixer = nnx.eval_shape(
        lambda: MambaMixer(
            WIDTH, "mamba2", make_config(direction), rngs=nnx.Rngs(0), dtype=jnp.float32
        )
    )
    graphdef, state = nnx.split(randomise(mixer, scale=0.25))
    params = jax.device_get(nnx.to_pure_dict(state))
    for name in {"forward", "backward"} & params.keys():
        params[name]["dt_bias"] = (
            params[name]["dt_bias"] - 3
        )  # step sizes of 0.05, so that states decay slowly
    return nnx.merge(graphdef, params), params


def sum_of_directions(params: dict, clip: torch.Tensor) -> torch.Tensor:
    """Applies the shared gate, norm and out_proj to the sum of what enters the norm of two torch mixers."""
    mixers = {name: torch_mixer(params, name) for name in ("forward", "backward")}
    before_norm = {}
    for name, mixer in mixers.items():
        u = clip if name == "forward" else clip.flip(1)

        def record(module: torch.nn.Module, args: tuple, name: str = name) -> None:
            before_norm[name] = args

        mixer.norm.register_forward_pre_hook(record)
        mixer(u)
    y, gate = before_norm["forward"]
    y_backward, _ = before_norm["backward"]
    mixer = mixers["forward"]
    mixer.norm._forward_pre_hooks.clear()
    return mixer.out_proj(mixer.norm(y + y_backward.flip(1), gate))


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_mixer_equals_transformers_with_its_gradient(length, direction, randomise, rng):
    mixer, params = jax_mixer(randomise, direction)
    u = rng.standard_normal((2, length, WIDTH)).astype(np.float32)
    weights = rng.standard_normal(u.shape).astype(np.float32)
    found, gradient = gradient_of(mixer, u, weights)
    torch_u = torch.from_numpy(u).requires_grad_()
    if direction == "forward":
        expected = torch_mixer(params, "forward")(torch_u)
    else:
        expected = sum_of_directions(params, torch_u)
    (expected * torch.from_numpy(weights)).sum().backward()
    assert min(expected.abs().max(), torch_u.grad.abs().max()) > 100 * MAX_ERROR
    assert max_error(found, expected) <= MAX_ERROR
    assert max_error(gradient, torch_u.grad) <= MAX_ERROR


def test_packed_clips_equal_separate_torch_mixers(randomise, rng):
    mixer, params = jax_mixer(randomise, "both")
    lengths = (1, 40, 2, 57)
    u = rng.standard_normal((1, sum(lengths), WIDTH)).astype(np.float32)
    segment_ids = np.repeat([1, 2, 3, 4], lengths)[None]
    found = nnx.jit(lambda m: m(u, segment_ids)[0])(mixer)
    with torch.no_grad():
        clips = torch.from_numpy(u).split(lengths, dim=1)
        expected = torch.cat([sum_of_directions(params, clip) for clip in clips], dim=1)
    assert max_error(found, expected) <= MAX_ERROR
