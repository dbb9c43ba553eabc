"""Lines and folders that a run reads again: changes are noticed."""

from __future__ import annotations

import json
import pathlib
import threading

import hypothesis
import hypothesis.strategies as st
import pytest

from storm_jax.files import changed_files, describe_change, read_lines, rewriting, to_line

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@hypothesis.given(st.dictionaries(st.text().filter(lambda key: key != "crc"), VALUES))
def test_lines_are_read_as_written(tmp_path_factory, fields):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_text(to_line(fields) + json.dumps(fields) + "\n")
    assert repr(read_lines(path)) == repr([fields, fields])


def test_a_changed_value_is_dropped_with_a_warning(tmp_path, caplog):
    path = tmp_path / "lines.jsonl"
    path.write_text(to_line({"id": "a", "reply": "B"}) + to_line({"id": "b", "reply": "B"}))
    path.write_text(path.read_text().replace("B", "C", 1))
    assert [line["id"] for line in read_lines(path)] == ["b"]
    assert f"{path} line 1 is damaged and dropped" in caplog.text


def write(folder: pathlib.Path, text: str) -> None:
    with rewriting(folder, ["a.json"]):
        (folder / "a.json").write_text(text)


def test_changed_and_missing_files_are_named(tmp_path):
    assert changed_files(tmp_path) == []
    write(tmp_path, "1")
    write(tmp_path, "2")
    assert changed_files(tmp_path) == [] and describe_change(tmp_path) == ""
    (tmp_path / "a.json").write_text("1")
    assert changed_files(tmp_path) == ["a.json"] and changed_files(tmp_path, "b") == []
    (tmp_path / "a.json").unlink()
    assert changed_files(tmp_path) == ["a.json"]
    assert f"{tmp_path}/a.json has changed" in describe_change(tmp_path)


def test_an_interrupted_change_leaves_files_that_can_be_used(tmp_path):
    write(tmp_path, "1")
    with pytest.raises(KeyboardInterrupt), rewriting(tmp_path, ["a.json"]):
        (tmp_path / "a.json").write_text("2")
        raise KeyboardInterrupt
    assert changed_files(tmp_path) == []


def test_a_reader_during_changes_sees_none(tmp_path):
    write(tmp_path, "0")
    writer = threading.Thread(target=lambda: [write(tmp_path, str(i)) for i in range(300)])
    writer.start()
    while writer.is_alive():
        assert changed_files(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a.json": 1}', '{"a.json": "0"}', "\0"])
def test_damaged_digests_are_a_change(tmp_path, text):
    write(tmp_path, "1")
    (tmp_path / "digests.json").write_text(text)
    assert len(changed_files(tmp_path)) == 1
