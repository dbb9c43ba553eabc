"""Settings of an evaluation, and those used in the paper."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping

from storm_jax.config import CompressionConfig, StreamSettings
from storm_jax.evals.benchmark import BenchmarkError

ANSWERS = ("generate", "likelihood")
MODES = ("offline", "stream")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What replies depend on, besides the weights and the benchmark's files.

    Attributes:
      split: of the benchmark.
      prompt_style: one of the benchmark's.
      subtitles: whether the prompt contains subtitles.
      answers: "generate", or "likelihood" of each option's letter.
      compression: frames, pooling and sampling.
      stream: how videos are watched while questions are asked; None if each is asked about a clip.
      context_seconds: how much of a video before a question its clip shows; None = all.
      max_new_tokens: maximum length of a reply.
      limit: ask only so many questions; None = all.
    """

    split: str
    prompt_style: str
    compression: CompressionConfig
    max_new_tokens: int
    stream: StreamSettings | None = None
    context_seconds: float | None = None
    subtitles: bool = False
    answers: str = "generate"
    limit: int | None = None

    def folder_name(self, step: int, default_style: str) -> str:
        """E.g. "step600_frames16_k4_p1_s1", followed by whatever is not a default."""
        c = self.compression
        shown = f"frames{c.num_frames}"
        if self.stream:
            shown = f"fps{self.stream.fps:g}_{self.stream.policy}{self.stream.budget_tokens}"
            if self.stream.policy != "window":
                shown += f"_recent{self.stream.recent}"
        parts = [f"step{step}_{shown}_k{c.temporal_pool}_p{c.spatial_pool}_s{c.temporal_sample}"]
        if self.context_seconds is not None:
            parts.append(f"context{self.context_seconds:g}")
        if self.prompt_style != default_style:
            parts.append(self.prompt_style)
        if self.subtitles:
            parts.append("subtitles")
        if self.answers != "generate":
            parts.append(self.answers)
        if self.limit is not None:
            parts.append(f"limit{self.limit}")
        return "_".join(parts)


@dataclasses.dataclass(frozen=True)
class PaperSettings:
    """A row of Table 15 (arXiv 2503.04130): pooling, sampling, and the frames per benchmark."""

    temporal_pool: int
    temporal_sample: int
    frames: Mapping[str, int]

    def compression(self, name: str, benchmark: str) -> CompressionConfig:
        """The compression of row `name` on a benchmark.

        Raises:
          BenchmarkError: if the row has no value for the benchmark.
        """
        if benchmark not in self.frames:
            raise BenchmarkError(
                f"--settings={name}: the paper has no frames for {benchmark}, only for "
                f"{', '.join(self.frames)}; set --num_frames and the other flags instead"
            )
        return CompressionConfig(
            num_frames=self.frames[benchmark],
            temporal_pool=self.temporal_pool,
            temporal_sample=self.temporal_sample,
        )


def _row(pool: int, sample: int, *frames: int) -> PaperSettings:
    names = ("mvbench", "mlvu", "longvideobench", "videomme")
    return PaperSettings(pool, sample, dict(zip(names, frames, strict=True)))


# The best number of frames on each benchmark, out of 8 to 512. The table has no row for the models
# trained on 128 frames.
PAPER_SETTINGS = types.MappingProxyType(
    {
        "storm_8f": _row(1, 1, 8, 64, 32, 64),
        "storm_8f_t_samp": _row(1, 2, 16, 256, 256, 128),
        "storm": _row(1, 1, 16, 64, 64, 64),
        "storm_t_samp": _row(1, 2, 32, 256, 256, 128),
        "storm_t_pool": _row(4, 1, 32, 64, 128, 64),
        "storm_t_pool_t_samp": _row(4, 2, 64, 256, 256, 128),
    }
)
