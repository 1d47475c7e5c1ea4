"""`cmfast profile`: where the time of an accelerated network evaluation goes, and what the engine did to it."""

import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ..engine import Accelerator
from ..engine.cpu import CpuTarget
from ..engine.cpu.executable import StepTime
from ..engine.passes import PASSES
from ..engine.target import Executable
from ..files import check_writable
from ..kernels import native
from ..kernels.conv_forms import ConvForm
from ..unet import UNet, UNetConfig
from . import options
from .options import Threads, load_model
from .results import write_json

_NETWORKS = {"imagenet64": UNetConfig.imagenet64, "lsun256": UNetConfig.lsun256}


def profile(
    model: options.Model = "digits",
    network: Annotated[
        str | None, typer.Option(help="Instead of a model: imagenet64 or lsun256, with weights drawn at random.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of an evaluation.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: the operands of products.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Evaluations that are measured; the medians are shown.")] = 5,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what each pass did, what is left to torch and why.")
    ] = False,
    passes: Annotated[bool, typer.Option("--passes", help="Measure what each pass gains: leave it out.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Measure the forms of the convolutions first.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the steps and their times as JSON.")] = None,
    threads: Threads = None,
) -> None:
    """Time each step of an accelerated network evaluation on the CPU."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype must be float32 or bfloat16, got {dtype}")
    if json_file is not None:
        check_writable(json_file)
    if threads is not None:
        torch.set_num_threads(threads)
    unet = load_model(model, "cpu", "float32").unet if network is None else _random_network(network)
    config = unet.config
    assert isinstance(config, UNetConfig)
    inputs = [torch.randn(batch_size, *config.sample_shape), torch.full((batch_size,), 500.0)]
    if config.num_classes is not None:
        inputs.append(torch.arange(batch_size) % config.num_classes)
    products = getattr(torch, dtype)
    fast = Accelerator(unet, products, tune=tune)
    executable = fast.executable(inputs)
    seconds, steps = _measure(executable, inputs, rounds)
    console = Console()
    title = f"{network or model}, batch {batch_size}, {dtype} products, {torch.get_num_threads()} threads"
    console.print(f"{title}, {native.cpu().build_info()['isa']}: {1e3 * seconds:.2f} ms", highlight=False)
    _print_operators(console, steps)
    if explain:
        _explain(console, fast, executable)
    gains = _gains(unet, products, inputs, rounds) if passes else {}
    for name, without in gains.items():
        console.print(f"without {name}: {1e3 * without:.2f} ms, {without / seconds:.2f} times as long", highlight=False)
    if json_file is not None:
        settings = {"network": network or model, "batch_size": batch_size, "dtype": dtype, "seconds": seconds}
        write_json(json_file, [_row(s) for s in steps], settings | {"without": gains})
        print(f"wrote {json_file}")


def _random_network(name: str) -> UNet:
    if name not in _NETWORKS:
        raise ValueError(f"--network must be one of {', '.join(_NETWORKS)}, got {name}")
    with torch.device("meta"):
        unet = UNet(_NETWORKS[name]())
    unet = unet.to_empty(device="cpu")
    with torch.no_grad():
        for p in unet.parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5)
            else:
                p.fill_(0.5)
    return unet.eval()


def _measure(executable: Executable, inputs: Sequence[Tensor], rounds: int) -> tuple[float, list[StepTime]]:
    """The median time of an evaluation, and of each of its steps."""
    executable(inputs)
    whole, each = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        executable(inputs)
        whole.append(time.perf_counter() - begin)
        each.append(executable.time(inputs))
    medians = [StepTime(of[0].step, statistics.median(t.seconds for t in of)) for of in zip(*each, strict=True)]
    return statistics.median(whole), medians


def _print_operators(console: Console, steps: Sequence[StepTime]) -> None:
    times: dict[str, list[float]] = defaultdict(list)
    for step, seconds in steps:
        times[_kind(step)].append(seconds)
    total = sum(seconds for _, seconds in steps)
    table = Table("step", "calls", "ms", "%", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, each in sorted(times.items(), key=lambda item: -sum(item[1])):
        table.add_row(kind, str(len(each)), f"{1e3 * sum(each):.2f}", f"{100 * sum(each) / total:.1f}")
    console.print(table)


def _kind(step: Any) -> str:
    """The operator, and of a convolution its size and form."""
    if step.operator != "conv2d":
        return f"{step.operator} (torch)" if step.reason else step.operator
    out, _, given = step.arguments
    kernel, sizes = "x".join(map(str, given.weight.shape[2:])), " x ".join(map(str, out.shape[2:]))
    return f"conv {kernel} at {sizes}, {ConvForm(given.tile, given.transformed, given.dtype)}"


def _explain(console: Console, fast: Accelerator, executable: Executable) -> None:
    for name in PASSES:
        summary = (sys.modules[PASSES[name].__module__].__doc__ or "").splitlines()[0]
        console.print(f"{name}: {executable.rewrites.get(name, 0)} times. {summary}", highlight=False)
    reasons = Counter((s.operator, s.reason) for s in executable.steps.steps if s.reason)
    for (operator, reason), count in reasons.items():
        console.print(f"torch: {count} x {operator}, {reason}", highlight=False)
    if not reasons:
        console.print("torch: nothing", highlight=False)
    assert isinstance(fast.target, CpuTarget)
    packed = sum(t.nbytes for t in fast.target.weights.packed.values())
    console.print(f"memory: {executable.bytes / 1e6:.1f} MB of values, {packed / 1e6:.1f} MB of packed weights")


def _gains(unet: Any, products: torch.dtype, inputs: Sequence[Tensor], rounds: int) -> Mapping[str, float]:
    """The median time of an evaluation without each of the passes."""
    found = {}
    for name in track(PASSES, "leaving out passes", console=Console(file=sys.stderr)):
        fast = Accelerator(unet, products, passes=[other for other in PASSES if other != name])
        found[name] = _measure(fast.executable(inputs), inputs, rounds)[0]
    return found


def _row(timed: StepTime) -> dict[str, Any]:
    step = timed.step
    described = {"name": step.name, "operator": step.operator, "step": _kind(step), "reason": step.reason}
    return described | {"seconds": timed.seconds}
