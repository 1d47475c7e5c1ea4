"""The fused operators of cmfast: group norm, attention, the consistency step, convolution and others.

Each operator has one file with its contract, and is served by one of several backends (see `backends`).
"""

if __name__ != "cmfast.kernels":
    raise ImportError(
        f"this folder is the package cmfast.kernels and was imported as {__name__!r}: install cmfast "
        "(pip install -e .) and import cmfast.kernels"
    )

from .apply_group_norm import apply_group_norm
from .attention import attention, split_qkv
from .backends import BackendError, backend_report, use_backend
from .channel_norm import channel_norm
from .consistency import ConsistencyStep, consistency_step
from .conv import ConvOutput, PreparedConv, conv2d, prepare_conv
from .conv_forms import CONV_FORMS
from .group_norm import group_norm
from .moments import channel_moments, fold_group_norm
from .timestep_embedding import timestep_embedding

__all__ = [
    "CONV_FORMS",
    "BackendError",
    "ConsistencyStep",
    "ConvOutput",
    "PreparedConv",
    "apply_group_norm",
    "attention",
    "backend_report",
    "channel_moments",
    "channel_norm",
    "consistency_step",
    "conv2d",
    "fold_group_norm",
    "group_norm",
    "prepare_conv",
    "split_qkv",
    "timestep_embedding",
    "use_backend",
]
