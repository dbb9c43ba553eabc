"""Finds a model: a local folder, or the cache of the Hugging Face Hub."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import huggingface_hub
from huggingface_hub import errors

from storm_jax.weights import WeightsError

_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


def local_folder(spec: str, files: Sequence[str] = _FILES) -> pathlib.Path:
    """Returns the folder of "path/to/folder", of a hub id "owner/name", or of "owner/name/subfolder".

    Files of the hub that match `files` are downloaded if they are not in the cache.

    Raises:
      WeightsError: if there is no such folder, and the model cannot be downloaded.
    """
    folder = pathlib.Path(spec).expanduser()
    if folder.is_dir():
        return folder
    owner, _, rest = spec.rstrip("/").partition("/")
    name, _, subfolder = rest.partition("/")
    if not name or spec.startswith((".", "/", "~")):
        raise WeightsError(
            f"{spec} is neither a local folder nor a hub id such as Qwen/Qwen2-7B-Instruct"
        )
    patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in files]
    try:
        root = huggingface_hub.snapshot_download(f"{owner}/{name}", allow_patterns=patterns)
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise WeightsError(
            f"{spec} is not a local folder, and downloading it from the Hugging Face Hub failed: "
            f"{reason} (offline: copy the model here and pass its folder; gated model: run "
            f"`hf auth login`)"
        ) from error
    return pathlib.Path(root) / subfolder
