import pytest
import torch


@pytest.fixture(autouse=True)
def _gpu_kernels_on_cpu(monkeypatch):
    """Let the tests of the operators ask for a GPU backend by name where there is no GPU."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("CMFAST_GPU_ON_CPU", "1")


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(request):
    """Fill torch.empty with NaN: an element that a kernel leaves unwritten, or reads before it is, shows."""
    if "compile" in request.node.name or "opcheck" in request.node.name:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
