"""The built-in task: questions about short events, some of which pooling without memory cannot answer."""

from storm_jax.tasks.shapes.ceilings import ceiling
from storm_jax.tasks.shapes.dataset import read_settings, write
from storm_jax.tasks.shapes.events import COLOURS, DIRECTIONS, OUTLINES, PLACES, Event
from storm_jax.tasks.shapes.families import FAMILIES, Family
from storm_jax.tasks.shapes.rendering import LETTERS, SPLITS, Rendered, event_of, events_of, render
from storm_jax.tasks.shapes.settings import Settings

__all__ = [
    "COLOURS",
    "DIRECTIONS",
    "FAMILIES",
    "LETTERS",
    "OUTLINES",
    "PLACES",
    "SPLITS",
    "Event",
    "Family",
    "Rendered",
    "Settings",
    "ceiling",
    "event_of",
    "events_of",
    "read_settings",
    "render",
    "write",
]
