import pytest

from cmfast.environment import describe


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["cmfast"] = describe()


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    import torch

    if request.param == "bfloat16" and not (
        torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() in FAST
    ):
        pytest.skip("this processor has no bfloat16 arithmetic")
    return getattr(torch, request.param)


#: Processors on which bfloat16 is computed, not emulated.
FAST = ("AVX512_BF16", "AMX")
