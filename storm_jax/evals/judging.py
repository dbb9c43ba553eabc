"""MLVU's generation tasks: the input for a judge model, and scores from its output. No model is called.

    judge_input.jsonl   {"id", "task", "messages": [system, user]}, as chat APIs expect
    judgements          {"id", "judgement": the judge's text}, one per line

A judge rates a reply with two scores of 1 to 5, which are added. G-Avg is the mean of the two tasks' means.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from storm_jax.evals.benchmark import BenchmarkError, ScoredReply
from storm_jax.evals.predictions import read_objects
from storm_jax.files import write_lines

SCORES = {
    "sub_scene": ("score_accuracy", "score_relevance"),
    "summary": ("score_completeness", "score_reliability"),
}
LOWEST = 2.0
# The authors' own instructions (JUNJIE99/MLVU, evaluation/generation_evaluation).
SYSTEM = {
    "sub_scene": """\
##TASK DESCRIPTION:
You are required to evaluate a respondent's answer based on a provided question, some scoring points, and the respondent's answer. You should provide two scores. The first is the accuracy score, which should range from 1 to 5. The second is the relevance score, which should also range from 1 to 5. Below are the criteria for each scoring category.
##ACCURACY Scoring Criteria:
Evaluate the respondent's answer against specific scoring points as follows:
Score 1: The response completely misses the scoring point.
Score 3: The response mentions content related to the scoring point but is not entirely correct.
Score 5: The response accurately addresses the scoring point.
Calculate the average score across all scoring points to determine the final accuracy score.
##RELEVANCE Scoring Criteria:
Assess how the respondent's answer relates to the original question:
Score 1: The response is completely off-topic from the question.
Score 2: The response is partially related to the question but contains a significant amount of irrelevant content.
Score 3: The response primarily addresses the question, but the respondent seems uncertain about their own answer.
Score 4: The response mostly addresses the question and the respondent appears confident in their answer.
Score 5: The response is fully focused on addressing the question with no irrelevant content and demonstrates complete certainty.
----
##INSTRUCTION:
1. Evaluate Accuracy: First, assess and score each scoring point based on the respondent's answer. Calculate the average of these scores to establish the final accuracy score. Provide a detailed rationale before assigning your score.
2. Evaluate RELEVANCE: Assess the relevance of the respondent\u2019s answer to the question. Note that when evaluating relevance, the correctness of the answer is not considered; focus solely on how relevant the answer is to the question. Provide a comprehensive rationale before assigning your score.
3. Output Scores in JSON Format: Present the scores in JSON format as follows:
{'score_accuracy': score_acc, 'score_relevance': score_rele, 'total_score': score_acc + score_rele}
""",
    "summary": """\
