"""A trained run that answers questions about files.

    storm = storm_jax.load("runs/sft")
    storm.answer("clip.mp4", "Which flash came first?")

Samples that need the same shapes are answered together; files are decoded ahead by processes.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import grain
import jax
import numpy as np
from flax import nnx

from storm_jax.config import CompressionConfig, MeshConfig
from storm_jax.data.conversation import ConversationEncoder, stop_ids
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.image import IMAGE_SUFFIXES
from storm_jax.data.reader import MediaReader
from storm_jax.data.rows import RowSample, RowShape, empty_rows, fill_row
from storm_jax.data.sample import PLACEHOLDER, Media, MediaError, Sample, SampleError, Turn
from storm_jax.data.workers import WorkerPool
from storm_jax.inference.generate import Sampling, generate
from storm_jax.models.storm import VisualShape
from storm_jax.params import abstract_model, compute_dtypes, with_sharding
from storm_jax.run import Run
from storm_jax.sharding import batch_sharding, make_mesh, param_shardings

_SMALLEST_PROMPT = 32


@dataclasses.dataclass(frozen=True)
class Prediction:
    """An answer, or the reason why there is none.

    Attributes:
      text: the answer, empty when it failed.
      error: what was wrong with the sample, empty when it was answered.
      clips: per medium, the frames that the model saw, uint8 [T, H, W, 3].
      times: per medium, when they are shown, float64 [T] in seconds.
    """

    text: str = ""
    error: str = ""
    clips: tuple[np.ndarray, ...] = ()
    times: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A sample whose media were read."""

    index: int
    row: RowSample
    times: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class _Failed:
    """A sample whose media could not be read."""

    index: int
    error: str


