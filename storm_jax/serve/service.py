"""Turns requests into prompts, and prompts into answers.

    prepare   fetches, checks, decodes and encodes the media, and tokenises the conversation
    answer    the text, in pieces

Media are decoded by worker processes with a deadline, and encoded by the thread that owns the model. What was encoded
is kept for the next question.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from storm_jax.compression import plan_clip
from storm_jax.config import FramesConfig
from storm_jax.data.encoder import SampleEncoder
from storm_jax.inference.encoding import EncodedScene
from storm_jax.inference.engine import EngineShape, Request
from storm_jax.inference.generate import Sampling
from storm_jax.inference.predictor import Predictor, sample_seed
from storm_jax.inference.scenes import scene_of
from storm_jax.inference.streaming.stream import Stream
from storm_jax.media.frames import Clip
from storm_jax.media.media import Media, MediaError
from storm_jax.media.read import count_frames, read_header
from storm_jax.media.workers import WorkerCrashError, WorkerTimeoutError
from storm_jax.serve.chat import ChatRequest, ImagePart, TextPart, VideoPart
from storm_jax.serve.engine_thread import EngineThread
from storm_jax.serve.errors import ApiError
from storm_jax.serve.remote import RemoteDecoder
from storm_jax.serve.sources import Source, Sources
from storm_jax.serve.tables import TableCache
from storm_jax.text.sample import PLACEHOLDER, Sample, SampleError, Turn

DEFAULT_NEW_TOKENS = 256
_LONGEST_TOKEN = 64  # characters; longer texts are refused before they are tokenised


@dataclasses.dataclass(frozen=True, kw_only=True)
class Medium:
    """An image or a video of a request.

    Attributes:
      field: where it is in the request.
      fps, num_frames: how it is sampled; the rate of listed frames.
    """

    kind: str
    field: str
    source: Source
    fps: float | None = None
    num_frames: int = 1

    @property
    def key(self) -> tuple:
        """The same for media that look alike to the model."""
        digests = tuple(hashlib.sha256(each).digest() for each in self.source.files)
        return self.kind, digests, self.fps, self.num_frames


@dataclasses.dataclass(frozen=True)
class Seen:
    """Media that were encoded: their visual table [1, V, D], and where they are in it."""

    table: jax.Array
    scene: EncodedScene

    @property
    def nbytes(self) -> int:
        return self.table.nbytes


@dataclasses.dataclass(kw_only=True)
class Prepared:
    """A prompt that is ready for the engine.

    Attributes:
      clamped: fields whose values were lowered to the server's limits.
      groups: of each medium, after pooling.
    """

    request: Request
    stop: Sequence[str]
    clamped: Sequence[str]
    seen: Seen
    groups: Sequence[int]
    finish: str = ""

    def usage(self) -> dict[str, Any]:
        prompt, new = len(self.request.tokens), len(self.request.written)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"multimodal_tokens": self.seen.scene.visual_tokens},
        }

    def seen_media(self) -> dict[str, Any]:
        """What the model has seen."""
        media = [
            {
                "kind": medium.kind,
                "frames": len(times),
                "times": [round(float(time), 3) for time in times],
                "groups": groups,
                "visual_tokens": len(entries),
            }
            for medium, times, entries, groups in zip(
                self.seen.scene.media,
                self.seen.scene.times,
                self.seen.scene.entries,
                self.groups,
                strict=True,
            )
        ]
        return {"media": media, "clamped": list(self.clamped)}


class Service:
    """Answers chat requests with one model.

    Args:
      rows, length: answers that are written at once, and positions of each.
      block: tokens of a prompt that are read between two steps of the other answers.
      cache_bytes: of visual tables.
      decoder: URL and model of a server that writes the answers; by default they are written here.
    """

    def __init__(
        self,
        predictor: Predictor,
        sources: Sources,
        *,
        name: str,
        rows: int,
        length: int,
        block: int,
        cache_bytes: int,
        decoder: tuple[str, str] | None = None,
    ):
        self.name, self.rows, self.length = name, rows, length
        self.sources, self.limits = sources, sources.limits
        self.sessions = 0  # live ones
        self._predictor = predictor
        shape = EngineShape(rows=rows, length=length, prompts=1, block=block, bits=2)
        self.engine = EngineThread(lambda: predictor.engine(shape))
        self._writer: EngineThread | RemoteDecoder = self.engine
        if decoder is not None:
            self._writer = RemoteDecoder(*decoder, self._embed, predictor.stop_ids)
        self.tables: TableCache[Seen] = TableCache(cache_bytes)
        # Threads that wait: for downloads, and for worker processes.
        self._threads = ThreadPoolExecutor(sources.limits.queued + rows, "media")

    @property
    def num_programs(self) -> int:
        """Programs that were compiled so far."""
        return self._predictor.num_programs

    def settings(self) -> dict[str, int]:
        """How videos are sampled and compressed by default, and how many frames are allowed."""
        defaults = dataclasses.asdict(self._predictor.compression)
        return defaults | {"num_frames": self._frames(None), "max_frames": self.limits.frames}

    def close(self) -> None:
        self.engine.close()
        self._threads.shutdown(cancel_futures=True)

    async def prepare(self, chat: ChatRequest) -> Prepared:
        """Reads the media and tokenises the conversation.

        Raises:
          ApiError: something is not allowed, cannot be read or does not fit.
        """
        if chat.model != self.name:
            raise ApiError(
                404, f"the model {chat.model!r} does not exist: use {self.name!r}", "model"
            )
        clamped: list[str] = []
        compression = dataclasses.replace(
            self._predictor.compression,
            **{name: value for name, value in chat.storm.model_dump().items() if value is not None},
        )
        encoder = self._predictor.encoder(compression)
        turns, media = await self._conversation(chat, clamped)
        # Hashing many megabytes would stop everybody else.
        keys = await self._in_thread(lambda: tuple(medium.key for medium in media))
        seen = await self.tables.get((keys, compression), lambda: self._see(media, encoder))
        sample = Sample(id="request", turns=turns, media=seen.scene.media, extra={})
        if sum(len(turn.text) for turn in turns) > _LONGEST_TOKEN * self.length:
            raise ApiError(400, f"the text cannot fit into {self.length:,} positions", "messages")
        try:
            encoded = await self._in_thread(encoder.encode, sample, seen.scene.times)
        except SampleError as error:
            raise ApiError(400, str(error), "messages") from None
        room = self.length - len(encoded)
        if room < 1:
            raise ApiError(
                400,
                f"{len(encoded):,} tokens, {seen.scene.visual_tokens:,} of them visual, exceed the {self.length:,} "
                f"positions of this server: use fewer frames, pool more, or shorten the text",
                "messages",
            )
        request = Request(
            tokens=encoded.tokens,
            visual_index=encoded.visual_index(seen.scene.entries),
            table=seen.table,
            sampling=self._sampling(chat, room, clamped),
            seed=sample_seed(chat.seed, 0),
        )
        plans = [plan_clip(len(times), encoder.grid, compression) for times in seen.scene.times]
        return Prepared(
            request=request,
            stop=chat.stop,
            clamped=clamped,
            seen=seen,
            groups=[plan.num_groups for plan in plans],
        )

    async def write(self, request: Request) -> AsyncGenerator[str]:
        """Yields the text of an answer in pieces.

        Raises:
          ApiError: the prompt does not fit, or the model fails.
        """
        text = self._predictor.text_stream()
        async with contextlib.aclosing(self._writer.answer(request)) as chunks:
            async for ids in chunks:
                if piece := text.add(ids):
                    yield piece
        if piece := text.end():
            yield piece

    async def answer(self, prepared: Prepared) -> AsyncGenerator[str]:
        """Yields the text in pieces; `prepared.finish` says at the end why it has ended."""
        text, shown = "", 0
        async with contextlib.aclosing(self.write(prepared.request)) as pieces:
            async for piece in pieces:
                text += piece
                ends = [text.find(stop) for stop in prepared.stop if stop in text]
                sure = min(ends) if ends else len(text) - _held(text, prepared.stop)
                if sure > shown:
                    yield text[shown:sure]
                    shown = sure
                if ends:
                    prepared.finish = "stop"
                    return
        if text[shown:]:
            yield text[shown:]
        prepared.finish = prepared.request.finish

    def _sampling(self, chat: ChatRequest, room: int, clamped: list[str]) -> Sampling:
        asked = chat.max_completion_tokens or chat.max_tokens
        limit = min(room, self.limits.new_tokens)
        if asked and asked > limit:
            clamped.append("max_completion_tokens" if chat.max_completion_tokens else "max_tokens")
        return Sampling(min(asked or DEFAULT_NEW_TOKENS, limit), chat.temperature, chat.top_p)

    async def _conversation(
        self, chat: ChatRequest, clamped: list[str]
    ) -> tuple[tuple[Turn, ...], list[Medium]]:
        """The turns, and the media of their placeholders."""
        if chat.messages[-1].role != "user":
            raise ApiError(400, "the last message is not one of the user", "messages")
        turns: list[Turn] = []
        media: list[Medium] = []
        for number, message in enumerate(chat.messages):
            text = ""
            for place, part in enumerate(message.content):
                field = f"messages[{number}].content[{place}]"
                if isinstance(part, TextPart):
                    text += PLACEHOLDER.sub("", part.text)
                    continue
                if message.role != "user":
                    raise ApiError(400, f"{field}: only the user sends media", field)
                if len(media) == self.limits.media:
                    limit = self.limits.media
                    raise ApiError(400, f"{field}: at most {limit} images and videos", field)
                medium = await self._medium(chat, part, field, clamped)
                media.append(medium)
                if sum(each.source.nbytes for each in media) > self.limits.media_bytes:
                    limit = self.limits.media_bytes
                    raise ApiError(422, f"{field}: all media exceed {limit:,} bytes", field)
                text += f"<{medium.kind}>\n"
            role = "system" if message.role == "developer" else message.role
            turns.append(Turn(role, text))
        return tuple(turns), media

    async def _medium(
        self, chat: ChatRequest, part: ImagePart | VideoPart, field: str, clamped: list[str]
    ) -> Medium:
        if isinstance(part, ImagePart):
            source = await self._in_thread(self.sources.read, part.image_url.url, "image", field)
            return Medium(kind="image", field=field, source=source)
        fps, frames = chat.frame_settings(part.video_url)
        count = self._frames(frames)
        if frames and count < frames:
            clamped.append(f"{field}.video_url.num_frames")
        source = await self._in_thread(self.sources.read, part.video_url.url, "video", field)
        return Medium(kind="video", field=field, source=source, fps=fps, num_frames=count)

    async def _embed(self, request: Request) -> np.ndarray:
        return await self.engine.call(lambda: self._predictor.embed(request))

    def stream(self, **settings: Any) -> Stream:
        """A video that arrives (see `Predictor.stream`); to be used in the engine's thread."""
        return self._predictor.stream(**settings)

    async def image(self, content: bytes, field: str) -> np.ndarray:
        """An image file as one frame, uint8 [H, W, 3].

        Raises:
          ApiError: it cannot be read.
        """
        medium = Medium(kind="image", field=field, source=Source((content,)))
        frames = self._predictor.config.data.frames
        clip = await self._in_thread(self._read, medium, frames)
        return clip.frames[0]

    def _frames(self, asked: int | None) -> int:
        return min(asked or self._predictor.compression.num_frames, self.limits.frames)

    async def _see(self, media: Sequence[Medium], encoder: SampleEncoder) -> Seen:
        """Decodes and encodes media."""
        clips = await asyncio.gather(
            *(self._in_thread(self._read, medium, encoder.frames) for medium in media)
        )
        named = [Media(kind=medium.kind, name=medium.field) for medium in media]
        scene = scene_of(named, [len(clip.frames) for clip in clips], encoder)
        if scene.visual_tokens > self.length:
            raise ApiError(
                400,
                f"{scene.visual_tokens:,} visual tokens exceed the {self.length:,} positions of this server: use fewer "
                f"frames, or pool more",
                "messages",
            )
        scenes = self._predictor.scene_encoder(encoder)

        def encode() -> Seen:
            (placed,), table, _ = scenes.encode([(scene, list(clips))])
            return Seen(table, placed)

        return await self.engine.call(encode)

    def _read(self, medium: Medium, frames: FramesConfig) -> Clip:
        """The frames of a medium; waits for a worker process."""
        files = medium.source.files
        if len(files) == 1:
            media = Media(kind=medium.kind, name=medium.field, data=files[0], fps=medium.fps)
            return self._read_file(medium, media, frames)
        picks = np.linspace(0, len(files) - 1, min(len(files), medium.num_frames)).round()
        reader = self._predictor.reader
        out = reader.empty(len(picks))
        for slot, pick in enumerate(picks.astype(int)):
            name = f"{medium.field} frame {pick}"
            image = Media(kind="image", name=name, data=files[pick])
            self._decoded(medium, self._check_header, medium, image, frames)
            self._decoded(medium, reader.read, image, 1, out[slot : slot + 1])
        return Clip(out, picks / (medium.fps or 1.0))

    def _read_file(self, medium: Medium, media: Media, frames: FramesConfig) -> Clip:
        self._decoded(medium, self._check_header, medium, media, frames)
        pool, limit = self._predictor.pool, frames.time_limit
        count = self._decoded(
            medium, pool.call, count_frames, media, medium.num_frames, frames, limit=limit
        )
        return self._decoded(medium, self._predictor.reader.read, media, count)

    def _check_header(self, medium: Medium, media: Media, frames: FramesConfig) -> None:
        pool = self._predictor.pool
        header = pool.call(read_header, media, limit=frames.time_limit)
        if header.width * header.height > self.limits.pixels:
            raise ApiError(
                400,
                f"{media.name}: {header.width:,} x {header.height:,} pixels exceed {self.limits.pixels:,}",
                medium.field,
            )
        if header.seconds > self.limits.seconds:
            raise ApiError(
                400,
                f"{media.name}: {header.seconds:,.0f} s exceed {self.limits.seconds:,.0f}",
                medium.field,
            )

    def _decoded(self, medium: Medium, function: Callable, *args: Any, **options: Any) -> Any:
        """The result of a function that reads a medium; its errors are the client's."""
        try:
            return function(*args, **options)
        except MediaError as error:
            raise ApiError(400, str(error), medium.field) from None
        except WorkerTimeoutError:
            raise ApiError(400, f"{medium.field} takes too long to decode", medium.field) from None
        except WorkerCrashError:
            raise ApiError(400, f"{medium.field} crashed the decoder", medium.field) from None

    async def _in_thread(self, function: Callable, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)


def _held(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of a text that may begin a stop text."""
    sizes = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
    return max(sizes, default=0)
