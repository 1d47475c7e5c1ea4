"""Stage d: one evaluation of the network: our model on each backend, plain torch, torch.compile.

As it is called from Python, and replayed from a CUDA graph; kernels launched, peak memory, a profiler's trace.
"""

import contextlib
import math

import torch

import cmfast
from benchmarks.peers.plain import plain_operators
from cmfast import UNet, UNetConfig, kernels

from . import stage

DTYPES = ("bfloat16", "float16")
#: Against the same weights in float64: as often the error of plain torch may a network have.
ALLOWED = 2.0


def config(device) -> UNetConfig:
    """The released network of ImageNet 64; the bundled one, which has all of its parts, in the dry run."""
    return cmfast.load("digits").unet.config if device.emulated else UNetConfig.imagenet64()


def network(device, dtype: torch.dtype = torch.float32) -> UNet:
    """The network on weights by the formula of the peers' comparison, drawn on the device."""
    with torch.device("meta"):
        unet = UNet(config(device))
    unet = unet.to_empty(device=device.name).eval().requires_grad_(False)
    generator = torch.Generator(device.name).manual_seed(0)
    for name, p in unet.named_parameters():
        p.normal_(generator=generator)
        if p.ndim > 1:
            p /= math.sqrt(p[0].numel())
        elif name.endswith("weight"):
            p.mul_(0.2).add_(1)
        else:
            p *= 0.1
    return unet.to(dtype)


def inputs(device, batch: int, dtype: torch.dtype) -> tuple:
    """x, timesteps and class labels."""
    generator = torch.Generator(device.name).manual_seed(1)
    c = config(device)
    x = torch.randn(batch, *c.sample_shape, generator=generator, device=device.name).to(dtype)
    timesteps = torch.linspace(-1000, 1000, batch, device=device.name)
    return x, timesteps, torch.arange(batch, device=device.name) % c.num_classes


#: name: (backend of our operators, or None for torch's; channels last)
VARIANTS = {
    "cuda": ("cuda", False),
    "cuda channels_last": ("cuda", True),
    "triton channels_last": ("triton", True),
    "torch": (None, False),
    "torch channels_last": (None, True),
}


def cases(device, folder, until):
    """Batch 1, then 16, then 64, of every variant; last torch.compile, which takes minutes."""
    batches = (1,) if device.emulated else (1, 16, 64)
    dtypes = DTYPES[:1] if device.emulated else DTYPES
    variants = [v for v in VARIANTS if v.endswith("last")] if device.emulated else list(VARIANTS)
    for batch in batches:
        for dtype in dtypes:
            for variant in variants:
                work = lambda a=(variant, dtype, batch): [measure(*a, device, folder)]  # noqa: E731
                yield stage.Case(f"{variant} {dtype} batch {batch}", work, patience=90)
    for mode in () if device.emulated else ("reduce-overhead", "max-autotune"):
        work = lambda mode=mode: [compiled(mode, device)]  # noqa: E731
        yield stage.Case(f"torch.compile {mode}", work, patience=600, optional=True)


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
        run = lambda: unet(*given)  # noqa: E731
        output = run()
        row["relative_error"], allowed = _errors(output, dtype, batch, device)
        if not row["relative_error"] <= allowed:
            return {**row, "error": f"off by {row['relative_error']:.2g} of the norm, allowed {allowed:.2g}"}
        row |= _times("called", device.called(run, 10))
        trace = folder / f"trace-{variant.replace(' ', '-')}-{dtype}-{batch}.json.gz"
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
