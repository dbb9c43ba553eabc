"""Our one folder for PyTorch: the files next to its weights, which transformers and vLLM read.

config.json                 StormConfig: tower, decoder, stem, mixer, layout, compression
*_storm.py                  the code, from `storm_jax/weights/hf`
processor_config.json       pixels, frames, and the layout of the prompt
tokenizer.json, ...         the run's tokenizer, with <image> and <video> as placeholders
chat_template.jinja         the run's template behind a head that adds the system text
generation_config.json  README.md
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import transformers
from tokenizers import AddedToken

from storm_jax.compression import Grid
from storm_jax.config import LayoutConfig, RunConfig, to_dict
from storm_jax.run import Run
from storm_jax.text.template import DATE, wants_parts
from storm_jax.text.tokenizer import read_tokenizer, save_tokenizer
from storm_jax.weights import WeightsError, hf
from storm_jax.weights.architecture import decoder_json, vision_json
from storm_jax.weights.card import model_card
from storm_jax.weights.hf.configuration_storm import StormConfig

PLACEHOLDERS = ("<image>", "<video>")
POOLS = ("temporal_pool", "spatial_pool", "temporal_sample")
NEWLINES = ("image_newline", "video_newline")
# The rest of the layout, which the processor needs.
TEXTS = tuple(f.name for f in dataclasses.fields(LayoutConfig) if f.name not in NEWLINES)
_AUTO = {
    "AutoConfig": "configuration_storm.StormConfig",
    "AutoModel": "modeling_storm.StormModel",
    "AutoModelForImageTextToText": "modeling_storm.StormForConditionalGeneration",
}
HEAD_END = "{#- Here begins the template of the decoder. #}\n"
# Adds the system text, and makes each message a text or a list of parts, whichever the template wants.
_HEAD = """\
{%- set given = namespace(messages=[]) -%}
{%- set system = SYSTEM -%}
{%- if system and messages[0].role != 'system' -%}
  {%- set given.messages = [{'role': 'system', 'content': CONTENT}] -%}
{%- endif -%}
{%- for message in messages -%}
MESSAGE
{%- endfor -%}
{%- set messages = given.messages -%}
{%- set date_string = 'DATE' -%}
"""
_TEXT = """\
  {%- set content = namespace(text='') -%}
  {%- for part in ([{'type': 'text', 'text': message.content}] if message.content is string else message.content) -%}
    {%- set content.text = content.text + (part.text if part.type == 'text' else '<' + part.type + '>\\n') -%}
  {%- endfor -%}
  {%- set given.messages = given.messages + [dict(message, content=content.text)] -%}"""
_PARTS = """\
  {%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
  {%- set given.messages = given.messages + [dict(message, content=parts)] -%}"""


def write_files(run: Run, step: int, dtype: str, folder: pathlib.Path, ids: dict[str, Any]) -> int:
    """Writes everything but the weights, and returns the number of rows of the embedding table.

    Args:
      ids: bos_token_id, eos_token_id and pad_token_id.

    Raises:
      WeightsError: if the model cannot be described in this format.
    """
    config = run.config
    if ":" in config.model.mixer:
        raise WeightsError(
            f"{run.path}: model.mixer={config.model.mixer!r} is your own code, which the files for PyTorch do not "
            f"have: export it with --format=folders"
        )
    tokenizer = read_tokenizer(run.tokenizer_path)
    placeholder_ids, added = _add_placeholders(tokenizer)
    rows = max(config.model.decoder.vocab_size, *(i + 1 for i in placeholder_ids))
    model = config_json(config, dtype, rows, placeholder_ids, **ids)
    files = {
        "config.json": model | {"added_tokens": added},
        "generation_config.json": ids,
        "processor_config.json": processor_json(config),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    parts = wants_parts(tokenizer, str(tokenizer.chat_template))
    tokenizer.chat_template = _head(config.data.system, parts) + str(tokenizer.chat_template)
    save_tokenizer(tokenizer, run.tokenizer_path, folder)
    for path in sorted(pathlib.Path(hf.__file__).parent.glob("*_storm.py")):
        shutil.copy(path, folder)
    (folder / "README.md").write_text(model_card(run, step, dtype))
    return rows


def config_json(
    config: RunConfig, dtype: str, rows: int, placeholder_ids: list[int], **token_ids: Any
) -> dict[str, Any]:
    """The config.json of the folder, whose embedding table has `rows` rows."""
    model, fields = config.model, to_dict(config.model)
    vision = vision_json(model.vision, dtype)
    vision["num_hidden_layers"] = model.vision.depth + 1 + model.vision.feature_layer
    text = decoder_json(model.decoder, dtype, **token_ids) | {"vocab_size": rows}
    return {
        "model_type": StormConfig.model_type,
        "architectures": ["StormForConditionalGeneration"],
        "auto_map": _AUTO,
        "dtype": dtype,
        "vision_config": vision,
        "vision_depth": model.vision.depth,
        "vision_final_norm": model.vision.final_norm,
        "text_config": text,
        "text_vocab_size": model.decoder.vocab_size,
        "tie_word_embeddings": model.decoder.tie_embeddings,
        **{name: fields[name] for name in ("stem", "mixer", "mamba")},
        "plan": _plan(config),
        "image_token_id": placeholder_ids[0],
        "video_token_id": placeholder_ids[1],
        **token_ids,
    }


def processor_json(config: RunConfig) -> dict[str, Any]:
    """The processor_config.json of the folder."""
    side = config.model.vision.image_size
    size = {"height": side, "width": side}
    layout = to_dict(config.model.layout)

    def part(kind: str) -> dict[str, Any]:
        name = f"Storm{kind}Processor"
        return {
            f"{kind.lower()}_processor_type": name,
            "auto_map": {f"Auto{kind}Processor": f"processing_storm.{name}"},
            "size": size,
        }

    return {
        "processor_class": "StormProcessor",
        "auto_map": {"AutoProcessor": "processing_storm.StormProcessor"},
        "image_processor": part("Image"),
        "video_processor": {
            **part("Video"),
            "num_frames": config.compression.num_frames,
            "fps": config.data.frames.fps or None,
        },
        "settings": {
            "plan": _plan(config),
            "layout": {name: layout[name] for name in TEXTS},
            "time_text": config.data.frames.time_text,
        },
    }


def _plan(config: RunConfig) -> dict[str, Any]:
    """The fields of `TokenPlan`."""
    grid, compression = Grid.of(config.model), config.compression
    return {
        "image_side": grid.image,
        "video_side": grid.video,
        **{name: getattr(compression, name) for name in POOLS},
        **{name: getattr(config.model.layout, name) for name in NEWLINES},
    }


def add_rows(table: np.ndarray, rows: int) -> np.ndarray:
    """A vocabulary matrix [V, D] with more rows, the mean of all others: their logits are never the highest."""
    mean = table.mean(axis=0, keepdims=True, dtype=np.float32).astype(table.dtype)
    return np.concatenate([table, np.repeat(mean, rows - len(table), axis=0)])


def _add_placeholders(
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> tuple[list[int], list[str]]:
    """Makes both placeholders special tokens; returns their ids, and those that are new."""
    before = tokenizer.get_vocab()
    added = [token for token in PLACEHOLDERS if token not in before]
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in added], special_tokens=True
    )
    after = tokenizer.get_vocab()
    assert {token: after[token] for token in before} == before
    return [after[token] for token in PLACEHOLDERS], added


def _head(system: str, parts: bool) -> str:
    """What precedes the run's chat template."""
    content = "[{'type': 'text', 'text': system}]" if parts else "system"
    head = _HEAD.replace("CONTENT", content).replace("MESSAGE", _PARTS if parts else _TEXT)
    head = head.replace("DATE", DATE).replace("SYSTEM", json.dumps(system, ensure_ascii=False))
    return head + HEAD_END
