"""The one folder for PyTorch: it comes back as the run, runs without this package, and has what vLLM asks for."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from exported_runs import CASES, random_run
from reference_models import config_for, edit_json
from transformers.processing_utils import ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor

from storm_jax.compression import Grid, plan_clip
from storm_jax.models.lora import is_adapter
from storm_jax.run import Run
from storm_jax.text.conversation import ConversationEncoder
from storm_jax.weights import WeightsError, hf, push, tensors
from storm_jax.weights.exporter import export_run
from storm_jax.weights.hf import modeling_storm
from storm_jax.weights.importer import Sources, import_run

FILES = sorted(pathlib.Path(hf.__file__).parent.glob("*_storm.py"))


def run_of(case: str, path: pathlib.Path, **changes) -> Run:
    family, fields = CASES[case]
    return random_run(path, family, **fields | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("exported")
    export_run(run_of("mamba1", root / "run"), root / "out", form="hf")
    return root / "out"


def load(folder: pathlib.Path):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)


def test_the_code_is_short_and_needs_only_torch_and_transformers(folder):
    assert len(FILES) == 3
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= 600
    for path in FILES:
        assert (folder / path.name).read_bytes() == path.read_bytes()
        assert "storm_jax" not in path.read_text()
    names = {path.name for path in folder.iterdir()} - {path.name for path in FILES}
    assert names == {
        "config.json", "generation_config.json", "processor_config.json", "chat_template.jinja", "README.md",
        "tokenizer.json", "tokenizer_config.json", "model.safetensors",
    }  # fmt: skip


ALONE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "orbax", "storm_jax"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import numpy, PIL.Image, torch, transformers

torch.set_num_threads(1)
model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = transformers.AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
image = PIL.Image.new("RGB", (50, 30), "red")
content = [{"type": "image", "image": image}, {"type": "video", "video": [image] * 5}, {"type": "text", "text": "?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
print(answer[0, -3:].tolist())
print(processor.decode(answer[0, -3:]))
"""


def test_it_runs_where_this_package_cannot_be_imported(folder, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, folder], cwd=tmp_path, env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[0])) == 3


ROUND_TRIPS = {
    "mamba1": {},
    "mamba2": {"model__dtype": "bfloat16", "model__decoder__tie_embeddings": False},
    "smolvlm": {"model__mamba__depth": 3},
    "llava": {"compression__num_frames": 16},
}


@pytest.mark.parametrize(
    "case",
    ["mamba2", *(pytest.param(c, marks=pytest.mark.slow) for c in ROUND_TRIPS if c != "mamba2")],
)
def test_importing_it_gives_the_run_back(case, tmp_path):
    run = run_of(case, tmp_path / "run", **ROUND_TRIPS[case])
    export_run(run, tmp_path / "out", dtype="float32", form="hf")
    edit_json(tmp_path / "out/config.json", lambda c: c.update(dtype=run.config.model.dtype))
    config = import_run(None, Sources(model=str(tmp_path / "out")), tmp_path / "again")
    again = Run(tmp_path / "again")
    assert config.model == run.config.model
    assert config.compression == run.config.compression
    assert (config.data.frames, config.data.system) == (run.config.data.frames, run.config.data.system)  # fmt: skip
    assert again.checkpoints.shapes(0) == run.checkpoints.shapes(0)
    for name in run.checkpoints.shapes(0):
        found, expected = again.checkpoints.read(0, name), run.checkpoints.read(0, name)
        assert found.tobytes() == expected.tobytes(), name
    texts = [ConversationEncoder(each.tokenizer(), "") for each in (again, run)]
    assert texts[0].digest == texts[1].digest
    assert texts[0].tokenizer.chat_template == texts[1].tokenizer.chat_template


