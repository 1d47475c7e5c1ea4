"""One call of a network, recorded: each operator that ran, when, for how long, in which layer.

Programs of the engine say what their steps took. What torch does outside them is seen by a dispatch mode, which every
operator passes, while torch's hooks of modules tell whose it is.
"""

import copy
import dataclasses
import functools
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..engine import work
from ..engine.layers import Layers
from ..engine.nvtx import Ranges, ranges
from ..engine.steps import Steps
from ..engine.target import Executable
from ..engine.trace import Run, Trace, synchronize, tracing
from ..kernels import direct
from .kinds import kind_of_call, kind_of_step, name_of

#: Cycles of a GPU's clock, for an operator that Python calls, that its work waits while they are enqueued: 60 us.
_HEAD_START = 120_000
#: Why torch serves an operator beside the programs of an accelerated network.
_OUTSIDE = "it is outside the captured modules"


@dataclasses.dataclass
class Operation:
    """What ran once: an operator of torch's, a step of a program, or the copies around it.

    Attributes:
        name: of the graph's node; "" outside programs.
        module: the captured module whose program it is in; None outside programs.
        layer: the dotted name of the module that it is of; "" for the network itself.
        operator: what ran.
        kind: the same, with what its time depends on.
        reason: why torch serves it; "" for a kernel of cmfast's, and in a network that is not accelerated.
        operations: multiplications and additions of products.
        bytes: that it reads and writes.
        products: dtype of its products' operands; None where there are none.
        begin: seconds since the call began.
        seconds: that it took.
        stage: of a sampling run; "" otherwise.
    """

    name: str
    module: str | None
    layer: str
    operator: str
    kind: str
    reason: str
    operations: int
    bytes: int
    products: torch.dtype | None
    begin: float
    seconds: float
    stage: str = ""


@dataclasses.dataclass(frozen=True)
class Recording:
    """A call.

    Attributes:
        operations: what ran, in order.
        seconds: of the whole call, with what the recording took itself.
        in_programs: seconds of those in programs of the engine.
        trace: the programs that ran, and why modules were not captured.
    """

    operations: list[Operation]
    seconds: float
    in_programs: float
    trace: Trace

    @property
    def whole(self) -> bool:
        """Whether programs did everything."""
        return all(operation.module is not None for operation in self.operations)

    @property
    def busy(self) -> float:
        """Seconds of all operations."""
        return sum(operation.seconds for operation in self.operations)


def record(
    call: Callable[[], Any],
    names: Mapping[nn.Module, str],
    device: torch.device,
    *,
    stage: Callable[[], str] = lambda: "",
    like: Recording | None = None,
) -> Recording:
    """Make a call and record it.

    Args:
        call: evaluates networks whose modules have these names.
        names: of modules.
        device: where the networks are.
        stage: the stage of a sampling run that is running, outside programs.
        like: an earlier recording of the same call. What it says of an operator is not found out again, which would put
            what the next one reads out of the caches; and a GPU waits while as many are enqueued.
    """
    layers = Layers(names)
    known = [] if like is None else [operation for operation in like.operations if operation.module is None]
    with ranges(device) as named, layers.followed(), tracing(steps_timed=True) as trace:
        synchronize(device)
        begin = time.perf_counter()
        recorder = _Recorder(layers, device, named, stage, known)
        if device.type == "cuda":
            torch.cuda._sleep(_HEAD_START * len(known))
        with recorder:
            call()
        synchronize(device)
        seconds = time.perf_counter() - begin
    found = recorder.finish(begin)
    if trace.runs:
        for operation in found:
            if not (operation.reason or operation.operator.startswith("cmfast.")):
                operation.reason, operation.kind = _OUTSIDE, f"{operation.kind} (torch)"
    for run in trace.runs:
        if run.executable not in _described:
            _described[run.executable] = _describe(run.executable.steps)
        found += _of_run(run, _described[run.executable], names.get(run.module, ""), begin)
    found.sort(key=lambda operation: operation.begin)
    return Recording(found, seconds, sum(run.seconds for run in trace.runs), trace)


