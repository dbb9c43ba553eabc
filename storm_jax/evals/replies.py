"""Replies after parsing: what scores, reports and submissions are computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from storm_jax.evals.questions import Parser, Question
from storm_jax.inference.prediction import Prediction

MISSING = "missing"  # cause of a prediction whose video does not exist


@dataclasses.dataclass(frozen=True)
class ScoredReply:
    """A question, the model's prediction, and what the parser read in it.

    Attributes:
      parsed: a letter of the question's, or the text of a free answer; None if there is neither.
    """

    question: Question
    prediction: Prediction
    parsed: str | None

    @property
    def right(self) -> bool:
        return self.parsed is not None and self.parsed == self.question.answer

    @property
    def status(self) -> str:
        """One of "parsed", "unparsed", "missing" and "failed"."""
        if self.prediction.error:
            return MISSING if self.prediction.cause == MISSING else "failed"
        return "unparsed" if self.parsed is None else "parsed"


def parse_replies(
    questions: Sequence[Question], predictions: Mapping[str, Prediction], parse: Parser
) -> list[ScoredReply]:
    """Parses the prediction of each question, in the order of the questions; those without a prediction
    were not asked and are left out."""
    replies = []
    for question in questions:
        prediction = predictions.get(question.id)
        if prediction is None:
            continue
        parsed = None if prediction.error else parse(prediction.text, question)
        if question.options and parsed not in question.lettered:
            parsed = None
        replies.append(ScoredReply(question, prediction, parsed))
    return replies
