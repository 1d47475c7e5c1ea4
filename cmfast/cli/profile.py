"""`cmfast profile`: where the time of an accelerated network evaluation goes, and what the engine did to it."""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from ..engine import Accelerator
from ..engine.accelerator import detached, products_of
from ..engine.explanation import explanation, module_names
from ..engine.steps import StepTime
from ..files import check_writable
from ..kernels import native
from ..kernels.conv_arguments import ConvArguments
from ..kernels.conv_forms import ConvForm
from ..kernels.static import GPUS
from ..unet import UNet, UNetConfig
from . import options
from .options import Threads, load_model
from .plan import print_plan
from .results import write_json
from .timing import Timing, measure
from .user_network import Call, errors_of, load_call

_NETWORKS = {"imagenet64": UNetConfig.imagenet64, "lsun256": UNetConfig.lsun256}
#: What only cmfast's own models have.
_OF_MODELS = {"model": "--model", "network": "--network", "batch_size": "--batch-size"}


def profile(
    context: typer.Context,
    model: options.Model = "digits",
    network: Annotated[
        str | None, typer.Option(help="Instead of a model: imagenet64 or lsun256, with weights drawn at random.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE.py:FUNCTION",
            help="Instead of a model: any network, from a function without arguments that returns (network, args) or "
            "(network, args, kwargs), the call to profile, or a dict of these; package.module:function too.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of an evaluation.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16: the operands of products; with --plan float16 as well.")
    ] = "float32",
    gpu: Annotated[
        str | None,
        typer.Option(
            "--plan",
            metavar="GPU",
            help=f"Measure nothing, and list what such a GPU would run, without one: {', '.join(GPUS)}.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Evaluations that are measured; the medians are shown.")] = 5,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what was captured, what each pass did, what torch does and why.")
    ] = False,
    passes: Annotated[bool, typer.Option("--passes", help="Measure what each pass gains: leave it out.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Measure the forms of the convolutions first.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the steps and their times as JSON.")] = None,
    threads: Threads = None,
) -> None:
    """Time each step of an accelerated network evaluation: on the CPU, or with --from where its network is."""
    if gpu is None and dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype must be float32 or bfloat16, got {dtype}")
    if source is not None:
        given = [option for name, option in _OF_MODELS.items() if _is_given(context, name)]
        if given:
            raise ValueError(f"--from has its own network and inputs: it does not go with {', '.join(given)}")
    if json_file is not None:
        check_writable(json_file)
    if threads is not None:
        torch.set_num_threads(threads)
    if gpu is not None:
        return _plan(gpu, model, network, source, batch_size, dtype, json_file)
    call = _own_call(model, network, batch_size) if source is None else load_call(source)
    evaluated = detached(call.network)
    evaluated.training = False
    call = call._replace(network=evaluated)
    products = products_of(list(evaluated.parameters()), getattr(torch, dtype))
    settings: dict[str, Any] = {"network": source or network or model}
    title = settings["network"]
    if source is None:
        settings["batch_size"] = batch_size
        title += f", batch {batch_size}"
    with nullcontext() if source is None else errors_of(f"the network of {source}"):
        timing = measure(_accelerated(call, products, tune=tune), rounds)
    title += f", {dtype} products, {_machine(timing)}"
    print(f"{title}: {1e3 * timing.whole:.2f} ms")
    names = module_names({"": evaluated})
    console = Console()
    if timing.trace.left:
        _print_modules(console, timing, names)
    _print_operators(console, [step for program in timing.programs for step in program.steps])
    explained = explanation(timing.trace, {"": evaluated})
    if explain:
        print(explained)
    gains = _gains(call, products, rounds, list(explained.passes)) if passes else {}
    for name, without in gains.items():
        print(f"without {name}: {1e3 * without:.2f} ms, {without / timing.whole:.2f} times as long")
    if json_file is not None:
        rows = [{"module": names[program.module]} | _row(step) for program in timing.programs for step in program.steps]
        settings |= {"dtype": dtype, "seconds": timing.whole, "seconds_outside": timing.outside}
        write_json(json_file, rows, settings | {"not_captured": explained.left, "without": gains})
        print(f"wrote {json_file}")


