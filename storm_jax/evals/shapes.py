"""The built-in task as a benchmark: exact match per family, beside chance and ceiling."""

from __future__ import annotations

import pathlib

from storm_jax.config import CompressionConfig, SourceConfig
from storm_jax.data import shapes
from storm_jax.data.sources import open_source
from storm_jax.evals.benchmark import Benchmark, Question, exact_match


def load(folder: str | pathlib.Path, split: str = "test") -> Benchmark:
    """The questions of a folder that `python -m storm_jax.data.shapes` rendered.

    Raises:
      ValueError: when the folder holds no such data.
    """
    folder = pathlib.Path(folder)
    settings = shapes.read_settings(folder)
    questions = []
    source = open_source(SourceConfig("shapes", str(folder / f"{split}.json")))
    for index in range(len(source)):
        sample = source.sample(index)
        options = tuple(sample.extra.get("options", ()))
        questions.append(
            Question(sample.prompt(), sample.answer(), options, sample.extra["family"])
        )

    def ceiling(family: str, compression: CompressionConfig) -> float | None:
        if not shapes.FAMILIES[family].is_image and compression.num_frames != settings.frames:
            return None
        return shapes.ceiling(
            family, settings, compression.temporal_pool, compression.temporal_sample
        )

    chance = {family: shapes.FAMILIES[family].chance for family in settings.families}
    return Benchmark("shapes", questions, chance, ceiling, exact_match)
