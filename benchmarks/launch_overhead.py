"""What a call costs the host beside the work of its kernel: python benchmarks/launch_overhead.py

On tensors so small that their kernels take next to nothing. On the processor: each operator as it is called, and
torch's nearest. Images are channels last, as the kernels read them; of planes, torch makes copies that are. The kernels
of conv2d are of one element: Winograd's transforms of larger ones are work.

Of the GPU's backends, without a GPU: each operator as it is called, first as from the third call on, which is
remembered (kernels/remembered.py), then the long way, of kernels that are compiled already. CUDA's launches are written
down instead of being made, which needs cmfast._cuda. Triton's, of kernels compiled for sm_90, go through its run time
to a driver that does nothing.

Microseconds, the best of several runs, one thread.
"""

import argparse
import contextlib
import os
import timeit
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from cmfast.kernels import backends, native
from cmfast.kernels import remembered as memory
from cmfast.kernels.conv_weights import pack
from torch.nn import functional as F

from cmfast import kernels

Calls = dict[str, Callable[[], Any]]


def microseconds(call: Callable[[], Any], number: int = 5_000) -> float:
    for _ in range(100):
        call()
    return min(timeit.repeat(call, number=number, repeat=9)) / number * 1e6


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


def on_the_processor() -> Calls:
    """Each operator, and behind it the nearest that torch has."""
    x, row, rows = image(1, 32, 2, 2), torch.randn(32), torch.randn(1, 32)
    planes = x.contiguous()
    q, t, counted, frequencies = torch.randn(1, 1, 4, 32), torch.tensor([3.0]), torch.tensor([3]), torch.randn(16)
    moments = kernels.channel_moments(x)
    weight = torch.randn(32, 32, 1, 1)
    prepared = kernels.prepare_conv(weight, row, height=2, width=2)
    film = {"scale": rows, "shift": rows, "activation": "silu"}
    fused = {"gain": rows, "offset": rows, "silu": True, "residual": x, "moments": True}
    step = {"clip": 1.0, "alpha": 1.0, "beta": 0.5, "seed": 7, "input_scale": 2.0}
    return {
        "group_norm": lambda: kernels.group_norm(x, 32, row, row),
        "group_norm with FiLM and SiLU": lambda: kernels.group_norm(x, 32, row, row, 1e-5, **film),
        "torch's, without them": lambda: F.group_norm(x, 32, row, row),
        "attention": lambda: kernels.attention(q, q, q),
        "torch's attention": lambda: F.scaled_dot_product_attention(q, q, q),
        "consistency_step": lambda: kernels.consistency_step(x, x, 0.5, 0.5, clip=1.0),
        "the same in torch": lambda: (0.5 * x + 0.5 * x).clamp(-1.0, 1.0),
        "consistency_step with its three outputs": lambda: kernels.consistency_step(x, x, 0.5, 0.5, **step),
        "channel_moments": lambda: kernels.channel_moments(x),
        "channel_moments of planes": lambda: kernels.channel_moments(planes),
        "torch's var_mean": lambda: torch.var_mean(x, (2, 3)),
        "fold_group_norm": lambda: kernels.fold_group_norm(moments, 4, 32, row, row),
        "fold_group_norm with FiLM": lambda: kernels.fold_group_norm(moments, 4, 32, row, row, scale=rows, shift=rows),
        "apply_group_norm": lambda: kernels.apply_group_norm(x, moments, 32, row, row),
        "apply_group_norm with FiLM and SiLU": lambda: kernels.apply_group_norm(x, moments, 32, row, row, **film),
        "channel_norm": lambda: kernels.channel_norm(x, row, row),
        "channel_norm with FiLM and SiLU": lambda: kernels.channel_norm(x, row, row, **film),
        "channel_norm of planes": lambda: kernels.channel_norm(planes, row, row),
        "torch's layer_norm, of tokens": lambda: F.layer_norm(rows, (32,), row, row),
        "conv2d": lambda: kernels.conv2d(x, prepared),
        "conv2d of planes": lambda: kernels.conv2d(planes, prepared),
        "conv2d of all it can": lambda: kernels.conv2d(x, prepared, **fused),
        "torch's conv2d": lambda: F.conv2d(x, weight, row),
        "timestep_embedding": lambda: kernels.timestep_embedding(t, frequencies),
        "timestep_embedding of integers": lambda: kernels.timestep_embedding(counted, frequencies),
        "torch's sines and cosines": lambda: torch.cat(((u := t[:, None] * frequencies).cos(), u.sin()), 1),
    }


