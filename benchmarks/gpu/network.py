"""Stage d: one evaluation of the network: accelerated, our model on each backend, plain torch, torch.compile.

As it is called from Python, and replayed from a CUDA graph; kernels launched, peak memory, a profiler's trace.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import torch

import cmfast
from cmfast import UNet, UNetConfig, kernels
from cmfast.benchmarking import networks
from cmfast.benchmarking.plain_network import plain_operators
from cmfast.engine.accelerator import accelerator_of

from . import stage

DTYPES = ("bfloat16", "float16")
#: Against the same weights in float64: as often the error of plain torch may a network have.
ALLOWED = 2.0


def config(device) -> UNetConfig:
    """The released network of ImageNet 64; the bundled one, which has all of its parts, in the dry run, at 4 × 4."""
    if device.emulated:
        return dataclasses.replace(cmfast.load("digits").unet.config, image_size=4)
    return UNetConfig.imagenet64()


def network(device, dtype: torch.dtype = torch.float32) -> UNet:
    """The network on weights by the formula of the peers' comparison, drawn on the device."""
    return networks.random_network(config(device), device.name, dtype)


def inputs(device, batch: int, dtype: torch.dtype) -> tuple:
    """x, timesteps and class labels."""
    return networks.inputs(config(device), device.name, batch, dtype)


#: name: whether the launches of the accelerated network are captured in a CUDA graph
ACCELERATED = {"accelerated": True, "accelerated without graphs": False}
#: name: (backend of our operators, or None for torch's; channels last), the most telling first
VARIANTS = {
    "torch channels_last": (None, True),
    "triton channels_last": ("triton", True),
    "cuda channels_last": ("cuda", True),
    "torch": (None, False),
    "cuda": ("cuda", False),
}


def cases(device, folder, until):
    """bfloat16 with batch 1, 16 and 64, then float16, of every variant; last torch.compile, which takes minutes."""
    variants = [*ACCELERATED, *VARIANTS]
    if device.emulated:
        variants = ["accelerated", *(v for v in VARIANTS if v.endswith("last"))]
    for dtype, batch in evaluations(device):
        for variant in variants:
            measured = accelerated if variant in ACCELERATED else measure
            work = lambda of=measured, a=(variant, dtype, batch): [of(*a, device, folder)]  # noqa: E731
            # What the stage "compile" has not compiled of the accelerated network's kernels is compiled here.
            patience = 300 if variant in ACCELERATED else 90
            yield stage.Case(f"{variant} {dtype} batch {batch}", work, patience=patience)
    for mode in () if device.emulated else ("reduce-overhead", "max-autotune"):
        work = lambda mode=mode: [compiled(mode, device)]  # noqa: E731
        yield stage.Case(f"torch.compile {mode}", work, patience=600, optional=True)


def evaluations(device) -> list[tuple[str, int]]:
    """The dtypes and batches of which every variant is measured, the most telling first."""
    if device.emulated:
        return [(DTYPES[0], 1)]
    return [(DTYPES[0], 1), (DTYPES[0], 16), (DTYPES[1], 1), (DTYPES[0], 64), (DTYPES[1], 16)]


@contextlib.contextmanager
def operators(backend: str | None):
    """Let the network compute on a backend, or in torch's operators."""
    with torch.inference_mode(), plain_operators() if backend is None else kernels.use_backend(backend):
        yield


def measure(variant: str, dtype: str, batch: int, device, folder) -> dict:
    """A row: microseconds as called and replayed, launches, peak memory; the error, which must not be wrong."""
    backend, last = VARIANTS[variant]
    row = {"variant": variant, "dtype": dtype, "batch": batch}
    if backend and device.refusal(backend):
        return {**row, "error": f"backend {backend!r} is not here: {device.refusal(backend)}"}
    unet = network(device, getattr(torch, dtype))
    unet = unet.to(memory_format=torch.channels_last) if last else unet
    given = inputs(device, batch, getattr(torch, dtype))
    if last:
        given = (given[0].contiguous(memory_format=torch.channels_last), *given[1:])
    with operators(backend):
        return _measured(row, lambda: unet(*given), device, folder)


