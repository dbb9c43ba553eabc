"""The public data sets of the paper, by stage: expected path, size and where to download each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from storm_jax.config import SourceConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicSet:
    """One public data set, in a format described in docs/data.md.

    Attributes:
      name: name of the source, unique in its mixture.
      path: file or folder, relative to the root.
      url: download page.
      samples: number of samples stated by the authors; None if not stated for this part.
      note: how to prepare the data set, and other remarks.
      media_root: folder, relative to the root, that media names are relative to; defaults to that of
        `path`.
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
