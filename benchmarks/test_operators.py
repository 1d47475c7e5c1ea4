"""Each operator at the networks' shapes, on every backend that serves this machine's fastest device, and in torch.

What is called, and when a result is right, is what `cmfast bench operators` has too: cmfast.benchmarking.
"""

import pytest
import torch
from cmfast.kernels import backends, shapes

from cmfast.benchmarking import accuracy, calls, devices, plain_torch, serving

DEVICE = devices.device_of("cuda" if torch.cuda.is_available() else "cpu")
SERVING = [name for name in backends.BACKENDS if backends.available(name, "group_norm")[0]]
CALLS = {
    calls.name(call): call
    for dtype in (torch.float32, torch.bfloat16)
    for call in shapes.calls(dtype=dtype, batch=1)
    if DEVICE.name == "cuda" or not call.shape.startswith("1x256x256x256")
}


@pytest.mark.parametrize("backend", [*SERVING, "torch"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@torch.no_grad()
def test_operator(benchmark, call, backend):
    if call.dtype == "bfloat16" and not devices.computes_bfloat16(DEVICE.name):
        pytest.skip("this processor has no bfloat16 arithmetic")
    given = calls.values(call, DEVICE.name)
    if backend == "torch":
        run = plain_torch.in_torch(call, given)
        accuracy.judge_plain(call, given, run())
    elif backend not in serving.backends_of(call, given):
        pytest.skip(backends.available(backend, call.op, calls.tensors(given))[1])
    else:
        given = serving.prepared(call, given, backend)
        run = serving.launched(call, backend, given)
        result = serving.run_watched(backend, run)
        accuracy.judge(call, given, result)
        if backend == "cpu":
            accuracy.check_alike(run(), result)
    benchmark.extra_info |= {"bytes": calls.bytes_moved(call, given), "flops": sum(call.flops)}

    def waited():
        run()
        DEVICE.synchronize()

    benchmark(waited)
