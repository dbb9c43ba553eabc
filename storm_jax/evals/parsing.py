"""Parses replies into letters.

`strict` is ours. The others reproduce other scorers, so that scores can be compared with theirs, except
that none guesses at random or calls a judge: such replies are unparsed and count as wrong.

    extract_mcq, mmmu, letter_in_text, first_letter     lmms-eval 0.7.3
    first_letter_vlm, before_bracket_vlm, check_answer_vlm   VLMEvalKit, "exact_matching"
    first_letter_videomme                               Video-MME's authors
    check_answer                                        MVBench's authors
    before_bracket                                      MLVU's authors
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

from storm_jax.evals.benchmark import Parser, Question

_THINKING = re.compile(r"\A.*</think>|<think>.*\Z", re.DOTALL)
_MARKERS = re.compile(r"<\|[^|>]*\|>|</s>")
_WRAP = r"[(\[{*_\"'`]*"  # may precede a letter
_ALONE = re.compile(
    r"(?:(?:option|choice|answer)\b\s*:?)?[\s(\[{*_\"'`]*([A-Z])[\s)\]}*_\"'`.:]*", re.IGNORECASE
)
# Where some models put their answer; the last one counts.
_BOXED = re.compile(
    r"\\boxed\s*\{\s*(?:\\(?:text|mathrm|textbf|mathbf)\s*\{)?([^{}]*)\}|<answer>(.*?)(?:</answer>|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_STATED = re.compile(
    r"\b(?:answer|option|choice)\b[\"'*_]*\s*(?:\bis\b|[:=])[\s:*_]*"
    r"(?:the\s+)?(?:(?:correct|best)\s+)?(?:(?:option|choice|letter)\b\s*:?\s*)?"
    rf"{_WRAP}(?-i:([A-Z])|(?<=[(\[{{])([a-z])(?=[)\]}}])|([a-z])(?=[.\s*_]*\Z))(?!\w)",
    re.IGNORECASE,
)
_LEADING = re.compile(
    rf"{_WRAP}([A-Za-z])[*_\"'`]*(?:[.):\]}}](?!\w)|[ \t]*\n|,(?!\s*(?:and\s+|or\s+)?\w\b))"
)
# At the start only: "neither A nor B is correct" chooses nothing.
_CORRECT = re.compile(
    rf"(?:option|choice|answer)?\s*{_WRAP}([A-Z])[)\]}}*_\"'`.:]*\s+is\s+(?:the\s+)?(?:correct|right|best)\b"
    r"(?!\s+(?:if|unless|or)\b)",
    re.IGNORECASE,
)
# "A" as an article: a word follows that does not start a reason.
_ARTICLE = re.compile(r"\s+(?!(?:because|since|as|and|or|is|for|due)\b)[a-z]")


def strict(reply: str, question: Question) -> str | None:
    r"""The letter that a reply chooses, by the first rule that applies:

    1. reasoning (`<think>`) and chat markers are removed, and of `\boxed{...}` or `<answer>...</answer>` only
       the content is kept;
    2. the reply is one letter, possibly in brackets, followed by a dot or colon, or preceded by "Option";
    3. the last letter stated to be the answer, option or choice ("the answer is (C)"), or else a letter at the
       start that "is correct";
    4. a letter at the start, followed by a dot, bracket, colon, comma or line end;
    5. the text of exactly one option equals the reply, or occurs in it;
    6. otherwise None, as for letters that the question does not have.

    "A" before a noun is an article, and "I" a pronoun unless it is one of the question's letters.
    """
    text = _MARKERS.sub("", _THINKING.sub("", reply)).strip()
    if boxed := [a or b for a, b in _BOXED.findall(text) if (a or b).strip()]:
        text = boxed[-1].strip()
    found = ""
    if alone := _ALONE.fullmatch(text):
        found = alone[1]
    elif stated := [match for match in _STATED.finditer(text) if not _is_word(match, question)]:
        found = next(filter(None, stated[-1].groups()))
    elif correct := _CORRECT.match(text):
        found = correct[1]
    elif leading := _LEADING.match(text):
        found = leading[1]
    if found:
        return found.upper() if found.upper() in question.letters else None
    words = f" {normalise(text)} "
    options = {letter: f" {normalise(o)} " for letter, o in question.lettered.items()}
    for fits in (
        [letter for letter, option in options.items() if option == words],
        [letter for letter, option in options.items() if option.strip() and option in words],
    ):
        if len(fits) == 1:
            return fits[0]
    return None


def _is_word(match: re.Match[str], question: Question) -> bool:
    if match[1] == "A":
        return _ARTICLE.match(match.string, match.end()) is not None
    return match[1] == "I" and "I" not in question.letters


def exact(reply: str, question: Question) -> str | None:
    """The reply, ignoring case and punctuation; for multiple choice, its letter if it is a letter, an option or both."""
    text = normalise(reply)
    for letter, option in question.lettered.items():
        if text in (letter.lower(), normalise(option), f"{letter.lower()} {normalise(option)}"):
            return letter
    if not question.options and question.answer and text == normalise(question.answer):
        return question.answer
    return text or None


_STATEMENTS = (
    "answer is", "correct answer is", "best answer is", "correct option is", "best option is",
    "choice is", "correct choice is",
)  # fmt: skip
_PHRASES = (
    *_STATEMENTS, *(f"the {phrase}" for phrase in _STATEMENTS), "i choose", "i select", "i pick", "my answer is",
    "my choice is", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


def extract_mcq(letters: str) -> Parser:
    """The letter in the highest-ranked of several forms; the last one of equal rank."""

    def parse(reply: str, question: Question) -> str | None:
        text = reply.strip()
        for mark in ",.!?;:'\"":
            text = text.strip(mark)
        text = f" {text} "
        found = [(*place, letter) for letter in letters for place in _places(text, letter)]
        if not found:
            found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
        return max(found, key=lambda item: item[:2])[2] if found else None

    return parse


def _places(text: str, letter: str) -> Iterator[tuple[int, int]]:
    """Occurrences of a letter in `text`, which is padded with spaces: (rank of the form, position)."""
    forms = {f"({letter})": 6, f"{letter}.": 5, f"{letter}:": 4, f"{letter})": 3, f"{letter} ": 2}
    for form, rank in forms.items():
        if form in text:
            yield rank, text.rfind(form)
    for phrase in _PHRASES:
        at = text.lower().find(phrase)
        position = text.find(letter, at + len(phrase)) if at >= 0 else -1
        if position >= 0:
            yield 7, position
    bare = text.strip()
    if bare.startswith(letter) and not bare[1:2].isalpha():
        yield 10, 0
    if bare.endswith(letter) and not bare[-2:-1].isalpha():
        yield 9, len(text) - 1


def mmmu(reply: str, question: Question) -> str | None:
    """The letter whose last occurrence comes first; for more than five words, otherwise the option that occurs."""
    text = reply
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    forms = ("({})", "{} ", "{}.")
    found = [
        (text.rfind(form.format(letter)), letter)
        for form in forms
        for letter in question.letters
        if form.format(letter) in text
    ]
    if not found and len(text.split()) > 5:
        lines = question.lines or question.options
        found = [
            (text.lower().rfind(line.strip().lower()), letter)
            for letter, line in zip(question.letters, lines, strict=True)
            if line.strip().lower() in text.lower()
        ]
    return min(found, key=lambda item: item[0])[1] if found else None


def letter_in_text(reply: str, question: Question) -> str | None:
    """The first A to E, in either case, that is a word; otherwise the cleaned reply."""
    if option := re.match(r"([A-E])\.\s*(.+)$", reply.strip(), re.IGNORECASE):
        return option[1].upper()
    text = reply.replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        near_space = f"{mark} " in spaced or f" {mark}" in spaced
        is_number = re.search(r"\d,\d", spaced) is not None
        text = text.replace(mark, "" if near_space or is_number else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=re.UNICODE)
    text = text.strip("'").strip('"').strip(")").strip("(").strip().lower()
    letter = re.search(r"\b([A-E])\b", text, re.IGNORECASE)
    return letter[1].upper() if letter else text or None


_PREFIXES = (
    "The best answer is", "The correct answer is", "The answer is", "The answer",
)  # fmt: skip
_LMMS_PREFIXES = (
    *_PREFIXES, "The best option is", "The correct option is", "Best answer:", "Best option:",
)  # fmt: skip
# The authors' lists lack two commas.
_VIDEOMME_PREFIXES = (
    *_PREFIXES, "The best option isThe correct option is", "Best answer:Best option:",
)  # fmt: skip
_VLM_PREFIXES = (*_VIDEOMME_PREFIXES, "Answer:", "Option:")


def _first_letter(letters: str, prefixes: tuple[str, ...]) -> Parser:
    def parse(reply: str, question: Question) -> str | None:
        text = reply.strip()
        for prefix in prefixes:
            text = text.replace(prefix, "")
        letter = re.search(f"[{letters}]", text)
        return letter[0] if letter else None

    return parse


# The first of the letters, even inside a word.
first_letter: Parser = _first_letter("ABCDE", _LMMS_PREFIXES)
first_letter_videomme: Parser = _first_letter("ABCD", _VIDEOMME_PREFIXES)


def first_letter_vlm(letters: str) -> Parser:
    """Like `first_letter`, with other prefixes removed first."""
    return _first_letter(letters, _VLM_PREFIXES)


def before_bracket(reply: str, question: Question) -> str | None:
    """The character before the first closing bracket; without one, the whole reply."""
    return _before_bracket(reply) or None


def before_bracket_vlm(reply: str, question: Question) -> str | None:
    """The right one of `before_bracket` and `_infer`, or else the first that is one of the letters."""
    found = _before_bracket(reply), _infer(reply, question)
    if question.answer and question.answer in found:
        return question.answer
    return next((letter for letter in found if letter and letter in question.letters), None)


def check_answer(reply: str, question: Question) -> str | None:
    """The right letter if the first word of the reply contains "(a)" or is contained in it, so that an empty
    reply, "(" and "." count as right. Otherwise a letter for which that is so."""
    return _checked(reply, question, lambda letter: _contains(reply, letter))


def check_answer_vlm(reply: str, question: Question) -> str | None:
    """Like `check_answer`; also accepts the letter that `_infer` returns."""
    inferred = _infer(reply, question)
    return _checked(reply, question, lambda x: _contains(reply, x) or inferred == x)


def _checked(reply: str, question: Question, fits: Callable[[str], bool]) -> str | None:
    key = question.answer or ""
    order = sorted(question.letters, key=lambda letter: letter != key)
    return next((letter for letter in order if fits(letter)), None)


def _contains(reply: str, letter: str) -> bool:
    first, key = reply.lower().split(" ")[0], f"({letter.lower()})"
    return first.replace(".", "") in key or key in first


def _before_bracket(reply: str) -> str:
    if ")" not in reply:
        return reply
    at = reply.index(")")
    return reply[at - 1 : at] if at else ""


def _infer(reply: str, question: Question) -> str | None:
    """VLMEvalKit's inference without a judge: the only letter among the words, unless it is one of the last
    five words; otherwise the only option that occurs in the reply, if the reply is short."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", reply).split()
    letters = [letter for letter in question.letters if letter in words]
    if len(letters) == 1 and words.index(letters[0]) < len(words) - 5:
        return letters[0]
    text = reply.lower()
    if len(text) > 2 * sum(map(len, question.options)):
        return None
    fits = [letter for letter, o in question.lettered.items() if o.lower() in text]
    return fits[0] if len(fits) == 1 else None


def normalise(text: str) -> str:
    """NFKC, lower case, no punctuation, single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w\s]", " ", text).split())
