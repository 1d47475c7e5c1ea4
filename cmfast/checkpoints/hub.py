"""Models of the Hugging Face hub, by huggingface_hub: an optional package, imported where it is used."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

from . import diffusers, folder
from .formats import format_of
from .tensors import first_line

_CONFIGS = [
    folder.CONFIG,
    diffusers.INDEX,
    diffusers.EXTRA,
    f"{diffusers.NETWORK}/config.json",
    f"{diffusers.SCHEDULER}/scheduler_config.json",
]


def is_hub_id(source: str | Path) -> bool:
    """Whether a string can be the id of a model, "organisation/name", and is not plainly a file's name."""
    if isinstance(source, Path) or source.endswith((".pt", ".pth", ".bin", ".safetensors", ".json")):
        return False
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII) is not None and not re.search(r"--|\.\.", source)


def download(
    repo_id: str,
    *,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder of a model in huggingface_hub's cache, with the files that reading it takes and no others.

    Args:
        repo_id: "organisation/name".
        variant: of the weights.
        revision: branch, tag or commit.
        token: for private models; None takes the one that the user logged in with, False none.
        cache_dir: of the cache; None takes the user's.
        force_download: download what is in the cache too.
        local_files_only: take what is in the cache, and connect to nothing (as HF_HUB_OFFLINE=1 does).

    Raises:
        ImportError: huggingface_hub is not installed.
        FileNotFoundError: there is no such model or revision, or it is not in the cache and the hub cannot be reached.
        PermissionError: the model is gated, and the token's owner has not been given access.
        CheckpointError: its configurations are not those of a model that cmfast can read.
    """
    hub = _huggingface_hub(f"there is no path {repo_id}; to look for a model of this name on the Hugging Face hub,")
    options = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "force_download": force_download,
        "local_files_only": local_files_only,
    }

    def fetch(*patterns: str) -> Path:
        try:
            return Path(hub.snapshot_download(repo_id, allow_patterns=[*_CONFIGS, *patterns], **options))
        except hub.utils.GatedRepoError as error:
            raise PermissionError(
                f"{repo_id} is gated on the Hugging Face hub: ask for access there, and give a token"
            ) from error
        except hub.utils.RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"no model {repo_id}: there is no such path, and no such model on the Hugging Face hub, or it is "
                "private (give a token)"
            ) from error
        except hub.utils.RevisionNotFoundError as error:
            raise FileNotFoundError(
                f"the model {repo_id} of the Hugging Face hub has no revision {revision}"
            ) from error
        except (hub.utils.LocalEntryNotFoundError, hub.utils.OfflineModeIsEnabled) as error:
            raise FileNotFoundError(
                f"no model {repo_id}: there is no such path, and the files of such a model of the Hugging Face hub are "
                f"not in the cache on this machine, while the hub was not asked or not reached: {first_line(error)}"
            ) from error

    if format_of(fetch()) == "cmfast":
        return fetch(folder.WEIGHTS)
    path = fetch(*_weight_patterns("safetensors", variant))
    if diffusers.weights_file(diffusers.network_folder(path), variant) is None:
        path = fetch(*_weight_patterns("bin", variant))
    return path


def upload(path: Path, repo_id: str, *, private: bool | None, token: str | bool | None, **options: Any) -> str:
    """Make the repository where it is missing, and upload a folder as one commit; return the commit's address.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    api = _huggingface_hub("to upload to the Hugging Face hub,").HfApi(token=token)
    repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(repo_id=repo_id, repo_type="model", folder_path=path, **options)


def _weight_patterns(suffix: str, variant: str | None) -> list[str]:
    """Names of a network's weights, whole or in shards, in a pipeline's folder and in a network's."""
    mark = f".{variant}" if variant else ""
    names = (
        f"{diffusers.STEM}{mark}.{suffix}",
        f"{diffusers.STEM}.{suffix}.index{mark}.json",
        f"{diffusers.STEM}{mark}-?????-of-?????.{suffix}",
    )
    return [f"{place}{name}" for place in ("", f"{diffusers.NETWORK}/") for name in names]


def _huggingface_hub(purpose: str) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.utils
    except ImportError as error:
        raise ImportError(f"{purpose} huggingface_hub is needed: pip install 'cmfast[hub]'") from error
    return huggingface_hub
