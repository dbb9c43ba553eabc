"""Thumbnails, the contact sheet and report.html, for any text of questions and replies."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import benchmark_trees as trees
import numpy as np
import pytest
from benchmark_trees import FakeModel, Videos
from PIL import Image

from storm_jax import evals
from storm_jax.config import CompressionConfig
from storm_jax.evals.benchmark import Question, ScoredReply
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.evals.report import contact_sheet, html
from storm_jax.evals.report.thumbnails import Thumbnails, read_thumbnails
from storm_jax.evals.runner import run_benchmark
from storm_jax.evals.scoring import score
from storm_jax.evals.settings import EvalSettings
from storm_jax.inference.prediction import Prediction
from storm_jax.media.frames import Clip
from storm_jax.media.media import Media

BENCHMARK = BENCHMARKS["longvideobench"]
STRIP = Thumbnails.of(Clip(np.zeros((8, 16, 16, 3), np.uint8), np.arange(8.0)), "video")
STILL = Thumbnails.of(Clip(np.zeros((1, 16, 16, 3), np.uint8), np.zeros(1)), "image")


def reply(number: int, text: str, *, group="g", answer="A", said="A", video=None) -> ScoredReply:
    question = Question(
        id=f"q{number}",
        video=video or f"v{number}",
        media=Media(kind="video", name="v"),
        text=text,
        options=("x", text),
        answer=answer,
        groups={"duration_group": group},
    )
    return ScoredReply(question, Prediction(text=said), said if said in ("A", "B") else None)


class Page(HTMLParser):
    """A parsed page: the attributes and text of each question, and all tags."""

    def __init__(self, text: str):
        super().__init__()
        self.questions: list[dict] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "section":
            self.questions.append(attributes | {"text": ""})

    def handle_data(self, data):
        if self.questions:
            self.questions[-1]["text"] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def render(replies, thumbnails) -> Page:
    scores = score(BENCHMARK, "val", replies, len(replies))
    return Page(html.render_report(BENCHMARK, "val", replies, scores, {"step": 3}, thumbnails))


def test_thumbnails_are_small_and_come_back(tmp_path):
    frames = np.zeros((10, 256, 256, 3), np.uint8)
    frames[:, :, :, 0] = np.arange(10)[:, None, None] * 25
    made = Thumbnails.of(Clip(frames, np.linspace(0, 7.126, 10)), "video")
    assert made.times[-1] == 7.13 and len(made.jpeg) < 50_000
    assert made.grid == (8, 2)
    grid = np.asarray(Image.open(io.BytesIO(made.jpeg)))
    assert grid.shape == (2 * 96, 8 * 96, 3)
    reds = grid[..., 0].reshape(2, 96, 8, 96).mean(axis=(1, 3)).ravel()
    np.testing.assert_allclose(reds[:10], np.arange(10) * 25, atol=4)
    assert Thumbnails.from_fields(made.to_fields()) == made
    assert STILL.times == () and Image.open(io.BytesIO(STILL.jpeg)).size == (16, 16)


def test_wrong_replies_come_first_and_are_spread_over_groups():
    right = [reply(i, "?", group=f"g{i % 3}") for i in range(30)]
    wrong = [reply(30 + i, "?", group=f"g{i // 10}", said="B") for i in range(30)]
    chosen = contact_sheet.choose_replies([*right, *wrong])
    assert [r.right for r in chosen] == [False] * 12 + [True] * 4
    groups = [r.question.groups["duration_group"] for r in chosen]
    assert groups[:12] == ["g0"] * 4 + ["g1"] * 4 + ["g2"] * 4
    assert sorted(groups[12:]) == ["g0", "g0", "g1", "g2"]
    few = contact_sheet.choose_replies([*right, *wrong[:2]])
    assert [r.right for r in few] == [False] * 2 + [True] * 14


def test_images_share_a_row_and_videos_do_not():
    replies = [reply(i, "?", said="A" if i > 4 else "B") for i in range(10)]
    strips = {f"q{i}": STRIP if i in (2, 6) else STILL for i in range(10)}
    rows = contact_sheet.arrange(replies, strips)
    numbers = [[r.question.id for r in row] for row in rows]
    assert numbers == [["q2"], ["q0", "q1", "q3", "q4"], ["q6"], ["q5", "q7", "q8", "q9"]]


def test_texts_of_any_kind_and_length_are_drawn(tmp_path):
    texts = [
        "",
        "$5 or $\\frac{",
        "word " * 400,
        "\n\n<video>\n",
        "x" * 500,
        "{}%_^&",
        "多语言 🎬",
        "\ud83d\x00",
    ]
    replies = [reply(i, text, group=text, said=text) for i, text in enumerate(texts)]
    strips = {r.question.id: STRIP if i % 3 else STILL for i, r in enumerate(replies)}
    (tmp_path / "page.html").write_text(
        "".join(q["text"] for q in render(replies, strips).questions)
    )
    contact_sheet.draw_contact_sheet(tmp_path / "sheet.png", replies, strips)
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width == 1210 and 1000 < height < 3000


def test_everything_from_data_is_escaped():
    attack = "<script>alert('x')</script>\"'&<img src=x onerror=alert(1)>"
    replies = [reply(0, attack, group=attack, said=attack, video=attack)]
    page = render(replies, {"q0": STRIP})
    assert page.count("script") == 1 and page.count("img") == 1
    assert not any("onerror" in attributes for _, attributes in page.tags)
    (question,) = page.questions
    assert question["data-video"] == attack
    assert question["text"].count(attack) == 4  # group, question, option, reply


def test_questions_carry_what_the_filters_look_for():
    failed = Prediction(error="video v is gone", cause="missing")
    replies = [
        reply(0, "first?", group="15", video="a"),
        reply(1, "second?", group="60", said="B", video="a"),
        reply(2, "third?", group="15", said="none"),
        ScoredReply(reply(3, "fourth?", group="60").question, failed, None),
        reply(4, "fifth?", group="15", answer=None),
    ]
    strips = {"q0": STRIP, "q1": STRIP}
    page = render(replies, strips)
    statuses = ["right", "wrong", "unparsed", "missing", "unscored"]
    assert [q["data-status"] for q in page.questions] == statuses
    options = [attributes for tag, attributes in page.tags if tag == "option"]
    assert [option["value"] for option in options] == ["", "0", "1"]
    assert [q["data-groups"] for q in page.questions] == ["0", "1", "0", "1", "0"]
    boxes = [a["value"] for tag, a in page.tags if tag == "input" and a["type"] == "checkbox"]
    assert boxes == ["right", "wrong", "unparsed", "missing", "unscored"]
    assert "video v is gone" in page.questions[3]["text"]
    assert page.count("article") == 4  # two questions are about one video
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["loading"] == "lazy" and image["src"].startswith("data:image/jpeg;base64,")


def test_thumbnails_beyond_the_limit_are_dropped_for_right_answers_first(monkeypatch):
    replies = [reply(i, "?", said="AB"[i % 2]) for i in range(8)]
    monkeypatch.setattr(html, "MAX_THUMBNAIL_BYTES", 5 * len(STRIP.base64))
    strips = {r.question.id: STRIP for r in replies}
    scores = score(BENCHMARK, "val", replies, 8)
    text = html.render_report(BENCHMARK, "val", replies, scores, {}, strips)
    assert "The thumbnails of 3 videos are left out" in text
    shown = [bool(re.search("<img", card)) for card in text.split("<article")[1:]]
    assert shown == [True, True, False, True, False, True, False, True]


def test_a_report_of_thousands_of_questions_is_written_in_seconds():
    replies = [reply(i, "Why? " * 20, said="AB"[i % 2], video=f"v{i // 3}") for i in range(2700)]
    page = render(replies, {r.question.id: STRIP for r in replies})
    assert len(page.questions) == 2700 and page.count("img") == 900


@pytest.fixture
def root(tmp_path):
    trees.longvideobench_authors(tmp_path / "root", Videos(tmp_path))
    return tmp_path / "root"


def ask(root, folder, shard=(0, 1), model_type=FakeModel):
    questions = BENCHMARK.questions(root, "val")
    settings = EvalSettings(
        split="val",
        prompt_style="vila",
        compression=CompressionConfig(num_frames=8),
        max_new_tokens=8,
    )
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (8, 16, 16, 3)).astype(np.uint8)
    model = model_type(questions, trees.failing, frames)
    return run_benchmark(
        BENCHMARK, questions, settings, folder, lambda: model, identity={}, about={}, shard=shard
    )


def test_sharded_interrupted_and_rescored_evaluations_have_the_same_report(root, tmp_path):
    whole = ask(root, tmp_path / "whole")
    assert (tmp_path / "whole/contact_sheet.png").exists()
    assert ask(root, tmp_path / "shared", (1, 2)) is None
    ask(root, tmp_path / "shared", (0, 2))

    class Dying(FakeModel):
        def ask(self, batch, samples, **how):
            if batch.number == 4:
                raise KeyboardInterrupt
            yield from super().ask(batch, samples, **how)

    with pytest.raises(KeyboardInterrupt):
        ask(root, tmp_path / "resumed", model_type=Dying)
    with next((tmp_path / "resumed").glob("thumbnails.*")).open("a") as file:
        file.write('{"ids": ["lv-9_')  # an unfinished line
    ask(root, tmp_path / "resumed")
    page = (tmp_path / "whole/report.html").read_text()
    assert page.count("<img") == 12 and page.count("<section") == 24
    for name in ("shared", "resumed"):
        assert read_thumbnails(tmp_path / name) == read_thumbnails(tmp_path / "whole")
        assert (tmp_path / name / "report.html").read_text() == page
    predictions = tmp_path / "whole/predictions.jsonl"
    again = evals.score("longvideobench", predictions, out=tmp_path / "again")
    assert again.scores.headline == whole.scores.headline
    assert (tmp_path / "again/report.html").read_text().count("<img") == 12
    (tmp_path / "elsewhere.jsonl").write_text(predictions.read_text())
    evals.score("longvideobench", tmp_path / "elsewhere.jsonl", out=tmp_path / "bare")
    bare = (tmp_path / "bare/report.html").read_text()
    assert bare.count("<img") == 0 and bare.count("<section") == 24
