"""FLOPs by formula: matrix products, attention and scans, at two operations per multiply-add.

The gradients of a matrix product, of its kernel and of its input, cost as much as the product itself. That of a
frozen kernel is not computed, nor that of an input that depends on nothing trained. The backward pass computes some
things again: with `train.remat` every layer but its last product, and the tower once more; always the logits and the
scores of attention.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from storm_jax.compression import VisualShape
from storm_jax.config import DecoderConfig, ModelConfig, RunConfig
from storm_jax.data.rows import RowShape
from storm_jax.ops.ssd import DEFAULT_SIZES


@dataclasses.dataclass(frozen=True)
class Passes:
    """FLOPs of a part of the model over all devices."""

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recomputed + other.recomputed,
        )

    @property
    def model(self) -> float:
        """What the model needs; the numerator of MFU."""
        return self.forward + self.backward

    @property
    def program(self) -> float:
        """What the program computes."""
        return self.forward + self.backward + self.recomputed


Work = Mapping[str, Passes]  # by part


@dataclasses.dataclass(frozen=True)
class _Layers:
    """FLOPs of a forward pass.

    Attributes:
      kernels: products with parameters.
      last: those of them whose result only the next layer needs.
      mixing: attention or scan.
      scores: products of queries and keys that the backward pass always computes again.
      adapters: products with the parameters of LoRA.
    """

    kernels: float
    last: float = 0.0
    mixing: float = 0.0
    scores: float = 0.0
    adapters: float = 0.0

    def forward(self) -> Passes:
        return Passes(self.kernels + self.mixing + self.adapters)

    def train(self, *, trained: bool, upstream: bool, remat: bool) -> Passes:
        """A forward and a backward pass.

        Args:
          trained: whether the kernels are trained.
          upstream: whether the input has a gradient.
        """
        forward = self.kernels + self.mixing + self.adapters
        if not (trained or upstream or self.adapters):
            return Passes(forward)
        backward = (trained + upstream) * self.kernels + 2 * (self.mixing + self.adapters)
        recomputed = self.scores + remat * (forward - self.last)
        return Passes(forward, backward, recomputed)


def train_work(config: RunConfig, shape: RowShape) -> dict[str, Passes]:
    """The FLOPs of a training step."""
    model, rates, remat = config.model, config.optim.learning_rate, config.train.remat
    rows = config.train.batch_size
    frames, lora = rows * shape.frames, bool(model.decoder.lora.rank)
    vision, projector = rates.vision > 0, rates.projector > 0
    decoder = rates.decoder > 0 and not lora
    before = vision or projector
    layers = decoder_layers(model.decoder, rows, shape.tokens, shape.tokens)
    pool = _Layers(0, mixing=_pooling(model, rows, shape.frames, shape.visual) / 2)
    patches, encoder = _vision(model, frames)
    # A chunk of frames is computed again as a whole, and then each of its layers.
    again = vision * remat * (patches.forward() + encoder.forward()).forward
    chunks = Passes(recomputed=again)
    stem, rest_of_stem = _stem(model, frames)
    mixer = _mixer(model, frames)
    return {
        "vision": patches.train(trained=vision, upstream=False, remat=False)
        + encoder.train(trained=vision, upstream=vision, remat=remat)
        + chunks,
        "projector": stem.train(trained=projector, upstream=vision, remat=False)
        + rest_of_stem.train(trained=projector, upstream=before, remat=False)
        + mixer.train(trained=projector, upstream=before, remat=remat)
        + pool.train(trained=False, upstream=before, remat=False)
        + pool.forward(),
        "decoder": layers.train(trained=decoder, upstream=before or decoder, remat=remat),
        "head": _head(model.decoder, rows * shape.tokens, decoder, before or decoder or lora),
    }


def encode_work(
    config: RunConfig, scenes: int, frames: int, visual: VisualShape
) -> dict[str, Passes]:
    """The FLOPs of encoding scenes."""
    model, total = config.model, scenes * frames
    pool = Passes(_pooling(model, scenes, frames, visual))
    projector = (*_stem(model, total), _mixer(model, total))
    return {
        "vision": sum((part.forward() for part in _vision(model, total)), Passes()),
        "projector": sum((part.forward() for part in projector), pool),
    }


def prefill_work(config: RunConfig, rows: int, tokens: int, keys: int) -> dict[str, Passes]:
    """The FLOPs of running tokens through the decoder that attend to `keys` positions."""
    decoder = config.model.decoder
    head = Passes(2.0 * rows * decoder.width * decoder.vocab_size)
    return {"decoder": decoder_layers(decoder, rows, tokens, keys).forward(), "head": head}


def decode_work(config: RunConfig, rows: int, keys: int) -> dict[str, Passes]:
    """The FLOPs of one new token in each row."""
    return prefill_work(config, rows, 1, keys)


def _vision(model: ModelConfig, frames: int) -> tuple[_Layers, _Layers]:
    """The patch embedding, and the layers up to the feature layer."""
    vision = model.vision
    patches, width = vision.side**2, vision.width
    tokens = 2.0 * frames * patches
    depth = vision.depth + 1 + vision.feature_layer
    last = depth * tokens * width * vision.mlp_dim
    scores = depth * tokens * patches * width
    return (
        _Layers(tokens * 3 * vision.patch_size**2 * width),
        _Layers(
            kernels=depth * tokens * 4 * width**2 + 2 * last,
            last=last,
            mixing=2 * scores,
            scores=scores,
        ),
    )


def _stem(model: ModelConfig, frames: int) -> tuple[_Layers, _Layers]:
    """The stem's first product, and the others."""
    width, merged = model.decoder.width, model.vision.width * model.stem.downsample**2
    inner = model.vision.width * model.stem.downsample
    first, others = {
        "linear": (merged * width, 0),
        "mlp2x_gelu": (merged * width, width**2),
        "mlp_downsample": (merged * width, width**2),
        "mlp_downsample_3x3_fix": (merged * inner, inner * width + width**2),
    }[model.stem.kind]
    tokens = 2.0 * frames * model.side**2
    return _Layers(tokens * first), _Layers(tokens * others)