class _Recorder(TorchDispatchMode):
    """Notes the operators that torch dispatches."""

    def __init__(
        self,
        layers: Layers,
        device: torch.device,
        named: Ranges,
        stage: Callable[[], str],
        known: Sequence[Operation],
    ) -> None:
        super().__init__()
        self._layers, self._named, self._stage, self._known = layers, named, stage, known
        self._on_gpu = device.type == "cuda"
        self.found: list[Operation] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if self._on_gpu:
            self._begin = self._event()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, layer, name = kwargs or {}, self._layers.current, name_of(func)
        ours = func._schema.name.partition("::")[2] if func.namespace == "cmfast" and not kwargs else ""
        with self._named.operator(layer, name):
            started = self._event() if self._on_gpu else None
            begin = time.perf_counter()
            result = direct.of_operator(ours, args) if ours else None  # the way that its call takes without this mode
            if result is None:
                result = func(*args, **kwargs)
            end = time.perf_counter()
            if started is not None:
                self._events.append((started, self._event()))
        at, stage = len(self.found), self._stage()
        if at < len(self._known) and (self._known[at].operator, self._known[at].layer) == (name, layer):
            operation = copy.copy(self._known[at])
        else:
            operation = _describe_call(func, args, kwargs, result, layer)
        operation.begin, operation.seconds, operation.stage = begin, end - begin, stage
        self.found.append(operation)
        return result

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self, begin: float) -> list[Operation]:
        """What was noted, after the GPU has done it: there operators run later than they are called."""
        added = _added() if self.found and not self._on_gpu else 0.0
        for operation in self.found:
            operation.begin -= begin
            operation.seconds = max(0.0, operation.seconds - added)
        for operation, (started, ended) in zip(self.found, self._events, strict=False):
            operation.begin = 1e-3 * self._begin.elapsed_time(started)
            operation.seconds = 1e-3 * started.elapsed_time(ended)
        return self.found


@functools.cache
def _added() -> float:
    """Seconds that recording adds to an operator, by one that does next to nothing: Python calls it a second time."""
    x, calls, rounds, device = torch.zeros(1), 100, 20, torch.device("cpu")
    with torch.no_grad():
        alone, recorded = [], []
        for _ in range(rounds):
            begin = time.perf_counter()
            for _ in range(calls):
                x.detach()
            alone.append((time.perf_counter() - begin) / calls)
            with ranges(device) as named, _Recorder(Layers({}), device, named, str, []) as recorder:
                for _ in range(calls):
                    x.detach()
            recorded.append(statistics.median(operation.seconds for operation in recorder.found))
    return max(0.0, min(recorded) - min(alone))


def _describe_call(func: Any, args: Any, kwargs: Any, result: Any, layer: str) -> Operation:
    """What is known of a call of torch's operator, but when it was, and how long it took."""
    flops = work.operations(func, args, kwargs, result)
    return Operation(
        name="",
        module=None,
        layer=layer,
        operator=name_of(func),
        kind=kind_of_call(func, args, result),
        reason="",
        operations=flops,
        bytes=work.bytes_of_call(func, (args, kwargs), result),
        products=work.products_of((args, kwargs)) if flops else None,
        begin=0.0,
        seconds=0.0,
    )


#: What was found of the steps of programs that are still there.
_described: "weakref.WeakKeyDictionary[Executable, list[dict[str, Any]]]" = weakref.WeakKeyDictionary()


def _describe(steps: Steps) -> list[dict[str, Any]]:
    """What is known of each step, whatever it took."""
    operations = work.operations_of(steps.steps)
    return [
        {
            "name": step.name,
            "layer": step.layer,
            "operator": step.operator,
            "kind": kind_of_step(step),
            "reason": step.reason,
            "operations": operations[i],
            "bytes": work.bytes_of(steps, i)[0],
            "products": work.products_of(step.arguments) if operations[i] else None,
        }
        for i, step in enumerate(steps.steps)
    ]


def _of_run(run: Run, steps: Sequence[dict[str, Any]], module: str, begin: float) -> list[Operation]:
    """The operations of a program's run, one after the other."""
    timed = run.timed
    assert timed is not None
    outputs = [t for t in pytree.tree_leaves(run.executable.steps.outputs) if isinstance(t, Tensor)]
    filling, giving = _copies("inputs", run.executable.steps.inputs), _copies("outputs", outputs)
    seconds = [timed.filling, *(step.seconds for step in timed.steps), timed.giving]
    at, found = run.begin - begin, []
    for known, took in zip([filling, *steps, giving], seconds, strict=True):
        layer = ".".join(part for part in (module, known["layer"]) if part)
        named = known | {"layer": layer, "module": module}
        found.append(Operation(begin=at, seconds=took, **named))
        at += took
    return found


def _copies(what: str, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """What is known of the copies of a program's inputs or outputs."""
    moved = 2 * sum(t.nbytes for t in tensors)
    known = {"name": "", "layer": "", "reason": "", "operations": 0, "bytes": moved, "products": None}
    return known | {"operator": f"copies of {what}", "kind": f"copies of {what}"}