@pytest.mark.slow
def test_bfloat16_comes_back_byte_for_byte(tmp_path):
    run = run_of("mamba2", tmp_path / "run", model__dtype="bfloat16")
    export_run(run, tmp_path / "1", form="hf")
    import_run(None, Sources(model=str(tmp_path / "1")), tmp_path / "again")
    export_run(Run(tmp_path / "again"), tmp_path / "2", form="hf")
    for path in (tmp_path / "1").iterdir():
        if path.name != "README.md":  # it names the folder that was imported
            assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name
    assert load(tmp_path / "1").dtype == torch.bfloat16


def test_placeholders_change_no_id_and_their_logits_are_never_the_highest(tmp_path):
    run = run_of("mamba2", tmp_path / "run", model__decoder__tie_embeddings=False)
    export_run(run, tmp_path / "out", form="hf")
    before = run.tokenizer().get_vocab()
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert {name: after[name] for name in before} == before
    assert {after["<image>"], after["<video>"]} == {295, 296}
    model = load(tmp_path / "out")
    assert model.config.text_config.vocab_size == 297
    hidden = torch.randn(200, 96)
    with torch.no_grad():
        assert model.lm_head(hidden).argmax(-1).max() < 295
        rows = model.get_input_embeddings().weight
    torch.testing.assert_close(rows[295:], rows[:295].mean(0).expand(2, -1))


@pytest.mark.slow
def test_a_tokenizer_that_has_placeholders_keeps_them(tmp_path):
    run = run_of("mamba1", tmp_path / "run")
    tokenizer = run.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<video>", "<image>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = Run(tmp_path / "again")
    again.prepare(run.config, tmp_path / "tokenizer")
    shutil.copytree(run.checkpoints.path, again.checkpoints.path)
    export_run(again, tmp_path / "out", form="hf")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["added_tokens"], config["text_config"]["vocab_size"]) == ([], 300)
    assert config["image_token_id"] == tokenizer.convert_tokens_to_ids("<image>")


