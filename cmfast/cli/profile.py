"""`cmfast profile`: where the time of a network evaluation goes, or of a whole batch of samples."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import nn

from ..accelerate import accelerate
from ..benchmarking.networks import configuration, random_network
from ..engine import Accelerator
from ..engine.accelerator import detached, device_of, products_of
from ..engine.explanation import explanation
from ..files import check_writable
from ..kernels.static import GPUS
from ..model import ConsistencyModel
from ..profiling import profile_call, profile_sampling
from ..profiling.measurement import fastest_in_turn
from ..unet import UNet
from . import options
from .networks import evaluation
from .options import Threads, load_model
from .plan import print_plan
from .results import write_json
from .user_network import Call, errors_of, load_call

#: What only cmfast's own models have.
_OF_MODELS = {"model": "--model", "network": "--network", "batch_size": "--batch-size", "device": "--device"}
_OF_SAMPLING = {"sampling": "--sampling", "steps": "--steps", "sampler": "--sampler"}
#: What measures or explains the engine.
_OF_THE_ENGINE = {"explain": "--explain", "passes": "--passes", "tune": "--tune", "memory": "--memory"}
_OF_MEASUREMENTS = {
    "device": "--device", "rounds": "--rounds", "eager": "--eager", "trace": "--trace", "plot": "--plot"
}  # fmt: skip


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
    device: options.Device = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or float16 on GPUs: the operands of products; with --eager all.")
    ] = "float32",
    eager: Annotated[bool, typer.Option("--eager", help="Do not accelerate the network.")] = False,
    sampling: Annotated[
        bool, typer.Option("--sampling", help="Instead of an evaluation: a whole batch, from noise to samples.")
    ] = False,
    steps: options.Steps = None,
    sampler: options.Sampler = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--plan",
            metavar="GPU",
            help=f"Measure nothing, and list what such a GPU would run, without one: {', '.join(GPUS)}.",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Evaluations that are timed, and recorded; by default until both agree, 5 or more."),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Layers are shown by so many parts of their dotted names.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what was captured, what each pass did, what torch does and why.")
    ] = False,
    passes: Annotated[bool, typer.Option("--passes", help="Measure what each pass gains: leave it out.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Measure the forms of the convolutions first.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Show the memory that each layer needs.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write a JSON trace for ui.perfetto.dev.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG: a roofline.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all rows as JSON.")] = None,
    threads: Threads = None,
) -> None:
    """Say where a network evaluation's time goes, by operator and by layer: time, operations, bytes, least time."""
    given = [name for name in context.params if _is_given(context, name)]
    _refuse(given, gpu, source, eager, sampling or steps is not None or sampler is not None)
    for path in (trace, plot, json_file):
        if path is not None:
            check_writable(path)
    if threads is not None:
        torch.set_num_threads(threads)
    if gpu is not None:
        return _plan(gpu, model, network, source, batch_size, dtype, json_file, depth)
    settings: dict[str, Any] = {"network": source or network or model}
    if source is None:
        settings["batch_size"] = batch_size
    settings |= {"dtype": dtype, "eager": eager}
    passing: dict[str, dict[str, float]] = {}
    if sampling or steps is not None or sampler is not None:
        settings |= {"steps": steps, "sampler": sampler}
        loaded = _loaded(model, network, device, dtype, eager)
        fast = loaded if eager else accelerate(loaded, options.dtype_of(dtype), tune=tune)
        networks: dict[str, nn.Module] = {"unet": fast.unet}
        title = f"{_title(settings)}, {sampler or loaded.default_sampler[0]} sampling"
        found = profile_sampling(fast, batch_size, title, sampler=sampler, steps=steps, rounds=rounds)
    else:
        call = _call(model, network, source, device, dtype, eager, batch_size)
        networks = {"": call.network}
        products = options.dtype_of(dtype)
        run = _as_it_is(call) if eager else _accelerated(call, products, tune=tune)
        with nullcontext() if source is None else errors_of(f"the network of {source}"):
            found = profile_call(run, networks, _title(settings), rounds=rounds)
        if passes:
            passing = _gains(call, products, rounds, list(explanation(found.trace, networks).passes), tune=tune)
    print(found.report(depth or (3 if "steps" in settings else 2)))
    if memory:
        print(f"\n{found.memory().report(depth or 2)}")
    if explain:
        print(f"\n{explanation(found.trace, networks)}")
    for name, took in passing.items():
        ratio = took["seconds"] / took["with_all"]
        print(f"without {name}: {1e3 * took['seconds']:.2f} ms, {ratio:.2f} times as long")
    if json_file is not None:
        total = found.summary() | ({"memory": found.memory().summary()} if memory else {})
        write_json(json_file, found.records(), settings | {"without": passing}, total)
    if trace is not None:
        found.save_trace(trace)
    if plot is not None:
        found.plot(plot)
    for path in (trace, plot, json_file):
        if path is not None:
            print(f"wrote {path}")


