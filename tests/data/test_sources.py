"""Every kind of source: its samples, finding records in any file layout, and one bad sample or one clear
error for broken files."""

from __future__ import annotations

import functools
import json
import pathlib
import pickle
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from media_files import numbers, write_numbered
from source_files import conversation, picture, write_parquet, write_shard, write_tfds

from storm_jax.config import SourceConfig
from storm_jax.data.skips import DataError
from storm_jax.data.sources import json_file, open_source
from storm_jax.media.read import read_media
from storm_jax.text.sample import Sample, SampleError


def open_path(path: pathlib.Path, **fields):
    return open_source(SourceConfig(name="some", path=str(path), **fields))


def shown(sample: Sample, frames: int = 1) -> list[int]:
    """The numbers shown by a sample's frames."""
    return [n for m in sample.media for n in numbers(read_media(m, frames, 32, 0.0).frames)]


# JSON and JSON lines.

RECORDS = [
    {"id": "é", "conversations": conversation("Why?")},
    {"id": 'a "quoted" ] , [ {', "conversations": conversation("Why\n?")},
    {"conversations": conversation("Third")},
]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("layout", ["list", "indented", "lines", "lines with gaps", "mark"])
def test_records_are_found_in_every_layout(tmp_path: pathlib.Path, layout: str, ascii_only: bool):
    texts = [json.dumps(record, ensure_ascii=ascii_only) for record in RECORDS]
    content = {
        "list": json.dumps(RECORDS, ensure_ascii=ascii_only),
        "indented": "\n " + json.dumps(RECORDS, ensure_ascii=ascii_only, indent=2) + "\n\n",
        "lines": "\n".join(texts),
        "lines with gaps": f"{texts[0]}\r\n\n  {texts[1]}\n\r\n{texts[2]}\n\n",
        "mark": "\ufeff" + json.dumps(RECORDS, ensure_ascii=ascii_only),
    }[layout]
    path = tmp_path / "a.json"  # the suffix does not matter
    path.write_bytes(content.encode())
    source = open_path(path)
    assert [source.record(i) for i in range(len(source))] == RECORDS
    assert [source.sample(i).id for i in range(3)] == ["é", 'a "quoted" ] , [ {', "2"]
    lines = content.replace("\r", "").split("\n")
    for i in range(3):
        line = int(source.where(i).split(" ")[-3].rstrip(","))
        text = "\n".join(lines[line - 1 :])
        assert text.lstrip("\ufeff [").startswith("{")
    assert source.where(2).startswith(f"{path} line ")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "layout", ["list in an object", "records by id", "one after another", "one"]
)
def test_records_in_other_layouts_are_found(
    tmp_path: pathlib.Path, layout: str, indent: int | None
):
    records = RECORDS[:1] if layout == "one" else RECORDS
    dump = functools.partial(json.dumps, indent=indent, ensure_ascii=False)
    content = {
        "list in an object": dump(
            {"version": 1, "info": {"a": []}, "data": RECORDS, "tags": ["x"]}
        ),
        "records by id": dump({f"key {i}": record for i, record in enumerate(RECORDS)}),
        "one after another": "\n".join(map(dump, RECORDS)),
        "one": dump(RECORDS[0]),
    }[layout]
    (tmp_path / "a.json").write_text(content, "utf-8")
    source = open_path(tmp_path / "a.json")
    expected = [dict(record) for record in records]
    if layout == "records by id":
        expected[2]["id"] = "key 2"  # the others have their own
    assert [source.record(i) for i in range(len(source))] == expected
    lines = content.split("\n")
    for i in range(len(source)):
        line = int(source.where(i).split(" ")[-3].rstrip(","))
        assert lines[line - 1].strip()[0] in '{["'


def test_an_object_without_records_is_explained(tmp_path: pathlib.Path):
    (tmp_path / "a.json").write_text(json.dumps({"train": "a.json", "val": ["b.json"]}))
    with pytest.raises(
        DataError, match=r"is one JSON object with the keys 'train', 'val': expected a"
    ):
        open_path(tmp_path / "a.json")


def test_a_damaged_first_line_is_a_bad_sample(tmp_path: pathlib.Path):
    good = json.dumps(RECORDS[2])
    for bad in ('{"id": "a", "conv', '{"id": "a"}}', '{"id": ' + "9" * 5000 + "}"):
        (tmp_path / "a.jsonl").write_text(f"{bad}\n{good}\n{good}")
        source = open_path(tmp_path / "a.jsonl")
        assert len(source) == 3 and source.sample(2).turns
        with pytest.raises(SampleError):
            source.sample(0)


