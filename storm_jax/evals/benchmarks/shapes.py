"""The built-in task as a benchmark: one group per family, exact match, with chance and ceiling."""

from __future__ import annotations

import pathlib

from storm_jax.config import CompressionConfig, SourceConfig
from storm_jax.data.sources import open_source
from storm_jax.evals import parsing
from storm_jax.evals.benchmark import Benchmark, Question, Split
from storm_jax.tasks import shapes
from storm_jax.text.sample import Sample


def load(root: pathlib.Path, split: str) -> list[Question]:
    settings = shapes.read_settings(root)
    source = open_source(SourceConfig(name="shapes", path=str(root / f"{split}.json")))
    questions = []
    for index in range(len(source)):
        sample = source.sample(index)
        family = sample.extra["family"]
        (medium,) = sample.media
        questions.append(
            Question(
                id=sample.id,
                video=medium.name,
                media=medium,
                text=sample.prompt().turns[-1].text,
                options=tuple(sample.extra.get("options", ())),
                answer=sample.answer(),
                groups={"family": family},
                guess=shapes.FAMILIES[family].chance,
                extra={"settings": settings},
            )
        )
    return questions


def as_trained(question: Question) -> Sample:
    return question.sample(question.text)


def ceiling(question: Question, compression: CompressionConfig) -> float | None:
    """The ceiling of the question's family; None on real footage, where what moves can tell the order of frames."""
    settings = question.extra["settings"]
    if settings.footage is not None:
        return None
    return shapes.ceiling(question.groups["family"], settings, compression)


BENCHMARK = Benchmark(
    name="shapes",
    title="the built-in task",
    source="render it with python -m storm_jax.tasks.shapes",
    splits={
        name: Split(rows=0, groups={"family": dict.fromkeys(shapes.FAMILIES, 0)}, max_new_tokens=64)
        for name in ("test", "val")
    },
    load=load,
    prompts={"trained": as_trained},
    parsers={"exact": parsing.exact},
    ceiling=ceiling,
)
