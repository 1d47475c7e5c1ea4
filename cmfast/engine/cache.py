"""Packed weights in a folder: a file for each network and dtype of products, named by a checksum of the weights."""

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import whole_file
from ..kernels import native
from ..kernels.cpu import memory


def fingerprint(tensors: Mapping[str, Tensor], products: torch.dtype) -> str:
    """A name for what is packed of these tensors by this version of cmfast, from their names, shapes and contents."""
    names = hashlib.sha256(f"{metadata.version('cmfast')} {products}".encode())
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        sum_ = native.cpu().checksum(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads())
        names.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} {sum_}".encode())
    return names.hexdigest()[:32]


def read(path: Path) -> dict[str, Tensor]:
    """The packed weights in a file; none where there is no such file.

    Raises:
        ValueError: the file is not one that `write` wrote, or not whole.
    """
    if not path.exists():
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118 - not a dict
                stored = file.get_tensor(name)
                found[name] = memory.empty(stored.nbytes).view(stored.dtype).copy_(stored)
            return found
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole file of packed weights ({error}): delete it") from error


def write(path: Path, packed: Mapping[str, Tensor]) -> None:
    """Write packed weights, whole or not at all."""
    with whole_file(path) as file:
        save_file(dict(packed), file)
