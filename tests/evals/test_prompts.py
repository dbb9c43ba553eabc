"""Every prompt of every benchmark and style, byte for byte."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import NamedTuple

import benchmark_trees as trees
import numpy as np
import pytest
from benchmark_trees import Videos

from storm_jax.evals.benchmark import BenchmarkError
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.text.sample import Caption, Sample


class Prompt(NamedTuple):
    """The text of a sample."""

    user: str
    system: str = ""
    opening: str = ""

    @classmethod
    def of(cls, sample: Sample) -> Prompt:
        turns = {turn.role: turn.text for turn in sample.turns}
        assert [turn.role for turn in sample.turns] == ["system", "user"][-len(turns) :]
        return cls(turns["user"], turns.get("system", ""), sample.opening)


SELECT = "Select the best answer to the following multiple-choice question based on the video"
LETTER = "Respond with only the letter (A, B, C, or D) of the correct option.\n"
FOUR = "A. red car\nB. blue boat\nC. green tree\nD. white house\n"
VIDEOMME_AUTHORS = f"<video>\n{SELECT}. {LETTER}What is 1?\n{FOUR}The best answer is:"
MVBENCH_SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and "
    "movement of objects, and the action and pose of persons. Based on your observations, select the "
    "best option that accurately addresses the question.\n"
)
MLVU_SYSTEM = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, select "
    "the best option that accurately addresses the question."
)
BRACKETS = "(A) red car\n(B) blue boat\n(C) green tree\n(D) white house"
MVBENCH_LMMS = (
    "<video>\nQuestion:What happens in action_sequence 1?\nOption:\n"
    f"{BRACKETS}\nOnly give the best option.\n"
)
MLVU_LMMS = f"<video>\nWhat about ego 1?\n{BRACKETS}\nOnly give the best option.\nBest option: ("
SIX = f"<video>\nWhat about ego 1?\n{BRACKETS}\n(E) black dog\n(F) grey cat"
MVBENCH_ASKED = f"Question: What happens in action_sequence 1?\nOptions:\n{BRACKETS}"
MLVU_ASKED = f"Question: What about ego 1?\nOptions:\n{BRACKETS}"
LVB_ASKED = (
    "When the text 1 appears, what is there?\n"
    "A. red car\nB. blue boat\nC. green tree\nD. white house\n"
    "Answer with the option's letter from the given choices directly."
)
EGO_OPTIONS = "A. red car\nB. blue boat\nC. green tree\nD. white house\nE. black dog\n"
DIRECTLY = "nswer with the option's letter from the given choices directly."
ASSISTANT = (
    "You are an advanced video question-answering AI assistant. You have been provided with "
)
CHOOSE = (
    "choosing from the four options provided. Respond with only the letter (A, B, C, or D) of the "
    "correct option.\n\n"
)
WHOLE_OPTIONS = f"Options:\n{FOUR}\nThe best option is:"
ONLY = "Do not include any additional text or explanation in your response.\n"
STREAMING = {
    ("streamingbench_authors", "real", 1, "official"): Prompt(
        f"<video>\n{ASSISTANT}some frames from the video and a multiple-choice question related to the "
        "video. Your task is to carefully analyze the video and provide the best answer to question, "
        f"{CHOOSE}Question: What is 1?\n\n{WHOLE_OPTIONS}"
    ),
    ("streamingbench_unpacked", "sqa", 1, "official"): Prompt(
        f"<video>\n{ASSISTANT}a video and a multiple-choice question related to the video. Your task is "
        "to carefully analyze the video and the provided context to answer the question, "
        f"{CHOOSE}Here are the contextual information related to the video. Please answer the questions "
        "based on the contextual information: At timestamp 00:00:02, the following question and answer "
        "occurred: Question: What is 0?; Options: A. red car, B. blue boat, C. green tree, D. white "
        "house; Answer: A; \n\nHere is the question. Answer it and don't confuse it with the previous "
        f"conversation.\nQuestion: What is 1?\n\n{WHOLE_OPTIONS}"
    ),
    ("streamingbench_unpacked", "proactive", 1, "official"): Prompt(
        "<video>\nYou are an advanced image question-answering AI assistant. You have been provided with "
        "images and a question related to the images. Your task is to carefully analyze the images and "
        "provide the answer to the question. You need to carefully confirm whether the images content "
        "meet the conditions of the question, and then output the correct content.\n\n"
        'Question: When 1 appears, output "1".\n\nThe answer is:\n'
    ),
    ("ovobench_whole", "test", 1, "official"): Prompt(
        "<video>\n\nQuestion: What is 1?\nOptions:\nA. red car; B. blue boat; C. green tree;\n\n"
        f"Respond only with the letter corresponding to your chosen option (e.g., A, B, C). \n{ONLY}"
    ),
    ("ovobench_chunks", "test", 7, "official"): Prompt(
        "<video>\n\nYou're watching a video in which people may perform a certain type of action "
        "repetively. \nThe person performing this kind of action are referred to as 'they' in the "
        "following statement.\nYou're task is to count how many times have different people in the "
        "video perform this kind of action in total.\nOne complete motion counts as one. \n"
        "Now, answer the following question: How many times did they jump?\nProvide your answer as a "
        f"single number (e.g., 0, 1, 2, 3…) indicating the total count.\n{ONLY}"
    ),
    ("ovobench_whole", "test", 9, "official"): Prompt(
        "<video>\n\nYou're watching a tutorial video which contain a sequential of steps. \nThe "
        "following is one step from the whole procedures: \nmix\nYour task is to determine if the man "
        "or woman in the video is currently performing this step.\n"
        f"Answer only with “Yes” or “No”.\n{ONLY}"
    ),
    ("ovobench_whole", "test", 12, "official"): Prompt(
        "<video>\n\nYou're responsible of answering questions based on the video content. \nThe "
        "following question are relevant to the latest frames, i.e. the end of the video.\nWhere is "
        "it?\nDecide whether existing visual content, especially latest frames, i.e. frames that near "
        "the end of the video, provide enough information for answering the question.\n"
        f"Answer only with “Yes” or “No”.\n{ONLY}"
    ),
}
GOLDEN = {
    **STREAMING,
    ("videomme_hub", "test", 1, "vila"): Prompt(VIDEOMME_AUTHORS),
    ("videomme_hub", "test", 1, "official"): Prompt(VIDEOMME_AUTHORS),
    ("videomme_flat", "test", 1, "vila"): Prompt(VIDEOMME_AUTHORS),
    ("videomme_hub", "test", 1, "lmms"): Prompt(
        f"<video>\n{SELECT} and the subtitles. {LETTER}What is 1?\n{FOUR}\nA{DIRECTLY}"
    ),
    ("videomme_hub", "test", 1, "vlmevalkit"): Prompt(
        f"<video>\nThese are the frames of a video. {SELECT}. {LETTER}"
        f"Question: What is 1?\n{FOUR}Answer: "
    ),
    **{
        (layout, "subset", 1, style): Prompt(text)
        for layout in ("egoschema_authors", "egoschema_hub")
        for style, text in (
            (
                "vila",
                f"<video>\nWatching the video and a{DIRECTLY}What does C do, 1?\n{EGO_OPTIONS}",
            ),
            ("lmms", f"<video>\nWhat does C do, 1?\n{EGO_OPTIONS}A{DIRECTLY}"),
        )
    },
    ("mvbench_main", "test", 1, "vila"): Prompt(MVBENCH_LMMS),
    ("mvbench_main", "test", 1, "lmms"): Prompt(MVBENCH_LMMS),
    ("mvbench_main", "test", 1, "vlmevalkit"): Prompt(
        f"{MVBENCH_ASKED}<video>\nOnly give the best option.", MVBENCH_SYSTEM
    ),
    ("mvbench_main", "test", 1, "official"): Prompt(
        f"<video>\n{MVBENCH_ASKED}\nOnly give the best option.", MVBENCH_SYSTEM, "Best option:("
    ),
    **{
        (layout, "dev", 11, style): prompt
        for layout in ("mlvu_dev_authors", "mlvu_dev_hub")
        for style, prompt in (
            ("vila", Prompt(MLVU_LMMS)),
            ("lmms", Prompt(MLVU_LMMS)),
            (
                "vlmevalkit",
                Prompt(f"{MLVU_ASKED}<video>\nOnly give the best option.", MLVU_SYSTEM),
            ),
            (
                "official",
                Prompt(
                    f"<video>\n{MLVU_ASKED}\nOnly give the best option.",
                    MLVU_SYSTEM,
                    "Best Option: (",
                ),
            ),
        )
    },
    ("mlvu_test", "test", 9, "vila"): Prompt(SIX),
    ("mlvu_test", "test", 9, "lmms"): Prompt(SIX),
    ("mlvu_generation", "generation", 1, "vila"): Prompt(
        "<video>\nDescribe 1.",
        "Carefully watch this video and pay attention to every detail. Based on your observations, "
        "answer the given questions.",
    ),
    **{
        (layout, "val", 1, style): Prompt(text)
        for layout in ("longvideobench_authors", "longvideobench_hub")
        for style, text in (
            ("vila", f"<video>\n{LVB_ASKED}\n"),
            ("lmms", f"<video>\n{LVB_ASKED}\n"),
            ("vlmevalkit", f"<video>{LVB_ASKED}"),
            ("official", f"<video>\nQuestion: {LVB_ASKED}"),
        )
    },
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, pathlib.Path]:
    videos = Videos(tmp_path_factory.mktemp("video"))
    roots = {}
    for name in {key[0] for key in GOLDEN}:
        roots[name] = tmp_path_factory.mktemp(name)
        getattr(trees, name)(roots[name], videos)
    return roots


@pytest.mark.parametrize("key", list(GOLDEN), ids=lambda key: f"{key[0]}-{key[2]}-{key[3]}")
def test_prompts_are_those_of_the_style(key, roots):
    layout, split, row, style = key
    benchmark = BENCHMARKS[layout.partition("_")[0]]
    question = benchmark.questions(roots[layout], split)[row]
    sample = benchmark.prompts[style](question)
    assert Prompt.of(sample) == GOLDEN[key]
    assert (sample.id, sample.media, sample.captions) == (question.id, (question.media,), ())


def test_every_style_has_a_golden_prompt():
    said = {(key[0].partition("_")[0], key[3]) for key in GOLDEN}
    there = {
        (name, style)
        for name, benchmark in BENCHMARKS.items()
        for style in benchmark.prompts
        if name != "shapes"
    }
    assert said == there


SHOWN = "This video's subtitles are listed below:"
SUBTITLED = {
    "vila": f"<video>\n{SHOWN}\nHi\nyou\n{SELECT} and the subtitles. {LETTER}",
    "official": f"<video>\n{SHOWN}\nHi\nyou\n{SELECT} and the subtitles. {LETTER}",
    "lmms": f"<video>\n{SHOWN} \nHi\nyou\n{SELECT} and the subtitles. {LETTER}",
    "vlmevalkit": f"<video>\nThese are the frames of a video. {SHOWN}\nHi\nyou\n{SELECT}. {LETTER}",
}
WITHOUT = {
    "vila": f"<video>\n{SELECT}. {LETTER}",
    "official": f"<video>\n{SELECT}. {LETTER}",
    "lmms": f"<video>\n{SHOWN} \nNo subtitles available\n{SELECT} and the subtitles. {LETTER}",
    "vlmevalkit": f"<video>\nThese are the frames of a video. {SHOWN}\n\n{SELECT}. {LETTER}",
}
ENDS = {"vlmevalkit": f"Question: What is 1?\n{FOUR}Answer: "}


@pytest.mark.parametrize("style", list(SUBTITLED))
def test_subtitles_are_placed_as_in_the_style(style, roots):
    benchmark = BENCHMARKS["videomme"]
    question = benchmark.questions(roots["videomme_hub"], "test")[1]
    prompt = benchmark.prompts[style]
    end = ENDS.get(style, f"What is 1?\n{FOUR}The best answer is:")
    said = dataclasses.replace(question, captions=(Caption(0, "Hi"), Caption(1, "you")))
    assert Prompt.of(prompt(said)) == Prompt(SUBTITLED[style] + end)
    without = prompt(dataclasses.replace(question, captions=()))
    assert Prompt.of(without) == Prompt(WITHOUT[style] + end)
    assert prompt(said).captions == ()


def test_only_subtitles_of_sampled_frames_are_shown(roots):
    benchmark = BENCHMARKS["videomme"]
    questions = benchmark.questions(roots["videomme_hub"], "test")
    times = np.array([0.0, 0.5, 1.0 - 1e-9, 1.3, 1.75])
    said = [caption.text for caption in benchmark.captions(questions[0], times)]
    assert said == ["Good morning.", "Good night."]
    assert benchmark.captions(questions[0], np.array([0.95])) == []
    assert benchmark.captions(questions[3], times) == []  # this video has no file


def test_subtitles_of_longvideobench_are_placed_by_time(roots):
    """Both line formats; times count from `starting_timestamp_for_subtitles`; frames are at 0, 2, 4, 6 and 8
    seconds."""
    root = roots["longvideobench_authors"]
    rows = trees.longvideobench_rows("val")[:2]
    rows[0] |= {"starting_timestamp_for_subtitles": 10, "duration": 20}
    rows[1] |= {"subtitle_path": "none.json"}
    lines = [
        {"timestamp": [11.9, 12.3], "text": "short, at 2.1"},
        {"timestamp": [12.6, 12.8], "text": "between frames"},
        {"start": "00:00:13.500", "end": "00:00:14.500", "line": "at <image>4"},
        {"timestamp": [17.5, None], "text": "to the end"},
    ]
    trees.write_json(root / "more/lvb_val.json", rows)
    trees.write_json(root / "more/subtitles/lv-0_en.json", lines)
    benchmark = BENCHMARKS["longvideobench"]
    first, second = benchmark.questions(root / "more", "val")
    times = np.array([0.0, 2.0, 4.0, 6.0, 8.0])
    found = benchmark.captions(first, times)
    assert [caption.text for caption in found] == ["short, at 2.1", "at 4", "to the end"]
    np.testing.assert_allclose([caption.time for caption in found], [2.1, 4.0, 8.75])
    assert benchmark.captions(second, times) == []
    for prompt in benchmark.prompts.values():
        captioned = prompt(dataclasses.replace(first, captions=tuple(found)))
        assert captioned.captions == tuple(found)
        assert dataclasses.replace(captioned, captions=()) == prompt(first)


def test_placeholders_in_a_benchmarks_text_are_removed(tmp_path):
    rows = trees.longvideobench_rows("val")[:1]
    rows[0] |= {
        "question": "What <video> is <image>?",
        "candidates": ["<image>x", "y", "z", "u", "v"],
    }
    trees.write_json(tmp_path / "lvb_val.json", rows)
    (question,) = BENCHMARKS["longvideobench"].questions(tmp_path, "val")
    prompt = BENCHMARKS["longvideobench"].prompts["vila"](question)
    assert Prompt.of(prompt).user.startswith("<video>\nWhat  is ?\nA. x\nB. y")


def test_unknown_styles_parsers_and_splits_are_refused():
    with pytest.raises(BenchmarkError, match="--prompt_style=official: EgoSchema has vila, lmms"):
        BENCHMARKS["egoschema"].pick_prompt("official")
    with pytest.raises(BenchmarkError, match="--parser=official: EgoSchema has strict, lmms"):
        BENCHMARKS["egoschema"].pick_parser("official", "vila")
    with pytest.raises(BenchmarkError, match="--split=val: MLVU has dev, test, generation"):
        BENCHMARKS["mlvu"].pick_split("val")
    assert BENCHMARKS["mlvu"].pick_parser("", "vila") == "strict"
    assert BENCHMARKS["mlvu"].pick_parser("", "official") == "official"
