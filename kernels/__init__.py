"""The fused operators of cmfast: group norm, attention and the consistency step.

Each operator has one file with its contract, and is served by one of several backends (see `backends`).
"""

if __name__ != "cmfast.kernels":
    raise ImportError(
        f"this folder is the package cmfast.kernels and was imported as {__name__!r}: install cmfast "
        "(pip install -e .) and import cmfast.kernels"
    )

from .attention import attention, split_qkv
from .backends import BackendError, backend_report, use_backend
from .consistency import ConsistencyStep, consistency_step
from .group_norm import group_norm

__all__ = [
    "BackendError",
    "ConsistencyStep",
    "attention",
    "backend_report",
    "consistency_step",
    "group_norm",
    "split_qkv",
    "use_backend",
]
