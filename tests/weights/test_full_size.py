"""A full-size tower, SigLIP so400m/14 at 448 with random weights, equals torch's after an import."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from reference_models import config_for, load_model

from configs.storm_qwen2_7b import MODEL as QWEN2_7B
from storm_jax.weights.architecture import vision_json
from storm_jax.weights.importer import Sources, import_run

MAX_ERROR = 1e-4  # of the largest feature: 26 layers of fp32 sums


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_full_size_tower_equals_transformers_on_an_image(decoder, tmp_path, capsys):
    fields = vision_json(QWEN2_7B.vision, "float32") | {"vision_use_head": True}
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(transformers.AutoConfig.for_model(**fields)).eval()
    model.save_pretrained(tmp_path / "tower")
    began = time.monotonic()
    config = config_for(model__vision__image_size=448)
    import_run(config, Sources(str(tmp_path / "tower"), str(decoder)), tmp_path / "run")
    seconds = time.monotonic() - began
    frame = np.random.default_rng(0).integers(0, 256, (1, 448, 448, 3)).astype(np.uint8)
    pixels = torch.from_numpy((frame / 255.0 - 0.5) / 0.5).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True).hidden_states[-2].numpy()
    found = np.asarray(nnx.jit(lambda m: m.vision(frame))(load_model(tmp_path / "run")))
    assert found.shape == expected.shape == (1, 1024, 1152)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    with capsys.disabled():
        print(f"\nfull-size tower: imported in {seconds:.0f} s, relative error {error:.1e}")
    assert error < MAX_ERROR