@hypothesis.given(
    records=st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=6),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
            max_leaves=8,
        ),
        min_size=1,
        max_size=8,
    ),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
)
def test_any_list_is_split_into_its_items(tmp_path_factory, records, indent, ascii_only):
    path = tmp_path_factory.getbasetemp() / "any.json"
    try:
        path.write_text(json.dumps(records, indent=indent, ensure_ascii=ascii_only), "utf-8")
    except UnicodeEncodeError:
        hypothesis.reject()
    spans = json_file.find_records(path)
    data = path.read_bytes()
    assert [json.loads(data[at : at + size]) for at, size, _ in spans.tolist()] == records
    assert [line for _, _, line in spans.tolist()] == [
        data[:at].count(b"\n") + 1 for at, _, _ in spans.tolist()
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe\x00", b"[]", b"[", b"[{}", b"[{},]", b"[{} {}]", b'[{"id": 1}', b"[1,\n2,\n]x]",
        b'"text"', b"null", b"3", b"\n\n",
    ],
)  # fmt: skip
def test_bad_file_is_an_error_that_names_it(tmp_path: pathlib.Path, content: bytes):
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.json"):
        open_path(path)


def test_error_in_a_list_has_its_line(tmp_path: pathlib.Path):
    (tmp_path / "a.json").write_text('[\n{"id": 1},\n{"id": 2}\n{"id": 3}]')
    with pytest.raises(DataError, match=r"a.json line 4: invalid JSON"):
        open_path(tmp_path / "a.json")


def test_a_bad_line_is_a_bad_sample(tmp_path: pathlib.Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1\n' + json.dumps(RECORDS[0]) + "\n" + "[" * 100_000 + "\n")
    source = open_path(path)
    for i in (0, 2):
        with pytest.raises(SampleError, match="invalid JSON") as caught:
            source.sample(i)
        assert caught.value.cause == "malformed"
    assert source.sample(1).id == "é" and source.where(2).endswith("line 3, record 2")


def test_index_of_a_large_file_is_cached_until_it_changes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(json_file, "_SMALL", 0)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS))
    assert len(open_path(path)) == 3
    cached = list((tmp_path / "a.jsonl.index").iterdir())
    monkeypatch.setattr(json_file, "find_records", None)
    assert open_path(path).sample(1).turns[0].text == "Why\n?"
    monkeypatch.undo()
    monkeypatch.setattr(json_file, "_SMALL", 0)
    path.write_text(json.dumps(RECORDS[0]) + "\n" * 3)
    assert len(open_path(path)) == 1
    assert len(list((tmp_path / "a.jsonl.index").iterdir())) == len(cached) + 1
    elsewhere = open_source(SourceConfig(name="some", path=str(path)), str(tmp_path / "indices"))
    assert len(elsewhere) == 1 and (tmp_path / "indices/some").is_dir()


def test_the_error_for_an_unwritable_index_names_the_setting(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(json_file, "_SMALL", 0)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(RECORDS[0]))
    (tmp_path / "a.jsonl.index").write_text("a file in place of the folder")
    with pytest.raises(DataError, match=r"set data.index_dir"):
        open_path(path)


def test_a_million_lines_open_in_seconds_and_are_read_at_random(tmp_path: pathlib.Path):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"id": "x", "conversations": conversation("Why?")})
    path.write_text((line + "\n") * 1_000_000)
    began = time.monotonic()
    source = open_path(path)
    assert len(source) == 1_000_000
    assert time.monotonic() - began < 10
    assert source.sample(999_999).id == "x" and "line 1000000, " in source.where(999_999)
    assert isinstance(source._spans, np.memmap)


def test_media_root_replaces_the_folder_of_the_file(tmp_path: pathlib.Path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"image": "x/a.png", "conversations": conversation()}]))
    assert open_path(path).sample(0).media[0].path == tmp_path / "x/a.png"
    assert open_path(path, media_root="/other").sample(0).media[0].name == "/other/x/a.png"


# Parquet.


def test_parquet_rows_are_records_with_their_media(tmp_path: pathlib.Path):
    rows = [
        {
            "id": f"row {i}",
            "image": {"bytes": picture(i), "path": f"{i}.png"} if i % 3 else None,
            "conversations": conversation("<image>\nWhat?" if i % 3 else "Why?"),
            "data_source": "x",
        }
        for i in range(7)
    ]
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data/train-00000.parquet", rows[:5], row_group_size=2)
    write_parquet(tmp_path / "data/train-00001.parquet", rows[5:])
    source = open_path(tmp_path)
    assert len(source) == 7
    for i in (6, 0, 3, 1, 5, 4, 2):
        sample = source.sample(i)
        assert sample.id == f"row {i}" and sample.extra == {"data_source": "x"}
        assert shown(sample) == ([i] if i % 3 else [])
        pickle.dumps(sample)  # media are sent to the workers unread
    assert source.where(3).endswith("train-00000.parquet row 1 of group 1")


def test_parquet_columns_may_be_lists_of_media(tmp_path: pathlib.Path):
    rows = [
        {
            "images": [{"bytes": picture(10 * i + k), "path": None} for k in range(i)],
            "conversations": conversation("<image>" * i + "What?"),
        }
        for i in range(4)
    ]
    write_parquet(tmp_path / "a.parquet", rows)
    source = open_path(tmp_path)
    assert [shown(source.sample(i)) for i in range(4)] == [[], [10], [20, 21], [30, 31, 32]]


