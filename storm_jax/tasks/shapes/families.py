"""The families of questions: their answers, wordings, events and drawing functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from storm_jax.tasks.shapes import drawing, events
from storm_jax.tasks.shapes.events import COLOURS, DIRECTIONS, OUTLINES, PLACES, Event
from storm_jax.tasks.shapes.settings import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of question.

    Attributes:
      answers: all possible answers, equally likely.
      questions: wordings for each question index.
      events: returns all events; those with the same answer are equally likely.
      draw: draws an event into background frames uint8 [F, S, S, 3], in place.
      multiple_choice: whether the options are listed and the answer is a letter.
      is_image: whether the sample is an image.
    """

    answers: tuple[str, ...]
    questions: tuple[tuple[str, ...], ...]
    events: Callable[[Settings], list[Event]]
    draw: Callable[[np.ndarray, Event, np.random.Generator], None]
    multiple_choice: bool = False
    is_image: bool = False

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / len(self.answers)


_COLOUR_NAMES = tuple(COLOURS)
FAMILIES: dict[str, Family] = {
    "order": Family(
        answers=_COLOUR_NAMES,
        questions=(
            ("Which flash came first?", "Two flashes follow each other. Which came first?"),
        ),
        events=events.order_events,
        draw=drawing.draw_flashes,
    ),
    "apart": Family(
        answers=_COLOUR_NAMES,
        questions=(("Which of the two flashes came first?", "Which flash was the earlier one?"),),
        events=events.apart_events,
        draw=drawing.draw_flashes,
    ),
    "motion": Family(
        answers=tuple(DIRECTIONS),
        questions=(("Which way did the shape move?", "In which direction did the shape move?"),),
        events=events.motion_events,
        draw=drawing.draw_motion,
    ),
    "needle": Family(
        answers=_COLOUR_NAMES,
        questions=(("What colour was the flash?", "One frame flashes. In what colour?"),),
        events=events.needle_events,
        draw=drawing.draw_flashes,
    ),
    "count": Family(
        answers=tuple("1234"),
        questions=(("How many flashes are there?", "How often did it flash?"),),
        events=events.count_events,
        draw=drawing.draw_flashes,
        multiple_choice=True,
    ),
    "recall": Family(
        answers=_COLOUR_NAMES,
        questions=(
            ("What colour was the shape at the start?", "How did the clip begin: what colour?"),
            ("What colour was the shape at the end?", "How did the clip end: what colour?"),
        ),
        events=events.recall_events,
        draw=drawing.draw_recall,
        multiple_choice=True,
    ),
    "colour": Family(
        answers=_COLOUR_NAMES,
        questions=(("What colour is the shape?", "Which colour do you see?"),),
        events=events.still(_COLOUR_NAMES),
        draw=drawing.draw_colour,
        is_image=True,
    ),
    "shape": Family(
        answers=OUTLINES,
        questions=(("What shape is it?", "Which shape do you see?"),),
        events=events.still(OUTLINES),
        draw=drawing.draw_shape,
        is_image=True,
    ),
    "place": Family(
        answers=tuple(PLACES),
        questions=(("Where is the shape?", "In which corner is the shape?"),),
        events=events.still(tuple(PLACES)),
        draw=drawing.draw_place,
        is_image=True,
    ),
}
