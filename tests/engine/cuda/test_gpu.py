"""What only a GPU can show: CUDA graphs, streams, several devices."""

import pytest
import torch

import cmfast
from cmfast.engine import Accelerator
from cmfast.engine.accelerator import accelerator_of

from ..networks import error, exact
from .device import DEVICE, network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_graph_gives_what_the_launches_give(dtype):
    unet, inputs = network("film")
    graphs, launches = (Accelerator(unet, dtype, graphs=graphs) for graphs in (True, False))
    for _ in range(3):
        assert torch.equal(graphs(*inputs), launches(*inputs))
        inputs[0] = -inputs[0]
    assert graphs.executable(inputs)._graph is not None
    assert launches.executable(inputs)._graph is None


@torch.no_grad()
def test_streams_take_turns():
    unet, inputs = network("film")
    fast = cmfast.accelerate(unet, torch.bfloat16)
    others = [x.flip(0) for x in inputs]
    expected = [fast(*inputs), fast(*others)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream, given in zip(streams, (inputs, others), strict=True):
            with torch.cuda.stream(stream):
                found.append(fast(*given))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[i % 2]) for i, out in enumerate(found))


@torch.no_grad()
def test_a_capture_of_the_callers():
    unet, inputs = network("film")
    fast = cmfast.accelerate(unet, torch.bfloat16)
    expected = fast(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fast(*inputs)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@torch.no_grad()
def test_calls_do_not_wait_for_the_gpu():
    unet, inputs = network("film")
    fast = cmfast.accelerate(unet, torch.bfloat16)
    fast(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_times_of_steps():
    unet, inputs = network("film")
    fast = cmfast.accelerate(unet, torch.bfloat16)
    times = accelerator_of(fast).executable(inputs).time(inputs).steps
    assert all(timed.seconds >= 0 for timed in times)
    assert 0 < sum(timed.seconds for timed in times) < 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@torch.no_grad()
def test_two_gpus():
    unet, inputs = network("film")
    fast = cmfast.accelerate(unet, torch.bfloat16)
    expected = fast(*inputs)
    unet.to("cuda:1")
    with pytest.raises(ValueError, match=f"expects inputs on cuda:1, got .*{DEVICE}"):
        fast(*inputs)
    assert error(fast(*(x.to("cuda:1") for x in inputs)).to(DEVICE), expected.double()) < 1e-3


@torch.no_grad()
def test_a_network_that_moves():
    unet, inputs = network("film")
    unet.cpu()
    fast = cmfast.accelerate(unet, torch.bfloat16)
    fast(*(x.cpu() for x in inputs))
    fast.cuda()
    assert error(fast(*inputs), exact(unet, inputs)) < 5e-2
