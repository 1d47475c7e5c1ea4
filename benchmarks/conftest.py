import pytest

from cmfast.benchmarking.devices import computes_bfloat16
from cmfast.environment import describe


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["cmfast"] = describe()


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    import torch

    if request.param == "bfloat16" and not computes_bfloat16("cuda" if torch.cuda.is_available() else "cpu"):
        pytest.skip("this processor has no bfloat16 arithmetic")
    return getattr(torch, request.param)
