"""An accelerated network on this CPU: start-up, memory, and how its time scales with threads, batch and instructions.

    python benchmarks/cpu_engine.py [--network imagenet64] [--dtype float32] [--rounds 7]

Weights are drawn. Start-up is loading a file of weights, packing and planning, then the same with packed weights from
a folder. Outputs are checked against float64 before they are timed; the cases take turns, and medians are shown.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from cmfast.kernels import native

import cmfast
from cmfast import ConsistencyModel, UNet, UNetConfig
from cmfast.engine.accelerator import accelerator_of

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw(name):
    """A network whose output is of the size of its input."""
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet(getattr(UNetConfig, name)())
    unet = unet.to_empty(device="cpu")
    for name, p in unet.named_parameters():
        p.normal_(float(p.ndim == 1 and name.endswith("weight")), p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    return unet.eval()


def seconds(call):
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def start(folder, dtype):
    """Load and accelerate, twice; the second time packed weights are there. The accelerated network and its inputs."""
    cache = folder / "packed"
    for what in ("", "with packed weights from a folder"):
        load, model = seconds(lambda: cmfast.load(folder / "model"))
        own = sum(p.nbytes for p in model.parameters())
        make, fast = seconds(lambda model=model: cmfast.accelerate(model, dtype, cache=cache))
        print(f"start-up {what}: load {load:.2f} s, accelerate {make:.2f} s".replace(" :", ":"), flush=True)
    network = fast.unet
    packed = accelerator_of(network).target.bytes
    print(f"weights {own / 1e9:.2f} GB, packed {packed / 1e9:.2f} GB")
    return network


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--network", choices=("imagenet64", "lsun256"), default="imagenet64")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments.add_argument("--batches", default="1,8")
    arguments.add_argument("--threads", default=f"1,{torch.get_num_threads()}")
    arguments.add_argument("--isas", default=native.cpu().build_info()["isas"].removesuffix(", portable"))
    arguments.add_argument("--rounds", type=int, default=7)
    given = arguments.parse_args()
    dtype, isas = getattr(torch, given.dtype), given.isas.replace(" ", "").split(",")
    batches, threads = ([int(n) for n in text.split(",")] for text in (given.batches, given.threads))
    unet = draw(given.network)
    inputs = {}
    for batch in batches:
        inputs[batch] = [torch.randn(batch, *unet.config.sample_shape), torch.linspace(100, 1000, batch)]
        if unet.config.num_classes is not None:
            inputs[batch].append(torch.arange(batch))
    exact = unet.double()(*(t[:1].double() if t.is_floating_point() else t[:1] for t in inputs[batches[0]]))
    unet.float()
    with tempfile.TemporaryDirectory() as folder:
        cmfast.save(ConsistencyModel(unet), Path(folder) / "model")
        del unet
        fast = start(Path(folder), dtype)
    found = fast(*(t[:1] for t in inputs[batches[0]]))
    error = ((found.double() - exact).norm() / exact.norm()).item()
    assert error < LIMITS[dtype], f"relative error {error:.2g}"
    print(f"relative error {error:.2g}")
    fasts = {isas[0]: fast}
    for isa in isas[1:]:  # each reads packed weights of its own
        native.cpu().set_isa(isa)
        fasts[isa] = cmfast.accelerate(fast, dtype)
    cases = [(isas[0], n, batch) for batch in batches for n in threads]
    cases += [(isa, threads[-1], batches[0]) for isa in isas[1:]]
    times = {case: [] for case in cases}
    for turn in range(given.rounds + 1):
        for isa, n, batch in cases:
            native.cpu().set_isa(isa)
            torch.set_num_threads(n)
            taken, _ = seconds(lambda isa=isa, batch=batch: fasts[isa](*inputs[batch]))
            times[isa, n, batch] += [taken] if turn else []  # not the first: its memory is new
    medians = {case: statistics.median(of) for case, of in times.items()}
    print(f"| {given.network} {given.dtype} | threads | batch | s | s an image | to the first |")
    print("|---|---|---|---|---|---|")
    first = medians[isas[0], threads[-1], batches[0]]
    for (isa, n, batch), median in medians.items():
        each = median / batch
        print(f"| {isa} | {n} | {batch} | {median:.3f} | {each:.3f} | {each / first:.2f} |")
    values = sum(accelerator_of(fast).executable(inputs[batch]).bytes for batch in batches)
    print(f"values {values / 1e6:.0f} MB for batches of {given.batches}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