def test_parquet_may_contain_paths_instead_of_bytes(tmp_path: pathlib.Path):
    (tmp_path / "b.png").write_bytes(picture(9))
    image = {"bytes": None, "path": "b.png"}
    rows = [{"image": image, "conversations": conversation()}]
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            (
                "conversations",
                pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())])),
            ),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    assert shown(open_path(tmp_path).sample(0)) == [9]


def test_a_broken_parquet_file_is_one_bad_sample(tmp_path: pathlib.Path):
    write_parquet(tmp_path / "a.parquet", [{"conversations": conversation("Why?")}] * 3)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    source = open_path(tmp_path)
    assert len(source) == 4 and source.sample(2).answer() == "So."
    with pytest.raises(SampleError, match="not a valid parquet file"):
        source.sample(3)


# Tar shards.


def record_bytes(text: str, **fields) -> bytes:
    return json.dumps({"conversations": conversation(text), **fields}).encode()


def test_members_of_a_key_are_one_sample(tmp_path: pathlib.Path):
    video = write_numbered(tmp_path / "v.mp4", 8).read_bytes()
    write_shard(
        tmp_path / "shard-000.tar",
        {
            "a/001.json": record_bytes("<video>"),
            "a/001.mp4": video,
            "002.0.png": picture(20),
            "002.1.png": picture(21),
            "002.json": record_bytes("<image><image>"),
            "003.json": record_bytes("Why?", id="own id"),
        },
    )
    write_shard(
        tmp_path / "shard-001.tar",
        {
            "004.png": picture(40),
            "004.mp4": video,
            "004.json": record_bytes(
                "<image><video>", image="004.png", video={"path": "mp4", "start": 0.5}
            ),
        },
    )
    source = open_path(tmp_path)
    assert [source.sample(i).id for i in range(len(source))] == ["a/001", "002", "own id", "004"]
    assert shown(source.sample(0), 8) == list(range(8))
    assert shown(source.sample(1)) == [20, 21]
    assert shown(source.sample(2)) == []
    assert shown(source.sample(3)) == [40, 5]
    assert source.where(3) == f"{tmp_path}/shard-001.tar!004"
    assert source.sample(0).media[0].name == f"{tmp_path}/shard-000.tar!a/001.mp4"
    assert len(open_path(tmp_path / "shard-001.tar")) == 1


def test_broken_members_and_shards_are_bad_samples(tmp_path: pathlib.Path):
    write_shard(
        tmp_path / "a.tar",
        {"1.png": picture(1), "2.json": b"{", "3.json": record_bytes("<image>"), "4.txt": b"x"},
    )
    (tmp_path / "b.tar").write_bytes(b"not a tar file" * 100)
    write_shard(tmp_path / "c.tar", {"1.json": record_bytes("Why?"), "2.json": b" " * 5000})
    data = (tmp_path / "c.tar").read_bytes()
    (tmp_path / "c.tar").write_bytes(data[: data.index(b"2.json") + 2048])
    source = open_path(tmp_path)
    causes = []
    for i in range(len(source)):
        try:
            causes.append(source.sample(i).id)
        except SampleError as error:
            causes.append(error.cause)
            assert source.where(i)
    assert causes == [
        "malformed",
        "malformed",
        "placeholder",
        "malformed",
        "malformed",
        "1",
        "malformed",  # its record is truncated
        "malformed",  # the shard is truncated
    ]


# TFDS.


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    records = [
        {"id": "item 0", "image": picture(0), "conversations": conversation()},
        {"id": "item 1", "video": "v.mp4", "conversations": conversation("<video>")},
        {"id": "item 2", "image": picture(2), "conversations": conversation()},
    ]
    return write_tfds(tmp_path_factory.mktemp("tfds"), {"train": records, "test": records[:1]})


def test_tfds_items_are_records(tfds_folder: pathlib.Path):
    write_numbered(tfds_folder / "v.mp4", 8)
    source = open_path(tfds_folder)
    samples = {sample.id: sample for sample in map(source.sample, range(len(source)))}
    assert sorted(samples) == ["item 0", "item 1", "item 2"]
    assert shown(samples["item 0"]) == [0] and shown(samples["item 2"]) == [2]
    assert shown(samples["item 1"], 3) == [0, 4, 7] or shown(samples["item 1"], 3) == [0, 3, 7]
    assert len(open_path(tfds_folder, split="test")) == 1
    with pytest.raises(DataError, match=r"no split 'validation'; available: .*train"):
        open_path(tfds_folder, split="validation")


# Paths that are not sources.


def test_a_path_that_is_not_a_source_is_an_error_that_names_it(tmp_path: pathlib.Path):
    with pytest.raises(
        DataError, match=r"none.json does not exist: it is the path of data source 'some'"
    ):
        open_path(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"contains no .parquet files, .tar shards"):
        open_path(tmp_path)
