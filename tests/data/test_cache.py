"""Cached arrays: complete or absent, with concurrent writers and leftovers of interrupted ones."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import pathlib

import numpy as np
import pytest

from storm_jax.data.cache import cached_arrays
from storm_jax.data.skips import DataError
from storm_jax.files import file_stamp


def arrays(size: int = 1000) -> dict[str, np.ndarray]:
    return {f"a{i}": np.full(size, i) for i in range(5)}


def compute_and_sum(folder: str, key: str) -> int:
    found = cached_arrays(pathlib.Path(folder), "some", key, lambda: arrays(100_000))
    return sum(int(array.sum()) for array in found.values())


def test_computed_once_and_memory_mapped_afterwards(tmp_path: pathlib.Path):
    cached_arrays(tmp_path / "new/index", "some", "key", arrays)
    again = cached_arrays(
        tmp_path / "new/index", "some", "key", lambda: pytest.fail("computed again")
    )
    assert isinstance(again["a3"], np.memmap) and (again["a3"] == 3).all()
    other = cached_arrays(tmp_path / "new/index", "some", "other key", lambda: arrays(3))
    assert len(other["a0"]) == 3


def test_concurrent_writers_all_read_complete_arrays(tmp_path: pathlib.Path):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(4, mp_context=context) as pool:
        for round_number in range(5):
            calls = [
                pool.submit(compute_and_sum, str(tmp_path), f"key {round_number}") for _ in range(8)
            ]
            assert {call.result() for call in calls} == {1_000_000}
    assert len(list(tmp_path.iterdir())) == 5  # no temporary files are left


def test_a_damaged_cache_is_replaced(tmp_path: pathlib.Path):
    cached_arrays(tmp_path, "some", "key", arrays)
    (folder,) = tmp_path.iterdir()
    (folder / "a1.npy").write_bytes((folder / "a1.npy").read_bytes()[:50])
    assert (cached_arrays(tmp_path, "some", "key", arrays)["a1"] == 1).all()


def test_the_error_for_a_read_only_folder_names_the_setting(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data.index_dir"):
        cached_arrays(tmp_path / "file", "some", "key", arrays)


def test_stamp_changes_when_a_file_does(tmp_path: pathlib.Path):
    path = tmp_path / "a"
    path.write_text("1")
    before = file_stamp([path])
    assert file_stamp([path]) == before
    path.write_text("12")
    after = file_stamp([path])
    path.rename(tmp_path / "b")
    assert len({before, after, file_stamp([tmp_path / "b"])}) == 3