@pytest.mark.slow
def test_adapters_are_merged_and_large_exports_are_sharded(tmp_path, monkeypatch):
    lora = {"model__decoder__lora__rank": 3, "optim__learning_rate__decoder": 1e-4}
    run = run_of("llava", tmp_path / "run", **lora)
    assert any(is_adapter(path) for path in run.checkpoints.shapes(0))
    monkeypatch.setattr(tensors, "SHARD_BYTES", 200_000)
    export_run(run, tmp_path / "out", form="hf")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model = load(tmp_path / "out")
    kernel, a, b = (
        run.checkpoints.read(0, f"decoder/layers/down/{name}")[1] for name in ("kernel", "lora/a", "lora/b")
    )  # fmt: skip
    expected = kernel + a @ b * run.config.model.decoder.lora.alpha / 3
    found = model.model.language_model.layers[1].mlp.down_proj.weight.detach().numpy().T
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_it_has_what_vllm_asks_for(folder):
    """The attributes that the Transformers backend of vLLM 0.32 reads, without vLLM."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert set(config.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
    assert config.get_text_config().model_type == "qwen2"
    model = transformers.AutoModel.from_config(config, trust_remote_code=True)
    assert type(model).__name__ == "StormModel" and model._supports_attention_backend
    assert model.get_decoder() is model.language_model
    assert model.get_encoder(modality="video") is model.vision_tower
    for tensor in tensors.list_tensors(folder):  # names that its loader maps or drops
        name = tensor.removeprefix("model.")
        known = name in model.state_dict() or name == "lm_head.weight"
        ignored = model._keys_to_ignore_on_load_unexpected
        assert known or any(re.search(pattern, tensor) for pattern in ignored), tensor
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert isinstance(processor, ProcessorMixin)
    assert isinstance(processor.video_processor, BaseVideoProcessor)
    assert processor.video_processor.do_sample_frames
    size = processor.image_processor.size
    assert (size["height"], size.get("width")) == (40, 40)
    frames = np.zeros((5, 40, 40, 3), np.uint8)
    inputs = processor(
        text="<image>a<video><video>", images=[frames[0]], videos=[frames, frames[:3]], return_tensors="pt",
        video_metadata=[{"fps": 2.0, "frames_indices": [0, 5, 9, 12, 16]}, {"fps": None}],
        do_sample_frames=False, return_text_replacement_offsets=True, add_special_tokens=False,
    )  # fmt: skip
    counts = processor._get_num_multimodal_tokens(
        image_sizes=[(40, 40)], video_sizes=[(5, 40, 40), (3, 9, 9)]
    )
    assert counts["num_image_patches"] == [1]
    assert [len(clip) for clip in inputs["pixel_values_videos"]] == [5, 3]
    images = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    videos = model.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output
    assert [len(images[0])] == counts["num_image_tokens"]
    assert list(map(len, videos)) == counts["num_video_tokens"]
    (offsets,) = inputs["text_replacement_offsets"]
    assert [entry["type"] for entry in offsets] == ["image", "video", "video"]
    encoded = [
        processor.tokenizer.encode(e["replacement"], add_special_tokens=False) for e in offsets
    ]
    assert [ids.count(processor.video_token_id) for ids in encoded[1:]] == counts[
        "num_video_tokens"
    ]
    replaced = processor.replace_video_token({"video_times": [np.arange(5.0)]}, video_idx=0)
    assert replaced.count(processor.video_token) == counts["num_video_tokens"][0]
    assert processor.replace_image_token({}, image_idx=0).count("<image>") == len(images[0])


def test_counts_are_those_of_our_planner(folder):
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    config = config_for(**{"model__vision__image_size": 40, **CASES["mamba1"][1]})
    grid = Grid.of(config.model)
    settings = processor.settings["plan"]
    for pool, cells, keep in ((1, 1, 1), (2, 2, 1), (4, 3, 2), (3, 1, 3)):
        settings |= {"temporal_pool": pool, "spatial_pool": cells, "temporal_sample": keep}
        compression = type(config.compression)(
            num_frames=9, temporal_pool=pool, spatial_pool=cells, temporal_sample=keep
        )
        sizes = [(n, 1, 1) for n in range(1, 20)]
        found = processor._get_num_multimodal_tokens(video_sizes=sizes)["num_video_tokens"]
        assert found == [plan_clip(n, grid, compression).num_tokens for n, *_ in sizes]


def test_kernels_get_the_layouts_that_mamba_ssm_documents(monkeypatch):
    """Both functions are replaced by ones that read their arguments as documented and run our loops."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    def scan(u, delta, A, B, C, D):  # [B, E, L], [B, E, L], [E, S], 2 x [B, S, L], [E]
        x, dt, b, c = (v.transpose(1, 2) for v in (u, delta, B, C))
        return plain(selective, x, dt, A, b, c, D).transpose(1, 2)

    def chunk_scan(x, dt, A, B, C, chunk_size, D):  # B, C: [B, L, groups, S]
        return plain(ssd, x, dt, A, B[:, :, 0], C[:, :, 0], D)

    def plain(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(modeling_storm, "selective_scan_fn", None)
            patch.setattr(modeling_storm, "mamba_chunk_scan_combined", None)
            return function(*arguments)

    selective, ssd = modeling_storm.selective_scan, modeling_storm.ssd
    states = (draw(2, 70, 4), draw(2, 70, 4))
    one = draw(2, 70, 6), draw(2, 70, 6).exp(), -draw(6, 4).exp(), *states, draw(6)
    two = draw(2, 70, 3, 2), draw(2, 70, 3).exp(), -draw(3).exp(), *states, draw(3)
    expected = selective(*one), ssd(*two)
    monkeypatch.setattr(modeling_storm, "selective_scan_fn", scan)
    monkeypatch.setattr(modeling_storm, "mamba_chunk_scan_combined", chunk_scan)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.testing.assert_close(selective(*one), expected[0])
    torch.testing.assert_close(ssd(*two), expected[1])


def break_field(name: str, value):
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update({name: value}))