def _refuse(given: Sequence[str], gpu: str | None, source: str | None, eager: bool, sampled: bool) -> None:
    """Raise ValueError for options that do not go together."""
    reasons: list[tuple[bool, str, Mapping[str, str]]] = [
        ("network" in given, "--network has random weights", {"model": "--model"}),
        (gpu is not None, "--plan measures nothing", {"threads": "--threads"}),
        (source is not None, "--from has its own network and inputs", _OF_MODELS | _OF_SAMPLING),
        (gpu is not None, "--plan measures nothing", _OF_MEASUREMENTS | _OF_THE_ENGINE | _OF_SAMPLING),
        (eager, "--eager leaves the engine out", _OF_THE_ENGINE),
        (eager and source is not None, "--eager takes the network of --from in its own dtype", {"dtype": "--dtype"}),
        (sampled, "--sampling is no single evaluation", {"plot": "--plot", "passes": "--passes"}),
    ]
    for applies, reason, excluded in reasons:
        wrong = dict.fromkeys(option for name, option in excluded.items() if name in given)
        if applies and wrong:
            raise ValueError(f"{reason}: it does not go with {', '.join(wrong)}")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _title(settings: Mapping[str, Any]) -> str:
    parts = [settings["network"], *([f"batch {settings['batch_size']}"] if "batch_size" in settings else [])]
    if not settings["eager"]:
        return ", ".join([*parts, f"{settings['dtype']} products"])
    return ", ".join([*parts, f"torch in {settings['dtype']}" if "batch_size" in settings else "torch"])


def _loaded(model: str, network: str | None, device: str | None, dtype: str, eager: bool) -> ConsistencyModel:
    """The model that is sampled."""
    if network is None:
        return load_model(model, device, _own_dtype(dtype, device, eager))
    return ConsistencyModel(_random(network, device, _own_dtype(dtype, device, eager)))


def _call(
    model: str,
    network: str | None,
    source: str | None,
    device: str | None,
    dtype: str,
    eager: bool,
    batch_size: int,
) -> Call:
    """The call that is measured, of a network in evaluation mode, which is not accelerated."""
    if source is not None:
        call = load_call(source)
        tensors = [*call.network.parameters(), *call.network.buffers()]
        if not eager:
            _check_dtype(dtype, device_of(tensors))
    else:
        own = _own_dtype(dtype, device, eager)
        unet = load_model(model, device, own).unet if network is None else _random(network, device, own)
        call = evaluation(unet, batch_size)
    evaluated = detached(call.network)
    evaluated.training = False
    if eager:
        evaluated.eval()
    else:
        products_of(list(evaluated.parameters()), options.dtype_of(dtype))  # says what it does not serve
    return call._replace(network=evaluated)


def _own_dtype(dtype: str, device: str | None, eager: bool) -> str:
    """The dtype of the parameters: what is accelerated has them in float32, whatever that of products."""
    if eager:
        return dtype
    _check_dtype(dtype, options.device_of(device))
    return "float32"


def _check_dtype(dtype: str, device: torch.device) -> None:
    if device.type == "cpu" and dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype must be float32 or bfloat16, got {dtype}")


def _random(network: str, device: str | None, dtype: str) -> UNet:
    return random_network(configuration(network), str(options.device_of(device)), options.dtype_of(dtype))


def _as_it_is(call: Call) -> Callable[[], Any]:
    return lambda: call.network(*call.args, **call.kwargs)


def _accelerated(call: Call, products: torch.dtype, **options: Any) -> Callable[[], Any]:
    """The call, with its network accelerated."""
    fast = Accelerator(call.network, products, **options)
    return lambda: fast(*call.args, **call.kwargs)


def _plan(
    gpu: str,
    model: str,
    network: str | None,
    source: str | None,
    batch_size: int,
    dtype: str,
    json_file: Path | None,
    depth: int | None,
) -> None:
    if source is not None:
        call = load_call(source)
        with errors_of(f"the network of {source}"):
            settings: dict[str, Any] = {"network": source}
            return print_plan(call, gpu, options.dtype_of(dtype), settings, json_file, depth=depth, sampled=False)
    with torch.device("meta" if network else "cpu"):
        unet = UNet(configuration(network)).eval() if network else load_model(model, "cpu", "float32").unet
    settings = {"network": network or model, "batch_size": batch_size}
    call = evaluation(unet, batch_size)
    print_plan(call, gpu, options.dtype_of(dtype), settings, json_file, depth=depth, sampled=True)


def _gains(
    call: Call, products: torch.dtype, rounds: int | None, passes: Sequence[str], *, tune: bool
) -> dict[str, dict[str, float]]:
    """The seconds of an evaluation without each of the passes, beside those with all of them, taken in turn."""
    found = {}
    device = device_of([*call.network.parameters(), *call.network.buffers()])
    whole = _accelerated(call, products, tune=tune)
    for name in track(passes, "leaving out passes", console=Console(file=sys.stderr)):
        others = [other for other in passes if other != name]
        part = _accelerated(call, products, tune=tune, passes=others)
        without, beside = fastest_in_turn([part, whole], device, rounds)
        found[name] = {"seconds": without, "with_all": beside}
    return found
