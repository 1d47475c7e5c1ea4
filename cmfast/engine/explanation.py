"""What the engine made of a call: the modules that it captured, what its kernels serve, and what torch does and why."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator, Mapping

from torch import nn

from .passes import GPU_PASSES, PASSES
from .trace import Trace

_PASSES = PASSES | GPU_PASSES


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What the engine made of a call; as a string, a report of some lines.

    Modules have the names by which the model has them; "" is the network itself. Steps are counted as often as the
    call runs them, rewrites of the passes once for each program.

    Attributes:
        captured: how many times each module ran as a program of the engine.
        left: why modules were not captured, so that torch ran their own forward; those of their submodules that could
            be captured are among `captured`.
        kernels: how many steps of the programs cmfast's kernels serve, by operator.
        torch: how many steps torch serves, by operator and the reason.
        passes: how many times each pass rewrote the graphs.
        value_bytes: size of the memory of all values of the programs.
        weight_bytes: size of the packed weights.
    """

    captured: Mapping[str, int]
    left: Mapping[str, str]
    kernels: Mapping[str, int]
    torch: Mapping[tuple[str, str], int]
    passes: Mapping[str, int]
    value_bytes: int
    weight_bytes: int

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for name, calls in self.captured.items():
            yield f"captured: {name or 'the network as a whole'}" + (f", {calls} calls" if calls > 1 else "")
        if not self.captured:
            yield "captured: nothing"
        for name, reason in self.left.items():
            yield f"not captured: {name or 'the network as a whole'}, {reason}"
        if self.kernels:
            yield "kernels: " + ", ".join(f"{count} x {operator}" for operator, count in self.kernels.items())
        for (operator, reason), count in self.torch.items():
            yield f"torch: {count} x {operator}, {reason}"
        if self.left:
            yield "torch: what the modules that are not captured do beside calling others"
        elif not self.torch:
            yield "torch: nothing"
        for name, count in self.passes.items():
            if count:
                yield f"{name}: {count} times. {_summary(name)}"
        idle = [name for name, count in self.passes.items() if not count]
        if idle:
            yield f"passes with nothing to do: {', '.join(idle)}"
        yield f"memory: {self.value_bytes / 1e6:.1f} MB of values, {self.weight_bytes / 1e6:.1f} MB of packed weights"


def explanation(trace: Trace, networks: Mapping[str, nn.Module]) -> Explanation:
    """Explain what was traced; `networks` are those that were accelerated, by their names in the model."""
    names = module_names(networks)
    steps = [step for run in trace.runs for step in run.executable.steps.steps]
    executables = {id(run.executable): run.executable for run in trace.runs}.values()
    targets = {id(run.target): run.target for run in trace.runs}.values()
    rewrites: Counter[str] = Counter()
    for executable in executables:
        rewrites.update(executable.rewrites)
    return Explanation(
        captured=Counter(names[run.module] for run in trace.runs),
        left={names[module]: reason for module, reason in trace.left.items()},
        kernels=dict(Counter(step.operator for step in steps if not step.reason).most_common()),
        torch=dict(Counter((step.operator, step.reason) for step in steps if step.reason).most_common()),
        passes={name: rewrites[name] for name in _PASSES if name in rewrites},
        value_bytes=sum(executable.bytes for executable in executables),
        weight_bytes=sum(target.bytes for target in targets),
    )


def module_names(networks: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """The names in the model of its networks' modules."""
    found: dict[nn.Module, str] = {}
    for prefix, network in networks.items():
        for name, module in network.named_modules():
            found.setdefault(module, f"{prefix}.{name}" if prefix and name else prefix or name)
    return found


def _summary(name: str) -> str:
    """The first line of what a pass's file says of it."""
    return (sys.modules[_PASSES[name].__module__].__doc__ or "").splitlines()[0]
