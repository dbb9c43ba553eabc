"""What a model is asked for one question: the question itself, or first each second whether it is time to answer it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from storm_jax.evals.benchmark import Question
from storm_jax.inference.prediction import Prediction

# Yields what to ask, is sent the reply, and returns the prediction for the question.
Dialogue = Generator[Question, Prediction, Prediction]
# Asks questions in any order.
Ask = Callable[[Sequence[Question]], Iterable[tuple[Question, Prediction]]]


def dialogue(question: Question) -> Dialogue:
    """A question with a `watch` is asked whether it is time, each second, and after a yes what the answer is."""
    if question.watch is None:
        return (yield question)
    watch, seconds, visual_tokens = question.watch, 0.0, 0
    for second in range(watch.begin + 1, watch.end + 1):
        now = dataclasses.replace(question, media=dataclasses.replace(question.media, end=second))
        reply = yield dataclasses.replace(now, text=watch.poll)
        if not reply.error and "yes" in reply.text.lower():
            seconds += reply.seconds
            reply = yield dataclasses.replace(now, watch=None)
            text = f"[{second} s] {reply.text}"
            return dataclasses.replace(reply, text=text, seconds=seconds + reply.seconds)
        if reply.error:
            return reply
        seconds, visual_tokens = seconds + reply.seconds, reply.visual_tokens
    silence = f"[no answer by {watch.end} s]"
    return Prediction(text=silence, visual_tokens=visual_tokens, seconds=seconds)


def in_rounds(questions: Sequence[Question], ask: Ask) -> Iterator[tuple[Question, Prediction]]:
    """Asks all questions, then those that follow from the replies, until every dialogue has ended."""
    by_id = {question.id: question for question in questions}
    dialogues = {question.id: dialogue(question) for question in questions}
    asked = [next(each) for each in dialogues.values()]
    while asked:
        following = []
        for question, reply in ask(asked):
            try:
                following.append(dialogues[question.id].send(reply))
            except StopIteration as end:
                yield by_id[question.id], end.value
        asked = following
