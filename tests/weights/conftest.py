"""A tower and a decoder on disk that many tests import."""

from __future__ import annotations

import pathlib

import pytest
from reference_models import make_decoder, make_tower, save


@pytest.fixture(scope="session")
def tower(tmp_path_factory) -> pathlib.Path:
    return save(make_tower(), tmp_path_factory.mktemp("hub") / "tower")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("hub") / "decoder"
    return save(make_decoder("qwen2"), folder, "qwen2")
