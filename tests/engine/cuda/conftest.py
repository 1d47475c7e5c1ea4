import pytest

from cmfast import kernels

from ...interpreter import make_faster

pytest.importorskip("triton")
make_faster()


@pytest.fixture(autouse=True)
def _gpu_on_cpu(monkeypatch):
    """Let the target for GPUs take CPU tensors, launches by Triton's interpreter; the definitions serve the rest."""
    monkeypatch.setenv("CMFAST_GPU_ON_CPU", "1")
    with kernels.use_backend("reference"):
        yield
