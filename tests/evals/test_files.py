"""Files are found regardless of case and suffix; subtitle files of several formats are read."""

from __future__ import annotations

import benchmark_trees as trees
import pytest

from storm_jax.evals.files import FileFinder, archives, is_there, read_rows
from storm_jax.evals.subtitles import read_srt


@pytest.mark.parametrize(
    ("there", "name", "found"),
    [
        ("a.mp4", "a.mp4", "a.mp4"),
        ("a.MP4", "a.mp4", "a.MP4"),
        ("a.mkv", "a.mp4", "a.mkv"),
        ("a.webm", "a", "a.webm"),
        ("A.mp4", "a.mp4", "A.mp4"),
        ("a.b.mp4", "a.b.avi", "a.b.mp4"),
        ("a.b.mp4", "a.b", "a.b.mp4"),
        ("clip_1.5/1.jpg", "clip_1.5", "clip_1.5"),
        ("sub/a.mp4", "sub/a.avi", "sub/a.mp4"),
        ("a.txt", "a.mp4", None),
        ("b.mp4", "a.mp4", None),
        ("a.mp4", "a.b.mp4", None),
    ],
)
def test_files_are_found(there, name, found, tmp_path):
    path = tmp_path / "videos" / there
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    finder = FileFinder(tmp_path, ("nowhere", "videos"))
    assert finder.find(name) == (tmp_path / "videos" / found if found else None)
    assert finder.path(name) == (finder.find(name) or tmp_path / "nowhere" / name)


def test_names_that_differ_only_in_case_are_distinguished(tmp_path):
    for name in ("ab.mp4", "aB.mp4"):
        (tmp_path / name).write_bytes(b"")
    finder = FileFinder(tmp_path, (".",))
    assert finder.find("aB.mp4").name == "aB.mp4"
    assert finder.find("ab.mkv").name == "ab.mp4"


def test_archives_that_are_not_unpacked_are_found(tmp_path):
    for name in ("x.zip", "videos.tar.part.aa", "y.mp4"):
        (tmp_path / name).write_bytes(b"")
    assert archives(tmp_path) == ["videos.tar.part.aa", "x.zip"]


def test_a_dead_link_or_a_folder_does_not_hide_a_video(tmp_path):
    for folder in ("data", "videos"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data/a.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "videos/a.mp4").write_bytes(b"")
    (tmp_path / "data/b").mkdir()
    (tmp_path / "data/b.mkv").write_bytes(b"")
    finder = FileFinder(tmp_path, ("data", "videos"))
    assert finder.find("a.mp4") == tmp_path / "videos/a.mp4"
    assert finder.find("b.mp4") == tmp_path / "data/b.mkv"
    assert not is_there(tmp_path / ("x" * 300))


def test_all_shards_of_a_parquet_are_read(tmp_path):
    for shard in range(3):
        rows = [{"n": 2 * shard}, {"n": 2 * shard + 1}]
        trees.write_rows(tmp_path / f"data/test-{shard:05}-of-00003.parquet", rows)
    trees.write_rows(tmp_path / "data/train-00000-of-00001.parquet", [{"n": 9}])
    found = read_rows(tmp_path, ("other*", "data/test-*.parquet"), "Title")
    assert [row["n"] for row in found] == list(range(6))


def test_subtitles_of_many_forms_are_read(tmp_path):
    path = tmp_path / "a.srt"
    path.write_bytes(
        "\ufeff1\r\n00:00:01,5 --> 00:00:02,25\r\n<i>Hé</i>\r\n  two  lines\r\n\r\n"
        "00:01:00.000 --> 01:00:00,000\n{\\an8}no number\n\nbehind a blank line\n"
        "4\n00:00:03,000 --> 00:00:04,000\n".encode()
        + b"\xff\n"
    )
    lines = read_srt(path)
    assert [(line.start, line.end) for line in lines] == [(1.5, 2.25), (60.0, 3600.0), (3.0, 4.0)]
    assert [line.text for line in lines[:2]] == ["Hé two lines", "no number behind a blank line"]
    path.write_text("1\n00:00:01,000 --> 00:00:02,000\nwide\n", encoding="utf-16")
    assert [line.text for line in read_srt(path)] == ["wide"]
    path.write_text("")
    assert read_srt(path) == []


TIMED = "1\n00:00:01,000 --> 00:00:02,000\n{}\n\n2\n00:00:03,000 --> 00:00:04,000\n{}\n"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"]
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_subtitles_of_many_encodings_are_read(tmp_path, encoding, newline):
    text = TIMED.format("Ouverture à l'été", "“Déjà vu…” dit-il")
    (tmp_path / "a.srt").write_bytes(text.replace("\n", newline).encode(encoding))
    lines = read_srt(tmp_path / "a.srt")
    assert [line.text for line in lines] == ["Ouverture à l'été", "“Déjà vu…” dit-il"]
    assert [line.start for line in lines] == [1, 3]


@pytest.mark.parametrize("time", ["00:01,500", "0:00:01.5", "00:00:01,500", "0:1.5"])
def test_times_of_many_forms_are_read(tmp_path, time):
    (tmp_path / "a.srt").write_text(f"1\n{time} --> 00:00:02\nHi\n")
    assert [(x.start, x.end) for x in read_srt(tmp_path / "a.srt")] == [(1.5, 2)]


@pytest.mark.parametrize(
    "content",
    [
        b"\0" * 200, TIMED.format("你好，世界", "再见").encode("gb18030"), b"no times at all",
        TIMED.format("Привет", "Пока").encode("koi8-r"), b"\xff\xfe\x00\xd8\x00",
    ],
)  # fmt: skip
def test_subtitles_of_an_unknown_encoding_are_refused_not_guessed(tmp_path, content):
    (tmp_path / "a.srt").write_bytes(content)
    with pytest.raises(ValueError):
        read_srt(tmp_path / "a.srt")
