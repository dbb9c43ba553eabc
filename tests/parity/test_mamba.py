"""The Mamba mixer and its scan: values and gradients of one and both directions, with and without clip
boundaries, equal transformers' torch implementation with the same weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from mixer_checks import gradient_of, max_error
from transformers import MambaConfig as TorchMambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer as TorchMixer
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from storm_jax.config import MambaConfig
from storm_jax.models.mamba import MambaMixer
from storm_jax.models.mamba1 import Mamba1Direction
from storm_jax.ops.selective_scan import selective_scan

MAX_ERROR = 1e-4
WIDTH = 20  # dt_rank 2
LENGTHS = (1, 5, 64, 65, 130)  # a step, less than a chunk, one chunk, two and three chunks


def to_torch(in_proj: dict, scan: dict, out_proj: dict) -> dict[str, np.ndarray]:
    """Renames our parameters of one direction to those of the torch mixer."""
    return {
        "in_proj.weight": in_proj["kernel"].reshape(WIDTH, -1).T,
        "conv1d.weight": scan["conv_kernel"].T[:, None],
        "conv1d.bias": scan["conv_bias"],
        "x_proj.weight": scan["x_proj"]["kernel"].T,
        "dt_proj.weight": scan["dt_proj"]["kernel"].T,
        "dt_proj.bias": scan["dt_bias"],
        "A_log": scan["A_log"],
        "D": scan["D"],
        "out_proj.weight": out_proj["kernel"].T,
    }


def torch_mixer(params: dict, direction: str) -> TorchMixer:
    ours = MambaConfig()
    config = TorchMambaConfig(
        hidden_size=WIDTH,
        state_size=ours.d_state,
        conv_kernel=ours.d_conv,
        expand=ours.expand,
        time_step_rank="auto",
        use_bias=False,
        use_conv_bias=True,
        num_hidden_layers=1,
    )
    mixer = TorchMixer(config, layer_idx=0).eval()
    names = to_torch(params["in_proj"], params[direction], params["out_proj"])
    weights = {name: torch.from_numpy(np.array(value)) for name, value in names.items()}
    mixer.load_state_dict(weights, strict=True)
    return mixer


def jax_mixer(randomise, direction: str) -> tuple[MambaMixer, dict]:
    config = MambaConfig(direction=direction)
    mixer = nnx.eval_shape(
        lambda: MambaMixer(WIDTH, "mamba1", config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    )
    graphdef, state = nnx.split(randomise(mixer, scale=0.25))
    params = jax.device_get(nnx.to_pure_dict(state))
    for name in {"forward", "backward"} & params.keys():
        params[name]["dt_bias"] = (
            params[name]["dt_bias"] - 3
        )  # step sizes of 0.05, so that states decay slowly
    return nnx.merge(graphdef, params), params


@pytest.mark.parametrize("length", LENGTHS)
def test_forward_mixer_equals_transformers_with_its_gradient(length, randomise, rng):
    mixer, params = jax_mixer(randomise, "forward")
    u = rng.standard_normal((2, length, WIDTH)).astype(np.float32)
    weights = rng.standard_normal(u.shape).astype(np.float32)
    found, gradient = gradient_of(mixer, u, weights)
    torch_u = torch.from_numpy(u).requires_grad_()
    expected = torch_mixer(params, "forward")(torch_u)
    (expected * torch.from_numpy(weights)).sum().backward()
    assert min(expected.abs().max(), torch_u.grad.abs().max()) > 100 * MAX_ERROR
    assert max_error(found, expected) <= MAX_ERROR
    assert max_error(gradient, torch_u.grad) <= MAX_ERROR


@pytest.mark.parametrize("length", LENGTHS)
def test_both_directions_are_a_torch_mixer_each_way_with_their_gradient(length, randomise, rng):
    """in_proj and gate are shared and out_proj is linear, so the outputs of both directions add up."""
    mixer, params = jax_mixer(randomise, "both")
    u = rng.standard_normal((2, length, WIDTH)).astype(np.float32)
    weights = rng.standard_normal(u.shape).astype(np.float32)
    found, gradient = gradient_of(mixer, u, weights)
    torch_u = torch.from_numpy(u).requires_grad_()
    forward = torch_mixer(params, "forward")(torch_u)
    backward = torch_mixer(params, "backward")(torch_u.flip(1)).flip(1)
    ((forward + backward) * torch.from_numpy(weights)).sum().backward()
    assert min(forward.abs().max(), backward.abs().max()) > 100 * MAX_ERROR
    assert max_error(found, forward + backward) <= MAX_ERROR
    assert max_error(gradient, torch_u.grad) <= MAX_ERROR


def test_packed_clips_equal_separate_torch_mixers(randomise, rng):
    mixer, params = jax_mixer(randomise, "both")
    lengths = (1, 40, 2, 57)  # the last one crosses a chunk boundary
    u = rng.standard_normal((1, sum(lengths), WIDTH)).astype(np.float32)
    segment_ids = np.repeat([1, 2, 3, 4], lengths)[None]
    found = nnx.jit(lambda m: m(u, segment_ids)[0])(mixer)
    with torch.no_grad():
        clips = torch.from_numpy(u).split(lengths, dim=1)
        forward = torch.cat([torch_mixer(params, "forward")(clip) for clip in clips], dim=1)
        mirrored = [torch_mixer(params, "backward")(clip.flip(1)).flip(1) for clip in clips]
    assert max_error(found, forward + torch.cat(mirrored, dim=1)) <= MAX_ERROR


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("implementation", ["sequential", "chunked"])
def test_scan_equals_the_torch_recurrence(implementation, reverse, length, rng):
    batch, width, state = 2, 5, 4
    x, dt = rng.standard_normal((2, batch, length, width)).astype(np.float32)
    B, C = rng.standard_normal((2, batch, length, state)).astype(np.float32)
    A = -np.exp(rng.standard_normal((width, state))).astype(np.float32)
    D, bias = rng.standard_normal((2, width)).astype(np.float32)
    bias -= 3
    found, last = jax.jit(
        lambda *args: selective_scan(
            *args, dt_bias=bias, reverse=reverse, implementation=implementation
        )
    )(x, dt, A, B, C, D)

    def to_torch_order(v: np.ndarray) -> torch.Tensor:  # time last, in scan order
        v = torch.from_numpy(v).transpose(1, 2)
        return v.flip(2) if reverse else v

    expected, state_after = mamba_selective_scan(
        to_torch_order(x),
        to_torch_order(dt),
        torch.from_numpy(A),
        to_torch_order(B),
        to_torch_order(C),
        D=torch.from_numpy(D),
        delta_bias=torch.from_numpy(bias),
        delta_softplus=True,
        return_last_state=True,
    )
    expected = (expected.flip(2) if reverse else expected).transpose(1, 2)
    assert expected.abs().max() > 1
    assert max_error(found, expected) <= MAX_ERROR
    assert max_error(last, state_after) <= MAX_ERROR


def test_the_reverse_scan_is_the_flipped_one(randomise, rng):
    config = MambaConfig(d_state=6)
    scan = randomise(
        Mamba1Direction(40, WIDTH, config, rngs=nnx.Rngs(0), dtype=jnp.float32, reverse=True)
    )
    forward = Mamba1Direction(40, WIDTH, config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    forward = nnx.merge(nnx.split(forward)[0], nnx.split(scan)[1])
    x = rng.standard_normal((2, 70, 40)).astype(np.float32)
    segments = np.repeat([[1, 2, 3]], 2, axis=0).repeat([30, 25, 15], axis=1)
    call = nnx.jit(lambda scan, x, segments: scan(x, x, segments)[0])
    found = np.asarray(call(scan, x, segments))
    expected = np.asarray(call(forward, x[:, ::-1], segments[:, ::-1]))[:, ::-1]
    np.testing.assert_allclose(found, expected, atol=1e-5)
