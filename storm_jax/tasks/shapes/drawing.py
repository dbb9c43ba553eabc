"""Draws events into frames."""

from __future__ import annotations

import numpy as np

from storm_jax.tasks.shapes.events import COLOURS, OUTLINES, PLACES, Event
from storm_jax.tasks.shapes.settings import Settings


def draw_flashes(frames: np.ndarray, event: Event, rng: np.random.Generator) -> None:
    _paint_distractor(frames, rng)
    colour = rng.choice(list(COLOURS))
    for frame, label in zip(frames, event.labels, strict=True):
        if label is not None:
            rgb = COLOURS[colour if label == "flash" else label]
            centre = rng.uniform(0.4, 0.6, 2)
            _paint(frame, "circle", centre, 0.42, rgb)


def draw_motion(frames: np.ndarray, event: Event, rng: np.random.Generator) -> None:
    outline, rgb = rng.choice(OUTLINES), COLOURS[rng.choice(list(COLOURS))]
    across = rng.uniform(0.3, 0.7)
    steps = sum(label is not None for label in event.labels) - 1
    for frame, label in zip(frames, event.labels, strict=True):
        if label is not None:
            axis, i = label
            along = 0.25 + 0.5 * i / max(1, steps)
            centre = (along, across) if axis == "horizontal" else (across, along)
            _paint(frame, outline, np.array(centre), 0.2, rgb)


def draw_recall(frames: np.ndarray, event: Event, rng: np.random.Generator) -> None:
    outline = rng.choice(OUTLINES)
    path = np.linspace(rng.uniform(0.3, 0.7, 2), rng.uniform(0.3, 0.7, 2), len(frames))
    for frame, label, centre in zip(frames, event.labels, path, strict=True):
        if label is not None:
            _paint(frame, outline, centre, 0.25, COLOURS[label])


def draw_colour(frames: np.ndarray, event: Event, rng: np.random.Generator) -> None:
    _paint(frames[0], rng.choice(OUTLINES), rng.uniform(0.3, 0.7, 2), 0.28, COLOURS[event.answer])


def draw_shape(frames: np.ndarray, event: Event, rng: np.random.Generator) -> None:
    rgb = COLOURS[rng.choice(list(COLOURS))]
    _paint(frames[0], event.answer, rng.uniform(0.42, 0.58, 2), 0.36, rgb)


def draw_place(frames: np.ndarray, event: Event, rng: np.random.Generator) -> None:
    centre = 0.5 + 0.24 * np.array(PLACES[event.answer]) + rng.uniform(-0.04, 0.04, 2)
    rgb = COLOURS[rng.choice(list(COLOURS))]
    _paint(frames[0], rng.choice(OUTLINES), centre, 0.2, rgb)


def _paint_distractor(frames: np.ndarray, rng: np.random.Generator) -> None:
    """Draws a grey shape at a random place in each frame: smooth motion would reveal the order of frames."""
    outline, grey = rng.choice(OUTLINES), int(rng.integers(170, 215))
    for frame in frames:
        _paint(frame, outline, rng.uniform(0.1, 0.9, 2), 0.13, (grey,) * 3)


def _paint(
    frame: np.ndarray, outline: str, centre: np.ndarray, radius: float, rgb: tuple[int, ...]
) -> None:
    """Draws a filled shape; centre (x, y) and radius are fractions of the frame's side."""
    size = len(frame)
    y, x = (np.mgrid[:size, :size] + 0.5) / size - np.asarray(centre)[::-1, None, None]
    x, y = x / radius, y / radius
    inside = {
        "circle": x**2 + y**2 <= 1,
        "square": np.maximum(abs(x), abs(y)) <= 0.85,
        "triangle": (y <= 0.8) & (y >= 2 * abs(x) - 1),
        "cross": (np.maximum(abs(x), abs(y)) <= 1) & (np.minimum(abs(x), abs(y)) <= 0.3),
    }[outline]
    frame[inside] = rgb


def background(settings: Settings, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a dim constant texture with independent noise per frame, uint8 [F, S, S, 3]."""
    size = settings.size
    cells = -(-size // 4)
    texture = rng.integers(40, 100, (cells, cells, 1)).repeat(4, 0).repeat(4, 1)[:size, :size]
    texture = texture + rng.integers(-12, 13, 3)
    noise = rng.normal(0, settings.noise / 2, (frames, size, size, 1))
    return (texture[None] + noise).clip(0, 255).astype(np.uint8)
