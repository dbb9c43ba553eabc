"""Media are found whatever the case and the ending of their names; subtitles are read as they are."""

from __future__ import annotations

import pytest

from storm_jax.evals.files import FileFinder, archives
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


def test_names_that_differ_in_case_alone_are_told_apart(tmp_path):
    for name in ("ab.mp4", "aB.mp4"):
        (tmp_path / name).write_bytes(b"")
    finder = FileFinder(tmp_path, (".",))
    assert finder.find("aB.mp4").name == "aB.mp4"
    assert finder.find("ab.mkv").name == "ab.mp4"


def test_archives_that_are_not_unpacked_are_found(tmp_path):
    for name in ("x.zip", "videos.tar.part.aa", "y.mp4"):
        (tmp_path / name).write_bytes(b"")
    assert archives(tmp_path) == ["videos.tar.part.aa", "x.zip"]


def test_subtitles_of_many_forms_are_read(tmp_path):
    path = tmp_path / "a.srt"
    path.write_bytes(
        "\ufeff1\r\n00:00:01,5 --> 00:00:02,25\r\n<i>Hé</i>\r\n  two  lines\r\n\r\n"
        "00:01:00.000 --> 01:00:00,000\n{\\an8}no number\n\n\n3\nno times\n\n"
        "4\n00:00:03,000 --> 00:00:04,000\n".encode()
        + b"\xff\n"
    )
    lines = read_srt(path)
    assert [(line.start, line.end) for line in lines] == [(1.5, 2.25), (60.0, 3600.0), (3.0, 4.0)]
    assert [line.text for line in lines[:2]] == ["Hé two lines", "no number"]
