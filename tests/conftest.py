import os

import torch
from hypothesis import settings

# The same examples at every run.
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")

# The networks here are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)

# Without a GPU, Triton's interpreter runs its kernels on CPU tensors; it must be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
