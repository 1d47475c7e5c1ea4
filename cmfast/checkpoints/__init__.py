"""Weights in and out: cmfast's folders, OpenAI's `.pt` files, diffusers' folders, and the Hugging Face hub.

Each format is a file with `read` and `write`; a `Checkpoint` is what they have in common.
"""

from .checkpoint import Checkpoint, CheckpointError
from .formats import FORMATS, format_of, read, write
from .openai import left_out, openai_config
from .sources import BUNDLED, asset, find
from .tensors import first_line

__all__ = [
    "BUNDLED",
    "FORMATS",
    "Checkpoint",
    "CheckpointError",
    "asset",
    "find",
    "first_line",
    "format_of",
    "left_out",
    "openai_config",
    "read",
    "write",
]
