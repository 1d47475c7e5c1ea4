import pytest

from ...interpreter import make_faster
from .device import ON_GPU

pytest.importorskip("triton")
make_faster()


@pytest.fixture(autouse=True)
def _gpu_on_cpu(monkeypatch):
    """Let the target for GPUs take CPU tensors, launches by Triton's interpreter; the definitions serve the rest."""
    monkeypatch.setenv("CMFAST_GPU_ON_CPU", "1")
    if not ON_GPU:  # the interpreter takes some milliseconds for a program
        for module in ("conv_config", "group_norm_grid", "moments_tiles", "moments"):
            monkeypatch.setattr(f"cmfast.kernels.triton.{module}.PROGRAMS", 3)
    monkeypatch.setattr("cmfast.kernels.backends._candidates", lambda op, tensors: ("reference",))
