"""Asks the questions of a benchmark while their videos are watched: one session per video, as a live user would."""

from __future__ import annotations

import heapq
import itertools
import math
import pathlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from storm_jax.evals.benchmark import Question
from storm_jax.evals.dialogues import dialogue
from storm_jax.evals.journal import JournalWriter
from storm_jax.evals.report.thumbnails import FRAMES, Thumbnails
from storm_jax.inference.encoding import EncodedBatch
from storm_jax.inference.prediction import Prediction
from storm_jax.inference.streaming.sources import Source, SourceError
from storm_jax.inference.streaming.stream import Stream
from storm_jax.media.frames import Clip

_EPSILON = 1e-3  # seconds by which a frame may be later than its question

Ask = Callable[[EncodedBatch, Question], Prediction]


def in_sessions(
    questions: Sequence[Question], stream: Stream, fps: float, ask: Ask, writer: JournalWriter
) -> Iterator[tuple[Question, Prediction]]:
    """Watches each video once, and asks every question at its `media.end`, or at the end of the file.

    Args:
      stream: reset for each video.
      fps: of the stream.
      ask: `(what the stream has seen, question) ->` the reply.
    """
    by_path: dict[pathlib.Path, list[Question]] = defaultdict(list)
    for question in questions:
        assert question.media.path is not None
        by_path[question.media.path].append(question)
    for path, about in by_path.items():
        stream.reset()
        session = _Session(about, stream, ask, writer)
        try:
            with Source(f"file:{path}", fps, stream.image_size) as source:
                for frames, times in source.blocks():
                    yield from session.watch(frames, times)
                    if session.is_over:
                        break
            yield from session.end()
        except SourceError as error:
            yield from session.fail(str(error))


class _Session:
    """The questions about one video, in the order of their times."""

    def __init__(
        self, questions: Sequence[Question], stream: Stream, ask: Ask, writer: JournalWriter
    ):
        self._stream, self._ask, self._writer = stream, ask, writer
        self._questions = {question.id: question for question in questions}
        self._dialogues = {question.id: dialogue(question) for question in questions}
        self._order = itertools.count()
        self._next: list[tuple[float, int, Question]] = []  # a heap
        self._seen: deque[tuple[np.ndarray, float]] = deque(maxlen=FRAMES)
        for each in self._dialogues.values():
            self._plan(next(each))

    @property
    def is_over(self) -> bool:
        return not self._next

    def watch(self, frames: np.ndarray, times: np.ndarray) -> Iterator[tuple[Question, Prediction]]:
        """Adds frames [F, H, W, 3]; yields the questions whose time has passed, with their replies."""
        start = 0
        while self._next:
            end = int(np.searchsorted(times, self._next[0][0] + _EPSILON, side="right"))
            if end == len(times):
                break
            self._push(frames[start:end], times[start:end])
            start = max(start, end)
            yield from self._ask_next()
        self._push(frames[start:], times[start:])

    def end(self) -> Iterator[tuple[Question, Prediction]]:
        """The video has ended: the other questions are asked now."""
        if not self._seen:
            first = next(iter(self._questions.values()))
            yield from self.fail(f"{first.media.name} has no frames")
        while self._next:
            yield from self._ask_next()

    def fail(self, problem: str) -> Iterator[tuple[Question, Prediction]]:
        """The video cannot be read any further."""
        cause = "truncated" if self._seen else "unreadable"
        for _, _, question in self._next:
            yield self._questions[question.id], Prediction(error=f"video {problem}", cause=cause)
        self._next = []

    def _plan(self, question: Question) -> None:
        due = math.inf if question.media.end is None else question.media.end
        heapq.heappush(self._next, (due, next(self._order), question))

    def _push(self, frames: np.ndarray, times: np.ndarray) -> None:
        self._stream.push(frames, times)
        self._seen.extend(zip(frames[-FRAMES:], times[-FRAMES:].tolist(), strict=True))

    def _ask_next(self) -> Iterator[tuple[Question, Prediction]]:
        _, _, question = heapq.heappop(self._next)
        try:
            self._plan(self._dialogues[question.id].send(self._reply(question)))
        except StopIteration as end:
            yield self._questions[question.id], end.value

    def _reply(self, question: Question) -> Prediction:
        if question.watch is None:
            frames, times = zip(*self._seen, strict=True)
            clip = Clip(np.stack(frames), np.array(times))
            self._writer.add_thumbnails([question.id], Thumbnails.of(clip, "video"))
        return self._ask(self._stream.encoded(), question)
