"""The Mamba mixer and its scan against transformers' torch implementation, with equal weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import MambaConfig as TorchMambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer as TorchMixer

from storm_jax.config import MambaConfig
from storm_jax.models.mamba import DirectedScan, MambaMixer
from storm_jax.ops.selective_scan import selective_scan

MAX_ERROR = 1e-4
WIDTH = 20  # dt_rank 2
LENGTHS = (1, 3, 64, 65, 130)


def to_torch(in_proj, scan: dict, out_proj) -> dict[str, np.ndarray]:
    """Our parameters of one direction under the torch mixer's names."""
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
    config = TorchMambaConfig(
        hidden_size=WIDTH,
        state_size=6,
        conv_kernel=4,
        expand=2,
        time_step_rank=2,
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
    config = MambaConfig(d_state=6, direction=direction)
    mixer = randomise(MambaMixer(WIDTH, config, rngs=nnx.Rngs(0), dtype=jnp.float32), scale=0.2)
    return mixer, jax.device_get(nnx.to_pure_dict(nnx.split(mixer)[1]))


@pytest.mark.parametrize("length", LENGTHS)
def test_forward_mixer_equals_transformers_with_its_gradient(length, randomise, rng):
    mixer, params = jax_mixer(randomise, "forward")
    u = rng.standard_normal((2, length, WIDTH)).astype(np.float32)
    weights = rng.standard_normal(u.shape).astype(np.float32)
    segment_ids = jnp.ones((2, length), jnp.int32)
    graphdef, state = nnx.split(mixer)

    def weighted(u):
        y = nnx.merge(graphdef, state)(u, segment_ids)
        return jnp.sum(y * weights), y

    (_, found), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(u)
    torch_u = torch.from_numpy(u).requires_grad_()
    expected = torch_mixer(params, "forward")(torch_u)
    (expected * torch.from_numpy(weights)).sum().backward()
    assert np.abs(expected.detach().numpy()).max() > 100 * MAX_ERROR
    assert np.abs(np.asarray(found) - expected.detach().numpy()).max() <= MAX_ERROR
    assert np.abs(np.asarray(gradient) - torch_u.grad.numpy()).max() <= MAX_ERROR


@pytest.mark.parametrize("length", LENGTHS)
def test_both_directions_are_a_torch_mixer_each_way(length, randomise, rng):
    """in_proj, gate and out_proj are shared and linear in the scans, so outputs add up."""
    mixer, params = jax_mixer(randomise, "both")
    u = rng.standard_normal((2, length, WIDTH)).astype(np.float32)
    found = np.asarray(nnx.jit(lambda m: m(u, jnp.ones((2, length), jnp.int32)))(mixer))
    with torch.no_grad():
        forward = torch_mixer(params, "forward")(torch.from_numpy(u)).numpy()
        flipped = torch.from_numpy(u[:, ::-1].copy())
        backward = torch_mixer(params, "backward")(flipped).numpy()[:, ::-1]
    assert np.abs(backward).max() > 100 * MAX_ERROR
    assert np.abs(found - (forward + backward)).max() <= MAX_ERROR


@pytest.mark.parametrize("implementation", ["sequential", "chunked"])
def test_scan_equals_the_torch_recurrence(implementation, rng):
    batch, length, width, state = 2, 130, 5, 4
    x, dt = rng.standard_normal((2, batch, length, width)).astype(np.float32)
    B, C = rng.standard_normal((2, batch, length, state)).astype(np.float32)
    A = -np.exp(rng.standard_normal((width, state))).astype(np.float32)
    D, bias = rng.standard_normal((2, width)).astype(np.float32)
    run = jax.jit(lambda *args: selective_scan(*args, dt_bias=bias, implementation=implementation))
    found, last = run(x, dt, A, B, C, D)
    step = torch.nn.functional.softplus(torch.from_numpy(dt + bias))[..., None]  # [B, L, E, 1]
    decay = torch.exp(step * torch.from_numpy(A))
    inputs = step * torch.from_numpy(B)[:, :, None] * torch.from_numpy(x)[..., None]
    h = torch.zeros(batch, width, state)
    for t in range(length):
        h = decay[:, t] * h + inputs[:, t]
        y = (h * torch.from_numpy(C)[:, t, None]).sum(-1) + torch.from_numpy(D * x[:, t])
        assert np.abs(np.asarray(found[:, t]) - y.numpy()).max() <= MAX_ERROR
    assert np.abs(np.asarray(last) - h.numpy()).max() <= MAX_ERROR


def test_the_reverse_scan_is_the_flipped_one(randomise, rng):
    config = MambaConfig(d_state=6)
    scan = randomise(
        DirectedScan(40, WIDTH, config, rngs=nnx.Rngs(0), dtype=jnp.float32, reverse=True)
    )
    forward = DirectedScan(40, WIDTH, config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    forward = nnx.merge(nnx.split(forward)[0], nnx.split(scan)[1])
    x = rng.standard_normal((2, 70, 40)).astype(np.float32)
    segments = np.repeat([[1, 2, 3]], 2, axis=0).repeat([30, 25, 15], axis=1)
    call = nnx.jit(lambda scan, x, segments: scan(x, segments))
    found = np.asarray(call(scan, x, segments))
    expected = np.asarray(call(forward, x[:, ::-1], segments[:, ::-1]))[:, ::-1]
    np.testing.assert_allclose(found, expected, atol=1e-5)
