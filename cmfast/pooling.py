"""Average pooling of one to three dimensions, in every dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def average_pool(x: Tensor, size: int | Sequence[int], *, ceil_mode: bool = False) -> Tensor:
    """The means of x [N, C, *spatial] over blocks of `size`, in the dtype of x, as F.avg_pool2d has them."""
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3]
    # On a CPU torch's avg_pool3d has no half precision.
    narrow = x.ndim == 5 and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    return pool(x.float() if narrow else x, size, ceil_mode=ceil_mode).to(x.dtype)  # type: ignore[arg-type]
