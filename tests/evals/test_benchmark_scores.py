"""Each benchmark in each layout: fake models get the scores that follow from the authors' rules, counted by
hand."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import benchmark_trees as trees
import numpy as np
import pytest
from benchmark_trees import FakeModel, Videos, always_a, failing, oracle, rambler

from storm_jax.config import CompressionConfig
from storm_jax.evals.benchmark import BenchmarkError
from storm_jax.evals.benchmarks import BENCHMARKS
from storm_jax.evals.checks import check_questions
from storm_jax.evals.runner import run_benchmark
from storm_jax.evals.settings import EvalSettings
from storm_jax.media.frame_folder import frame_files
from storm_jax.media.media import Media, MediaError
from storm_jax.media.read import read_media


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    """A benchmark on disk, and the number of right replies per group for each fake model."""

    write: str
    benchmark: str
    split: str
    sizes: dict[str, int]
    always_a: tuple[int, ...]
    oracle: tuple[int, ...]
    failing: tuple[int, ...]


_DURATIONS = {"short": 9, "medium": 9, "long": 6}
_MVBENCH = dict.fromkeys(trees.MVBENCH, 6)
_LENGTHS = dict.fromkeys(("15", "60", "600", "3600"), 6)
_EGO = {"": 20}
TREES = [
    Tree(write="videomme_hub", benchmark="videomme", split="test", sizes=_DURATIONS, always_a=(3, 2, 1), oracle=(9, 9, 6), failing=(6, 6, 4)),
    Tree(write="videomme_flat", benchmark="videomme", split="test", sizes=_DURATIONS, always_a=(3, 2, 1), oracle=(9, 9, 6), failing=(6, 6, 4)),
    Tree(write="egoschema_authors", benchmark="egoschema", split="subset", sizes=_EGO, always_a=(4,), oracle=(20,), failing=(13,)),
    Tree(write="egoschema_hub", benchmark="egoschema", split="subset", sizes=_EGO, always_a=(4,), oracle=(20,), failing=(13,)),
    Tree(write="mvbench_main", benchmark="mvbench", split="test", sizes=_MVBENCH, always_a=(2,) * 4, oracle=(6,) * 4, failing=(4,) * 4),
    Tree(write="mvbench_video", benchmark="mvbench", split="test", sizes=_MVBENCH, always_a=(2,) * 4, oracle=(6,) * 4, failing=(4,) * 4),
    Tree(
        write="mlvu_dev_authors", benchmark="mlvu", split="dev", sizes=trees.MLVU_DEV,
        always_a=(3, 1, 1, 1, 1, 1, 1), oracle=(6, 3, 2, 2, 2, 2, 4), failing=(4, 1, 2, 1, 1, 2, 2),
    ),
    Tree(
        write="mlvu_dev_hub", benchmark="mlvu", split="dev", sizes=trees.MLVU_DEV,
        always_a=(2, 1, 1, 1, 1, 1, 1), oracle=(6, 4, 2, 2, 2, 2, 4), failing=(4, 2, 2, 1, 1, 2, 2),
    ),
    Tree(
        write="mlvu_test", benchmark="mlvu", split="test", sizes=trees.MLVU_TEST,
        always_a=(1,) * 9, oracle=(6, *(2,) * 8), failing=(4, 1, 1, 2, 1, 1, 2, 1, 1),
    ),
    Tree(write="longvideobench_authors", benchmark="longvideobench", split="val", sizes=_LENGTHS, always_a=(2,) * 4, oracle=(6,) * 4, failing=(4,) * 4),
    Tree(write="longvideobench_hub", benchmark="longvideobench", split="val", sizes=_LENGTHS, always_a=(2,) * 4, oracle=(6,) * 4, failing=(4,) * 4),
]  # fmt: skip
# The headline, if it is not the mean over all questions.
MACRO = {
    ("mlvu_dev_authors", "always_a"): 3 / 7,
    ("mlvu_dev_authors", "oracle"): 6.75 / 7,
    ("mlvu_dev_authors", "failing"): (4 / 6 + 1 / 4 + 1 + 1 / 2 + 1 / 2 + 1 + 1 / 2) / 7,
    ("mlvu_dev_hub", "always_a"): (1 / 3 + 1 / 4 + 4 / 2 + 1 / 4) / 7,
    ("mlvu_dev_hub", "failing"): (4 / 6 + 1 / 2 + 1 + 1 / 2 + 1 / 2 + 1 + 1 / 2) / 7,
    ("mlvu_test", "always_a"): (1 / 6 + 8 / 2) / 9,
    ("mlvu_test", "failing"): (4 / 6 + 6 / 2 + 2) / 9,
}
MODELS = {"always_a": always_a, "oracle": oracle, "rambler": rambler, "failing": failing}


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, pathlib.Path]:
    videos = Videos(tmp_path_factory.mktemp("video"))
    roots = {}
    for name in {tree.write for tree in TREES}:
        roots[name] = tmp_path_factory.mktemp(name)
        getattr(trees, name)(roots[name], videos)
    return roots


def settings_of(benchmark, split, style="", **fields) -> EvalSettings:
    style = style or next(iter(benchmark.prompts))
    return EvalSettings(
        split=split,
        prompt_style=style,
        compression=CompressionConfig(num_frames=8, temporal_pool=4),
        max_new_tokens=16,
        **fields,
    )


def ask(tree: Tree, root, folder, reply, **options):
    benchmark = BENCHMARKS[tree.benchmark]
    questions = benchmark.questions(root, tree.split)
    model = FakeModel(questions, reply)
    report = run_benchmark(
        benchmark,
        questions,
        settings_of(benchmark, tree.split),
        folder,
        lambda: model,
        identity={},
        about={},
        **options,
    )
    return report, model


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.write)
def test_scores_are_those_of_the_authors_rules(tree, name, roots, tmp_path):
    report, model = ask(tree, roots[tree.write], tmp_path, MODELS[name])
    expected = getattr(tree, "oracle" if name == "rambler" else name)
    key = (tree.write, "oracle" if name == "rambler" else name)
    total, right = sum(tree.sizes.values()), sum(expected)
    assert len(model.asked) == total >= 20
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["headline"]["value"] == pytest.approx(MACRO.get(key, right / total))
    assert results["micro"]["value"] == pytest.approx(right / total)
    dimension = next(iter(results["macro"]), None)
    groups = {
        g["group"]: (g["right"], g["total"])
        for g in results["groups"]
        if g["dimension"] == dimension
    }
    if tree.sizes != _EGO:
        sizes = tree.sizes.items()
        assert groups == {
            group: (right, size) for (group, size), right in zip(sizes, expected, strict=True)
        }
        assert list(groups) == [g for g in published_order(tree) if g in groups]
    failed = len(range(0, total, 3)) if name == "failing" else 0
    counts = results["counts"]
    assert (counts["rows"], counts["asked"], counts["failed"]) == (total, total, failed)
    assert counts["parsed"] + counts["unparsed"] + failed == total
    assert counts["missing"] == 0
    assert counts["published"] == BENCHMARKS[tree.benchmark].splits[tree.split].rows
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert sum(line["right"] for line in lines) == right
    assert [line["status"] for line in lines].count("failed") == failed
    assert report.scores.visual_tokens == 64 and report.scores.seconds == 0.5


def published_order(tree: Tree) -> list[str]:
    groups = BENCHMARKS[tree.benchmark].splits[tree.split].groups
    return list(next(iter(groups.values())))


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.write)
def test_every_clip_is_found_and_can_be_read(tree, roots):
    benchmark = BENCHMARKS[tree.benchmark]
    questions = benchmark.questions(roots[tree.write], tree.split)
    found = check_questions(benchmark, tree.split, questions, roots[tree.write])
    assert "  no video is missing" in found.lines
    assert not found.complete  # 20 rows are not what was published
    kinds = {(q.media.path.suffix, q.media.end): q for q in questions}
    for question in kinds.values():
        assert read_media(question.media, 4, 16, 0.0).frames.shape == (4, 16, 16, 3)
    assert len({question.id for question in questions}) == len(questions)


def test_bounds_are_taken_where_clips_are_not_cut(roots):
    """Checked by the stripes of numbered frames: 4 per second in a video, 3 per second in a folder."""
    whole = BENCHMARKS["mvbench"].questions(roots["mvbench_main"], "test")
    cut = BENCHMARKS["mvbench"].questions(roots["mvbench_video"], "test")
    assert (whole[0].media.start, whole[0].media.end) == (0.5, 1.5)
    assert (cut[0].media.start, cut[0].media.end) == (0.0, None)
    times = read_media(whole[0].media, 3, 16, 0.0).times
    np.testing.assert_allclose(times, [0.5, 1.0, 1.5])
    folder = next(q.media for q in whole if q.groups["task"] == "episodic_reasoning")
    np.testing.assert_allclose(read_media(folder, 3, 16, 0.0).times, [1 / 3, 1, 4 / 3], atol=0.35)


def test_missing_videos_count_as_wrong_and_the_model_is_not_asked(roots, tmp_path):
    tree = next(tree for tree in TREES if tree.write == "longvideobench_authors")
    root = tmp_path / "root"
    shutil.copytree(roots[tree.write], root)
    for number in (0, 5, 11):
        (root / f"videos/lv-{number}.mp4").unlink()
    report, model = ask(tree, root, tmp_path / "out", oracle)
    assert len(model.asked) == 18
    counts = report.scores.counts
    assert (counts.missing, counts.failed, counts.parsed) == (6, 0, 18)
    assert report.scores.headline.value == 18 / 24
    (root / "videos.tar.part.aa").write_bytes(b"")
    questions = BENCHMARKS["longvideobench"].questions(root, "val")
    lines = check_questions(BENCHMARKS["longvideobench"], "val", questions, root).lines
    assert "  missing videos: 3 (of 6 questions)" in lines
    assert "    15: 6 (PUBLISHED: 189), 4 without a video" not in lines
    assert "    15: 6 (PUBLISHED: 189), 2 without a video" in lines
    assert "  not unpacked? videos.tar.part.aa" in lines
    shutil.copy(root / "videos/lv-1.mp4", root / "videos/lv-0.mp4")
    again, model = ask(tree, root, tmp_path / "out", oracle)
    assert sorted(model.asked) == ["lv-0_0", "lv-0_1"]  # found, and asked; the others are kept
    assert again.scores.headline.value == 20 / 24


def test_private_answers_are_not_scored(roots, tmp_path):
    for write, benchmark, split in (
        ("egoschema_authors", "egoschema", "full"),
        ("egoschema_hub", "egoschema", "full"),
        ("longvideobench_authors", "longvideobench", "test"),
        ("longvideobench_hub", "longvideobench", "test"),
    ):
        tree = Tree(
            write=write,
            benchmark=benchmark,
            split=split,
            sizes={},
            always_a=(),
            oracle=(),
            failing=(),
        )
        report, _ = ask(tree, roots[write], tmp_path / write, always_a)
        assert report.scores.headline is None and report.scores.micro is None
        assert report.scores.counts.without_key == 24


def test_an_answer_that_is_not_an_option_is_reported_and_never_right(roots, tmp_path):
    benchmark, root = BENCHMARKS["mlvu"], roots["mlvu_dev_authors"]
    questions = benchmark.questions(root, "dev")
    lines = check_questions(benchmark, "dev", questions, root).lines
    assert "  with an answer that is not among the options: needle/2" in lines
    for letter in "ABCD":
        model = FakeModel(questions, lambda i, q, letter=letter: letter)
        settings = settings_of(benchmark, "dev")
        report = run_benchmark(
            benchmark,
            questions,
            settings,
            tmp_path / letter,
            lambda m=model: m,
            identity={},
            about={},
        )
        assert not next(row for row in report.replies if row.question.id == "needle/2").right


def test_a_folder_of_frames_that_may_not_be_read_is_one_failure(tmp_path):
    medium = Media.file("video", tmp_path / "frames")
    (tmp_path / "frames").write_bytes(b"")
    with pytest.raises(MediaError, match="unreadable"):
        frame_files(medium)


def test_each_parser_has_its_own_scores(roots, tmp_path):
    """lmms-eval's parser takes the first letter of a rambling reply, and no letter above D."""
    videomme = next(tree for tree in TREES if tree.write == "videomme_hub")
    report, _ = ask(videomme, roots["videomme_hub"], tmp_path / "1", rambler, parser="lmms")
    assert report.scores.headline.value == 6 / 24  # always A
    mlvu = next(tree for tree in TREES if tree.write == "mlvu_test")
    report, _ = ask(mlvu, roots["mlvu_test"], tmp_path / "2", oracle, parser="lmms")
    assert report.scores.micro.value == 20 / 22
    mvbench = next(tree for tree in TREES if tree.write == "mvbench_main")
    silent = ask(mvbench, roots["mvbench_main"], tmp_path / "3", lambda i, q: "", parser="official")
    assert silent[0].scores.headline.value == 1.0
    assert silent[0].scores.counts.empty_but_right == 24


