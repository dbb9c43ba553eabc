"""The public sets of the paper's stages are mixtures that train.py accepts."""

from __future__ import annotations

import pytest

from configs import storm_qwen2_7b
from configs.mixtures import align, long, sft
from storm_jax.config import RunConfig, from_dict


@pytest.mark.parametrize(("stage", "mixture"), [("align", align), ("sft", sft), ("long", long)])
def test_the_sets_of_a_stage_are_a_mixture(stage, mixture):
    sets = mixture.SETS
    config = from_dict(RunConfig, storm_qwen2_7b.get_config(f"stage={stage}"))
    assert [source.name for source in config.data.train] == [each.name for each in sets]
    assert all(source.path.startswith("data/") for source in config.data.train)
    assert len({each.path for each in sets}) == len(sets)
    for each in sets:
        assert each.url.startswith("https://")
        assert each.samples is None or each.samples > 1000


def test_the_second_stage_is_table_8():
    assert len(sft.SETS) == 39
