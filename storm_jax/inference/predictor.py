"""A trained run that answers questions about images and videos.

    storm = storm_jax.load("runs/sft")
    storm.answer("clip.mp4", "Which flash came first?")

`predict` answers many samples: media are decoded ahead in worker processes and encoded once for all
questions about them, and prompts of similar length are answered together. It is `encode` followed by
`ask`; call these two if questions depend on which frames were sampled.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from storm_jax.compression import plan_groups
from storm_jax.config import CompressionConfig
from storm_jax.data.encoder import SampleEncoder
from storm_jax.inference.encoding import EncodedBatch, EncodedScene, SceneEncoder
from storm_jax.inference.engine import Engine, EngineShape, Request
from storm_jax.inference.generate import Sampling
from storm_jax.inference.prediction import Prediction
from storm_jax.inference.programs import Programs
from storm_jax.inference.scenes import default_rows, plan_scene, round_up
from storm_jax.inference.streaming.stream import Stream
from storm_jax.inference.streaming.video import RecurrentVideo, Shown, Video, WindowVideo
from storm_jax.inference.text_stream import TextStream
from storm_jax.media.image import IMAGE_SUFFIXES
from storm_jax.media.media import Media, MediaError
from storm_jax.media.reader import MediaReader
from storm_jax.media.workers import WorkerPool
from storm_jax.run import Run
from storm_jax.text.conversation import ConversationEncoder
from storm_jax.text.sample import PLACEHOLDER, Sample, SampleError, Turn
from storm_jax.text.tokenizer import stop_ids

Path = str | pathlib.Path

# Tokens that are added to answers at once: many, unless somebody reads along.
_BATCH_STEPS, _STREAM_STEPS = 32, 4


class Watched:
    """Images and videos that a model has encoded."""

    def __init__(self, predictor: Predictor, media: tuple[Media, ...], batch: EncodedBatch):
        self._predictor, self._media, self._batch = predictor, media, batch

    def answer(self, question: str, *, sampling: Sampling | None = None, seed: int = 0) -> str:
        """Answers a question about all of them.

        Raises:
          ValueError: if the question is too long.
        """
        sample = _question(question, self._media)
        [(_, prediction)] = self._predictor.ask(self._batch, [sample], sampling=sampling, seed=seed)
        if prediction.error:
            raise ValueError(prediction.error)
        return prediction.text


class Predictor:
    """The model and tokenizer of one checkpoint, sharded over all devices.

    Attributes:
      run: the run that the checkpoint belongs to.
      config: its configuration.
      step: step of the checkpoint.
      weights: "int8", or "" as trained.
      pool: processes that decode media.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        step: int | None = None,
        *,
        weights: str = "",
        is_timed: bool = False,
        num_workers: int | None = None,
    ):
        """Loads a checkpoint of a run, the last one by default.

        Args:
          weights: "int8" stores the kernels of most layers in half the memory (see `storm_jax.models.int8`).
          is_timed: run each program once more before it is first timed, so that `Prediction.seconds` is what a
            later call takes.
          num_workers: processes that decode media, by default `data.num_workers`.

        Raises:
          ConfigError: if `workdir` is not a run.
          RunError: if it has no such checkpoint.
        """
        self.run = Run(workdir)
        self.config = self.run.config
        self.step = self.run.checkpoints.resolve(step)
        self.weights = weights
        self._text = ConversationEncoder(self.run.tokenizer(), self.config.data.system)
        self._stop_ids = stop_ids(self.run.tokenizer_path, self._text.tokenizer)
        self.pool = WorkerPool(self.config.data.num_workers if num_workers is None else num_workers)
        self._programs = Programs.load(
            self.run, self.step, self._stop_ids, weights, warms_up=is_timed
        )

    @property
    def compression(self) -> CompressionConfig:
        """The compression used in training, the default of every method."""
        return self.config.compression

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self._stop_ids

    @property
    def num_programs(self) -> int:
        """Programs that were compiled so far."""
        return len(self._programs.compiled)

    def answer(
        self,
        media: Path | Sequence[Path],
        question: str,
        *,
        compression: CompressionConfig | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> str:
        """Answers a question about images and videos.

        Raises:
          ValueError: if a file cannot be read, or the question is too long.
        """
        return self.watch(media, compression=compression).answer(
            question, sampling=sampling, seed=seed
        )

    def watch(
        self,
        media: Path | Media | Sequence[Path | Media],
        *,
        compression: CompressionConfig | None = None,
    ) -> Watched:
        """Reads and encodes images and videos once, for several questions about them.

        Raises:
          ValueError: if a file cannot be read.
        """
        listed = [media] if isinstance(media, (str, pathlib.Path, Media)) else media
        files = tuple(
            each if isinstance(each, Media) else Media.file(kind_of(each), each) for each in listed
        )
        (batch,) = self.encode([files], compression=compression, batch_size=1)
        if batch.scenes[0].error:
            raise batch.scenes[0].error
        return Watched(self, files, batch)

    def predict(
        self,
        samples: Sequence[Sample],
        *,
        compression: CompressionConfig | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        choices: Sequence[Sequence[str]] | None = None,
    ) -> Iterator[tuple[int, Prediction]]:
        """Answers samples that end with a question; yields (index, prediction) as they are done.

        Arguments are those of `encode` and `ask`.
        """
        about: dict[tuple[Media, ...], list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            about[sample.media].append(index)
        for batch in self.encode(list(about), compression=compression, batch_size=batch_size):
            indices = [index for scene in batch.scenes for index in about[scene.media]]
            answered = self.ask(
                batch,
                [samples[index] for index in indices],
                sampling=sampling,
                seed=seed,
                choices=None if choices is None else [choices[index] for index in indices],
            )
            for place, prediction in answered:
                yield indices[place], prediction

    def encode(
        self,
        media: Sequence[Sequence[Media]],
        *,
        compression: CompressionConfig | None = None,
        batch_size: int | None = None,
        preview_frames: int = 0,
    ) -> Iterator[EncodedBatch]:
        """Encodes scenes; each element of `media` is the media of one conversation.

        Scenes are batched by shape, so they are not yielded in the order of `media`. Media that cannot be
        read have an error in their `EncodedScene`.

        Raises:
          ValueError: before anything is read, if there are more visual tokens than the decoder has positions.

        Args:
          batch_size: how many scenes are encoded, and prompts answered, together; rounded up to a multiple
            of the devices. Defaults to 32, or fewer if that exceeds 131,072 visual tokens per device.
          preview_frames: how many frames of each medium are returned in `EncodedScene.previews`.
        """
        encoder = self.encoder(compression)
        scenes = [plan_scene(each, encoder) for each in media]
        largest = max((scene.visual_tokens for scene in scenes), default=0)
        self._check_visual_tokens(largest)
        rows = self._batch_size(batch_size, largest)
        yield from self.scene_encoder(encoder).batches(scenes, self.reader, rows, preview_frames)

    def ask(
        self,
        batch: EncodedBatch,
        samples: Sequence[Sample],
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        choices: Sequence[Sequence[str]] | None = None,
    ) -> Iterator[tuple[int, Prediction]]:
        """Answers samples about the scenes of a batch; yields (index, prediction) as they are done.

        A sample that cannot be used has a prediction with its error; the others are not affected.

        Args:
          samples: their media are those of one of the batch's scenes.
          choices: per sample, texts of one token each. The answer is the text with the highest probability
            as first token, and nothing is generated.

        Raises:
          ValueError: if one of `choices` is not a single token.
        """
        candidates = [self._single_tokens(texts) for texts in choices or ()]
        sampling = sampling or Sampling()
        places = {scene.media: place for place, scene in enumerate(batch.scenes)}
        indices: dict[Request, int] = {}
        for index, sample in enumerate(samples):
            place = places[sample.media]
            try:
                request = self._request(
                    batch,
                    place,
                    sample,
                    sampling,
                    sample_seed(seed, index),
                    candidates[index] if choices else (),
                )
            except (MediaError, SampleError) as error:
                yield index, Prediction(error=str(error), cause=error.cause)
            else:
                indices[request] = index
        if not indices:
            return
        encoding = batch.seconds / len(indices)
        requests = sorted(indices, key=lambda request: len(request.tokens))
        longest, new = len(requests[-1].tokens), sampling.max_new_tokens
        if any(scene.plans is not None for scene in batch.scenes):  # a stream that grows
            shape = EngineShape.for_one(longest, new)
        else:
            shape = EngineShape.for_batch(batch.rows, longest, new, self._programs.mesh.size)
        for request in self.engine(shape, _BATCH_STEPS).run(requests):
            index = indices[request]
            if choices is None:
                written = self.text_stream()
                written.add(request.written)
                text = written.text
            else:
                assert request.scores is not None
                text = choices[index][int(request.scores.argmax())]
            yield (
                index,
                Prediction(
                    text=text,
                    visual_tokens=batch.scenes[request.scene].visual_tokens,
                    seconds=encoding + request.seconds,
                ),
            )

    def stream(
        self,
        *,
        compression: CompressionConfig | None = None,
        fps: float = 1.0,
        budget_tokens: int = 8192,
        policy: str = "window",
        recent: int = 16,
    ) -> Stream:
        """A video that is asked about while it arrives (see `storm_jax.inference.streaming.stream`).

        With `mamba.direction="forward"`, each frame is encoded once, and memory does not grow with the video. Other
        models encode the newest frames that fit into the budget again before a question.

        Args:
          compression: pooling and sampling; its `num_frames` is not used.
          fps: frames per second to use; 0 uses all that are pushed.
          budget_tokens: visual tokens of a prompt at most.
          policy: what makes room when they are used up: "window" keeps the newest groups, "stride" drops every
            second old one, "merge" averages neighbours of the old ones.
          recent: how many of the newest groups stride and merge leave alone.

        Raises:
          ValueError: a policy that the model does not support, or a budget that is too small or too large.
        """
        encoder, model = self.encoder(compression), self.config.model
        grid, factors = encoder.grid, encoder.compression
        self._check_visual_tokens(budget_tokens)
        capacity = budget_tokens // plan_groups(np.zeros(1, np.int32), grid, factors).num_tokens
        is_recurrent = model.mixer in ("mamba1", "mamba2") and model.mamba.direction == "forward"
        if not is_recurrent and policy != "window":
            raise ValueError(
                f"policy={policy!r} needs a model with mamba.direction='forward'; this one encodes a window of frames "
                f"again: use policy='window'"
            )

        def make_video() -> Video:
            if is_recurrent:
                return RecurrentVideo(self._programs, grid, factors, capacity, policy, recent)
            return WindowVideo(self._programs, grid, factors, capacity, model.vision.image_size)

        def make_batch(shown: Shown) -> EncodedBatch:
            scene = EncodedScene(
                media=(Media(kind="video", name="stream"),),
                times=(shown.times,),
                visual_tokens=shown.plan.num_tokens,
                entries=(shown.entries,),
                plans=(shown.plan,),
            )
            return EncodedBatch(
                number=0,
                scenes=(scene,),
                rows=1,
                table=shown.table,
                encoder=encoder,
                seconds=shown.seconds,
            )

        settings = {
            "run": str(self.run.path),
            "step": self.step,
            "weights": self.weights,
            "compression": dataclasses.replace(factors, num_frames=1),
            "budget_tokens": budget_tokens,
            "policy": policy,
            "recent": recent,
        }
        size = model.vision.image_size
        return Stream(make_video, make_batch, self._request_about, self._write, size, fps, settings)

    def _request_about(
        self, batch: EncodedBatch, question: str, sampling: Sampling, seed: int
    ) -> Request:
        """The prompt of a question about the first scene of a batch."""
        sample = _question(question, batch.scenes[0].media)
        return self._request(batch, 0, sample, sampling, sample_seed(seed, 0))

    def _request(
        self,
        batch: EncodedBatch,
        place: int,
        sample: Sample,
        sampling: Sampling,
        seed: int,
        candidates: Sequence[int] = (),
    ) -> Request:
        """The prompt of a sample about one of the batch's scenes.

        Raises:
          MediaError: the scene could not be read.
          SampleError: the prompt is too long.
        """
        scene = batch.scenes[place]
        if scene.error:
            raise scene.error
        encoded = batch.encoder.encode(sample, scene.times, scene.plans)
        self._check_length(sample, len(encoded), 0 if candidates else sampling.max_new_tokens)
        return Request(
            tokens=encoded.tokens,
            visual_index=encoded.visual_index(scene.entries),
            table=batch.table,
            scene=place,
            sampling=sampling,
            seed=seed,
            candidates=candidates,
        )

    def _write(self, request: Request) -> Iterator[str]:
        """The text of one answer, in pieces; together, what `predict` returns."""
        shape = EngineShape.for_one(len(request.tokens), request.sampling.max_new_tokens)
        text = self.text_stream()
        for chunk in self.engine(shape, _STREAM_STEPS).stream(request):
            if more := text.add(chunk):
                yield more
        if more := text.end():
            yield more

    def cache_bytes(self, rows: int, length: int) -> int:
        """What an engine's cache takes on each device."""
        model, devices = self.config.model, self._programs.mesh.size
        decoder = model.decoder
        position = 2 * decoder.depth * decoder.num_kv_heads * decoder.head_dim
        here = rows // devices if rows % devices == 0 else rows
        return here * length * position * np.dtype(jnp.dtype(model.dtype)).itemsize

    def engine(self, shape: EngineShape, steps: int = 1) -> Engine:
        """Answers requests; see `Engine`."""
        pad_id = self._text.tokenizer.pad_token_id
        return Engine(self._programs, shape, pad_id=pad_id, steps=steps)

    def embed(self, request: Request) -> np.ndarray:
        """The embeddings of a prompt, text and visual tokens, [S, D]."""
        length = len(request.tokens)
        more = round_up(length, 3, 32) - length  # few programs
        tokens = np.pad(request.tokens, (0, more))[None]
        index = np.pad(request.visual_index, (0, more), constant_values=-1)[None]
        scenes = np.array([request.scene], np.int32)
        x, _ = self._programs.embed(request.table, scenes, tokens, index)
        return np.asarray(x)[0, :length]

    def text_stream(self) -> TextStream:
        """Turns the tokens of one answer into text."""
        return TextStream(self._text.tokenizer, self._stop_ids)

    def encoder(self, compression: CompressionConfig | None) -> SampleEncoder:
        """Turns samples into tokens, with this compression."""
        return SampleEncoder.of(self.config, self._text, compression or self.compression)

    def scene_encoder(self, encoder: SampleEncoder) -> SceneEncoder:
        """Encodes the clips of scenes."""
        return SceneEncoder(self._programs, encoder, self.config.model.vision.image_size)

    @property
    def reader(self) -> MediaReader:
        """Decodes media in worker processes."""
        size = self.config.model.vision.image_size
        return MediaReader(self.pool, size, self.config.data.frames)

    def _check_length(self, sample: Sample, prompt: int, new: int) -> None:
        """Raises SampleError if a prompt and its answer exceed the decoder's positions."""
        limit = self.config.model.decoder.max_positions
        if prompt + new > limit:
            answer = f" and up to {new:,} of the answer" if new else ""
            raise SampleError(
                sample.id,
                "too_long",
                f"{prompt:,} tokens{answer} exceed the decoder's {limit:,} positions "
                f"(model.decoder.max_positions): shorten the question, use fewer frames, or pool more",
            )

    def _check_visual_tokens(self, tokens: int) -> None:
        limit = self.config.model.decoder.max_positions
        if tokens > limit:
            raise ValueError(
                f"{tokens:,} visual tokens exceed the decoder's {limit:,} positions "
                f"(model.decoder.max_positions): use fewer frames, or pool or sample more"
            )

    def _batch_size(self, requested: int | None, visual_tokens: int) -> int:
        """Rows of a batch, a multiple of the devices, for scenes of at most `visual_tokens`."""
        devices = self._programs.mesh.size
        if requested is None:
            requested = default_rows(visual_tokens, devices)
        return -(-requested // devices) * devices

    def _single_tokens(self, texts: Sequence[str]) -> list[int]:
        """The token of each text."""
        tokens = []
        for text in texts:
            ids = self._text.tokenizer.encode(text, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(
                    f"the choice {text!r} is {len(ids)} tokens; only single tokens can be scored: "
                    f"generate the answers instead"
                )
            tokens += ids
        return tokens


def kind_of(path: Path) -> str:
    """ "image" or "video", by the suffix of a file."""
    return "image" if pathlib.Path(path).suffix.lower() in IMAGE_SUFFIXES else "video"


def _question(text: str, media: tuple[Media, ...]) -> Sample:
    """A question that a user asks about media."""
    placeholders = "".join(f"<{medium.kind}>\n" for medium in media)
    turn = Turn("user", placeholders + PLACEHOLDER.sub("", text))
    return Sample(id="question", turns=(turn,), media=media, extra={})


def sample_seed(seed: int, index: int) -> int:
    """The seed of one of many samples: each has other draws."""
    return int(np.random.SeedSequence([seed % 2**32, index]).generate_state(1)[0])
