import pytest
import torch


@pytest.fixture(autouse=True)
def _gpu_kernels_on_cpu(monkeypatch):
    """Let the tests of the operators ask for a GPU backend by name where there is no GPU."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("CMFAST_GPU_ON_CPU", "1")
