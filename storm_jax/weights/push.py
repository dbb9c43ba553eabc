"""Uploads an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import pathlib

import huggingface_hub
from huggingface_hub import errors

from storm_jax.weights import WeightsError
from storm_jax.weights.storm import recognise
from storm_jax.weights.whole import read_json


def push(folder: pathlib.Path, repo: str, *, dry_run: bool = False) -> None:
    """Uploads the one folder of an export to `repo`, "owner/name". A new repository is private.

    Args:
      dry_run: only list what would be uploaded; needs no network.

    Raises:
      WeightsError: if the folder is no such export, or the upload fails. Its text has no token.
    """
    folder = folder.expanduser()
    if not recognise(read_json(folder / "config.json")):
        raise WeightsError(
            f"--folder={folder} is not a folder that `export --format=hf` wrote: its config.json must have "
            f"model_type='storm'"
        )
    try:
        huggingface_hub.utils.validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise WeightsError(f"--repo={repo!r} is not a name such as owner/name: {error}") from None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.relative_to(folder)}: {path.stat().st_size:,} bytes")
    size = sum(path.stat().st_size for path in files) / 1e9
    if dry_run:
        print(f"{len(files)} files, {size:.2f} GB, would be uploaded to {repo}")
        return
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        address = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Export of STORM in JAX"
        ).repo_url
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, ValueError, OSError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise WeightsError(
            f"the upload to {repo} failed: {reason} (run `hf auth login` with a token that may write)"
        ) from None
    print(f"{address}: {len(files)} files, {size:.2f} GB")
