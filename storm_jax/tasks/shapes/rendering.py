"""Renders samples in memory."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict

import numpy as np

from storm_jax.tasks.shapes.drawing import background
from storm_jax.tasks.shapes.events import Event
from storm_jax.tasks.shapes.families import FAMILIES
from storm_jax.tasks.shapes.footage import footage
from storm_jax.tasks.shapes.settings import Settings

LETTERS = "ABCD"
SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendered:
    """A rendered sample: frames uint8 [F, S, S, 3], a question and its answer.

    `options` are those of a multiple-choice question, whose answer is a letter.
    """

    family: str
    frames: np.ndarray
    question: str
    answer: str
    options: tuple[str, ...]


def render(settings: Settings, split: str, index: int) -> Rendered:
    """Renders sample `index` of a split; it does not depend on the number of samples."""
    rng = np.random.default_rng([settings.seed, SPLITS.index(split), index])
    name, event = _draw_event(settings, index, rng)
    family, answer = FAMILIES[name], event.answer
    count = 1 if family.is_image else settings.frames
    frames = (
        background(settings, count, rng)
        if settings.footage is None
        else footage(settings, split, count, rng)
    )
    family.draw(frames, event, rng)
    question = str(rng.choice(family.questions[event.question]))
    options: tuple[str, ...] = ()
    if family.multiple_choice:
        options = tuple(str(option) for option in rng.permutation(family.answers))
        listed = "\n".join(f"{letter}. {o}" for letter, o in zip(LETTERS, options, strict=True))
        question, answer = f"{question}\n{listed}", LETTERS[options.index(answer)]
    return Rendered(family=name, frames=frames, question=question, answer=answer, options=options)


def event_of(settings: Settings, split: str, index: int) -> Event:
    """What happens in sample `index` of a split."""
    rng = np.random.default_rng([settings.seed, SPLITS.index(split), index])
    return _draw_event(settings, index, rng)[1]


def events_of(settings: Settings, split: str, family: str) -> list[Event]:
    """What happens in the samples of a family, in "val" or "test"."""
    names = settings.eval_clips * settings.families  # in turns
    return [event_of(settings, split, i) for i, name in enumerate(names) if name == family]


def _draw_event(settings: Settings, index: int, rng: np.random.Generator) -> tuple[str, Event]:
    """The family of a sample, and its event."""
    turn, which = divmod(index, len(settings.families))
    name = settings.families[which]
    answers = FAMILIES[name].answers
    events = _events_by_answer(name, settings)[answers[turn % len(answers)]]  # exactly balanced
    return name, events[rng.integers(len(events))]


@functools.lru_cache
def _events_by_answer(family: str, settings: Settings) -> dict[str, list[Event]]:
    by_answer = defaultdict(list)
    for event in FAMILIES[family].events(settings):
        by_answer[event.answer].append(event)
    return dict(by_answer)