@pytest.mark.parametrize(
    ("benchmark", "split", "files", "problem"),
    [
        ("videomme", "test", {}, "contains none of Video-MME's annotation files"),
        ("egoschema", "subset", {"questions.json": "[]"}, "has no subset_answers.json"),
        ("mvbench", "test", {}, "has no folder json/"),
        ("mlvu", "generation", {}, "has no MLVU/json/"),
        ("longvideobench", "val", {"lvb_val.json": "{}"}, "lvb_val.json must be a list of objects"),
        ("longvideobench", "val", {"lvb_val.json": "[{"}, "lvb_val.json cannot be read"),
        (
            "longvideobench",
            "val",
            {"lvb_val.json": '[{"id": 1}]'},
            "a row does not have the fields of LongVideoBench",
        ),
        ("longvideobench", "val", {"lvb_val.json": "[]"}, "contains no questions"),
        ("videomme", "test", {"test-0.parquet": "nothing"}, "test-0.parquet cannot be read"),
    ],
)
def test_files_that_are_not_as_documented_are_named(benchmark, split, files, problem, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(BenchmarkError, match=problem):
        BENCHMARKS[benchmark].questions(tmp_path, split)


def test_unusual_rows_keep_their_answers(tmp_path):
    row = {**trees.longvideobench_rows("val")[0], "correct_choice": 2}
    row.pop("candidates")
    options = ["N/A", "red", "blue", "N/A", None]
    trees.write_json(
        tmp_path / "lvb_val.json", [{**row, **{f"option{i}": o for i, o in enumerate(options)}}]
    )
    (question,) = BENCHMARKS["longvideobench"].questions(tmp_path, "val")
    assert question.lettered == {"A": "N/A", "B": "red", "C": "blue"} and question.answer == "C"
    ego = {"question": "?", "video_idx": "u", "option": trees.lettered(trees.OPTIONS[:5])}
    trees.write_rows(tmp_path / "MC/test-0.parquet", [{**ego, "answer": "-1"}])
    (question,) = BENCHMARKS["egoschema"].questions(tmp_path, "full")
    assert question.answer is None
    rows = [{**row, "sub_category": None, "domain": None} for row in trees.videomme_rows()]
    trees.write_rows(tmp_path / "test-0.parquet", rows)
    assert BENCHMARKS["videomme"].questions(tmp_path, "test")[0].groups["domain"] == "None"


def test_repeated_ids_are_refused(tmp_path):
    rows = trees.longvideobench_rows("val")
    trees.write_json(tmp_path / "lvb_val.json", [rows[0], rows[0]])
    with pytest.raises(BenchmarkError, match="'lv-0_0' occurs more than once"):
        BENCHMARKS["longvideobench"].questions(tmp_path, "val")
