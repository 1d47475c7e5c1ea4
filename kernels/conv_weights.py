"""The weights of a convolution as the kernels of GPUs read them."""

import torch
from torch import Tensor


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [Cout, Cin, *kernel] as rows of output channels: [taps · Cin, Cout], in the dtype of products."""
    return weight.movedim((0, 1), (-1, -2)).reshape(-1, weight.shape[0]).to(dtype).contiguous()
