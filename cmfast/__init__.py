"""cmfast: a custom-kernel engine for consistency models.

`load` a model, `model.sample(...)`; `kernels` has the fused operators, `sampling` the samplers.
"""

from importlib import metadata

from . import kernels, noise, preconditioning, sampling
from .accelerate import accelerate, restore
from .checkpoints import CheckpointError
from .explain import explain
from .model import ConsistencyModel, load
from .profile import profile
from .storage import save
from .unet import UNet, UNetConfig

__version__ = metadata.version("cmfast")

__all__ = [
    "CheckpointError",
    "ConsistencyModel",
    "UNet",
    "UNetConfig",
    "__version__",
    "accelerate",
    "explain",
    "kernels",
    "load",
    "noise",
    "preconditioning",
    "profile",
    "restore",
    "sampling",
    "save",
]