class Predictor:
    """The parameters and tokenizer of one checkpoint, spread over all devices."""

    def __init__(self, workdir: str | pathlib.Path, step: int | None = None):
        """Loads checkpoint `step` of a run, the last one by default.

        Raises:
          ConfigError: when `workdir` is not a run.
          RunError: when it has no such checkpoint.
        """
        run = Run(workdir)
        self.config = run.config
        self._text = ConversationEncoder(run.tokenizer(), self.config.data.system)
        self._pool = WorkerPool(self.config.data.num_workers)
        self._stop_ids = stop_ids(run.tokenizer_path, self._text.tokenizer)
        self.mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
        self._graphdef, abstract = abstract_model(self.config.model)
        target = with_sharding(
            compute_dtypes(nnx.to_pure_dict(abstract), self.config.model),
            param_shardings(abstract, self.mesh),
        )
        self.step = run.checkpoint_step(step)
        self._params = run.restore_params(target, self.step)
        self._run_batch = jax.jit(self._run, static_argnames=("shape", "sampling"))

    @property
    def compression(self) -> CompressionConfig:
        """What the run was trained with; calls may use another."""
        return self.config.compression

    def answer(
        self,
        media: str | pathlib.Path,
        question: str,
        *,
        compression: CompressionConfig | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> str:
        """Answers a question about a video or an image file.

        Raises:
          ValueError: when the file cannot be read.
        """
        path = pathlib.Path(media)
        kind = "image" if path.suffix.lower() in IMAGE_SUFFIXES else "video"
        turn = Turn("user", f"<{kind}>\n{PLACEHOLDER.sub('', question)}")
        sample = Sample(path.name, (turn,), (Media.file(kind, path),), {})
        _, prediction = next(
            self.predict(
                [sample], compression=compression, sampling=sampling, seed=seed, batch_size=1
            )
        )
        if prediction.error:
            raise ValueError(prediction.error)
        return prediction.text

    def predict(
        self,
        samples: Sequence[Sample],
        *,
        compression: CompressionConfig | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        batch_size: int = 32,
    ) -> Iterator[tuple[int, Prediction]]:
        """Answers samples that end with a question, and yields (index, prediction) as they come.

        A sample that cannot be used gives a prediction with its error; the others are not touched.
        """
        compression = compression or self.compression
        sampling = sampling or Sampling()
        encoder = SampleEncoder(
            self._text, self.config.model.side, compression, self.config.data.frames
        )
        counts: dict[int, list[int]] = {}
        buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            counts[index] = encoder.frame_counts(sample)
            try:
                planned = encoder.plan(sample, counts[index])
            except SampleError as error:
                yield index, Prediction(error=str(error))
                continue
            tokens = max(_SMALLEST_PROMPT, _power_of_two(len(planned)))
            buckets[tokens, _power_of_two(sum(counts[index]))].append(index)
        for batch_number, (bucket, batch) in enumerate(
            self._decoded(samples, encoder, counts, buckets, batch_size)
        ):
            for item in batch:
                if isinstance(item, _Failed):
                    yield item.index, Prediction(error=item.error)
            readable = [item for item in batch if isinstance(item, _Prepared)]
            if readable:
                key = jax.random.fold_in(jax.random.key(seed), batch_number)
                texts = self._generate(
                    readable, self._row_shape(*bucket, compression), sampling, key, batch_size
                )
                for done, text in zip(readable, texts, strict=True):
                    clips = tuple(done.row.clips)
                    yield done.index, Prediction(text, clips=clips, times=done.times)

    def _decoded(
        self,
        samples: Sequence[Sample],
        encoder: SampleEncoder,
        counts: Mapping[int, Sequence[int]],
        buckets: Mapping[tuple[int, int], list[int]],
        batch_size: int,
    ) -> Iterator[tuple[tuple[int, int], list[_Prepared | _Failed]]]:
        """Batches of one bucket each, their media read two batches ahead."""
        size = self.config.model.vision.image_size
        reader = MediaReader(self._pool, size, self.config.data.frames)

        def prepare(index: int) -> _Prepared | _Failed:
            sample = samples[index]
            try:
                clips = reader.read_all(sample.media, counts[index])
            except MediaError as error:
                return _Failed(index, str(error))
            times = tuple(clip.times for clip in clips)
            row = RowSample(encoder.encode(sample, times), [clip.frames for clip in clips])
            return _Prepared(index, row, times)

        order = [index for _, members in sorted(buckets.items()) for index in members]
        if not order:
            return
        options = reader.read_options(2 * batch_size)
        items = iter(grain.MapDataset.source(order).map(prepare).to_iter_dataset(options))
        for bucket, members in sorted(buckets.items()):
            for start in range(0, len(members), batch_size):
                yield bucket, [next(items) for _ in members[start : start + batch_size]]

    def _generate(
        self,
        items: Sequence[_Prepared],
        shape: RowShape,
        sampling: Sampling,
        key: jax.Array,
        batch_size: int,
    ) -> list[str]:
        """The answers to the items of one batch, which empty rows fill up to `batch_size`."""
        tokenizer = self._text.tokenizer
        rows = empty_rows(batch_size, tokenizer.pad_token_id, shape)
        for number, item in enumerate(items):
            fill_row(rows, number, [item.row], shape)
        lengths = np.zeros(batch_size, np.int32)
        lengths[: len(items)] = [len(item.row.encoded) for item in items]
        arrays = {**rows, "lengths": lengths}
        arrays = {name: arrays[name] for name in _PROMPT}
        batch = {
            name: jax.device_put(array, batch_sharding(self.mesh, array))
            for name, array in arrays.items()
        }
        visual = VisualShape(shape.num_groups, shape.compression.spatial_pool)
        with jax.set_mesh(self.mesh):
            tokens = self._run_batch(self._params, batch, key, shape=visual, sampling=sampling)
        answers = [
            list(itertools.takewhile(lambda token: token not in self._stop_ids, row))
            for row in tokens.tolist()
        ]
        return [
            str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
            for answer in answers[: len(items)]
        ]

    def _run(
        self, params: dict, batch: dict, key: jax.Array, *, shape: VisualShape, sampling: Sampling
    ) -> jax.Array:
        model = nnx.merge(self._graphdef, params)
        return generate(model, batch, key, shape=shape, sampling=sampling, stop_ids=self._stop_ids)

    def _row_shape(self, tokens: int, frames: int, compression: CompressionConfig) -> RowShape:
        model = self.config.model
        return RowShape(tokens, frames, model.vision.image_size, model.side, compression)


_PROMPT = ("tokens", "visual_index", "frames", "frame_clip", "frame_group", "lengths")


def _power_of_two(n: int) -> int:
    """The smallest that is at least n and at least 1."""
    return 1 << max(0, n - 1).bit_length()
