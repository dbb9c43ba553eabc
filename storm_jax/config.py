"""Strict configuration: frozen dataclasses built from an ml_collections ConfigDict.

`from_dict(RunConfig, mapping)` checks every key, type and combination of values, and raises one
`ConfigError` that lists all problems by field and value. Nothing here touches a device. A run stores
its configuration as `config.json` and is rebuilt from it.

    RunConfig
      model        ModelConfig: vision, stem, mixer (+ mamba), decoder, dtype
      compression  CompressionConfig: num_frames, temporal_pool, spatial_pool, temporal_sample
      data         DataConfig: mixtures (SourceConfig), frames (FramesConfig), rows (RowConfig)
      optim        OptimConfig: AdamW, one learning rate per part (0 freezes the part)
      train        TrainConfig: steps, batch, saving, logging
      mesh         MeshConfig: data, fsdp, context, tensor
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from storm_jax.old_runs import current_model

T = TypeVar("T")

_PROJECTIONS = ("query", "key", "value", "out", "gate_up", "down")


# What makes room when the budget of a stream is used up.
STREAM_POLICIES = ("window", "stride", "merge")


def _at_least(minimum: float, default: Any = dataclasses.MISSING) -> Any:
    """Declares a number that is at least `minimum`. All other numbers must be positive."""
    return dataclasses.field(default=default, metadata={"minimum": minimum})


def _pattern_problems(name: str, pattern: str) -> list[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"{name}={pattern!r} is not a valid regular expression: {error}"]
    return []


class ConfigError(ValueError):
    """One or more fields of a configuration are unknown, missing, mistyped or incompatible."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A SigLIP tower. `feature_layer` indexes hidden states as transformers does: -1 is the output
    of the last layer, -2 the one before it, as LLaVA and VILA use."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    feature_layer: int = dataclasses.field(default=-2, metadata={"minimum": -math.inf})
    final_norm: bool = False
    norm_eps: float = 1e-6

    @property
    def side(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    def problems(self) -> list[str]:
        found = []
        if self.width % self.num_heads:
            found.append(f"num_heads={self.num_heads} does not divide width={self.width}")
        if self.patch_size > self.image_size:
            found.append(f"patch_size={self.patch_size} exceeds image_size={self.image_size}")
        if not -self.depth <= self.feature_layer <= -1:
            found.append(f"feature_layer={self.feature_layer} must be in [-{self.depth}, -1]")
        elif self.final_norm and self.feature_layer != -1:
            found.append(f"final_norm=True needs feature_layer=-1, not {self.feature_layer}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class StemConfig:
    """The projector's stem (see `storm_jax.models.stems`).

    Attributes:
      downsample: r, the side of the cells of patches that pixel shuffle merges into one token.
      bias: whether the stem "linear" has a bias.
      video_pool: how the grid of a video's frame is halved, as in LLaVA: "none", "bilinear", "average" or "max".
        Images keep theirs.
    """

    kind: str = "linear"
    downsample: int = 2
    bias: bool = True
    video_pool: str = "none"

    def problems(self) -> list[str]:
        found = []
        for name, allowed in (
            ("kind", ("linear", "mlp2x_gelu", "mlp_downsample", "mlp_downsample_3x3_fix")),
            ("video_pool", ("none", "bilinear", "average", "max")),
        ):
            if getattr(self, name) not in allowed:
                found.append(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if not self.bias and self.kind != "linear":
            found.append(f"bias=False is only for kind='linear', not for kind={self.kind!r}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """What surrounds visual tokens in the prompt; nothing in the paper.

    Attributes:
      before_video, after_video: text around a video. It may contain {frames}, their number in words, {count}, in
        digits, {times}, "0.00s,1.00s", {seconds}, the length of the video, and {duration}, the same as H:MM:SS.
      group_time: text before each pooled group of a video. It may contain {time}, MM:SS of its first frame.
      before_group, after_group: text around the tokens of each pooled group, and of each image.
      joined: whether these texts are tokenised together with the text around them, or each on its own.
      trim: whether line breaks and spaces after a medium in the prompt are removed.
      image_newline: whether a learned vector, the newline, follows the tokens of each image.
      video_newline: where it goes in a video: "none", or after each "row" of the grid, "group" or "clip".
    """

    before_video: str = ""
    after_video: str = ""
    group_time: str = ""
    before_group: str = ""
    after_group: str = ""
    joined: bool = False
    trim: bool = False
    image_newline: bool = False
    video_newline: str = "none"

    @property
    def has_newline(self) -> bool:
        return self.image_newline or self.video_newline != "none"

    def problems(self) -> list[str]:
        found = []
        positions = ("none", "row", "group", "clip")
        if self.video_newline not in positions:
            found.append(
                f"video_newline={self.video_newline!r} must be one of {', '.join(positions)}"
            )
        video = ("frames", "count", "times", "seconds", "duration")
        for name, values in (
            ("before_video", video),
            ("after_video", video),
            ("group_time", ("time",)),
        ):
            try:
                getattr(self, name).format(**dict.fromkeys(values, ""))
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                allowed = ", ".join(f"{{{value}}}" for value in values)
                found.append(
                    f"{name}={getattr(self, name)!r} may contain only {allowed}, and braces as {{{{ and }}}}: "
                    f"{error!r}"
                )
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Layers of the mixers "mamba1" (selective scan) and "mamba2" (SSD, with heads of `head_dim` channels and
    usually a `d_state` of 64 to 128). `direction` is "both" or "forward", the causal variant for streaming."""

    depth: int = 2
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    direction: str = "both"
    head_dim: int = 64

    def problems(self) -> list[str]:
        found = []
        if self.direction not in ("both", "forward"):
            found.append(f"direction={self.direction!r} must be 'both' or 'forward'")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """Llama 3's scaling of rotary frequencies. Wavelengths above `original_positions /
    low_freq_factor` are stretched by `factor`, those below `original_positions / high_freq_factor`
    are unchanged, and those in between are interpolated. A factor of 1 disables scaling."""

    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def problems(self) -> list[str]:
        if self.low_freq_factor >= self.high_freq_factor:
            return [
                f"low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            ]
        return []


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the decoder projections whose name matches the regular expression
    `targets` (query, key, value, out, gate_up, down). A rank of 0 disables them. Otherwise only the
    adapters of the decoder are trained, at the decoder's learning rate."""

    rank: int = _at_least(0, 0)
    alpha: float = 16.0
    targets: str = "query|key|value|out|gate_up|down"

    def problems(self) -> list[str]:
        if found := _pattern_problems("targets", self.targets):
            return found
        if self.rank and not any(re.fullmatch(self.targets, name) for name in _PROJECTIONS):
            return [f"targets={self.targets!r} matches none of {', '.join(_PROJECTIONS)}"]
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only language model of the Qwen2, Qwen3 or Llama family. `max_positions` is the
    context length it was trained with; longer rows cause a warning."""

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float
    qkv_bias: bool
    tie_embeddings: bool
    qk_norm: bool = False
    norm_eps: float = 1e-6
    max_positions: int = 32_768
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    lora: LoraConfig = LoraConfig()

    def problems(self) -> list[str]:
        found = []
        if self.num_heads % self.num_kv_heads:
            found.append(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            found.append(f"head_dim={self.head_dim} must be even for rotary embeddings")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Vision tower, projector (a stem per frame, and a mixer over the frames of a clip) and decoder.

    `mixer` is "mamba1", "mamba2", "none" (frames are encoded independently, as in VILA) or "module:Class", a
    custom Flax module built with `mixer_args`."""

    vision: VisionConfig
    decoder: DecoderConfig
    stem: StemConfig = StemConfig()
    mixer: str = "mamba1"
    mixer_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mamba: MambaConfig = MambaConfig()
    layout: LayoutConfig = LayoutConfig()
    dtype: str = "bfloat16"

    @property
    def side(self) -> int:
        """Tokens along one side of an image after pixel shuffle. Odd grids are padded."""
        return -(-self.vision.side // self.stem.downsample)

    @property
    def video_side(self) -> int:
        """Tokens along one side of a video's frame."""
        if self.stem.video_pool == "none":
            return self.side
        return -(-self.side // 2) if self.stem.video_pool == "bilinear" else self.side // 2

    def problems(self) -> list[str]:
        found = []
        if self.mixer not in ("none", "mamba1", "mamba2") and ":" not in self.mixer:
            found.append(
                f"mixer={self.mixer!r} must be 'mamba1', 'mamba2', 'none' or 'module:Class'"
            )
        if ":" not in self.mixer and self.mixer_args:
            found.append(
                f"mixer_args={dict(self.mixer_args)!r} apply to a custom mixer ('module:Class'), not to "
                f"mixer={self.mixer!r}"
            )
        if self.stem.video_pool != "none" and self.side == 1:
            found.append(
                f"stem.video_pool={self.stem.video_pool!r}: a grid of one token has no half"
            )
        inner = self.mamba.expand * self.decoder.width
        if self.mixer == "mamba2" and inner % self.mamba.head_dim:
            found.append(
                f"mamba.head_dim={self.mamba.head_dim} must divide mamba.expand * decoder.width = "
                f"{inner}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            found.append(f"dtype={self.dtype!r} must be 'float32' or 'bfloat16'")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """Frames per video and how their tokens are compressed.

    Attributes:
      num_frames: frames sampled from a video.
      temporal_pool: k, frames averaged into one group.
      spatial_pool: p, side of the cells of tokens that are averaged.
      temporal_sample: s, keep every s-th group; at test time only, unless `train.compressions` says otherwise.
    """

    num_frames: int
    temporal_pool: int = 1
    spatial_pool: int = 1
    temporal_sample: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedCompression:
    """One of several compressions that a stage trains with.

    Attributes:
      temporal_pool, spatial_pool: see `CompressionConfig`; 0 is that of `compression`.
      temporal_sample: see `CompressionConfig`.
      weight: share of the samples, relative to the other weights.
    """

    temporal_pool: int = _at_least(0, 0)
    spatial_pool: int = _at_least(0, 0)
    temporal_sample: int = 1
    weight: float = 1.0

    def problems(self) -> list[str]:
        return [] if math.isfinite(self.weight) else [f"weight={self.weight} must be finite"]

    def applied_to(self, compression: CompressionConfig) -> CompressionConfig:
        """The compression of a sample, if `compression` is that of the run."""
        return dataclasses.replace(
            compression,
            temporal_pool=self.temporal_pool or compression.temporal_pool,
            spatial_pool=self.spatial_pool or compression.spatial_pool,
            temporal_sample=self.temporal_sample,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How a video is watched as it arrives: the arguments of `Predictor.stream`, besides compression.

    Attributes:
      fps: frames per second to use; 0 uses all.
      budget_tokens: visual tokens of a prompt at most.
      policy: what makes room when they are used up (see `storm_jax.inference.streaming.groups`).
      recent: how many of the newest groups stride and merge leave alone.
    """

    fps: float = 1.0
    budget_tokens: int = 8192
    policy: str = "window"
    recent: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One dataset of a mixture.

    Attributes:
      path: a LLaVA .json or .jsonl file, or a folder of .parquet files, .tar shards or a prepared
        TFDS dataset.
      media_root: folder that media names are relative to. Defaults to the folder of `path`.
      split: the split to read, for TFDS.
      weight: fraction of the mixture's samples, relative to the other weights and independent of the
        dataset's size. Either all sources have a weight or none.
      repeat: how many times each sample occurs in an epoch.
      percent, cap: percentage or number of samples used in an epoch, a subset drawn with the seed.

    At most one of weight, repeat, percent and cap is set; 0 means not set.
    """

    name: str
    path: str
    media_root: str = ""
    split: str = "train"
    weight: float = _at_least(0, 0.0)
    repeat: float = _at_least(0, 0.0)
    percent: float = _at_least(0, 0.0)
    cap: int = _at_least(0, 0)

    def problems(self) -> list[str]:
        found = []
        if not re.fullmatch(r"[\w.-]+", self.name):
            found.append(f"name={self.name!r} may contain only letters, digits, '.', '-' and '_'")
        chosen = {f: getattr(self, f) for f in ("weight", "repeat", "percent", "cap")}
        chosen = {field: value for field, value in chosen.items() if value}
        if len(chosen) > 1:
            listed = ", ".join(f"{field}={value}" for field, value in chosen.items())
            found.append(f"name={self.name!r} has {listed}: set at most one of them")
        if self.percent > 100:
            found.append(f"percent={self.percent} must be at most 100")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class FramesConfig:
    """How videos are read.

    Attributes:
      fps: frames per second to sample, at most `compression.num_frames` in all. 0 always samples
        `num_frames`.
      time_text: timestamps in the prompt: "none", in one "sentence", or "per_group" of pooled frames.
      max_damage: fraction of a clip's frames that may be replaced by the nearest readable frame.
      time_limit: seconds after which a file is skipped.
    """

    fps: float = _at_least(0, 0.0)
    time_text: str = "none"
    max_damage: float = _at_least(0, 0.0)
    time_limit: float = 120.0

    def problems(self) -> list[str]:
        found = []
        if self.time_text not in ("none", "sentence", "per_group"):
            found.append(f"time_text={self.time_text!r} must be 'none', 'sentence' or 'per_group'")
        if self.max_damage >= 1:
            found.append(f"max_damage={self.max_damage} must be below 1")
        return found


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """Token slots (S) and frame slots (F) of a row."""

    tokens: int
    frames: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and validation mixtures, and the rows that their samples are packed into.

    Attributes:
      train: empty in a run of imported weights that is only asked and evaluated.
      tokenizer: a tokenizer folder. Defaults to that of `init_from`, or to `tokenizer/` next to the
        first source.
      system: system prompt of samples that have none.
      rows: row shapes, smallest first, each compiled once. A row uses the first shape that fits.
      index_dir: where indexes of sources (lengths, record offsets) are cached. Defaults to
        `SOURCE.index/` next to each source.
      max_skip_fraction: fraction of a source's samples that may be unusable before training stops.
      num_workers: processes that decode media; 0 decodes in the training process without a time limit.
    """

    train: tuple[SourceConfig, ...] = ()
    val: tuple[SourceConfig, ...] = ()
    tokenizer: str = ""
    system: str = "You are a helpful assistant"
    frames: FramesConfig = FramesConfig()
    rows: tuple[RowConfig, ...] = (RowConfig(4096, 32),)
    index_dir: str = ""
    max_skip_fraction: float = _at_least(0, 0.1)
    num_workers: int = _at_least(0, 8)

    @property
    def largest_row(self) -> RowConfig:
        return self.rows[-1]

    def problems(self) -> list[str]:
        found = []
        if self.max_skip_fraction > 1:
            found.append(f"max_skip_fraction={self.max_skip_fraction} must be at most 1")
        for field in ("train", "val"):
            found += _mixture_problems(field, getattr(self, field))
        if not self.rows:
            return [*found, "rows is empty: list at least one row shape"]
        for smaller, larger in zip(self.rows, self.rows[1:], strict=False):
            if (
                smaller.tokens > larger.tokens
                or smaller.frames > larger.frames
                or smaller == larger
            ):
                found.append(
                    f"rows: {larger.tokens} tokens and {larger.frames} frames must not be less than "
                    f"{smaller.tokens} and {smaller.frames}, the shape before it"
                )
        return found


def _mixture_problems(field: str, sources: tuple[SourceConfig, ...]) -> list[str]:
    found = []
    names = [source.name for source in sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        found.append(
            f"{field} has {names.count(name)} sources named {name!r}: names must be unique"
        )
    weighted = [source.name for source in sources if source.weight]
    unequal = [source.name for source in sources if source.weight or source.repeat]
    if unequal and field == "val":
        found.append(
            f"val: {unequal[0]} has a weight or repeat, but every validation sample is used exactly once"
        )
    elif weighted and len(weighted) < len(sources):
        other = next(source.name for source in sources if not source.weight)
        found.append(
            f"{field}: {weighted[0]} has a weight and {other} has none: set it for all sources or none"
        )
    return found


@dataclasses.dataclass(frozen=True)
class LearningRateConfig:
    """Peak learning rate of each part of the model; 0 freezes the part."""

    vision: float = _at_least(0)
    projector: float = _at_least(0)
    decoder: float = _at_least(0)

    def problems(self) -> list[str]:
        rates = dataclasses.asdict(self)
        if not any(rates.values()):
            return ["vision, projector and decoder are all 0: nothing would be trained"]
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warmup and cosine decay to zero. Weight decay applies to parameters whose
    path matches the regular expression `decay_pattern`."""

    learning_rate: LearningRateConfig
    warmup_fraction: float = _at_least(0, 0.03)
    weight_decay: float = _at_least(0, 0.0)
    decay_pattern: str = r"/kernel$"
    b1: float = _at_least(0, 0.9)
    b2: float = _at_least(0, 0.999)
    clip_norm: float = 1.0

    def problems(self) -> list[str]:
        for name in ("warmup_fraction", "b1", "b2"):
            if getattr(self, name) >= 1:
                return [f"{name}={getattr(self, name)} must be below 1"]
        return _pattern_problems("decay_pattern", self.decay_pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Steps, batch size, and when to log, evaluate, save and profile.

    Attributes:
      batch_size: the global number of rows per step, over all devices and accumulation steps.
      compressions: one is drawn for every sample, each time it comes, so that one model serves every budget of tokens.
        By default all samples have `compression`, without temporal sampling.
      checkpoint_dir: where this run keeps its checkpoints, a folder or gs://BUCKET/PATH; by default RUN/checkpoints.
      profile_steps: "A:B" traces the steps A to B, both included and numbered as they are printed, into RUN/profile. A
        training that resumes within them traces the rest. The first step, and any with a new row shape, compiles in
        the trace: leave A above 1. Empty: no profile.
    """

    steps: int
    batch_size: int
    compressions: tuple[TrainedCompression, ...] = ()
    accumulation: int = 1
    seed: int = _at_least(0, 0)
    remat: bool = True
    log_every: int = 10
    eval_every: int = _at_least(0, 500)
    save_every: int = 500
    keep_last: int = 2
    keep_best: int = _at_least(0, 1)
    checkpoint_dir: str = ""
    tensorboard: bool = False
    profile_steps: str = ""

    @property
    def profiled_steps(self) -> range:
        """The steps to profile, numbered from 1."""
        first, last = (self.profile_steps or "1:0").split(":")
        return range(int(first), int(last) + 1)

    def problems(self) -> list[str]:
        found = []
        if self.profile_steps:
            found += self._profile_problems()
        if self.batch_size % self.accumulation:
            found.append(
                f"accumulation={self.accumulation} does not divide batch_size={self.batch_size}"
            )
        if "://" in self.checkpoint_dir and not self.checkpoint_dir.startswith("gs://"):
            found.append(
                f"checkpoint_dir={self.checkpoint_dir}: Orbax writes to folders and gs:// only; mount the bucket"
            )
        return found

    def _profile_problems(self) -> list[str]:
        name = f"profile_steps={self.profile_steps!r}"
        if not re.fullmatch("[0-9]+:[0-9]+", self.profile_steps):
            return [f"{name} must be 'A:B', the first and the last step to profile"]
        steps = self.profiled_steps
        if not steps:
            return [f"{name}: the last step is before the first"]
        if steps.start < 1 or steps[-1] > self.steps:
            return [f"{name}: the steps must be from 1 to steps={self.steps}"]
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis. One of `data` and `fsdp` may be -1: it takes the remaining devices."""

    data: int = _at_least(-1, -1)
    fsdp: int = _at_least(-1, 1)
    context: int = 1
    tensor: int = 1

    def problems(self) -> list[str]:
        if 0 in (self.data, self.fsdp) or self.data == self.fsdp == -1:
            return [f"data={self.data} and fsdp={self.fsdp} must be positive, or one of them -1"]
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The complete configuration of a run. `init_from` is a run to take parameters and tokenizer from."""

    model: ModelConfig
    compression: CompressionConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    init_from: str = ""

    @property
    def unsampled(self) -> CompressionConfig:
        """`compression` without temporal sampling: that of validation, and by default of training."""
        return dataclasses.replace(self.compression, temporal_sample=1)

    @property
    def trained_compressions(self) -> tuple[CompressionConfig, ...]:
        """The compressions of training samples."""
        if not self.train.compressions:
            return (self.unsampled,)
        return tuple(each.applied_to(self.compression) for each in self.train.compressions)

    def problems(self) -> list[str]:
        found = []
        if self.model.decoder.num_kv_heads % self.mesh.tensor:
            found.append(
                f"mesh.tensor={self.mesh.tensor} does not divide "
                f"model.decoder.num_kv_heads={self.model.decoder.num_kv_heads}"
            )
        if self.compression.num_frames > self.data.largest_row.frames:
            found.append(
                f"compression.num_frames={self.compression.num_frames} exceeds the "
                f"{self.data.largest_row.frames} frames of the largest row in data.rows: no video would fit"
            )
        found += self._compression_problems()
        if self.model.decoder.lora.rank and not self.optim.learning_rate.decoder:
            found.append(
                f"model.decoder.lora.rank={self.model.decoder.lora.rank} with "
                f"optim.learning_rate.decoder=0: the adapters would not be trained"
            )
        for i, row in enumerate(self.data.rows):
            for name in ("tokens", "frames"):
                if getattr(row, name) % self.mesh.context:
                    found.append(
                        f"mesh.context={self.mesh.context} does not divide "
                        f"data.rows[{i}].{name}={getattr(row, name)}"
                    )
        return found

    def _compression_problems(self) -> list[str]:
        found = []
        trained = self.trained_compressions
        for number, each in enumerate(trained):
            if each in trained[:number]:
                found.append(
                    f"train.compressions has temporal_pool={each.temporal_pool}, spatial_pool={each.spatial_pool}, "
                    f"temporal_sample={each.temporal_sample} twice: give it a larger weight instead"
                )
        pools = {(each.temporal_pool, each.spatial_pool) for each in trained}
        if (self.compression.temporal_pool, self.compression.spatial_pool) not in pools:
            found.append(
                f"compression.temporal_pool={self.compression.temporal_pool} with "
                f"spatial_pool={self.compression.spatial_pool} is not in train.compressions: add it, or set "
                f"train.compressions=() to train with it alone"
            )
        return found


def from_dict(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """Builds a config dataclass from a nested mapping such as a ConfigDict.

    Raises:
      ConfigError: listing every unknown key, missing key, wrong type and invalid combination.
    """
    problems: list[str] = []
    config = _build(cls, mapping, "", problems)
    if problems:
        listed = "\n  ".join(problems)
        raise ConfigError(listed if len(problems) == 1 else f"configuration:\n  {listed}")
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config dataclass as a nested plain dict, as stored in `config.json`."""
    return dataclasses.asdict(config)


def load(path: pathlib.Path) -> RunConfig:
    """Reads a run's `config.json`."""
    try:
        mapping = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: {path.parent} is not a run (train.py creates one)"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    try:
        if isinstance(mapping, dict) and isinstance(mapping.get("model"), dict):
            mapping["model"] = current_model(mapping["model"])
        return from_dict(RunConfig, mapping)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns the fields that differ between two config dicts, {dotted name: (old, new)}."""
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        old, new = ({f"[{i}]": value for i, value in enumerate(values)} for values in (old, new))
        return {
            name.replace(".[", "["): values
            for name, values in differences(old, new, prefix).items()
        }
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = {}
        for key in sorted({*old, *new}):
            found.update(differences(old.get(key), new.get(key), f"{prefix}{key}."))
        return found
    return {} if old == new else {prefix[:-1]: (old, new)}


def replace_model(
    config: RunConfig, model: ModelConfig, explicit: Collection[str], source: str
) -> tuple[RunConfig, dict[str, tuple[Any, Any]]]:
    """Replaces the model of `config`, as `inherit_model`; `source` is its name in errors."""
    fields = to_dict(config) | {"model": to_dict(model)}
    changes = differences(to_dict(config), fields)
    wrong = [f"{k}={changes[k][0]!r}, not {changes[k][1]!r}" for k in changes if k in explicit]
    if wrong:
        listed = "\n  ".join(wrong)
        raise ConfigError(f"the weights of {source} require a different value of\n  {listed}")
    return from_dict(RunConfig, fields), changes


def _build(cls: type[T], mapping: Any, prefix: str, problems: list[str]) -> T:
    where = prefix[:-1] or "the configuration"
    if not isinstance(mapping, Mapping) and not hasattr(mapping, "items"):
        problems.append(f"{where}={mapping!r} must be a mapping of fields")
        return None  # type: ignore[return-value]
    before = len(problems)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            problems.append(f"{prefix}{key} is an unknown field; fields: {', '.join(fields)}")
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _check(field, hints[name], mapping[name], prefix + name, problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{prefix}{name} is missing")
    if len(problems) > before:
        return None  # type: ignore[return-value]
    config = cls(**values)
    if hasattr(config, "problems"):
        problems.extend(prefix + problem for problem in config.problems())
    return config


def _check(field: dataclasses.Field, hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, name + ".", problems)
    if typing.get_origin(hint) is tuple:
        return _build_tuple(typing.get_args(hint)[0], value, name, problems)
    if typing.get_origin(hint) is not None:  # Mapping[str, Any]
        plain = value.to_dict() if hasattr(value, "to_dict") else value
        if not isinstance(plain, Mapping):
            problems.append(f"{name}={plain!r} must be a mapping of fields")
            return {}
        try:
            return json.loads(json.dumps(plain))  # as read back from config.json
        except TypeError as error:
            problems.append(f"{name}={plain!r} must be plain JSON: {error}")
            return {}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        problems.append(f"{name}={value!r} must be {_ARTICLE[hint]}")
        return value
    if hint in (int, float):
        problems += _number_problems(name, value, field.metadata.get("minimum"))
    return value


def _number_problems(name: str, value: float, minimum: float | None) -> list[str]:
    if minimum is None and value <= 0:
        return [f"{name}={value!r} must be positive"]
    if minimum is not None and value < minimum:
        return [f"{name}={value!r} must be at least {minimum}"]
    return []


def _build_tuple(cls: type[T], value: Any, name: str, problems: list[str]) -> tuple[T, ...]:
    if not isinstance(value, (list, tuple)):
        problems.append(f"{name}={value!r} must be a list of mappings")
        return ()
    return tuple(_build(cls, item, f"{name}[{i}].", problems) for i, item in enumerate(value))


_ARTICLE: Mapping[type, str] = types.MappingProxyType(
    {int: "an integer", float: "a number", str: "a string", bool: "True or False"}
)
