import os

import torch

# Where there is no GPU, Triton's interpreter runs its kernels on CPU tensors (it must be chosen before they are imported).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