def _plan(
    gpu: str, model: str, network: str | None, source: str | None, batch_size: int, dtype: str, json_file: Path | None
) -> None:
    if source is not None:
        call = load_call(source)
        with errors_of(f"the network of {source}"):
            return print_plan(call, gpu, options.dtype_of(dtype), {"network": source}, json_file, sampled=False)
    with torch.device("meta" if network else "cpu"):
        unet = UNet(_configuration(network)).eval() if network else load_model(model, "cpu", "float32").unet
    settings = {"network": network or model, "batch_size": batch_size}
    call = _call_of(unet, batch_size)
    print_plan(call, gpu, options.dtype_of(dtype), settings, json_file, sampled=True)


def _machine(timing: Timing) -> str:
    """What ran the programs."""
    device = next((run.target.device for run in timing.trace.runs), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {native.cpu().build_info()['isa']}"


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _own_call(model: str, network: str | None, batch_size: int) -> Call:
    """An evaluation of one of cmfast's own networks."""
    return _call_of(
        load_model(model, "cpu", "float32").unet if network is None else _random_network(network), batch_size
    )


def _call_of(unet: nn.Module, batch_size: int) -> Call:
    config = unet.config
    assert isinstance(config, UNetConfig)
    inputs = [torch.randn(batch_size, *config.sample_shape), torch.full((batch_size,), 500.0)]
    if config.num_classes is not None:
        inputs.append(torch.arange(batch_size) % config.num_classes)
    return Call(unet, tuple(inputs), {})


def _configuration(name: str) -> UNetConfig:
    if name not in _NETWORKS:
        raise ValueError(f"--network must be one of {', '.join(_NETWORKS)}, got {name}")
    return _NETWORKS[name]()


def _random_network(name: str) -> UNet:
    with torch.device("meta"):
        unet = UNet(_configuration(name))
    unet = unet.to_empty(device="cpu")
    with torch.no_grad():
        for p in unet.parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5)
            else:
                p.fill_(0.5)
    return unet.eval()


def _accelerated(call: Call, products: torch.dtype, **options: Any) -> Callable[[], Any]:
    """The call, with its network accelerated."""
    fast = Accelerator(call.network, products, **options)
    return lambda: fast(*call.args, **call.kwargs)


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _print_modules(console: Console, timing: Timing, names: Mapping[Any, str]) -> None:
    """The time of each captured module, and of all that is in none."""
    times: dict[str, list[float]] = defaultdict(list)
    for program in timing.programs:
        times[names[program.module]].append(program.seconds)
    table = _table("module", "calls", "ms", "%")
    total = timing.outside + sum(map(sum, times.values()))
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1])):
        table.add_row(name, str(len(each)), f"{1e3 * sum(each):.2f}", f"{100 * sum(each) / total:.1f}")
    table.add_row("not captured (torch)", "", f"{1e3 * timing.outside:.2f}", f"{100 * timing.outside / total:.1f}")
    console.print(table)


def _print_operators(console: Console, steps: Sequence[StepTime]) -> None:
    times: dict[str, list[float]] = defaultdict(list)
    for step, seconds in steps:
        times[_kind(step)].append(seconds)
    total = sum(seconds for _, seconds in steps)
    table = _table("step", "calls", "ms", "%")
    for kind, each in sorted(times.items(), key=lambda item: -sum(item[1])):
        table.add_row(kind, str(len(each)), f"{1e3 * sum(each):.2f}", f"{100 * sum(each) / total:.1f}")
    console.print(table)


def _kind(step: Any) -> str:
    """The operator, and of a convolution its size and form."""
    if step.operator != "conv2d" or not isinstance(step.arguments[-1], ConvArguments):
        return f"{step.operator} (torch)" if step.reason else step.operator
    out, *_, given = step.arguments
    kernel, sizes = "x".join(map(str, given.weight.shape[2:])), " x ".join(map(str, out.shape[2:]))
    return f"conv {kernel} at {sizes}, {ConvForm(given.tile, given.transformed, given.dtype)}"


def _gains(call: Call, products: torch.dtype, rounds: int, passes: Sequence[str]) -> Mapping[str, float]:
    """The median time of an evaluation without each of the passes."""
    found = {}
    for name in track(passes, "leaving out passes", console=Console(file=sys.stderr)):
        others = [other for other in passes if other != name]
        found[name] = measure(_accelerated(call, products, passes=others), rounds).whole
    return found


def _row(timed: StepTime) -> dict[str, Any]:
    step = timed.step
    described = {"name": step.name, "operator": step.operator, "step": _kind(step), "reason": step.reason}
    return described | {"seconds": timed.seconds}
