"""STORM in PyTorch (arXiv 2503.04130): a tower and a decoder of transformers, with a projector between them.

    frames -> SigLIP -> stem -> depth x (x + Mamba(LayerNorm(x))) over the whole clip -> pooled tokens -> decoder

Letters: B batch, F frames, P patches, N tokens per frame, C and D widths of tower and decoder, L length, E inner
width, H heads, S state size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from .configuration_storm import StormConfig, TokenPlan

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError:
    selective_scan_fn = mamba_chunk_scan_combined = None

FRAMES_AT_ONCE = 16  # through the tower
CHUNK = 64  # steps of a scan that are solved at once


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The scan of Mamba-1, h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t] and y[t] = C[t] . h[t] + D x[t], in fp32.
    Shapes: x, dt [B, L, E]; A [E, S]; B, C [B, L, S]; D [E]."""
    if selective_scan_fn is not None and x.is_cuda:
        u, step, b, c = (v.transpose(1, 2).contiguous() for v in (x, dt, B, C))
        return selective_scan_fn(u, step, A, b, c, D).transpose(1, 2)
    h, outputs = x.new_zeros(len(x), *A.shape), []
    for xs, step, b, c in zip(*(v.split(CHUNK, dim=1) for v in (x, dt, B, C)), strict=True):
        decay = torch.exp(step[..., None] * A)  # [B, L, E, S]
        state, back = (step * xs)[..., None] * b[:, :, None], 1
        while back < state.shape[1]:  # each round doubles the steps that a state looks back
            pad = (0, 0, 0, 0, back, 0)
            state = state + decay * F.pad(state[:, :-back], pad)
            decay = decay * F.pad(decay[:, :-back], pad, value=1.0)
            back *= 2
        state = state + decay * h[:, None]
        h = state[:, -1]
        outputs.append(torch.einsum("bles,bls->ble", state, c) + D * xs)
    return torch.cat(outputs, dim=1)


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The scan of Mamba-2, the same with one decay per head: x [B, L, H, E / H]; dt [B, L, H]; A, D [H]."""
    if mamba_chunk_scan_combined is not None and x.is_cuda:
        b, c = B[:, :, None].contiguous(), C[:, :, None].contiguous()
        return mamba_chunk_scan_combined(x.contiguous(), dt, A, b, c, chunk_size=256, D=D)
    h, outputs = x.new_zeros(len(x), *x.shape[2:], B.shape[-1]), []
    for xs, step, b, c in zip(*(v.split(CHUNK, dim=1) for v in (x, dt, B, C)), strict=True):
        log = torch.cumsum((step * A).clamp(min=-104.0), dim=1)  # [B, L, H]; exp(-104) is 0 in fp32
        later = torch.ones(log.shape[1], log.shape[1], device=x.device).triu(1).bool()
        between = (log[:, :, None] - log[:, None]).masked_fill(later[..., None], -torch.inf)
        weights = torch.exp(between) * torch.einsum("bts,brs->btr", c, b)[..., None]
        inputs = step[..., None] * xs
        y = torch.einsum("btrh,brhp->bthp", weights, inputs) + D[:, None] * xs
        outputs.append(y + torch.einsum("bth,bts,bhps->bthp", torch.exp(log), c, h))
        left = torch.exp(log[:, -1:] - log)  # what remains at the end of the chunk
        h = h * torch.exp(log[:, -1])[..., None, None]
        h = h + torch.einsum("brh,brs,brhp->bhps", left, b, inputs)
    return torch.cat(outputs, dim=1)


class CausalConv(nn.Conv1d):
    """silu(conv(x)) on [B, L, E], channel by channel; a step sees only earlier ones."""

    def __init__(self, channels: int, taps: int):
        super().__init__(channels, channels, taps, groups=channels, padding=taps - 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))


class Mamba1(nn.Module):
    """One direction of a Mamba-1 mixer: maps x [B, L, E] to [B, L, E]; u [B, L, D] is the input of the mixer."""

    def __init__(self, width: int, inner: int, mamba: dict[str, Any]):
        super().__init__()
        self.sizes = [-(-width // 16), mamba["d_state"], mamba["d_state"]]
        self.conv1d = CausalConv(inner, mamba["d_conv"])
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(self.sizes[0], inner)
        self.A_log = nn.Parameter(torch.zeros(inner, mamba["d_state"]))
        self.D = nn.Parameter(torch.ones(inner))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        x = self.conv1d(x)
        dt, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        dt = F.linear(dt, self.dt_proj.weight).float() + self.dt_proj.bias.float()
        dt, A = F.softplus(dt), -torch.exp(self.A_log.float())
        return selective_scan(x.float(), dt, A, B.float(), C.float(), self.D.float()).to(x.dtype)


class Mamba2(nn.Module):
    """One direction of a Mamba-2 mixer; shapes as in `Mamba1`."""

    def __init__(self, width: int, inner: int, mamba: dict[str, Any]):
        super().__init__()
        heads, states = inner // mamba["head_dim"], mamba["d_state"]
        self.conv_x = CausalConv(inner, mamba["d_conv"])
        self.conv_bc = CausalConv(2 * states, mamba["d_conv"])
        self.bc_proj = nn.Linear(width, 2 * states, bias=False)
        self.dt_proj = nn.Linear(width, heads, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        B, C = self.conv_bc(self.bc_proj(u)).chunk(2, dim=-1)
        heads = self.conv_x(x).unflatten(-1, (len(self.D), -1)).float()
        dt, A = F.softplus(self.dt_proj(u).float() + self.dt_bias), -torch.exp(self.A_log.float())
        return ssd(heads, dt, A, B.float(), C.float(), self.D.float()).flatten(2).to(x.dtype)


class MambaMixer(nn.Module):
    """One or both directions between shared projections, [B, L, D] -> [B, L, D]."""

    def __init__(self, width: int, version: str, mamba: dict[str, Any]):
        super().__init__()
        inner, make = mamba["expand"] * width, {"mamba1": Mamba1, "mamba2": Mamba2}[version]
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.directions = nn.ModuleList(
            make(width, inner, mamba) for _ in range(1 + (mamba["direction"] == "both"))
        )
        self.norm = nn.RMSNorm(inner, eps=1e-5) if version == "mamba2" else nn.Identity()
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.in_proj(u).chunk(2, dim=-1)
        y = self.directions[0](u, x)
        for backward in self.directions[1:]:
            y = y + backward(u.flip(1), x.flip(1)).flip(1)
        return self.out_proj(self.norm(y * F.silu(z)))


class Stem(nn.Module):
    """Patch features [F, P, C] of each frame -> tokens [F, N, D]."""

    def __init__(self, features: int, width: int, kind: str, downsample: int, bias: bool):
        super().__init__()
        is_deep, self.downsample = kind == "mlp_downsample_3x3_fix", downsample
        merged, inner = features * downsample**2, features * downsample if is_deep else width
        self.norm1 = nn.LayerNorm(merged) if kind.startswith("mlp_downsample") else nn.Identity()
        self.linear1 = nn.Linear(merged, inner, bias=bias)
        self.norm2 = nn.LayerNorm(inner) if is_deep else nn.Identity()
        self.linear2 = nn.Linear(inner, width) if kind != "linear" else None
        self.linear3 = nn.Linear(width, width) if is_deep else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear1(self.norm1(_pixel_shuffle(x, self.downsample)))
        if self.linear2 is not None:
            x = self.linear2(self.norm2(F.gelu(x)))
        return x if self.linear3 is None else self.linear3(F.gelu(x))


class StormProjector(nn.Module):
    """Patch features of images and videos -> their tokens in the decoder."""

    def __init__(self, config: StormConfig):
        super().__init__()
        width, stem = config.text_config.hidden_size, dict(config.stem)
        self.plan = plan = TokenPlan(**config.plan)
        self.halve = {
            "none": nn.Identity(), "bilinear": nn.Upsample(plan.video_side, mode="bilinear"),
            "average": nn.AvgPool2d(2), "max": nn.MaxPool2d(2),
        }[stem.pop("video_pool")]  # fmt: skip
        self.average = nn.AvgPool2d(plan.spatial_pool, ceil_mode=True, count_include_pad=False)
        self.stem = Stem(config.vision_config.hidden_size, width, **stem)
        self.layers = nn.ModuleList()
        for _ in range(config.mamba["depth"] if config.mixer != "none" else 0):
            mixer = MambaMixer(width, config.mixer, config.mamba)
            self.layers.append(nn.ModuleDict({"norm": nn.LayerNorm(width), "mixer": mixer}))
        has_newline = plan.image_newline or plan.video_newline != "none"
        self.newline = nn.Parameter(torch.zeros(width)) if has_newline else None

    def images(self, features: Tensor) -> Tensor:
        """Maps images [B, P, C], each a sequence of its own, to [B, N, D]."""
        return self._end(self._mix(self.stem(features)), self.plan.image_newline)

    def video(self, features: Tensor) -> Tensor:
        """Maps the frames of one video [F, P, C] to [tokens, D]."""
        if len(features) == 1:
            return self.images(features)[0]
        x = _pool(self.stem(features), self.halve)
        x = self._mix(x.flatten(0, 1)[None]).reshape(x.shape)
        groups = [x[group.start : group.stop].float().mean(0) for group in self.plan.groups(len(x))]
        grid = _as_grid(_pool(torch.stack(groups), self.average).to(x.dtype))
        where = self.plan.video_newline
        x = self._end(grid.permute(0, 2, 3, 1), where == "row").flatten(1, 2)  # [groups, N, D]
        return self._end(self._end(x, where == "group").flatten(0, 1), where == "clip")

    def _mix(self, x: Tensor) -> Tensor:
        """Mixes sequences [B, L, D]."""
        layer: Any
        for layer in self.layers:
            x = x + layer["mixer"](layer["norm"](x))
        return x

    def _end(self, x: Tensor, has_newline: bool) -> Tensor:
        """[..., n, D] -> [..., n + 1, D] with the newline."""
        if not has_newline or self.newline is None:
            return x
        return torch.cat([x, self.newline.to(x.dtype).expand(*x.shape[:-2], 1, -1)], dim=-2)


class StormPreTrainedModel(PreTrainedModel):
    config_class = StormConfig
    base_model_prefix = "model"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    # What the tower has after the layer whose output is used.
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\.(encoder\.layers|post_layernorm)\."]  # noqa: RUF012


class StormModel(StormPreTrainedModel):
    """Tower, projector and decoder, without its head."""

    def __init__(self, config: StormConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        if not config.vision_final_norm:
            self.vision_tower.post_layernorm = nn.Identity()
        self.projector = StormProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Encodes images [B, 3, H, W]; `pooler_output` is [B, N, D]."""
        tokens = self.projector.images(self._encode(pixel_values))
        return BaseModelOutputWithPooling(pooler_output=tokens)

    def get_video_features(self, pixel_values_videos: Any, **_: Any) -> BaseModelOutputWithPooling:
        """Encodes videos [B, F, 3, H, W], or a list of [F, 3, H, W]; `pooler_output` has [tokens, D] of each."""
        tokens: Any = [self.projector.video(self._encode(frames)) for frames in pixel_values_videos]
        return BaseModelOutputWithPooling(pooler_output=tokens)

    def _encode(self, frames: Tensor) -> Tensor:
        """[F, 3, H, W] -> [F, P, C]."""
        parts = frames.split(FRAMES_AT_ONCE)
        return torch.cat([self.vision_tower(part).last_hidden_state for part in parts])

    def forward(
        self, input_ids=None, pixel_values=None, pixel_values_videos=None, inputs_embeds=None, **kwargs
    ):  # fmt: skip
        """The decoder's output. Visual tokens of `pixel_values` and `pixel_values_videos` (see `get_image_features`
        and `get_video_features`) replace the placeholders in `input_ids` [B, L], in order."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features_of: Any
        for pixels, features_of, placeholder in (
            (pixel_values, self.get_image_features, self.config.image_token_id),
            (pixel_values_videos, self.get_video_features, self.config.video_token_id),
        ):
            if pixels is None:
                continue
            tokens = torch.cat(tuple(features_of(pixels).pooler_output)).to(inputs_embeds)
            mask = input_ids == placeholder
            if mask.sum() != len(tokens):
                raise ValueError(
                    f"{int(mask.sum())} placeholders for {len(tokens)} visual tokens: the processor must have the "
                    f"model's `plan`"
                )
            inputs_embeds = inputs_embeds.masked_scatter(mask[..., None], tokens)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


class StormForConditionalGeneration(StormPreTrainedModel, GenerationMixin):
    """Answers questions about images and videos."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: StormConfig):
        super().__init__(config)
        self.model, text = StormModel(config), config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids=None, pixel_values=None, pixel_values_videos=None, logits_to_keep=0, **kwargs
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits [B, L, V], or those of the last `logits_to_keep` tokens. Other arguments are the decoder's."""
        outputs = self.model(input_ids, pixel_values, pixel_values_videos, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        rest = {name: v for name, v in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(logits=logits, **rest)


def _as_grid(x: Tensor) -> Tensor:
    """[F, N, D] -> [F, D, side, side]."""
    return x.transpose(1, 2).unflatten(2, (round(x.shape[1] ** 0.5), -1))


def _pool(x: Tensor, pool: nn.Module) -> Tensor:
    """Pools the grid of tokens [F, N, D] in fp32."""
    return pool(_as_grid(x).float()).flatten(2).transpose(1, 2).to(x.dtype)


def _pixel_shuffle(x: Tensor, r: int) -> Tensor:
    """[F, P, C] -> [F, N, r * r * C]; zeros fill the grid at the bottom and right."""
    grid = _as_grid(x)
    rest = -grid.shape[-1] % r
    cells = F.pad(grid, (0, rest, 0, rest)).unfold(2, r, r).unfold(3, r, r)  # [F, C, n, n, r, r]
    return cells.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
