"""A local folder, or a model of the Hugging Face Hub in its cache."""

from __future__ import annotations

import pathlib

import huggingface_hub
from huggingface_hub import errors

from storm_jax.weights import WeightsError

_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


def local_folder(spec: str) -> pathlib.Path:
    """The folder of "path/to/folder", of a hub id "owner/name", or of "owner/name/sub/folder" in one.

    Raises:
      WeightsError: when there is no such folder and the hub cannot be reached or does not have it.
    """
    folder = pathlib.Path(spec).expanduser()
    if folder.is_dir():
        return folder
    owner, _, rest = spec.rstrip("/").partition("/")
    name, _, inside = rest.partition("/")
    if not name or spec.startswith((".", "/", "~")):
        raise WeightsError(
            f"{spec} is neither a folder here nor a hub id such as Qwen/Qwen2-7B-Instruct"
        )
    patterns = [f"{inside}/{pattern}" if inside else pattern for pattern in _FILES]
    try:
        root = huggingface_hub.snapshot_download(f"{owner}/{name}", allow_patterns=patterns)
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, ValueError, OSError) as error:
        raise WeightsError(
            f"{spec} is no folder here and could not be had from the Hugging Face Hub: "
            f"{(str(error) or repr(error)).splitlines()[0]} (without a network, copy the model here and name its "
            f"folder; for a gated one, `hf auth login`)"
        ) from error
    return pathlib.Path(root) / inside