##TASK DESCRIPTION:
You are required to evaluate the performance of the respondent in the video summarization task based on the standard answer and the respondent's answer. You should provide two scores. The first is the COMPLETENESS score, which should range from 1 to 5. The second is the RELIABILITY score, which should also range from 1 to 5. Below are the criteria for each scoring category:
##COMPLETENESS Scoring Criteria:
The completeness score focuses on whether the summary covers all key points and main information from the video.
Score 1: The summary hardly covers any of the main content or key points of the video.
Score 2: The summary covers some of the main content and key points but misses many.
Score 3: The summary covers most of the main content and key points.
Score 4: The summary is very comprehensive, covering most to nearly all of the main content and key points.
Score 5: The summary completely covers all the main content and key points of the video.
##RELIABILITY Scoring Criteria:
The reliability score evaluates the correctness and clarity of the video summary. It checks for factual errors, misleading statements, and contradictions with the video content. If the respondent's answer includes details that are not present in the standard answer, as long as these details do not conflict with the correct answer and are reasonable, points should not be deducted.
Score 1: Contains multiple factual errors and contradictions; presentation is confusing.
Score 2: Includes several errors and some contradictions; needs clearer presentation.
Score 3: Generally accurate with minor errors; minimal contradictions; reasonably clear presentation.
Score 4: Very accurate with negligible inaccuracies; no contradictions; clear and fluent presentation.
Score 5: Completely accurate with no errors or contradictions; presentation is clear and easy to understand.
----
##INSTRUCTION:
1. Evaluate COMPLETENESS: First, analyze the respondent's answer according to the scoring criteria, then provide an integer score between 1 and 5 based on sufficient evidence.
2. Evaluate RELIABILITY: First, analyze the respondent's answer according to the scoring criteria, then provide an integer score between 1 and 5 based on sufficient evidence.
3. Output Scores in JSON Format: Present the scores in JSON format as follows:
{'score_completeness': score_comp, 'score_reliability': score_reli, 'total_score': score_comp + score_reli}
""",
}
_SCORE = (
    "Please score the respondent's answer according to the steps in the Instructions. You must end with a "
    "JSON dict to store the scores.\n"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """Mean score of each task and the mean of both, from 2 to 10.

    Attributes:
      unjudged: replies without a judgement, which count as 2.
    """

    tasks: Mapping[str, float]
    average: float
    total: int
    unjudged: int

    def __str__(self) -> str:
        lines = [f"{task:<12}{value:>8.2f}" for task, value in self.tasks.items()]
        lines.append(f"{'G-Avg':<12}{self.average:>8.2f}   of 2 to 10")
        lines.append(f"{self.total} replies, {self.unjudged} without a judgement (counted as 2)")
        return "\n".join(lines)


def write_judge_input(replies: Sequence[ScoredReply], folder: pathlib.Path) -> pathlib.Path:
    """Writes the messages for a judge, for all questions with a reply."""
    path = folder / "judge_input.jsonl"
    lines = [
        {
            "id": reply.question.id,
            "task": reply.question.groups["task"],
            "messages": [
                {"role": "system", "content": SYSTEM[reply.question.groups["task"]]},
                {"role": "user", "content": _user_message(reply)},
            ],
        }
        for reply in replies
        if reply.prediction.text
    ]
    write_lines(path, lines)
    return path


def _user_message(reply: ScoredReply) -> str:
    question, text = reply.question, f"Respondent's Answer: {reply.prediction.text}\n"
    if question.groups["task"] == "summary":
        return f"{_SCORE}Standard Answer: {question.answer}\n{text}"
    points = question.extra.get("scoring_points", "")
    return f"{_SCORE}Question: {question.text}\nScoring Points: {points}\n{text}"


def score_judgements(tasks: Mapping[str, str], path: pathlib.Path) -> Judged:
    """Reads the scores in a file of judgements.

    Args:
      tasks: the task of each question, by id.

    Raises:
      BenchmarkError: if a line has no judgement, or no id of a question.
    """
    given: dict[str, float | None] = {}
    for number, line in enumerate(read_objects(path), start=1):
        if line.get("id") not in tasks or not isinstance(line.get("judgement"), str):
            raise BenchmarkError(
                f"{path}: judgement {number} must have the id of a question and a judgement (text)"
            )
        given[line["id"]] = read_scores(line["judgement"], tasks[line["id"]])
    scores: dict[str, list[float]] = defaultdict(list)
    for identity, task in tasks.items():
        value = given.get(identity)
        scores[task].append(LOWEST if value is None else value)
    means = {task: sum(values) / len(values) for task, values in scores.items()}
    unjudged = sum(given.get(identity) is None for identity in tasks)
    return Judged(
        tasks=means, average=sum(means.values()) / len(means), total=len(tasks), unjudged=unjudged
    )


def read_scores(judgement: str, task: str) -> float | None:
    """The sum of the task's two scores, each the last one stated; None unless both are from 1 to 5."""
    total = 0.0
    for name in SCORES[task]:
        found = re.findall(rf"{name}['\"]?\s*[:=]\s*([0-9]+(?:\.[0-9]+)?)", judgement)
        if not found or not 1 <= float(found[-1]) <= 5:
            return None
        total += float(found[-1])
    return total
