"""A decoder-only language model of the Qwen2, Qwen3 and Llama families.

    x -> depth x (x + Attn(RMSNorm(x)); x + SwiGLU(RMSNorm(x))) -> RMSNorm -> hidden states

Grouped-query attention with rotary position embeddings. The families differ in biases, query and key
norms and rotary scaling, all of which are configuration fields. The input is embeddings rather than token
ids, because visual tokens are placed among the text. `head()` returns the vocabulary matrix for the loss and
for sampling.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from storm_jax.config import DecoderConfig
from storm_jax.models.layers import Einsum, run_layers, stack_layers
from storm_jax.ops.attention import KeyRange, attention, causal_keys
from storm_jax.sharding import constrain


class Cache(NamedTuple):
    """Keys and values of every layer, indexed by position.

    What is written for a token is contiguous, so that TPUs write in place: they would copy the whole cache to such a
    layout, and back, in every call.
    """

    key: jax.Array  # [depth, B, T, H_kv, K]
    value: jax.Array  # [depth, B, T, H_kv, K]

    def write(self, layer: jax.Array, positions: jax.Array, k: jax.Array, v: jax.Array) -> Cache:
        """Writes keys and values [B, S, H_kv, K] of tokens at these positions, int [B, S]."""
        rows = jnp.arange(k.shape[0])[:, None]
        return Cache(
            self.key.at[layer, rows, positions].set(k),
            self.value.at[layer, rows, positions].set(v),
        )

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """All keys and values of a layer, [B, T, H_kv, K]."""
        return self.key[layer], self.value[layer]


class Decoder(nnx.Module):
    """Maps embeddings to hidden states, with an optional key-value cache."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, remat: bool):
        self.config, self.dtype, self.remat = config, dtype, remat
        init = nnx.initializers.normal(
            config.width**-0.5
        )  # logits have unit variance at initialisation
        table = init(rngs.params(), (config.vocab_size, config.width))
        self.embedding = nnx.Param(table, logical_axes=("vocab", None))
        self.layers = stack_layers(
            lambda rngs: DecoderLayer(config, rngs=rngs, dtype=dtype), config.depth, rngs
        )
        self.norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        head = None if config.tie_embeddings else init(rngs.params(), table.shape[::-1])
        self.lm_head = None if head is None else nnx.Param(head, logical_axes=(None, "vocab"))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeds token ids: int [B, S] -> [B, S, D]."""
        return jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype)

    def head(self) -> jax.Array:
        """Returns the vocabulary matrix [D, V]."""
        head = self.embedding[...].T if self.lm_head is None else self.lm_head[...]
        return head.astype(self.dtype)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        new_cache: int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the layers.

        Args:
          x: [B, S, D] embeddings.
          positions: int [B, S], positions within each sample.
          segment_ids: int [B, S], of packed samples, which do not attend to each other; 0 is padding.
          cache: keys and values of earlier tokens. New ones are written at `positions`, and a token
            attends to all entries up to its own position. Requires one sample per row.
          new_cache: slots of a new cache to put these tokens into; their positions are 0, 1, ....

        Returns:
          Normalised hidden states [B, S, D], and the updated or new cache (None without one).
        """
        angles = rope_angles(positions, self.config)
        if segment_ids is None:  # one sample per row; tokens are in the slots of their positions
            keys = KeyRange(jnp.zeros_like(positions), positions, is_causal=cache is None)
        else:
            keys = causal_keys(segment_ids)

        def run(layer: DecoderLayer, x: jax.Array) -> tuple[jax.Array, Cache | None]:
            x = constrain(x, "batch", "sequence", None)
            q, k, v = layer.project(x, angles)
            filled = Cache(_fill(k, new_cache), _fill(v, new_cache)) if new_cache else None
            return layer.add(x, attention(q, k, v, keys)), filled

        def extend(
            inputs: tuple[DecoderLayer, jax.Array], carry: tuple[jax.Array, Cache]
        ) -> tuple[tuple[jax.Array, Cache], None]:
            (layer, number), (x, cache) = inputs, carry
            q, k, v = layer.project(x, angles)
            cache = cache.write(number, positions, k, v)
            return (layer.add(x, attention(q, *cache.read(number), keys)), cache), None

        if cache is None:
            x, cache = run_layers(self.layers, x, run, self.remat and not new_cache)
        else:  # carried from layer to layer, so that it is updated in place
            numbered = (self.layers, jnp.arange(self.config.depth))
            (x, cache), _ = run_layers(numbered, (x, cache), extend, remat=False)
        return self.norm(x), cache


