"""Parsers: ours, and those that reproduce other scorers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storm_jax.evals import parsing
from storm_jax.evals.benchmark import Question
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.media.media import Media


def question(options=("red car", "blue boat", "a man", "dog"), answer="B") -> Question:
    return Question(
        id="1",
        video="v",
        media=Media(kind="video", name="v"),
        text="?",
        options=tuple(options),
        answer=answer,
        groups={},
    )


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), ("b", "B"), (" (C) ", "C"), ("D.", "D"), ("A:", "A"), ("**B**", "B"),
        (r"\boxed{B}", "B"), (r"So $\boxed{\text{C}}$.", "C"), (r"\boxed{A}, no, \boxed{(D)}", "D"),
        ("<answer>B</answer>", "B"), ("A? <answer> (C). a man </answer> D", "C"), ("<answer>B", "B"),
        ("<answer></answer>", None), (r"\boxed{E}", None), (r"\boxed{7}", None),
        ("B is correct.", "B"), ("Option (C) is the best answer.", "C"), ("**D** is right", "D"),
        ("Neither A nor B is correct.", None), ("B is incorrect.", None), ("B is not correct.", None),
        ("B is correct if it rains, D otherwise", None), ("A is wrong. B is wrong.", None),
        ('{"answer": "B"}', "B"), ("**Answer:** B", "B"), ("the answer is b", "B"),
        ("the answer is a", "A"), ("the answer is a mystery", None), ("The answer is i.", None),
        ("A man and a dog. The answer is (C).", "C"),
        ("The answer is B because A is wrong", "B"),
        ("Answer: B", "B"), ("Answer: option D.", "D"), ("the best option is: **C**", "C"),
        ("The answer is A. No, the correct answer is D.", "D"),
        ("the answer is (b)", "B"),
        ("B. red car", "B"), ("C) it is", "C"), ("(D) dog", "D"), ("B: boat", "B"),
        ("red car", "A"), ("It is the Red Car!", "A"), ("I think of a blue boat here", "B"),
        ("Option B", "B"), ("( C )", "C"), ("C\n\nThe man sits down.", "C"), ("B, because it floats", "B"),
        ("Answer: I believe C.", None), ("The answer is A man running", "C"),
        ("The answer is A because it is red", "A"), ("A, B and C are wrong", None),
        ("A, B", None), ("I choose it", None),
        ("<think>Answer: A</think>C", "C"), ("thinking: A</think>D<|im_end|>", "D"),
        ("", None), ("E", None), ("The answer is F", None), ("The answer is A, no: answer is F", None),
        ("red car and dog", None), ("neither", None), ("<think>the answer is A", None),
        ("A man walks", "C"), ("the answer is blue", None), ("Based on it, cars", None),
    ],
)  # fmt: skip
def test_the_strict_parser_takes_only_what_is_stated(reply, letter):
    assert parsing.strict(reply, question()) == letter


def test_letters_are_those_of_the_row():
    three = question(("x", "y", "z"), "A")
    assert parsing.strict("D", three) is None
    assert parsing.strict("F", question("uvwxyz", "F")) == "F"
    assert parsing.strict("A", question((), "A")) is None


@given(st.text(max_size=60), st.integers(0, 6))
def test_no_reply_is_too_strange(reply, count):
    asked = question(tuple("uvwxyz"[:count]), "A" if count else "u")
    assert parsing.strict(reply, asked) in (None, *asked.letters)
    for benchmark in BENCHMARKS.values():
        for parse in benchmark.parsers.values():
            parsed = parse(reply, asked)
            assert parsed is None or (parsed and isinstance(parsed, str))
            assert parse(reply, asked) == parsed  # nothing is drawn


@given(
    st.sampled_from("ABCD"),
    st.sampled_from(["{}", "({})", "{}.", "The answer is {}", "Answer: {}"]),
)
def test_plain_replies_are_understood(letter, form):
    assert parsing.strict(form.format(letter), question()) == letter


# Found by running these scorers.
@pytest.mark.parametrize(
    ("parser", "reply", "letter"),
    [
        (parsing.extract_mcq("ABCD"), "A man and a dog. The answer is (C).", "A"),
        (parsing.extract_mcq("ABCD"), "b", None),
        (parsing.extract_mcq("ABCD"), "The answer is B because A is wrong", "A"),
        (parsing.extract_mcq("ABCD"), "E", None),
        (parsing.extract_mcq("ABCD"), "I would say (B), for sure", "B"),
        (parsing.extract_mcq("ABCD"), "It must be C", "C"),
        (parsing.extract_mcq("ABCD"), "", None),
        (parsing.first_letter, "Answer: B", "A"),
        (parsing.first_letter, "Based on the video, C", "B"),
        (parsing.first_letter, "Correct answer: D", "C"),
        (parsing.first_letter, "The best option is D", "D"),
        (parsing.first_letter, "nothing", None),
        (parsing.first_letter_vlm("ABCDE"), "Best answer: C", "B"),
        (parsing.first_letter_vlm("ABCDE"), "Answer: C", "C"),
        (parsing.first_letter_videomme, "Answer: C", "A"),
        (parsing.check_answer, "", "B"), (parsing.check_answer, "(", "B"),
        (parsing.check_answer, ".", "B"), (parsing.check_answer, "(b) blue", "B"),
        (parsing.check_answer, "B", "B"), (parsing.check_answer, "C", "C"),
        (parsing.check_answer, "The answer is (B)", None),
        (parsing.check_answer_vlm, "The answer is (B)", None),
        (parsing.check_answer_vlm, "it is the blue boat", "B"),
        (parsing.before_bracket, "B) blue", "B"), (parsing.before_bracket, "B", "B"),
        (parsing.before_bracket, "the answer is (C)", "C"), (parsing.before_bracket, ")", None),
        (parsing.before_bracket, "B.", "B."),
        (parsing.before_bracket_vlm, "a blue boat", "B"),
        (parsing.letter_in_text, "(B)", "B"), (parsing.letter_in_text, "b. blue", "B"),
        (parsing.letter_in_text, "It is a car", "A"), (parsing.letter_in_text, "blue", "blue"),
        (parsing.mmmu, "B", "B"), (parsing.mmmu, "(C) or so", "C"), (parsing.mmmu, "blue", None),
        (parsing.mmmu, "I can see the blue boat over there", "B"),
    ],
)  # fmt: skip
def test_other_scorers_are_copied_with_their_faults(parser, reply, letter):
    assert parser(reply, question()) == letter


def test_no_parser_needs_a_key():
    """No reply is right if no option is; if the answer is not public, replies are still parsed."""
    for benchmark in BENCHMARKS.values():
        for name, parse in benchmark.parsers.items():
            for reply in ("", "(", "B", "B) boat"):
                assert parse(reply, question(answer="")) != "", name
            if (benchmark.name, name) not in {("shapes", "exact"), ("streamingbench", "official")}:
                assert parse("(B)", question(answer=None)) == "B", name


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("top left", True),
        (" Top-Left. ", True),
        ("top", False),
        ("top left left", False),
        ("", False),
    ],
)
def test_free_answers_match_but_for_case_and_punctuation(text, right):
    assert (parsing.exact(text, question((), "top left")) == "top left") == right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", True), ("b.", True), ("(B)", True), ("3", True), ("B. 3", True),
        ("A", False), ("A. 3", False), ("B. 2", False), ("AB", False), ("", False),
    ],
)  # fmt: skip
def test_choices_match_by_letter_or_option_and_not_by_both_at_odds(text, right):
    assert (parsing.exact(text, question(("2", "3", "1", "4"), "B")) == "B") == right