DAMAGED = {
    "a mixer of their own": (break_field("mixer", "evil:Mixer"), "mixer='evil:Mixer' must be"),
    "an unknown stem": (break_field("stem", {"kind": "x"}), "config.json: stem: kind='x' must be"),
    "no plan": (break_field("plan", None), "config.json: plan=None must be a mapping of fields"),
    "a plan without pooling": (
        break_field("plan", {"spatial_pool": 1}),
        r"config.json \(plan\).*: temporal_pool=None must be an integer",
    ),
    "no depth": (break_field("vision_depth", 0), "vision_depth=0 must be a positive number"),
    "another template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        "chat_template.jinja does not begin with the head",
    ),
    "a missing tensor": (
        break_field("mamba", {"depth": 2, "d_state": 8}),
        r"model.projector.layers.1.mixer.directions.0.conv1d.bias is missing",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_is_refused(case, folder, tmp_path):
    damage, problem = DAMAGED[case]
    shutil.copytree(folder, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(WeightsError, match=problem):
        import_run(None, Sources(model=str(tmp_path / "copy")), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_second_mixer_and_one_of_your_own_are_refused(folder, tmp_path):
    with pytest.raises(WeightsError, match="--add_mixer=mamba2: the model has a mixer, mamba1"):
        import_run(None, Sources(model=str(folder)), tmp_path / "run", add_mixer="mamba2")
    run = run_of("mamba1", tmp_path / "own", model__mixer="reference_models:Mixer")
    with pytest.raises(
        WeightsError, match=r"'reference_models:Mixer' is your own code, .*--format=folders"
    ):
        export_run(run, tmp_path / "out", form="hf")
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


def test_the_card_tells_where_the_model_comes_from(tmp_path):
    run = run_of("mamba1", tmp_path / "base")
    meta = {
        "imported": {
            "vision": "google/siglip",
            "decoder": str(tmp_path / "a-decoder"),
            "projector": "",
        }
    }
    (tmp_path / "a-decoder").mkdir()
    (run.checkpoints.path / "0/meta/metadata").write_text(json.dumps({"step": 0, **meta}))
    evals = run.path / "evals"
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    for step in (0, 7):
        path = evals / f"videomme/step{step}_frames8_k2_p1_s1/results.json"
        path.parent.mkdir(parents=True)
        result = {
            "step": step,
            "headline_name": "accuracy",
            "headline": estimate,
            "counts": {"asked": 2700},
        }
        path.write_text(json.dumps(result))
    export_run(run, tmp_path / "out", form="hf")
    card = (tmp_path / "out/README.md").read_text()
    assert 'base_model: ["google/siglip"]' in card and "- a-decoder\n" in card
    row = "| videomme | accuracy 50.0% (40.0% to 60.0%) | 2,700 | frames8_k2_p1_s1 |"
    assert card.count("videomme") == 1 and row in card
    assert "| temporal sampling | 2 |" in card
    assert str(tmp_path) not in card


def test_a_dry_run_lists_what_would_be_uploaded(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    push.push(folder, "owner/name", dry_run=True)
    printed = capsys.readouterr().out
    assert "model.safetensors: " in printed and "modeling_storm.py: " in printed
    assert "11 files, 0.00 GB, would be uploaded to owner/name" in printed
    for wrong, problem in (("a/b/c", "is not a name such as owner/name"), ("-", "is not a name")):
        with pytest.raises(WeightsError, match=problem):
            push.push(folder, wrong, dry_run=True)
    with pytest.raises(WeightsError, match="is not a folder that"):
        push.push(tmp_path, "owner/name", dry_run=True)

    def refuse(*args, **kwargs):
        raise ValueError("no network")

    monkeypatch.setattr(push.huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(WeightsError, match="the upload to owner/name failed: no network") as error:
        push.push(folder, "owner/name")
    assert "hf_secret" not in printed + str(error.value) + capsys.readouterr().out
