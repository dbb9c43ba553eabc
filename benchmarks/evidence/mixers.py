"""Other ways to mix frames, to find out what the Mamba layers contribute (`model.mixer="benchmarks.evidence.mixers:CLASS"`).

    FrameAttention     each token attends to those of its place in all frames of the clip
    WindowAttention    each token attends to all tokens of a window of frames; every second layer shifts the windows
    TemporalConv       gated depthwise convolution over the frames
    GatedMLP           each token by itself: what as many parameters do without mixing

Like the Mamba layers of `configs.tiny`, they are two pre-norm residual layers that start as the identity, and with the
default sizes their parameters are within 5 % of theirs, and so are the FLOPs of the model in clips of 16 frames.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

WINDOW = 16  # frames
_THETA = 100.0  # of rotary angles: a clip has few frames


class _Layers(nnx.Module):
    """x + layer(LayerNorm(x)), twice, on x [B, F, N, D]."""

    def __init__(
        self, width: int, make: Callable[[int], nnx.Module], *, rngs: nnx.Rngs, dtype: jnp.dtype
    ):
        self.layers = nnx.List([make(number) for number in range(2)])
        self.norms = nnx.List([nnx.LayerNorm(width, dtype=dtype, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array, frame_clip: jax.Array) -> jax.Array:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), frame_clip)
        return x


class FrameAttention(_Layers):
    """Bidirectional attention over the frames of a clip, at each place of the grid by itself."""

    def __init__(
        self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype, heads: int = 8, head_dim: int = 24
    ):
        def make(number: int) -> nnx.Module:
            return _OverFrames(width, heads, head_dim, rngs=rngs, dtype=dtype)

        super().__init__(width, make, rngs=rngs, dtype=dtype)


class WindowAttention(_Layers):
    """Bidirectional attention over all tokens of a window of frames."""

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        heads: int = 8,
        head_dim: int = 24,
        window: int = WINDOW,
    ):
        def make(number: int) -> nnx.Module:
            shift = number % 2 * window // 2
            return _InWindows(width, heads, head_dim, window, shift, rngs=rngs, dtype=dtype)

        super().__init__(width, make, rngs=rngs, dtype=dtype)


class TemporalConv(_Layers):
    """Depthwise convolution over the frames of a clip, centred, with a gate."""

    def __init__(
        self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype, inner: int = 240, size: int = 19
    ):
        def make(number: int) -> nnx.Module:
            return _GatedConv(width, inner, size, rngs=rngs, dtype=dtype)

        super().__init__(width, make, rngs=rngs, dtype=dtype)


class GatedMLP(TemporalConv):
    """A gated MLP of each token, without mixing."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype, inner: int = 256):
        super().__init__(width, rngs=rngs, dtype=dtype, inner=inner, size=1)


class _Attention(nnx.Module):
    """Multi-head attention of the last but one axis to itself."""

    def __init__(self, width: int, heads: int, head_dim: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.heads, self.head_dim, inner = heads, head_dim, heads * head_dim
        self.qkv = nnx.Linear(width, 3 * inner, use_bias=False, dtype=dtype, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.out = nnx.Linear(
            inner, width, use_bias=False, kernel_init=zeros, dtype=dtype, rngs=rngs
        )

    def attend(self, x: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        """Attends from x [..., L, D] at positions [..., L] where mask [..., L, L] is true."""
        heads = (*x.shape[:-1], 3, self.heads, self.head_dim)
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(heads), -3, 0)  # 3 x [..., L, H, K]
        q, k = _rotate(q, positions), _rotate(k, positions)
        logits = jnp.einsum("...qhk,...shk->...hqs", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where(mask[..., None, :, :], logits * self.head_dim**-0.5, -1e30)
        weights = jax.nn.softmax(logits).astype(v.dtype)
        y = jnp.einsum("...hqs,...shk->...qhk", weights, v)  # [..., L, H, K]
        return self.out(y.reshape(*x.shape[:-1], -1))


class _OverFrames(_Attention):
    def __call__(self, x: jax.Array, frame_clip: jax.Array) -> jax.Array:
        same = frame_clip[:, None, :, None] == frame_clip[:, None, None, :]  # [B, 1, F, F]
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), (x.shape[0], x.shape[2], x.shape[1]))
        mask = jnp.broadcast_to(same, (*positions.shape, x.shape[1]))
        y = self.attend(x.swapaxes(1, 2), positions, mask)  # [B, N, F, D]
        return y.swapaxes(1, 2)


class _InWindows(_Attention):
    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        window: int,
        shift: int,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        super().__init__(width, heads, head_dim, rngs=rngs, dtype=dtype)
        self.window, self.shift = window, shift

    def __call__(self, x: jax.Array, frame_clip: jax.Array) -> jax.Array:
        batch, frames, tokens, width = x.shape
        windows = (_in_clip(frame_clip) + self.shift) // self.window  # [B, F]
        place = jnp.stack([frame_clip, windows], axis=-1).repeat(tokens, axis=1)  # [B, F * N, 2]
        mask = (place[:, :, None] == place[:, None]).all(-1)
        positions = jnp.broadcast_to(jnp.arange(frames * tokens), (batch, frames * tokens))
        y = self.attend(x.reshape(batch, frames * tokens, width), positions, mask)
        return y.reshape(x.shape)


class _GatedConv(nnx.Module):
    def __init__(self, width: int, inner: int, size: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.size = size
        self.into = nnx.Linear(width, 2 * inner, use_bias=False, dtype=dtype, rngs=rngs)
        init = nnx.initializers.normal(size**-0.5)
        self.kernel = nnx.Param(init(rngs.params(), (size, inner), jnp.float32))
        zeros = nnx.initializers.zeros
        self.out = nnx.Linear(
            inner, width, use_bias=False, kernel_init=zeros, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array, frame_clip: jax.Array) -> jax.Array:
        values, gate = jnp.split(self.into(x), 2, axis=-1)  # 2 x [B, F, N, E]
        half, frames = self.size // 2, x.shape[1]
        padded = jnp.pad(values, ((0, 0), (half, half), (0, 0), (0, 0)))
        clips = jnp.pad(frame_clip, ((0, 0), (half, half)), constant_values=-1)
        kernel = self.kernel[...].astype(values.dtype)
        mixed = jnp.zeros_like(values)
        for offset in range(self.size):
            is_same = clips[:, offset : offset + frames] == frame_clip  # [B, F]
            shifted = padded[:, offset : offset + frames] * is_same[..., None, None]
            mixed += shifted * kernel[None, None, None, offset]
        return self.out(jax.nn.silu(mixed) * jax.nn.silu(gate))


def _in_clip(frame_clip: jax.Array) -> jax.Array:
    """The number of each frame within its clip, int [B, F]."""
    frames = jnp.broadcast_to(jnp.arange(frame_clip.shape[1]), frame_clip.shape)
    is_first = jnp.diff(frame_clip, axis=1, prepend=-1) != 0
    return frames - jax.lax.cummax(jnp.where(is_first, frames, 0), axis=1)


def _rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding of x [..., L, H, K] at positions [..., L]."""
    half = x.shape[-1] // 2
    frequencies = _THETA ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.einsum("...l,k->...lk", positions.astype(jnp.float32), frequencies)[..., None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