def _fill(x: jax.Array, slots: int) -> jax.Array:
    """Keys or values [B, S, H_kv, K] as a new cache of one layer [B, T, H_kv, K]."""
    return jnp.pad(x, [(0, 0), (0, slots - x.shape[1]), (0, 0), (0, 0)])


class DecoderLayer(nnx.Module):
    """Attention and SwiGLU, both pre-norm and residual."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        width, head_dim, heads = config.width, config.head_dim, config.num_heads

        def norm(size: int) -> nnx.RMSNorm:
            return nnx.RMSNorm(size, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)

        def linear(name: str, equation: str, shape: tuple, axes: tuple, bias=False) -> Einsum:
            adapted = config.lora.rank and re.fullmatch(config.lora.targets, name)
            return Einsum(
                equation,
                shape,
                axes,
                bias=bias,
                lora=config.lora if adapted else None,
                rngs=rngs,
                dtype=dtype,
            )

        def project(name: str, heads: int, axis: str) -> Einsum:
            shape, axes = (width, heads, head_dim), ("embed", axis, None)
            return linear(name, "bsd,dhk->bshk", shape, axes, bias=config.qkv_bias)

        self.attn_norm, self.mlp_norm = norm(width), norm(width)
        self.query = project("query", heads, "heads")
        self.key = project("key", config.num_kv_heads, "kv_heads")
        self.value = project("value", config.num_kv_heads, "kv_heads")
        self.query_norm = norm(head_dim) if config.qk_norm else None
        self.key_norm = norm(head_dim) if config.qk_norm else None
        self.out = linear(
            "out", "bshk,hkd->bsd", (heads, head_dim, width), ("heads", None, "embed")
        )
        # Gate and up projection are stacked on a separate axis, so that sharding M needs no communication.
        self.gate_up = linear(
            "gate_up", "bsd,djm->bsjm", (width, 2, config.mlp_dim), ("embed", None, "mlp")
        )
        self.down = linear("down", "bsm,md->bsd", (config.mlp_dim, width), ("mlp", "embed"))

    def project(self, x: jax.Array, angles: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, S, H, K], keys and values [B, S, H_kv, K]."""
        y = self.attn_norm(x)
        q, k, v = self.query(y), self.key(y), self.value(y)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return rotate(q, angles), rotate(k, angles), v

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Adds attention's result [B, S, H, K], then the MLP's, to x [B, S, D]."""
        x += self.out(y)
        gate, up = jnp.moveaxis(self.gate_up(self.mlp_norm(x)), 2, 0)  # 2 x [B, S, M]
        return x + self.down(jax.nn.silu(gate) * up)


def rope_angles(positions: jax.Array, config: DecoderConfig) -> jax.Array:
    """Returns fp32 rotary angles [B, S, K / 2] (Su et al., arXiv 2104.09864).

    With `rope_scaling`, frequencies are scaled as in Llama 3.1: low ones are divided by the factor, high
    ones are unchanged, and those in between are interpolated.
    """
    size, scaling = config.head_dim, config.rope_scaling
    frequencies = config.rope_theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if scaling.factor != 1:
        periods = (
            scaling.original_positions * frequencies / (2 * math.pi)
        )  # in the original context
        band = scaling.high_freq_factor - scaling.low_freq_factor
        unscaled = jnp.clip((periods - scaling.low_freq_factor) / band, 0, 1)
        frequencies = unscaled * frequencies + (1 - unscaled) * frequencies / scaling.factor
    return positions[..., None].astype(jnp.float32) * frequencies[None, None]


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Applies rotary angles to x [B, S, H, K], pairing the two halves of a head as in transformers."""
    sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
