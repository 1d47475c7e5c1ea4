"""Several processes under torchrun, each with its share of every batch."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch import distributed as dist


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a training: how many there are, and which one this is (0 writes the files)."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Processes":
        """Those of torch.distributed's group, or this one alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of the processes' values."""
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value)
            value = value / self.count
        return value

    def agree(self, number: Tensor) -> bool:
        """Whether all processes have the same number; all are told the same."""
        return not self.mean((number - self.mean(number)).abs())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, by NCCL on GPUs and gloo elsewhere; gives this process its device.

    Without torchrun, there is nothing to join and the device is the one that was given.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield device
        return
    gpu = device.type == "cuda"
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    try:
        yield device
    finally:
        dist.destroy_process_group()
