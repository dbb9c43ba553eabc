"""Continuous batching: requests share the rows of one cache, and a row that is free takes the next one.

    submit   a request waits
    step     reads a block of the waiting prompts, or continues all answers

The engine runs in the thread that calls `step`. Requests may be submitted and cancelled from others.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from storm_jax.inference.generate import Answers, Choice, Prompts, Sampling
from storm_jax.inference.programs import Programs
from storm_jax.inference.scenes import round_up

_MULTIPLE = 32  # of token slots
_MIN_NEW_TOKENS = 64
_TOKENS_AT_ONCE = 40_960  # of prompts that a device reads: 32,768 visual ones, and text


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """A prompt, and its answer as far as it is written.

    Attributes:
      tokens, visual_index: int32 [n] (see `Storm.merge`).
      table: visual tables [N, V, D], of which the prompt uses number `scene`.
      seed: of sampling. The answer depends on it, the prompt and `sampling` only.
      candidates: tokens to score as first token of the answer; nothing is written then.
      written: tokens of the answer; the last one may be a stop token.
      finish: why it has ended: "stop", "length", "cancelled" or "scored"; "" while it is being written.
      scores: fp32, log-probabilities of the candidates.
      seconds: device time; work for several requests is divided among them.
    """

    tokens: np.ndarray
    visual_index: np.ndarray
    table: jax.Array
    scene: int = 0
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    candidates: Sequence[int] = ()
    written: list[int] = dataclasses.field(default_factory=list)
    finish: str = ""
    scores: np.ndarray | None = None
    seconds: float = 0.0
    is_cancelled: bool = False

    def cancel(self) -> None:
        """Ends the request with the engine's next step."""
        self.is_cancelled = True

    @property
    def length(self) -> int:
        """Positions that the prompt and the longest answer take."""
        return len(self.tokens) + (0 if self.candidates else self.sampling.max_new_tokens)


