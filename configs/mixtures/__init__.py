"""The public sets that the paper trains on, by stage: where each is expected, its size, where to get it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from storm_jax.config import SourceConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicSet:
    """One public set, once it is in a form that docs/data.md describes.

    Attributes:
      name: unique in its mixture.
      path: file or folder under the root.
      url: where to get it.
      samples: how many its authors state; None = not stated, or not for this part of it.
      note: what must be known of it.
      media_root: folder under the root that media names are relative to; "" = that of `path`.
    """

    name: str
    path: str
    url: str
    samples: int | None = None
    note: str = ""
    media_root: str = ""


def sources(sets: Sequence[PublicSet], root: str = "data") -> tuple[SourceConfig, ...]:
    """Returns the sets as sources of `data.train`, all under the folder `root`."""
    return tuple(
        SourceConfig(
            name=each.name,
            path=f"{root}/{each.path}",
            media_root=f"{root}/{each.media_root}" if each.media_root else "",
        )
        for each in sets
    )
