"""Our own files after damage: bad lines are dropped one by one, and a full disk is recognised."""

from __future__ import annotations

import errno
import json
import os

import pytest

from storm_jax.files import is_full, read_lines, write_atomically

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
    assert is_full(full) and not is_full(OSError(errno.EIO, "broken")) and not is_full(None)
    try:
        try:
            raise full
        except OSError as error:
            raise ValueError("save failed") from error
    except ValueError as error:
        assert is_full(error)
    assert is_full(ValueError("[metadata] write: No space left on device [errno 28]"))
