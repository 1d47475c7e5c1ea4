"""cmfast: a custom-kernel engine for consistency models.

`load` a model, `model.sample(...)`; `kernels` has the fused operators, `sampling` the samplers.
"""

from importlib import metadata

from . import kernels, noise, preconditioning, sampling
from .model import ConsistencyModel
from .unet import UNet, UNetConfig

__version__ = metadata.version("cmfast")

__all__ = [
    "ConsistencyModel",
    "UNet",
    "UNetConfig",
    "__version__",
    "kernels",
    "noise",
    "preconditioning",
    "sampling",
]