def accelerated(variant: str, dtype: str, batch: int, device, folder) -> dict:
    """The same of the accelerated network, and the number of its steps: what it launches but for copies."""
    row = {"variant": variant, "dtype": dtype, "batch": batch}
    fast = cmfast.accelerate(network(device, getattr(torch, dtype)), getattr(torch, dtype), graphs=ACCELERATED[variant])
    given = inputs(device, batch, getattr(torch, dtype))
    accelerator = accelerator_of(fast)
    assert accelerator is not None
    steps = accelerator.executable(given).steps.steps
    row |= {"steps": len(steps), "steps_by_torch": sum(bool(step.reason) for step in steps)}
    with torch.inference_mode():
        return _measured(row, lambda: fast(*given), device, folder)


def _measured(row: dict, run: Callable, device, folder) -> dict:
    batch, dtype = row["batch"], row["dtype"]
    row["relative_error"], allowed = _errors(run(), dtype, batch, device)
    if not row["relative_error"] <= allowed:
        return {**row, "error": f"off by {row['relative_error']:.2g} of the norm, allowed {allowed:.2g}"}
    row |= _times("called", device.called(run, 10))
    trace = folder / f"trace-{row['variant'].replace(' ', '-')}-{dtype}-{batch}.json.gz"
    launches = device.launches(run, trace if batch == 1 and dtype == "bfloat16" else None)
    row |= {"launches": sum(launches.values()), "kernels": dict(list(launches.items())[:40])}
    row["peak_bytes"] = device.peak_memory(run)
    row |= _times("replayed", device.replayed([run]))
    device.free()
    return {**row, "images_per_s": round(1e6 * batch / row["replayed_us"], 1)}


_exact: dict = {}


def _errors(output, dtype: str, batch: int, device) -> tuple[float, float]:
    """The output's error and the one that is allowed, both relative to the norm of the float64 result.

    The first images of a batch stand for all of it.
    """
    count = min(batch, 2)
    if (dtype, batch) not in _exact:
        x, *rest = inputs(device, batch, getattr(torch, dtype))
        few = (x[:count], *(t[:count] for t in rest))
        with operators("reference"):
            exact = network(device).to(getattr(torch, dtype)).double()(few[0].double(), *few[1:])
        with operators(None):
            plain = network(device, getattr(torch, dtype))(*few)
        _exact[dtype, batch] = exact, _relative(plain, exact)
        device.free()
    exact, plain = _exact[dtype, batch]
    return _relative(output[:count], exact), ALLOWED * plain


def _relative(output, exact) -> float:
    return ((output.double() - exact).norm() / exact.norm()).item()


def _times(name: str, times) -> dict:
    return {f"{name}_us": times.median, f"{name}_low_us": times.low, f"{name}_high_us": times.high}


def compiled(mode: str, device) -> dict:
    """A row of plain torch under torch.compile, in bfloat16, channels last, batch 1; it has CUDA graphs of its own."""
    row = {"variant": f"torch.compile {mode}", "dtype": "bfloat16", "batch": 1}
    unet = network(device, torch.bfloat16).to(memory_format=torch.channels_last)
    x, *rest = inputs(device, 1, torch.bfloat16)
    given = (x.contiguous(memory_format=torch.channels_last), *rest)
    with operators(None):
        fast = torch.compile(unet, mode=mode, dynamic=False)
        for _ in range(3):
            output = fast(*given)
        row["relative_error"], allowed = _errors(output, "bfloat16", 1, device)
        if not row["relative_error"] <= allowed:
            return {**row, "error": f"off by {row['relative_error']:.2g} of the norm, allowed {allowed:.2g}"}
        return {**row, **_times("called", device.called(lambda: fast(*given)))}


if __name__ == "__main__":
    stage.main("network", cases)
