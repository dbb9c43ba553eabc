"""Training on a mixture of every kind of source with 30 % of its media broken: per-source counts and
skipped.jsonl agree exactly."""

from __future__ import annotations

from collections import Counter

import jax
import numpy as np
import pytest
from broken_mixture import COUNT, make_broken_mixture

from storm_jax.files import read_lines
from storm_jax.run import Run
from storm_jax.sharding import make_mesh
from storm_jax.train import loop


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], dict[str, int]]:
    return make_broken_mixture(tmp_path_factory.mktemp("broken") / "data")


def test_broken_files_are_counted_and_skipped(
    mixture, small_config, shapes_folder, tmp_path, capsys
):
    sources, broken = mixture
    assert set(broken) == {"json", "jsonl", "parquet", "tar", "tfds"}
    assert 0.2 < sum(broken.values()) / (5 * COUNT) < 0.4
    config = small_config(
        data__train=sources,
        data__val=[],
        data__rows=[{"tokens": 128, "frames": 16}],
        data__num_workers=2,
        data__max_skip_fraction=0.5,
        train__batch_size=8,
        train__log_every=1,
        train__eval_every=0,
    )
    run = Run(tmp_path / "run")
    run.prepare(config, shapes_folder / "tokenizer")
    loop.train(run, make_mesh(config.mesh, jax.devices()[:1]), lambda spec, pool: {})

    last = read_lines(run.path / "metrics.jsonl")[-1]
    assert np.isfinite(last["loss"])
    skipped = read_lines(run.path / "skipped.jsonl")
    assert all(line["where"] and line["cause"] and line["message"] for line in skipped)
    table = capsys.readouterr().out
    for name in broken:
        read, used = last[f"data/{name}/read"], last[f"data/{name}/used"]
        causes = {
            key.rpartition("/")[2]: int(value)
            for key, value in last.items()
            if key.startswith(f"data/{name}/skipped/")
        }
        assert read == used + sum(causes.values())
        # One line each: found while training, or when the source was opened.
        lines = [line for line in skipped if line["source"] == name]
        met = Counter(line["cause"] for line in lines if line["file"])
        assert met == causes
        before = [line for line in lines if not line["file"]]
        assert len(before) == (broken[name] if name == "jsonl" else 0)
        assert len({line["where"] for line in lines}) == len(lines)
        assert name == "jsonl" or 0 < len(met) <= broken[name]
        (row,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
        assert row.split()[1:4] == [str(n) for n in (read, used, sum(causes.values()))]
    total_read = sum(last[f"data/{name}/read"] for name in broken)
    assert 40 < total_read <= 5 * COUNT - broken["jsonl"]  # within one epoch: each at most once