def operators() -> dict[str, Callable[[str], Any]]:
    """Each operator that a GPU serves, as it is called of a backend."""
    x, q, k, v = image(1, 32, 2, 2).bfloat16(), *(torch.randn(1, 1, 16, 32).bfloat16() for _ in range(3))
    weight, bias, output = torch.randn(32), torch.randn(32), torch.randn_like(x)
    moments, t, frequencies = torch.randn(1, 2, 32).abs(), torch.tensor([3.0]), torch.randn(16)
    film = {"scale": torch.randn(1, 32), "shift": torch.randn(1, 32), "activation": "silu"}
    step = {"clip": 1.0, "alpha": 1.0, "beta": 0.5, "seed": 7, "input_scale": 2.0}
    numbers = {"height": 64, "width": 64, "tile": 1, "dtype": torch.bfloat16}
    large = torch.randn(160, 32, 3, 3)  # so many outputs make enough blocks for a GPU
    prepared = kernels.prepare_conv(large, None, padding=1, **numbers)._replace(packed=pack(large, torch.bfloat16))
    given = {
        "group_norm": ((x, 32, weight, bias), film),
        "attention": ((q, k, v), {}),
        "consistency_step": ((x, output, 0.5, 0.5), step),
        "conv2d": ((image(1, 32, 64, 64).bfloat16(), prepared), {}),
        "channel_moments": ((x,), {}),
        "fold_group_norm": ((moments, 4, 32, weight, bias), {"scale": film["scale"], "shift": film["shift"]}),
        "apply_group_norm": ((x, moments, 32, weight, bias), film),
        "channel_norm": ((x, weight, bias), film),
        "timestep_embedding": ((t, frequencies), {}),
    }

    def calling(name: str, positional: tuple, named: dict[str, Any]) -> Callable[[str], Any]:
        operator = getattr(kernels, name)
        return lambda backend: operator(*positional, **named, backend=backend)

    return {name: calling(name, *operands) for name, operands in given.items()}


def of_backend(name: str) -> Calls:
    """The operators that a backend serves, called of it by name."""
    served = {op: call for op, call in operators().items() if backends.available(name, op)[0]}
    return {f"{name}: {op}": lambda op=op: served[op](name) for op in served}


@contextlib.contextmanager
def as_on_a_gpu(*, remembered: bool) -> Iterator[None]:
    """Within the block, calls of CPU tensors are remembered, or none are."""
    with mock.patch.object(memory, "DEVICES", {1} if remembered else set()):
        memory.forget()
        yield


def of_cuda() -> Calls:
    x = torch.randn(1, 3, 64, 64)
    return {
        "native.launch of nothing": lambda: native.launch("nothing", x),
        "which backend serves": lambda: backends.available("cuda", "consistency_step", (x, x)),
        "three torch.empty_like": lambda: [torch.empty_like(x) for _ in range(3)],
    }


def planned(call: Callable[[], Any]) -> float:
    """The time of a call whose launches are written down instead of being made."""
    times: list[float] = []
    native.cuda().planned(lambda: times.append(microseconds(call)))
    return times[0]


def without_a_gpu() -> Any:
    """A driver for Triton's run time that says it has an sm_90, and launches nothing."""
    from triton.backends.compiler import GPUTarget

    return SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=lambda source, metadata: lambda *arguments: None,
        utils=SimpleNamespace(
            load_binary=lambda *arguments: (None, 0, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)

    def show(calls: Calls, measure: Callable[[Callable[[], Any]], float]) -> None:
        for name, call in calls.items():
            print(f"{name:40} {measure(call):6.2f} µs", flush=True)

    def show_backend(name: str, measure: Callable[[Callable[[], Any]], float]) -> None:
        for op, call in of_backend(name).items():
            times = []
            for remembered in (True, False):
                with as_on_a_gpu(remembered=remembered):
                    times.append(measure(call))
            print(f"{op:40} {times[0]:6.2f} µs, the long way {times[1]:6.2f} µs", flush=True)

    with torch.no_grad():
        show(on_the_processor(), microseconds)
        os.environ["CMFAST_GPU_ON_CPU"] = "1"
        ok, reason = backends.available("cuda", "consistency_step")
        show(of_cuda() if ok else {}, planned)
        if ok:
            show_backend("cuda", planned)
        print("" if ok else f"cuda: {reason}", end="")
        ok, reason = backends.available("triton", "consistency_step")
        if ok:
            from triton.runtime import driver

            driver.set_active(without_a_gpu())
            show_backend("triton", microseconds)
        else:
            print(f"triton: {reason}")


if __name__ == "__main__":
    main()
