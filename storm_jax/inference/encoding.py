"""Reads media ahead in worker processes and encodes them, a batch of scenes at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np

from storm_jax.compression import ClipPlan, VisualShape
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.rows import UsedSlots, empty_frames, place_clips
from storm_jax.inference.programs import Programs
from storm_jax.inference.scenes import Scene, batch_scenes, scenes_per_call
from storm_jax.media.frames import Clip
from storm_jax.media.media import Media, MediaError
from storm_jax.media.reader import MediaReader

# Limit for frames decoded ahead.
_BYTES_AHEAD = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedScene:
    """Media that were read and encoded, or the error that prevented it.

    Attributes:
      times: per medium, when its frames are shown, float64 [T] in seconds.
      previews: per medium, some of its frames, evenly spaced, for display.
      visual_tokens: number of visual tokens in a prompt about the scene.
      entries: per medium, the positions of its tokens in the scene's visual table.
      plans: per medium, the groups of its frames; None if they follow from the number of frames.
      error: None if the media could be read; otherwise times, previews and entries are empty.
    """

    media: tuple[Media, ...]
    times: tuple[np.ndarray, ...] = ()
    previews: tuple[Clip, ...] = ()
    visual_tokens: int = 0
    entries: tuple[np.ndarray, ...] = ()
    plans: tuple[ClipPlan, ...] | None = None
    error: MediaError | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """Scenes whose visual tokens are on the devices.

    Attributes:
      number: counts batches from 0.
      rows: how many prompts are answered together.
      table: visual tables [N, V, D]; number n belongs to scene n. N is the same in all batches, so that programs fit
        all of them.
      encoder: turns samples about the scenes into tokens.
      seconds: model time of encoding.
    """

    number: int
    scenes: tuple[EncodedScene, ...]
    rows: int
    table: jax.Array
    encoder: SampleEncoder
    seconds: float


class SceneEncoder:
    """Encodes scenes batch by batch, while the media of later batches are being decoded."""

    def __init__(self, programs: Programs, encoder: SampleEncoder, image_size: int):
        self._programs, self._encoder, self._image_size = programs, encoder, image_size

    def batches(
        self, scenes: Sequence[Scene], reader: MediaReader, rows: int, preview_frames: int
    ) -> Iterator[EncodedBatch]:
        """Encodes all scenes, at most `rows` in a batch.

        Args:
          preview_frames: kept per medium in `EncodedScene.previews`.
        """
        planned = batch_scenes(scenes, rows)
        clips = self._read_ahead([scene for batch in planned for scene in batch], reader, rows)
        for number, batch in enumerate(planned):
            per_call = scenes_per_call(batch[0].shape, rows, self._programs.mesh.size)
            encoded: list[EncodedScene] = []
            tables: list[jax.Array] = []
            seconds = 0.0
            for start in range(0, len(batch), per_call):
                part = batch[start : start + per_call]
                placed, table, took = self.encode(
                    [(scene, next(clips)) for scene in part], per_call, preview_frames
                )
                encoded += placed
                tables.append(table)
                seconds += took
            tables += tables[:1] * (-(-rows // per_call) - len(tables))
            yield EncodedBatch(
                number=number,
                scenes=tuple(encoded),
                rows=rows,
                table=self._programs.join(tables),
                encoder=self._encoder,
                seconds=seconds,
            )

    def encode(
        self,
        scenes: Sequence[tuple[Scene, list[Clip] | MediaError]],
        slots: int = 1,
        preview_frames: int = 0,
    ) -> tuple[list[EncodedScene], jax.Array, float]:
        """Encodes scenes of one shape with their clips; returns them, their tables [C, V, D] and the model time.

        Args:
          slots: C.
        """
        shape = scenes[0][0].shape
        visual = VisualShape(shape.groups, (self._encoder.compression.spatial_pool,))
        arrays = empty_frames(slots, shape.frames, self._image_size)
        placed = []
        for slot, (scene, clips) in enumerate(scenes):
            row = {name: array[slot] for name, array in arrays.items()}
            placed.append(self._place(scene, clips, row, visual, preview_frames))
        table, seconds = self._programs.encode(arrays, visual)
        return placed, table, seconds

    def _place(
        self,
        scene: Scene,
        clips: list[Clip] | MediaError,
        row: dict[str, np.ndarray],
        visual: VisualShape,
        preview_frames: int,
    ) -> EncodedScene:
        """Copies the frames of a scene into a row of the arrays that are encoded."""
        if isinstance(clips, MediaError):
            return EncodedScene(media=scene.media, error=clips)
        entries = place_clips(
            row,
            [clip.frames for clip in clips],
            visual,
            self._encoder.grid,
            self._encoder.compression,
            UsedSlots(),
        )
        return EncodedScene(
            media=scene.media,
            times=tuple(clip.times for clip in clips),
            previews=tuple(_thin_out(clip, preview_frames) for clip in clips),
            visual_tokens=scene.visual_tokens,
            entries=tuple(entries),
        )

    def _read_ahead(
        self, scenes: Sequence[Scene], reader: MediaReader, rows: int
    ) -> Iterator[list[Clip] | MediaError]:
        """The clips of each scene, or the error of the first medium that cannot be read."""
        if not scenes:
            return iter(())

        def read(scene: Scene) -> list[Clip] | MediaError:
            try:
                return reader.read_all(scene.media, scene.counts)
            except MediaError as error:
                return error

        largest = max(sum(scene.counts) for scene in scenes) * self._image_size**2 * 3
        ahead = min(2 * rows, _BYTES_AHEAD // max(1, largest))
        options = reader.read_options(ahead)
        return iter(grain.MapDataset.source(scenes).map(read).to_iter_dataset(options))


def _thin_out(clip: Clip, count: int) -> Clip:
    """At most `count` evenly spaced frames of a clip, copied, so that the clip can be freed."""
    picks = np.linspace(0, len(clip.frames) - 1, min(count, len(clip.frames))).round().astype(int)
    return Clip(clip.frames[picks], clip.times[picks])
