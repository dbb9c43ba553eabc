"""Our own files after damage: bad lines are dropped one by one, and a full disk is recognised."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal

import pytest

from storm_jax.files import Appender, read_lines, system_error, write_atomically

GOOD = [{"step": number} for number in range(5)]
BAD = [b"{", b"null", b"[1]", b"\xff", b'{"step": 1', b"{}", b"\0" * 20, b"1" * 5000, b"[" * 10**5]


@pytest.mark.parametrize("bad", BAD)
def test_only_the_damaged_line_is_lost(tmp_path, caplog, bad):
    lines = [json.dumps(line).encode() for line in GOOD]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*lines[:2], bad, *lines[2:], b""]))

    def step_of(line: dict) -> int:
        return line["step"]

    assert read_lines(path, step_of) == list(range(5))
    assert f"{path} line 3 is damaged" in caplog.text


def test_an_unfinished_last_line_is_expected(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a"')
    assert read_lines(path) == [{"a": 1}] and not caplog.records


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_is_recognised_behind_other_errors():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert system_error(full) == "No space left on device"
    assert not system_error(ValueError("broken")) and not system_error(None)
    try:
        try:
            raise full
        except OSError as error:
            raise ValueError("save failed") from error
    except ValueError as error:
        assert system_error(error) == "No space left on device"
    for text in (
        "[metadata] write: full [errno 28]",
        "Failed to rename: full [os_error_code='28']",
    ):
        assert system_error(ValueError(text)) == "No space left on device"


def test_lines_that_cannot_be_written_now_are_written_with_later_ones(tmp_path, caplog):
    path = tmp_path / "gone/a.jsonl"
    lines = Appender(path)
    lines.write(["1\n", "2\n"])
    lines.write(["3\n"])
    assert caplog.text.count("No such file or directory") == 1
    path.parent.mkdir()
    lines.write(["4\n"])
    lines.write(["5\n"])
    assert path.read_text() == "1\n2\n3\n4\n5\n"


def test_a_line_that_the_disk_has_no_room_for_leaves_no_part(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("1\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    lines = Appender(path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5, before[1]))
        lines.write(["a long line\n"])
        assert path.read_text() == "1\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    lines.write(["2\n"])
    assert path.read_text() == "1\na long line\n2\n"