@dataclasses.dataclass
class _Reading:
    """Prompts that are being read, and how far."""

    requests: list[Request]
    rows: list[int]
    lengths: np.ndarray
    size: int  # of a block
    slots: int
    start: int = 0
    prompts: Prompts | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineShape:
    """Sizes of an engine's arrays.

    Attributes:
      rows, length: answers that are written at once, R, and positions of each, T.
      prompts: how many prompts are read together, P; they wait until that many rows are free.
      block: tokens of a prompt that are read at once. Bounds the memory, and for how long answers wait.
      bits: prompts are padded to one of 2^(bits-1) lengths between one power of two and the next.
    """

    rows: int
    length: int
    prompts: int
    block: int
    bits: int

    @classmethod
    def for_batch(cls, rows: int, longest: int, new: int, devices: int) -> EngineShape:
        """For many prompts of similar lengths, of which `longest` is the largest, and answers of up to `new` tokens."""
        # Prompts that are read together are spread over the devices, like the rows that take them.
        prompts = rows if devices > 1 else max(1, rows // 4)
        return cls(
            rows=rows,
            length=round_up(longest, 5, _MULTIPLE) + _room(new),
            prompts=prompts,
            block=_TOKENS_AT_ONCE * devices // prompts,
            bits=5,
        )

    @classmethod
    def for_one(cls, prompt: int, new: int) -> EngineShape:
        """For one of many prompts of different lengths, which should need few programs."""
        length = round_up(prompt, 3, _MULTIPLE) + _room(new)
        return cls(rows=1, length=length, prompts=1, block=_TOKENS_AT_ONCE, bits=3)

    def cut(self, longest: int) -> tuple[int, int]:
        """The tokens of a block, and those of all blocks, of prompts of at most `longest` tokens."""
        block = min(self.block, self.length)
        count = round_up(-(-longest // block), 2)
        size = min(round_up(-(-longest // count), self.bits, _MULTIPLE), block)
        return size, min(count * size, self.length)


def _room(new: int) -> int:
    """Positions for new tokens, few different numbers."""
    return max(_MIN_NEW_TOKENS, round_up(new, 1))


class Engine:
    """Answers requests with the programs of a model.

    Args:
      pad_id: token that pads prompts.
      steps: how many tokens are added to all answers at once, while no prompt can be read.
    """

    def __init__(self, programs: Programs, shape: EngineShape, *, pad_id: int, steps: int = 1):
        self._programs, self.shape = programs, shape
        self._pad_id, self._steps = pad_id, steps
        self._waiting: deque[Request] = deque()
        self._reading: _Reading | None = None
        self._active: dict[int, Request] = {}  # by row
        self._answers: Answers | None = None

    @property
    def is_idle(self) -> bool:
        return not (self._waiting or self._reading or self._active)

    @property
    def waiting(self) -> int:
        """Requests of which nothing has been read."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._active) + (len(self._reading.requests) if self._reading else 0)

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
          ValueError: it is empty, or too long for a row.
        """
        if not len(request.tokens):
            raise ValueError("the prompt is empty")
        if request.length > self.shape.length:
            raise ValueError(
                f"{len(request.tokens):,} tokens of the prompt and up to {request.length - len(request.tokens):,} of "
                f"the answer exceed the {self.shape.length:,} positions of a row"
            )
        self._waiting.append(request)

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Answers requests; yields each as it ends."""
        for request in requests:
            self.submit(request)
        while not self.is_idle:
            yield from (request for request in self.step() if request.finish)

    def stream(self, request: Request) -> Iterator[list[int]]:
        """Yields the tokens of one answer as they are written."""
        self.submit(request)
        done = 0
        while not request.finish:
            self.step()
            yield request.written[done:]
            done = len(request.written)

    def step(self) -> list[Request]:
        """Reads one block of prompts, then adds tokens to all answers; returns the requests that have changed.

        With `steps` above 1, answers wait until all prompts that fit have been read.
        """
        changed = self._drop_cancelled()
        self._admit()
        if self._reading:
            changed += self._read()
        if self._active and (self._steps == 1 or not (self._reading or self._can_admit())):
            changed += self._decode()
        return list(dict.fromkeys(changed))

    def _drop_cancelled(self) -> list[Request]:
        dropped = [request for request in self._waiting if request.is_cancelled]
        for request in dropped:
            self._waiting.remove(request)
        for row, request in list(self._active.items()):
            if request.is_cancelled:
                dropped.append(self._active.pop(row))
        if self._reading and all(request.is_cancelled for request in self._reading.requests):
            dropped += self._reading.requests
            self._reading = None
        for request in dropped:
            request.finish = "cancelled"
        return dropped

    def _can_admit(self) -> bool:
        free = self.shape.rows - len(self._active)
        return 0 < min(self.shape.prompts, len(self._waiting)) <= free

    def _admit(self) -> None:
        """Takes waiting requests that share a table, if enough rows are free."""
        if self._reading or not self._can_admit():
            return
        requests = [self._waiting.popleft()]
        while (
            self._waiting
            and len(requests) < self.shape.prompts
            and self._waiting[0].table is requests[0].table
        ):
            requests.append(self._waiting.popleft())
        lengths = np.zeros(self.shape.prompts, np.int32)
        lengths[: len(requests)] = [len(request.tokens) for request in requests]
        free = [row for row in range(self.shape.rows) if row not in self._active]
        size, slots = self.shape.cut(int(lengths.max()))
        self._reading = _Reading(requests, free[: len(requests)], lengths, size, slots)

    def _read(self) -> list[Request]:
        """Reads the next block; after the last one, the answers begin."""
        reading = self._reading
        assert reading is not None
        count, start = self.shape.prompts, reading.start
        size = min(reading.size, reading.slots - start)
        tokens = np.full((count, size), self._pad_id, np.int32)
        index = np.full((count, size), -1, np.int32)
        scenes = np.zeros(count, np.int32)
        for place, request in enumerate(reading.requests):
            part = request.tokens[start : start + size]
            tokens[place, : len(part)] = part
            index[place, : len(part)] = request.visual_index[start : start + size]
            scenes[place] = request.scene
        table = reading.requests[0].table
        x, embedding = self._programs.embed(table, scenes, tokens, index)
        reading.prompts, seconds = self._programs.prefill(
            x, reading.lengths, start, reading.prompts, reading.slots
        )
        self._share(reading.requests, embedding + seconds)
        reading.start += size
        if reading.start < reading.lengths.max():
            return []
        self._reading = None
        return self._begin(reading)

    def _begin(self, reading: _Reading) -> list[Request]:
        """Scores what has candidates, and puts the rest into rows."""
        assert reading.prompts is not None
        requests, count = reading.requests, self.shape.prompts
        if any(request.candidates for request in requests):
            self._score(reading)
        rows = np.full(count, self.shape.rows, np.int32)  # nowhere
        limits, seeds = np.ones(count, np.int32), np.zeros(count, np.uint32)
        temperature, top_p = np.zeros(count, np.float32), np.ones(count, np.float32)
        for place, (request, row) in enumerate(zip(requests, reading.rows, strict=True)):
            if request.finish:
                continue
            rows[place], seeds[place] = row, np.uint32(request.seed % 2**32)
            limits[place] = request.sampling.max_new_tokens
            temperature[place] = request.sampling.temperature
            top_p[place] = request.sampling.top_p
            self._active[row] = request
        if (rows == self.shape.rows).all():
            return requests
        if self._answers is None:
            self._answers = self._programs.empty_answers(self.shape.rows, self.shape.length)
        choice = Choice(temperature, top_p, seeds)  # type: ignore[arg-type]
        self._answers, tokens, seconds = self._programs.insert(
            self._answers, reading.prompts, rows, reading.lengths, limits, choice
        )
        self._share(requests, seconds)
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            if row in self._active:
                self._add(row, [token])
        return requests

    def _score(self, reading: _Reading) -> None:
        assert reading.prompts is not None
        width = round_up(max(len(request.candidates) for request in reading.requests), 1, 8)
        candidates = np.zeros((self.shape.prompts, width), np.int32)
        for row, request in zip(candidates, reading.requests, strict=False):
            row[: len(request.candidates)] = request.candidates
        scores, seconds = self._programs.score(reading.prompts, candidates)
        self._share(reading.requests, seconds)
        for row, request in zip(scores, reading.requests, strict=False):
            if request.candidates:
                request.scores, request.finish = row[: len(request.candidates)], "scored"

    def _decode(self) -> list[Request]:
        assert self._answers is not None
        active = dict(self._active)
        is_kept = np.zeros(self.shape.rows, bool)
        is_kept[list(active)] = True
        steps = 1 if self._reading else self._steps
        self._answers, tokens, seconds = self._programs.decode(
            self._answers, is_kept, steps, self._steps
        )
        self._share(active.values(), seconds)
        for row in active:
            self._add(row, [token for token in tokens[row].tolist() if token >= 0])
        return list(active.values())

    def _add(self, row: int, tokens: list[int]) -> None:
        """Adds new tokens to the request of a row, which it leaves at its end."""
        request = self._active[row]
        request.written += tokens
        if request.written[-1] in self._programs.stop_ids:
            request.finish = "stop"
        elif len(request.written) == request.sampling.max_new_tokens:
            request.finish = "length"
        if request.finish:
            del self._active[row]

    def _share(self, requests: Iterable[Request], seconds: float) -> None:
        shared = list(requests)
        for request in shared:
            request.seconds += seconds / len(shared)
