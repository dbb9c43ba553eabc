"""The model card of an exported run: what it was made from, how it sees videos, and how it was evaluated."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from storm_jax.checkpoints import RunError
from storm_jax.config import ConfigError, RunConfig
from storm_jax.run import Run
from storm_jax.weights.whole import read_json

_USE = """\
```python
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "NAME"  # this repository, or a folder
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, dtype="auto")
content = [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "What happens?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
)
with torch.no_grad():
    answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def model_card(run: Run, step: int, dtype: str) -> str:
    """README.md in Markdown. Paths of this machine are reduced to names."""
    stages = _stages(run)
    bases = _bases(stages)
    hub_ids = [name for name in bases if "/" in name]
    front = {
        "library_name": "transformers",
        "pipeline_tag": "video-text-to-text",
        "tags": ["video", "mamba", "storm"],
        **({"base_model": hub_ids} if hub_ids else {}),
    }
    config = run.config
    parts = [
        f"---\n{_yaml(front)}---\n",
        "# A STORM video-language model\n",
        "A SigLIP tower, a projector that mixes the frames of a video over time "
        "([STORM](https://arxiv.org/abs/2503.04130)), and a decoder. Trained with STORM in JAX; the files here need "
        "PyTorch and transformers only, and PyAV to read video files.\n",
        "## Use\n",
        _USE + "\n",
        "## Model\n",
        _table(_model_rows(config, step, dtype)),
        "## Made from\n",
        "\n".join(f"- {name}" for name in bases) + "\n"
        if bases
        else "It was trained from scratch.\n",
        "## Training\n",
        _training(stages),
        "## Evaluation\n",
        _evaluation(run, step),
        "## Licence\n",
        "The licences of the models and data above apply; they are not stated here.\n",
    ]
    return "\n".join(parts)


def _stages(run: Run) -> list[Run]:
    """The run, and those that it started from, as far as they still exist; the first one first."""
    found = [run]
    while (start := found[0].config.init_from) and len(found) < 20:
        earlier = Run(start)
        try:
            earlier.config  # noqa: B018
        except (ConfigError, RunError):
            break
        found.insert(0, earlier)
    return found


def _bases(stages: Sequence[Run]) -> list[str]:
    """The models that were imported: hub ids, or names of folders."""
    names: list[str] = []
    for run in stages:
        imported = read_json(run.checkpoints.path / "0/meta/metadata").get("imported") or {}
        names += [_public(str(spec)) for spec in imported.values() if spec]
    return list(dict.fromkeys(names))


def _public(spec: str) -> str:
    """A hub id as it is; of a local folder, only its name."""
    path = pathlib.Path(spec).expanduser()
    is_hub_id = not path.exists() and not spec.startswith((".", "/", "~")) and "/" in spec
    return spec if is_hub_id else path.name


def _model_rows(config: RunConfig, step: int, dtype: str) -> list[tuple[str, Any]]:
    model, compression = config.model, config.compression
    mixer = model.mixer
    if mixer != "none":
        mixer = f"{mixer}, {model.mamba.depth} layers, direction {model.mamba.direction}"
    rate = f" at {config.data.frames.fps:g} a second, at most" if config.data.frames.fps else ""
    return [
        ("checkpoint", f"step {step}, {dtype}"),
        ("image size", f"{model.vision.image_size} x {model.vision.image_size}"),
        ("tower, decoder", f"{model.vision.width} wide, {model.decoder.width} wide"),
        ("stem, mixer", f"{model.stem.kind}, {mixer}"),
        ("frames of a video", f"{rate} {compression.num_frames}".strip()),
        ("temporal pooling", compression.temporal_pool),
        ("spatial pooling", compression.spatial_pool),
        ("temporal sampling", compression.temporal_sample),
    ]


def _training(stages: Sequence[Run]) -> str:
    rows = []
    for run in stages:
        data, steps = run.config.data, max(run.checkpoints.steps(), default=0)
        if steps:
            names = ", ".join(source.name for source in data.train) or "none listed"
            rows.append(
                (run.path.name, f"{steps} of {run.config.train.steps} steps; data: {names}")
            )
    return _table(rows) if rows else "The weights are as imported.\n"


def _evaluation(run: Run, step: int) -> str:
    lines = ["| benchmark | result | questions | settings |", "| --- | --- | --- | --- |"]
    for path in sorted(run.path.glob("evals/*/*/results.json")):
        found = read_json(path)
        headline, counts = found.get("headline"), found.get("counts")
        if found.get("step") != step or not headline or not counts:
            continue
        value = f"{headline['value']:.1%} ({headline['low']:.1%} to {headline['high']:.1%})"
        result = f"{found.get('headline_name')} {value}"
        settings = path.parent.name.partition("_")[2]
        lines.append(f"| {path.parent.parent.name} | {result} | {counts['asked']:,} | {settings} |")
    if len(lines) == 2:
        return "There are no results for this checkpoint.\n"
    note = "Intervals are 95 %. Settings: frames, temporal pooling (k), spatial pooling (p), temporal sampling (s)."
    return "\n".join([*lines, "", note, ""])


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows), ""])


def _yaml(fields: dict[str, Any]) -> str:
    """Text and lists of text; JSON is YAML."""
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items())
