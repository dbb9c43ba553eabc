"""Asks a stream while its frames arrive: every few seconds, at the end, and whenever somebody types a question."""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from storm_jax.inference.generate import Sampling
from storm_jax.inference.streaming.sources import Source
from storm_jax.inference.streaming.stream import Stream


class Conversation:
    """Answers go to stdout as they are written, or as one JSON object per line; everything else goes to stderr."""

    def __init__(self, stream: Stream, source: Source, sampling: Sampling, seed: int, jsonl: bool):
        self._stream, self._source = stream, source
        self._sampling, self._seed, self._jsonl = sampling, seed, jsonl

    def run(
        self, questions: Sequence[str], every: float, typed: Callable[[], Iterator[str]]
    ) -> None:
        """Pushes all frames of the source and asks.

        Args:
          questions: asked every `every` seconds of video, and of a file at its end.
          every: 0 asks at the end only.
          typed: returns other questions, which it waits for. Of live input they are asked when they come, of a file
            after its end.

        Raises:
          SourceError: the file is damaged; the questions are asked about what could be read.
        """
        waiting: queue.Queue[str] = queue.Queue()
        if self._source.is_live:
            threading.Thread(target=_collect, args=(typed, waiting), daemon=True).start()
        due, is_new = every, False
        try:
            for frames, times in self._source.blocks():
                is_new |= bool(self._stream.push(frames, times))
                if every and self._stream.seconds >= due:
                    due = every * (self._stream.seconds // every + 1)
                    self._ask_all(questions)
                    is_new = False
                while not waiting.empty():
                    self._ask(waiting.get())
        finally:
            self._report()
            if is_new and sys.exc_info()[0] is not KeyboardInterrupt:
                self._ask_all(questions)
        if not questions:
            for question in typed():
                self._ask(question)

    def _ask_all(self, questions: Sequence[str]) -> None:
        for question in questions:
            self._ask(question)

    def _ask(self, question: str) -> None:
        stats, began = self._stream.stats, time.monotonic()
        first, text = 0.0, ""
        try:
            pieces = self._stream.ask(question, sampling=self._sampling, seed=self._seed)
            if not self._jsonl:
                print(f"[{stats.seconds:.1f} s] ", end="", flush=True)
            for piece in pieces:
                first = first or time.monotonic() - began
                text += piece
                if not self._jsonl:
                    print(piece, end="", flush=True)
        except ValueError as error:
            print(f"predict.py: {error}", file=sys.stderr, flush=True)
            return
        record = {
            "time": round(stats.seconds, 3),
            "question": question,
            "answer": text,
            "first_token_seconds": round(first, 4),
            "seconds": round(time.monotonic() - began, 4),
            "visual_tokens": stats.visual_tokens,
            "frames": stats.used,
            "dropped": self._source.counts.dropped,
        }
        print(json.dumps(record) if self._jsonl else "", flush=True)

    def _report(self) -> None:
        stats, counts = self._stream.stats, self._source.counts
        print(
            f"{stats.used:,} frames in {stats.seconds:,.1f} s of video, {stats.visual_tokens:,} visual tokens, "
            f"{stats.device_bytes / 1e6:,.1f} MB on each device ({stats.mode}); {counts.dropped:,} frames dropped, "
            f"{counts.reconnects:,} reconnections"
            + (f" ({counts.problem})" if counts.problem else ""),
            file=sys.stderr,
            flush=True,
        )


def _collect(typed: Callable[[], Iterator[str]], waiting: queue.Queue[str]) -> None:
    try:
        for question in typed():
            waiting.put(question)
    except ValueError as error:  # not UTF-8
        print(f"predict.py: {error}", file=sys.stderr, flush=True)
