"""A call on the backend that a row names, and what shows that no other backend served it."""

import contextlib
import dataclasses
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from ..kernels import BackendError, backends, direct, native, prepare_conv
from ..kernels.conv_arguments import ConvArguments
from ..kernels.shapes import Call
from .calls import tensors

_PACKAGE = "cmfast.kernels."


class VoidError(BackendError):
    """A row would name a backend that did not serve it."""


def backends_of(call: Call, given: tuple[Any, ...]) -> list[str]:
    """The backends that serve the call for these arguments, the fastest first."""
    return [name for name in backends.BACKENDS if backends.available(name, call.op, tensors(given), given)[0]]


def prepared(call: Call, given: tuple[Any, ...], backend: str) -> tuple[Any, ...]:
    """The arguments with a convolution's weights packed as the backend reads them."""
    if call.op != "conv2d" or backend == "reference":
        return given
    (a,) = given
    if backend == "cpu":
        return (_packed_for_cpu(a),)
    from ..kernels.conv_weights import pack

    return (a._replace(packed=pack(a.weight, a.dtype)),)


def _packed_for_cpu(a: ConvArguments) -> ConvArguments:
    height, width = a.output_shape()[2:]  # as the stride is 1 and the padding keeps the size
    products = torch.bfloat16 if a.dtype == torch.bfloat16 else torch.float32
    options = {"stride": tuple(a.stride), "padding": tuple(a.padding), "dtype": products}
    found = prepare_conv(a.weight, a.bias, height=height, width=width, **options)
    return a._replace(packed=found.packed, tile=found.tile, transformed=found.transformed, dtype=products)


def served(call: Call, backend: str, given: tuple[Any, ...]) -> Callable[[], Any]:
    """The call on the backend that is named.

    Raises:
        BackendError: it cannot serve the call.
        VoidError: another would serve it.
    """
    function = backends.resolve(call.op, tensors(given), backend, given)
    if not function.__module__.startswith(_PACKAGE + backend):
        raise VoidError(f"asked for {backend}, and {function.__module__} serves {call.op}")
    return lambda: function(*given)


def launched(call: Call, backend: str, given: tuple[Any, ...]) -> Callable[[], Any]:
    """`served` as a network's call is: on the processor without torch's dispatcher, where that is its way.

    On a GPU launches are planned once where they count: their counters are cleared once, as in the engine.
    """
    run = served(call, backend, given)
    if backend == "cpu":
        return _called(call, given, run)
    plans = {"conv2d": "conv", "channel_moments": "moments"}
    if call.op not in plans or backend != "triton":
        return run
    module = importlib.import_module(f"cmfast.kernels.{backend}.{plans[call.op]}")
    launches, results = getattr(module, f"plan_{call.op}")(*given)

    def launch() -> Any:
        for each in launches:
            each.run()
        return results

    return launch


def _called(call: Call, given: tuple[Any, ...], otherwise: Callable[[], Any]) -> Callable[[], Any]:
    arguments = (*(given[0] if call.op == "conv2d" else given), None)

    def run() -> Any:
        found = direct.of_operator(call.op, arguments)
        return otherwise() if found is None else found  # it is None of what is watched

    with torch.no_grad():
        return otherwise if direct.of_operator(call.op, arguments) is None else run


@dataclasses.dataclass
class Served:
    """What served operators: calls by backend, as the operators chose them, and kernel launches by backend."""

    calls: Counter[str] = dataclasses.field(default_factory=Counter)
    launches: Counter[str] = dataclasses.field(default_factory=Counter)


@contextlib.contextmanager
def watching() -> Iterator[Served]:
    """Within the block, count what serves operators and what is launched, in the whole process."""
    found = Served()
    choose = backends.function

    def chosen(name: str, op: str) -> Callable[..., Any]:
        function = choose(name, op)
        found.calls[function.__module__.removeprefix(_PACKAGE).partition(".")[0]] += 1
        return function

    def counted(backend: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            found.launches[backend] += 1
            return launch(*arguments)

        return count

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(direct.plain, "is_plain", return_value=False))  # all take the long way
        stack.enter_context(mock.patch.object(backends, "function", chosen))
        stack.enter_context(mock.patch.object(native, "run", counted("cpu", native.run)))
        stack.enter_context(mock.patch.object(native, "launch", counted("cuda", native.launch)))
        if backends.available("triton", "group_norm")[0]:
            from ..kernels.triton.launch import Launch

            stack.enter_context(mock.patch.object(Launch, "run", counted("triton", Launch.run)))
        yield found


def run_watched(backend: str, run: Callable[[], Any]) -> Any:
    """The result of a call, once it is certain that kernels of the backend, and of no other, gave it.

    Raises:
        VoidError: it launched no kernel of the backend, or one of another. The reference has none to launch.
    """
    with watching() as found:
        result = run()
    names = sorted(found.launches) or ["reference"]
    if names != [backend]:
        raise VoidError(f"asked for {backend}, and {' and '.join(names)} served it")
    return result
