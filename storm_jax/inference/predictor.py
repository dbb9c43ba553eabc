"""A trained run that answers questions about files.

    storm = storm_jax.load("runs/sft")
    storm.answer("clip.mp4", "Which flash came first?")

Media are decoded ahead by processes and encoded once for all questions about them; prompts of similar
length are answered together.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import pathlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from storm_jax.config import CompressionConfig, MeshConfig
from storm_jax.data.encoder import SampleEncoder
from storm_jax.data.rows import Taken, empty_frames, place_clips
from storm_jax.inference.generate import Sampling, generate, score_first
from storm_jax.inference.scenes import (
    Scene,
    SceneShape,
    Wave,
    group_scenes,
    plan_waves,
    prompt_slots,
)
from storm_jax.media.frames import Clip
from storm_jax.media.image import IMAGE_SUFFIXES
from storm_jax.media.media import Media, MediaError
from storm_jax.media.reader import MediaReader
from storm_jax.media.workers import WorkerPool
from storm_jax.models.storm import VisualShape
from storm_jax.params import abstract_model, compute_dtypes, flat_params, with_sharding
from storm_jax.run import Run
from storm_jax.sharding import batch_sharding, constrain, make_mesh, param_shardings
from storm_jax.text.conversation import ConversationEncoder, Encoded
from storm_jax.text.sample import PLACEHOLDER, Sample, SampleError, Turn
from storm_jax.text.tokenizer import stop_ids

# Scenes of fewer frames are encoded together, up to so many frames a device.
_FRAMES_AT_ONCE = 64
# Visual tokens that a device holds in a batch, at most in so many rows, unless it is told otherwise.
_TOKENS_AT_ONCE = 2**17
_LARGEST_BATCH = 32
# Of frames that are decoded ahead.
_BYTES_AHEAD = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """An answer, or the reason why there is none.

    Attributes:
      text: the answer, empty when it failed.
      error, cause: what was wrong with the sample, and the word that is counted under; empty when it
        was answered.
      visual_tokens: how many the decoder read.
      seconds: of the model's time; what is done for several samples at once is shared among them, and
        neither compiling nor waiting for media counts.
      clips: per medium, the frames that the model saw, uint8 [T, H, W, 3], where they were asked for.
      times: per medium, when they are shown, float64 [T] in seconds.
    """

    text: str = ""
    error: str = ""
    cause: str = ""
    visual_tokens: int = 0
    seconds: float = 0.0
    clips: tuple[np.ndarray, ...] = ()
    times: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prompt:
    """A tokenised question about the scene in slot `slot` of its wave; `index` is its sample's, and
    `entries` are its media's in the scene's visual table."""

    index: int
    slot: int
    encoded: Encoded
    entries: Sequence[np.ndarray]
    prediction: Prediction


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What one call of `predict` asks for; see there."""

    encoder: SampleEncoder
    ask: Callable[[int, Sequence[np.ndarray]], Sample]
    with_clips: Collection[int]
    batch_size: int


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
            compute_dtypes(flat_params(abstract), self.config.model),
            param_shardings(abstract, self.mesh),
        )
        self.step = run.checkpoints.resolve(step)
        self._params = unflatten_dict(run.checkpoints.restore(target, self.step), sep="/")
        self._programs: dict[tuple, Callable] = {}

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
        sample = Sample(id=path.name, turns=(turn,), media=(Media.file(kind, path),), extra={})
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
        batch_size: int | None = None,
        choices: Sequence[Sequence[str]] | None = None,
        ask: Callable[[int, Sequence[np.ndarray]], Sample] | None = None,
        with_clips: Collection[int] = (),
    ) -> Iterator[tuple[int, Prediction]]:
        """Answers samples that end with a question, and yields (index, prediction) as they come.

        A sample that cannot be used gives a prediction with its error; the others are not touched.

        Args:
          batch_size: how many are answered together, and how many media are encoded before; rounded up
            to a multiple of the devices. By default 32, or fewer where media have so many tokens that
            they would not fit beside a 7B model.
          choices: per sample, texts of one token each: the answer is the one that is likeliest to come
            first, and nothing is generated.
          ask: `(index, times of the frames of its media) ->` the sample as it is asked, for questions
            that depend on which frames are seen; its media must be the same.
          with_clips: indices of samples whose prediction holds the frames.

        Raises:
          ValueError: when one of `choices` is no single token.
        """
        encoder = SampleEncoder(
            text=self._text,
            side=self.config.model.side,
            compression=compression or self.compression,
            frames=self.config.data.frames,
        )
        letters = self._single_tokens(choices)
        scenes = group_scenes(samples, encoder)
        largest = max((scene.visual_tokens for scene in scenes), default=0)
        self._warn_of_length(largest)
        batch_size = self._batch_size(batch_size, largest)
        ask = ask or (lambda index, times: samples[index])
        call = _Call(encoder=encoder, ask=ask, with_clips=with_clips, batch_size=batch_size)
        waves = plan_waves(scenes, batch_size)
        clips = self._read_ahead([scene for wave in waves for scene in wave.scenes], batch_size)
        for number, wave in enumerate(waves):
            watch = _Stopwatch()
            prompts, failed, chunks = self._see(wave, clips, call, watch)
            yield from failed
            encoding = watch.seconds / max(1, len(prompts))
            for start in range(0, len(prompts), batch_size):
                batch, watch = prompts[start : start + batch_size], _Stopwatch()
                arrays = self._prompt_arrays(batch, batch_size)
                if choices is not None:
                    scores = self._score(arrays, chunks, tuple(letters.values()), watch)
                    texts = [
                        _likeliest(choices[prompt.index], dict(zip(letters, row, strict=True)))
                        for prompt, row in zip(batch, scores, strict=False)
                    ]
                else:
                    key = jax.random.fold_in(jax.random.key(seed), number)
                    key = jax.random.fold_in(key, start)
                    ids = self._generate(arrays, chunks, key, sampling or Sampling(), watch)
                    texts = [self._decode(row) for row in ids[: len(batch)]]
                seconds = encoding + watch.seconds / len(batch)
                for prompt, text in zip(batch, texts, strict=True):
                    answered = dataclasses.replace(prompt.prediction, text=text, seconds=seconds)
                    yield prompt.index, answered

    def _warn_of_length(self, visual_tokens: int) -> None:
        trained = self.config.model.decoder.max_positions
        if visual_tokens > trained:
            logging.warning(
                "%d visual tokens are more than the decoder's positions were trained for "
                "(model.decoder.max_positions=%d): take fewer frames, or pool or sample more",
                visual_tokens,
                trained,
            )

    def _batch_size(self, asked: int | None, largest: int) -> int:
        """Rows of a batch, a multiple of the devices, where media have at most `largest` visual tokens."""
        if asked is None:
            fitting = max(1, _TOKENS_AT_ONCE // max(1, largest)) * self.mesh.size
            asked = min(_LARGEST_BATCH, fitting)
        return -(-asked // self.mesh.size) * self.mesh.size

    def _single_tokens(self, choices: Sequence[Sequence[str]] | None) -> dict[str, int]:
        """The token of each text that occurs in `choices`."""
        tokens = {}
        for text in sorted({text for texts in choices or () for text in texts}):
            ids = self._text.tokenizer.encode(text, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(
                    f"the choice {text!r} is {len(ids)} tokens, and only single tokens can be scored: "
                    f"generate the answers instead"
                )
            tokens[text] = ids[0]
        return tokens

    def _read_ahead(
        self, scenes: Sequence[Scene], batch_size: int
    ) -> Iterator[list[Clip] | MediaError]:
        """The clips of each scene, or why one of them cannot be read."""
        if not scenes:
            return iter(())
        size = self.config.model.vision.image_size
        reader = MediaReader(self._pool, size, self.config.data.frames)

        def read(scene: Scene) -> list[Clip] | MediaError:
            try:
                return reader.read_all(scene.media, scene.counts)
            except MediaError as error:
                return error

        largest = max(sum(scene.counts) for scene in scenes) * size * size * 3
        ahead = min(2 * batch_size, _BYTES_AHEAD // max(1, largest))
        options = reader.read_options(ahead)
        return iter(grain.MapDataset.source(scenes).map(read).to_iter_dataset(options))

    def _see(
        self,
        wave: Wave,
        clips: Iterator[list[Clip] | MediaError],
        call: _Call,
        watch: _Stopwatch,
    ) -> tuple[list[_Prompt], list[tuple[int, Prediction]], list[jax.Array]]:
        """Encodes the scenes of a wave.

        Returns:
          The questions about them, the shortest first; those that failed; and the visual tables of the
          scenes in chunks [C, V, D], of which every wave has as many, so that programs fit.
        """
        prompts: list[_Prompt] = []
        failed: list[tuple[int, Prediction]] = []
        chunks: list[jax.Array] = []
        encoder, at_once = call.encoder, self._scenes_at_once(wave.shape, call.batch_size)
        for start in range(0, len(wave.scenes), at_once):
            rows = empty_frames(at_once, wave.shape.frames, self.config.model.vision.image_size)
            for slot, scene in enumerate(wave.scenes[start : start + at_once]):
                seen = next(clips)
                if isinstance(seen, MediaError):
                    reason = Prediction(error=str(seen), cause=seen.cause)
                    failed += [(index, reason) for index in scene.members]
                    continue
                entries = place_clips(
                    {name: array[slot] for name, array in rows.items()},
                    [clip.frames for clip in seen],
                    wave.shape.groups,
                    encoder.side,
                    encoder.compression,
                    Taken(),
                )
                times = tuple(clip.times for clip in seen)
                for index in scene.members:
                    frames = tuple(c.frames for c in seen) if index in call.with_clips else ()
                    prediction = Prediction(
                        visual_tokens=scene.visual_tokens, clips=frames, times=times
                    )
                    try:
                        encoded = encoder.encode(call.ask(index, times), times)
                        prompts.append(
                            _Prompt(
                                index=index,
                                slot=start + slot,
                                encoded=encoded,
                                entries=entries,
                                prediction=prediction,
                            )
                        )
                    except SampleError as error:
                        failed.append((index, Prediction(error=str(error), cause=error.cause)))
            chunks.append(self._encode(rows, wave.shape, encoder.compression, watch))
        chunks += chunks[:1] * (-(-call.batch_size // at_once) - len(chunks))
        return sorted(prompts, key=lambda prompt: len(prompt.encoded)), failed, chunks

    def _scenes_at_once(self, shape: SceneShape, batch_size: int) -> int:
        """How many scenes are encoded together, by all devices."""
        return min(batch_size, self.mesh.size * max(1, _FRAMES_AT_ONCE // shape.frames))

    def _encode(
        self,
        rows: Mapping[str, np.ndarray],
        shape: SceneShape,
        compression: CompressionConfig,
        watch: _Stopwatch,
    ) -> jax.Array:
        """Visual tables [C, V, D] of C scenes."""
        visual = VisualShape(shape.groups, compression.spatial_pool)

        def encode(params: dict, rows: dict[str, jax.Array]) -> jax.Array:
            model = nnx.merge(self._graphdef, params)
            table = model.encode(rows["frames"], rows["frame_clip"], rows["frame_group"], visual)
            return constrain(table, "batch", None, None)

        return self._run(encode, (visual,), (self._put(rows),), watch)

    def _prompt_arrays(self, prompts: Sequence[_Prompt], batch_size: int) -> dict[str, np.ndarray]:
        """Prompts as rows, which empty ones fill up to `batch_size`: int [B, S], [B, S], [B], [B]."""
        slots = (batch_size, prompt_slots(max(len(prompt.encoded) for prompt in prompts)))
        tokens = np.full(slots, self._text.tokenizer.pad_token_id, np.int32)
        index = np.full(slots, -1, np.int32)
        lengths, scenes = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32)
        for row, prompt in enumerate(prompts):
            lengths[row], scenes[row] = len(prompt.encoded), prompt.slot
            tokens[row, : lengths[row]] = prompt.encoded.tokens
            for medium, entries in enumerate(prompt.entries):
                index[row, : lengths[row]][prompt.encoded.media == medium] = entries
        return {"tokens": tokens, "visual_index": index, "lengths": lengths, "scenes": scenes}

    def _generate(
        self,
        arrays: Mapping[str, np.ndarray],
        chunks: Sequence[jax.Array],
        key: jax.Array,
        sampling: Sampling,
        watch: _Stopwatch,
    ) -> np.ndarray:
        """Generated ids [B, max_new_tokens]."""

        def run(params: dict, batch: dict, chunks: list, key: jax.Array) -> jax.Array:
            model = nnx.merge(self._graphdef, params)
            visual = _tables(batch, chunks)
            return generate(model, batch, visual, key, sampling=sampling, stop_ids=self._stop_ids)

        inputs = (self._put(arrays), list(chunks), key)
        return np.asarray(self._run(run, (sampling,), inputs, watch))

    def _score(
        self,
        arrays: Mapping[str, np.ndarray],
        chunks: Sequence[jax.Array],
        candidates: tuple[int, ...],
        watch: _Stopwatch,
    ) -> np.ndarray:
        """Log-probabilities of the candidates as first tokens, [B, len(candidates)]."""

        def run(params: dict, batch: dict, chunks: list) -> jax.Array:
            model = nnx.merge(self._graphdef, params)
            return score_first(model, batch, _tables(batch, chunks), candidates)

        inputs = (self._put(arrays), list(chunks))
        return np.asarray(self._run(run, (candidates,), inputs, watch))

    def _put(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return {
            name: jax.device_put(array, batch_sharding(self.mesh, array))
            for name, array in arrays.items()
        }

    def _run(
        self, function: Callable, static: tuple, inputs: tuple, watch: _Stopwatch
    ) -> jax.Array:
        """`function(params, *inputs)`, compiled before its time is taken; `static` is what else the
        program depends on."""
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(inputs))
        key = (function.__qualname__, static, shapes)
        with jax.set_mesh(self.mesh):
            if key not in self._programs:
                lowered = jax.jit(function).lower(self._params, *inputs)
                self._programs[key] = lowered.compile()
            with watch:
                return jax.block_until_ready(self._programs[key](self._params, *inputs))

    def _decode(self, ids: np.ndarray) -> str:
        answer = itertools.takewhile(lambda token: token not in self._stop_ids, ids.tolist())
        text = self._text.tokenizer.decode(list(answer), skip_special_tokens=True)
        return str(text).strip()


def _likeliest(texts: Sequence[str], scores: Mapping[str, float]) -> str:
    return max(texts, key=scores.__getitem__)


class _Stopwatch:
    """Adds up the time spent inside `with`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


def _tables(batch: dict[str, jax.Array], chunks: Sequence[jax.Array]) -> jax.Array:
    """The visual table of each prompt's scene, [B, V, D]."""
    visual = jnp.concatenate(list(chunks))[batch["scenes"]]
    return constrain(visual, "batch", None, None)
