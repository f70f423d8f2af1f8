"""From what a user calls a model to a folder on disk: a folder, a run directory, or a Hub id.

Only safetensors, JSON, tokenizer files and chat templates are fetched, never code. Nothing here
looks into weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from sparring.deadline import within
from sparring.errors import CheckpointError
from sparring.models.adapter_files import adapter_base
from sparring.models.files import read_json

HUB_SECONDS = 25.0
"""How long the Hub may take to say whether a model is there and readable."""

WANTED_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
)
_FILES = {
    "model": "config.json and safetensors",
    "adapter": "adapter_config.json and adapter_model.safetensors",
}
_UNWANTED_FILES = ("*/*", "consolidated*")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


def resolve(
    path: str | Path,
    *,
    endpoint: str | None = None,
    seconds: float = HUB_SECONDS,
    wanted: Literal["model", "adapter"] = "model",
) -> Path:
    """The folder that holds a model or an adapter.

    path: such a folder, a run directory (its `final` is taken), or a Hub id, which is downloaded
    into the Hub's own cache. endpoint: another Hub than the configured one. Raises CheckpointError
    with the remedy for anything else (wanted: what it speaks of); an unreachable Hub is told from
    the cache or given up within `seconds`.
    """
    name = str(path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _model_folder(folder)
    if folder.exists():
        raise CheckpointError(f"{folder.resolve()} is a file; give {_file_remedy(folder)}")
    if isinstance(path, Path) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"no {wanted} folder at {folder.resolve()}; give a folder with {_FILES[wanted]}, a run "
            "directory, or a Hub id such as Qwen/Qwen2.5-0.5B-Instruct"
        )
    return _download(name, folder, endpoint, seconds)


def config_of(
    path: str | Path,
    *,
    endpoint: str | None = None,
    seconds: float = HUB_SECONDS,
    fetch: bool = True,
) -> dict[str, Any]:
    """The config.json of a model, nothing else of it read or fetched.

    path: as in `resolve`, where a folder needs no weights, or a JSON file itself. An adapter's is
    its base's. Of a Hub id the cache's is taken where there is one; fetch=False: that one alone.
    Raises CheckpointError.
    """
    folder = Path(str(path)).expanduser()
    if folder.suffix == ".json" and folder.is_file():
        return read_json(folder)
    if folder.is_dir():
        found = _model_folder(folder)
        if (found / "config.json").is_file():
            return read_json(found / "config.json")
        return config_of(adapter_base(found), endpoint=endpoint, seconds=seconds, fetch=fetch)
    if isinstance(path, Path) or folder.exists() or not _HUB_ID.fullmatch(str(path)):
        resolve(path)  # says what is wrong
    return _hub_config(str(path), endpoint, seconds, fetch=fetch)


def _hub_config(name: str, endpoint: str | None, seconds: float, *, fetch: bool) -> dict[str, Any]:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return read_json(Path(hf_hub_download(name, "config.json", local_files_only=True)))
    except LocalEntryNotFoundError:
        if not fetch:
            raise CheckpointError(
                f"the config.json of {name!r} is not here: there is no such folder, and the Hub's"
                " cache has none"
            ) from None

    def look() -> str:
        api = HfApi(endpoint=endpoint)
        api.model_info(name, timeout=seconds / 3)
        return api.hf_hub_download(name, "config.json", etag_timeout=seconds / 3)

    try:
        file = within(seconds, look)
    except Exception as error:  # the client raises errors of several libraries, reported here
        if not _is_unreachable(error):
            raise CheckpointError(_refusal(repr(name), name, error)) from error
        raise CheckpointError(
            f"{name!r} is no folder, so it was taken for a Hub id, but the Hub cannot be reached"
            f" ({type(error).__name__}: {_first_line(error)}), and its config.json is not in the"
            " cache; give a local folder"
        ) from error
    return read_json(Path(file))


def _model_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "final"):
        if (candidate / "config.json").is_file() or (candidate / "adapter_config.json").is_file():
            return candidate
    if any(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder.resolve()} holds GGUF files, which are for llama.cpp; give the model they "
            "were made from, in safetensors"
        )
    kind = (
        "a run directory that has not finished (no `final` in it)"
        if (folder / "recipe.toml").exists()
        else "not a model"
    )
    raise CheckpointError(
        f"{folder.resolve()} is {kind}: there is neither config.json nor adapter_config.json; give "
        "a folder with config.json and safetensors, a PEFT adapter, or a finished run directory"
    )


def _file_remedy(file: Path) -> str:
    if file.suffix == ".gguf":
        return "the model it was made from, as a folder of safetensors: GGUF is for llama.cpp"
    if file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return "a folder of safetensors: pickled weights can run code and are refused"
    return "the folder it lies in"


def _download(name: str, tried: Path, endpoint: str | None, seconds: float) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    where = f"{name!r} (there is no folder {tried.resolve()}, so it was taken for a Hub id)"
    api = HfApi(endpoint=endpoint)

    def look() -> Any:
        info = api.model_info(name, timeout=seconds / 3)
        api.hf_hub_download(name, "config.json", etag_timeout=seconds / 3)
        return info

    try:
        info = within(seconds, look)
    except Exception as error:  # the client raises errors of several libraries, reported here
        if not _is_unreachable(error):
            raise CheckpointError(_refusal(where, name, error)) from error
        cached = _cached_snapshot(name)
        if cached is not None:
            return cached
        raise CheckpointError(
            f"{where}: the Hub cannot be reached within {seconds:.0f} s ({type(error).__name__}: "
            f"{_first_line(error)}), and the model is not in its cache; check the network (and "
            "HF_ENDPOINT), or give a local folder"
        ) from error
    files = [sibling.rfilename for sibling in info.siblings or []]
    if files and not any(file.endswith(".safetensors") and "/" not in file for file in files):
        raise CheckpointError(f"{where} has no safetensors files; {_missing_weights_remedy(files)}")
    try:
        found = snapshot_download(
            name,
            endpoint=endpoint,
            allow_patterns=list(WANTED_FILES),
            ignore_patterns=list(_UNWANTED_FILES),
            etag_timeout=seconds / 3,
        )
    except Exception as error:  # as above: nothing is hidden, the cause is chained
        raise CheckpointError(_refusal(where, name, error)) from error
    return _model_folder(Path(found))


def _cached_snapshot(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            name,
            local_files_only=True,
            allow_patterns=list(WANTED_FILES),
            ignore_patterns=list(_UNWANTED_FILES),
        )
    except LocalEntryNotFoundError:
        return None
    return Path(found) if (Path(found) / "config.json").exists() else None


def _is_unreachable(error: Exception) -> bool:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, OfflineModeIsEnabled):
        return True
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return not isinstance(error, EntryNotFoundError | HFValidationError)


def _refusal(where: str, name: str, error: Exception) -> str:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return (
            f"{where} is gated: accept its terms at https://huggingface.co/{name}, then log in "
            "with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{where} is not on the Hub, or private: check the spelling; for a private one log in "
            "with `hf auth login`"
        )
    if isinstance(error, EntryNotFoundError):
        return (
            f"{where} has no config.json, so it is not a model in Hugging Face format "
            f"({_first_line(error)})"
        )
    return f"{where} cannot be downloaded: {type(error).__name__}: {_first_line(error)}"


def _missing_weights_remedy(files: list[str]) -> str:
    if any(file.endswith(".gguf") for file in files):
        return "it holds GGUF files, which are for llama.cpp: give the model they were made from"
    return (
        "pickled weights (.bin, .pt) can run code while they are read and are refused: convert "
        "them in a safe "
        "place with transformers' from_pretrained and save_pretrained, then give that folder"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
