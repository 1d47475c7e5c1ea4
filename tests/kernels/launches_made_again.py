"""Triton's launches of calls that are made again, compared with its own, by a driver that writes them down.

Run without Triton's interpreter, by test_remembered.py: a line for each call, or an error.
"""

import ctypes
import os
import sys

import torch
from cmfast.kernels import remembered
from cmfast.kernels.conv_weights import pack
from cmfast.kernels.triton import group_norm_forward
from triton import knobs
from triton.runtime import driver

from benchmarks.launch_overhead import without_a_gpu
from cmfast import kernels

os.environ["CMFAST_GPU_ON_CPU"] = "1"
noted, counters, counters_read = [], set(), set()


def launcher(source, metadata):
    name = source.fn.__name__

    def launch(*given):
        noted.append((name, given))
        for place, value in enumerate(given):
            if isinstance(value, torch.Tensor) and value.dtype == torch.int32:
                counters.add((name, place))
            elif (name, place) in counters and isinstance(value, int):
                assert ctypes.string_at(value, 4) == bytes(4), (name, place)
                counters_read.add(name)

    return launch


gpu = without_a_gpu()
gpu.launcher_cls = launcher
driver.set_active(gpu)
remembered.DEVICES = {1}
last, half = torch.channels_last, torch.bfloat16


def image(*shape, dtype=half):
    return torch.randn(shape).to(dtype, memory_format=last if len(shape) == 4 else torch.contiguous_format)


weight = torch.randn(64, 32, 3, 3)
numbers = {"height": 16, "width": 16, "tile": 1, "dtype": half}
prepared = kernels.prepare_conv(weight, torch.randn(64), padding=1, **numbers)._replace(packed=pack(weight, half))


def calls():
    x, y = image(2, 64, 32, 32), image(2, 32, 16, 16)
    a, b, s, t = torch.randn(64), torch.randn(64), torch.randn(2, 64), torch.randn(2, 64)
    q, k, v = torch.randn(3, 2, 4, 64, 64).to(half)
    m = torch.randn(2, 2, 64)
    film = {"scale": s, "shift": t, "activation": "silu"}
    fused = {"gain": torch.randn(2, 32), "offset": torch.randn(2, 32), "silu": True, "moments": True}
    yield "group_norm", (x, 32, a, b), film
    yield "group_norm", (image(2, 64, 4, 4), 32, a, b), film
    yield "group_norm", ((x, image(2, 64, 32, 32)), 32), {}
    yield "attention", (q, k, v), {}
    yield "conv2d", (y, prepared), {}
    yield "conv2d", (y, prepared), {**fused, "residual": image(2, 64, 16, 16)}
    yield "channel_moments", (x,), {}
    yield "channel_moments", (image(1, 32, 64, 64),), {}
    yield "fold_group_norm", (m, 1024, 32, a, b), {"scale": s, "shift": t}
    yield "apply_group_norm", (x, m, 32, a, b), film
    yield "apply_group_norm", (x, m, 32, a, b), {**film, "resample": "average"}
    yield "channel_norm", (x, a, b), film
    yield "timestep_embedding", (torch.tensor([3.0]), torch.randn(16)), {}


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [t for v in values for t in tensors_of(v)]


def launches(op, given, named):
    noted.clear()
    results = getattr(kernels, op)(*given, **named, backend="triton")
    names = {t.data_ptr(): f"given {i}" for i, t in reversed([*enumerate(tensors_of((given, named)))])}
    names |= {t.data_ptr(): f"result {i}" for i, t in enumerate(tensors_of(results))}
    scratch, found = {}, []
    for kernel, (x, y, z, stream, function, metadata, _, _, _, *arguments) in noted:
        row = []
        for value in arguments:
            address = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if isinstance(value, torch.Tensor) or (isinstance(address, int) and address > 1 << 32):
                known = names.get(address)
                row.append(known or f"scratch {scratch.setdefault(address, len(scratch))}")
                assert address % 16 == 0
            else:
                row.append(value)
        found.append((kernel, x, y, z, stream, function, metadata, tuple(row)))
    return results, found


for _ in range(3):
    launches(*next(calls()))
assert "torch._dynamo" not in sys.modules  # its import would take a second
remembered.forget()
torch.use_deterministic_algorithms(True)  # fills memory that nobody has written with numbers
recalled, recall = [], remembered.recall
remembered.recall = lambda *arguments: recalled.append(recall(*arguments)) or recalled[-1]
for (op, *first), second, (_, *third) in zip(calls(), calls(), calls(), strict=True):
    launches(op, *first)
    long, wanted = launches(op, *second[1:])
    assert noted
    assert wanted
    recalled.clear()
    short, found = launches(op, *third)
    assert len(recalled) == 1, op
    assert recalled[0] is not None, op
    # Only a gradient reads what a group norm and attention write besides: it is in scratch memory.
    assert found == wanted, (op, found, wanted)
    for a, b in zip(tensors_of(long), tensors_of(short), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    knobs.runtime.launch_enter_hook.add(print)  # who has to know of each launch
    launches(op, *third)
    knobs.runtime.launch_enter_hook.remove(print)
    assert len(recalled) == 2, op
    assert recalled[1] is None, op
    print(op, len(found))
assert len(counters_read) == 2, counters_read


def steps(i):
    """The same kinds of steps, of other numbers for each i."""
    x, y = image(2, 4, 16, 16), image(2, 4, 16, 16, dtype=torch.float32)
    numbers = {"clip": 1.0 + i, "alpha": 0.5 * i, "beta": 0.25 + i, "draw": i, "first_sample": 7 * i}
    yield (x, y, 0.5 + i, 1.0 * i), {}
    yield (x, y, 0.5 + i, 1.0 * i), {**numbers, "seed": (1 << 64) - 16 + i, "input_scale": 2.0 + i}
    yield (x, y, torch.randn(2), 1.0 * i), {"beta": torch.randn(2), "noise": image(2, 4, 16, 16)}
    yield (x, y, 1.0, 1.0), {"beta": 1.0 * i, "seed": torch.tensor(i), "first_sample": torch.tensor(i)}


def of_step(given, named):
    return launches("consistency_step", given, named)[1]


for kind in zip(*map(steps, range(4)), strict=True):
    wanted = []
    for call in kind:
        remembered.forget()
        wanted.append(of_step(*call))
    remembered.forget()
    recalled.clear()
    assert [of_step(*call) for call in kind] == wanted
    assert [results is not None for results in recalled] == [False, False, True, True]
    print("consistency_step", len(wanted[0]))
group_norm_kernels = {kernel for kernel in vars(group_norm_forward).values() if hasattr(kernel, "pre_run_hooks")}
for kernel in group_norm_kernels:
    kernel.add_pre_run_hook(lambda *given, **named: None)
launches(*next(calls()))
assert recalled[-1] is None
