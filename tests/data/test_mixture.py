"""Proportions of a mixture: exact, seeded, and every sample is used once before any is repeated."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from storm_jax.compression import Grid
from storm_jax.config import SourceConfig
from storm_jax.data import mixture as mixture_lib
from storm_jax.data.rows import RowShape
from storm_jax.data.skips import DataError

SIZES = {"a": 10, "b": 30, "c": 60}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, write_texts) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: str(write_texts(folder / f"{name}.jsonl", n)) for name, n in SIZES.items()}


@pytest.fixture
def mix(make_mixture, paths):
    def make(seed: int = 0, **settings: dict):
        configs = [SourceConfig(name=n, path=paths[n], **fields) for n, fields in settings.items()]
        return make_mixture(*configs, seed=seed)

    return make


def stream(mixture, windows: int) -> list:
    return list(itertools.chain(*(mixture.draw(window) for window in range(windows))))


def counts(mixture, refs) -> dict[str, int]:
    found = Counter(mixture.parts[ref.source].config.name for ref in refs)
    return dict(sorted(found.items()))


@pytest.mark.parametrize(
    ("settings", "per_epoch"),
    [
        ({"a": {}, "b": {}}, {"a": 10, "b": 30}),
        ({"a": {"repeat": 3}, "b": {}}, {"a": 30, "b": 30}),
        ({"a": {"repeat": 0.5}, "b": {"percent": 10}}, {"a": 5, "b": 3}),
        ({"a": {"cap": 4}, "c": {"cap": 999}}, {"a": 4, "c": 60}),
        # Independent of their sizes; an epoch is as long as all sources together.
        ({"a": {"weight": 1}, "b": {"weight": 1}, "c": {"weight": 2}}, {"a": 25, "b": 25, "c": 50}),
        ({"a": {"weight": 0.3}, "c": {"weight": 0.7}}, {"a": 21, "c": 49}),
    ],
)
def test_an_epoch_has_the_requested_proportions(mix, settings: dict, per_epoch: dict):
    mixture = mix(**settings)
    for window in range(3):
        assert counts(mixture, mixture.draw(window)) == per_epoch


@pytest.mark.parametrize("window", [1, 7, 33])
def test_proportions_are_exact_in_the_long_run(mix, monkeypatch, window: int):
    """Even if a window contains less than one sample of a source."""
    monkeypatch.setattr(mixture_lib, "WINDOW", window)
    mixture = mix(a={"weight": 1}, b={"weight": 2.5}, c={"weight": 96.5})
    refs = stream(mixture, 600)
    for (_, n), proportion in zip(counts(mixture, refs).items(), (0.01, 0.025, 0.965), strict=True):
        assert abs(n - 600 * window * proportion) < 1


def test_every_sample_is_used_once_before_any_is_repeated(mix, monkeypatch):
    monkeypatch.setattr(mixture_lib, "WINDOW", 17)
    mixture = mix(a={"weight": 1}, b={"weight": 1})
    refs = stream(mixture, 40)
    for number, size in enumerate((10, 30)):
        # Windows are shuffled across sources, so counts are compared instead of positions.
        seen = Counter(ref.item for ref in refs if ref.source == number)
        assert set(seen) == set(range(size))
        assert max(seen.values()) - min(seen.values()) <= 1


def test_epochs_and_seeds_differ_and_the_stream_is_a_function_of_the_seed(mix):
    one, other, again = mix(0, a={}, b={}), mix(1, a={}, b={}), mix(0, a={}, b={})
    assert one.draw(0) != one.draw(1)
    assert one.draw(0) != other.draw(0)
    assert sorted(one.draw(0)) == sorted(other.draw(0))
    assert again.draw(5) == one.draw(5) and again.draw(0) == one.draw(0)


def test_a_subset_of_a_source_is_the_same_in_every_epoch_and_chosen_by_the_seed(mix):
    def part(seed: int, window: int) -> set:
        return set(mix(seed, c={"percent": 25}).draw(window))

    assert len(part(0, 0)) == 15
    assert part(0, 0) == part(0, 7) != part(1, 0)


def test_unusable_samples_are_never_drawn_but_reported(make_mixture, write_texts, tmp_path):
    path = write_texts(tmp_path / "a.jsonl", 40, long=True)
    with path.open("a") as file:
        file.write("\n{}\n" + json.dumps({"id": "bad", "conversations": "no"}))
    mixture = make_mixture(path, skip=1.0)
    too_long = [skip for skip in mixture.skips if skip.cause == "too_long"]
    assert {skip.cause for skip in mixture.skips} == {"too_long", "empty_conversation", "malformed"}
    assert too_long[0].where.startswith(f"{path} line {40 - len(too_long) + 1}, ")
    assert "data.rows" in too_long[0].message
    drawn = {ref.item for ref in stream(mixture, 4)}
    assert drawn == set(range(40 - len(too_long)))
    assert len(mixture) == len(drawn)


def test_a_long_answer_is_truncated(make_mixture, tmp_path):
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "so " * 500}]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns}]))
    mixture = make_mixture(tmp_path / "a.json")
    assert mixture.skips == []
    assert mixture.lengths(mixture.draw(0)).tolist() == [[160, 0]]


def test_a_source_without_usable_samples_is_an_error_that_names_it(make_mixture, tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[{}]")
    with pytest.raises(DataError, match=r"data source 's0' has no usable samples"):
        make_mixture(path, skip=1.0)


@pytest.mark.parametrize(("bad", "fails"), [(10, False), (11, True)])
def test_too_many_skips_are_a_data_error(
    make_mixture, write_texts, tmp_path, bad: int, fails: bool
):
    """Small sources count as 100 samples, so that a few bad ones are tolerated."""
    path = write_texts(tmp_path / "a.jsonl", 20)
    with path.open("a") as file:
        file.write("\n{}" * bad)
    if not fails:
        assert len(make_mixture(path).skips) == bad
        return
    with pytest.raises(DataError, match=f"{bad} unusable samples of {20 + bad}") as caught:
        make_mixture(path)
    assert f"{bad} empty_conversation" in str(caught.value)
    assert "max_skip_fraction=0.1" in str(caught.value) and "line 21" in str(caught.value)


def test_samples_that_fit_any_shape_are_used(make_mixture, write_texts, tmp_path):
    path = write_texts(tmp_path / "a.jsonl", 30, long=True)
    small = RowShape(
        tokens=60,
        frames=4,
        image_size=32,
        grid=Grid.square(2),
        compressions=make_mixture(path, skip=1.0).compressions,
    )
    large = RowShape(
        tokens=600, frames=4, image_size=32, grid=Grid.square(2), compressions=small.compressions
    )
    assert len(make_mixture(path, shapes=(small, large))) == 30
    assert len(make_mixture(path, shapes=(small,), skip=1.0)) < 30
