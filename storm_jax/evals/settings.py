"""How a model is asked: what an evaluation is a function of, and the paper's own settings."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping

from storm_jax.config import CompressionConfig
from storm_jax.evals.benchmark import BenchmarkError

ANSWERS = ("generate", "likelihood")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What the replies of an evaluation depend on beside weights and files.

    Attributes:
      split: of the benchmark.
      prompt_style: of the benchmark's.
      subtitles: whether they are part of the prompt.
      answers: "generate", or "likelihood" of each option's letter.
      compression: frames, pooling and sampling.
      max_new_tokens: of a reply.
      limit: how many questions are asked, None = all.
    """

    split: str
    prompt_style: str
    compression: CompressionConfig
    max_new_tokens: int
    subtitles: bool = False
    answers: str = "generate"
    limit: int | None = None

    def folder_name(self, step: int, default_style: str) -> str:
        """Such as "step600_frames16_k4_p1_s1", with what is not as usual behind it."""
        c = self.compression
        parts = [
            f"step{step}_frames{c.num_frames}_k{c.temporal_pool}_p{c.spatial_pool}"
            f"_s{c.temporal_sample}"
        ]
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
    """A row of Table 15 (arXiv 2503.04130): pooling, sampling, and the frames of each benchmark."""

    temporal_pool: int
    temporal_sample: int
    frames: Mapping[str, int]

    def compression(self, name: str, benchmark: str) -> CompressionConfig:
        """As the model `name` is tested on a benchmark.

        Raises:
          BenchmarkError: when the paper does not test it there.
        """
        if benchmark not in self.frames:
            raise BenchmarkError(
                f"--settings={name}: the paper has no frames for {benchmark}, only for "
                f"{', '.join(self.frames)}; give --num_frames and the rest yourself"
            )
        return CompressionConfig(
            num_frames=self.frames[benchmark],
            temporal_pool=self.temporal_pool,
            temporal_sample=self.temporal_sample,
        )


def _row(pool: int, sample: int, *frames: int) -> PaperSettings:
    names = ("mvbench", "mlvu", "longvideobench", "videomme")
    return PaperSettings(pool, sample, dict(zip(names, frames, strict=True)))


# The number of frames that was best on the benchmark itself, of 8 to 512. The paper has no row for the
# models that were trained on 128 frames.
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