def _mixer(model: ModelConfig, frames: int) -> _Layers:
    """Mamba layers; a custom mixer is not counted."""
    mamba, width = model.mamba, model.decoder.width
    inner, state = mamba.expand * width, mamba.d_state
    directions = 2 if mamba.direction == "both" else 1
    tokens = float(frames * model.video_side**2 * mamba.depth)
    if model.mixer == "mamba1":
        rank = math.ceil(width / 16)
        projections = inner * (rank + 2 * state) + rank * inner
        scan = 6 * inner * state
    elif model.mixer == "mamba2":
        chunk = DEFAULT_SIZES[0]
        projections = width * (2 * state + inner // mamba.head_dim)
        scan = 2 * chunk * (state + inner) + 4 * state * inner
    else:
        return _Layers(0)
    last = 2 * tokens * inner * width
    return _Layers(
        kernels=2 * tokens * (2 * width * inner + directions * projections) + last,
        last=last,
        mixing=tokens * directions * scan,
    )


def _pooling(model: ModelConfig, rows: int, frames: int, visual: VisualShape) -> float:
    """Temporal pooling is a product with the membership of frames in groups."""
    tokens = model.video_side**2
    if model.stem.video_pool != "none":
        tokens += model.side**2
    return 2.0 * rows * visual.num_groups * frames * tokens * model.decoder.width


def decoder_layers(config: DecoderConfig, rows: int, tokens: int, keys: int) -> _Layers:
    """The decoder's layers on `tokens` of each row that attend to `keys`, all of which are computed."""
    width, heads = config.width, config.num_heads * config.head_dim
    shapes = {
        "query": (width, heads),
        "key": (width, config.num_kv_heads * config.head_dim),
        "value": (width, config.num_kv_heads * config.head_dim),
        "out": (heads, width),
        "gate_up": (width, 2 * config.mlp_dim),
        "down": (config.mlp_dim, width),
    }
    per_size = 2.0 * config.depth * rows * tokens
    lora = config.lora
    adapted = [sum(shape) for name, shape in shapes.items() if re.fullmatch(lora.targets, name)]
    scores = per_size * keys * heads
    return _Layers(
        kernels=per_size * sum(inputs * outputs for inputs, outputs in shapes.values()),
        last=per_size * math.prod(shapes["down"]),
        mixing=2 * scores,
        scores=scores,
        adapters=per_size * lora.rank * sum(adapted),
    )


def _head(config: DecoderConfig, tokens: int, trained: bool, upstream: bool) -> Passes:
    product = 2.0 * tokens * config.width * config.vocab_size
    return Passes(product, (trained + upstream) * product, product)
