"""A network that is run by the engine."""

import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import cache
from .capture import capture
from .executable import Executable
from .forms import Form, choose
from .give_up import giver_up
from .graph import CONV, Graph, arguments
from .lower import lower
from .passes import PASSES
from .tuning import Tuner
from .weights import Weights

#: Shapes of the inputs that are kept ready; each has memory of its own for its values.
_MOST_SHAPES = 8


@dataclasses.dataclass
class _Made:
    """What was made of the parameters as they are."""

    choose: Callable[[fx.Node], Form]
    weights: Weights = dataclasses.field(default_factory=Weights)
    executables: OrderedDict[Any, Executable] = dataclasses.field(default_factory=OrderedDict)
    stored: cache.Stored | None = None
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


class AcceleratedUNet(nn.Module):
    """A network with UNet's forward, evaluated by fused kernels on the CPU; for inference only.

    It is captured, made faster and compiled to a program when it meets a shape of inputs for the first time. Its own
    module keeps the parameters; where they change, it starts anew.

    Attributes:
        accelerated: the network itself.
        products: dtype of the operands of products; everything else is float32.
    """

    def __init__(
        self,
        module: nn.Module,
        products: torch.dtype,
        *,
        tune: bool = False,
        cache: str | Path | None = None,
        keep_weights: bool = True,
        passes: Sequence[str] | None = None,
    ) -> None:
        """Take a network; see `cmfast.accelerate` for the other arguments.

        `passes` are those of `passes.PASSES` to run, by default all.
        """
        super().__init__()
        self.accelerated = module
        self.products = products
        self.tune = tune
        self.cache = None if cache is None else Path(cache)
        self.keep_weights = keep_weights
        self.passes = tuple(PASSES) if passes is None else tuple(passes)
        self.eval()
        self._forget()

    @property
    def config(self) -> Any:
        """The network's configuration, where it has one."""
        return getattr(self.accelerated, "config", None)

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network, as its own forward does.

        Args:
            x: [N, in_channels, *spatial] on the CPU, any floating dtype.
            timesteps: [N].
            class_labels: [N]; None for an unconditional network.

        Returns:
            [N, out_channels, *spatial] in the dtype of x, without a gradient.

        Raises:
            RuntimeError: in training mode, or for inputs that require a gradient.
            ValueError: inputs on another device, or what the network itself says of those that do not fit.
        """
        if self.training:
            raise RuntimeError("an accelerated network serves inference: call eval(), or train the network itself")
        if torch.is_grad_enabled() and (x.requires_grad or timesteps.requires_grad):
            raise RuntimeError(
                "an accelerated network has no gradients: an input requires one; call it under torch.no_grad(), or use "
                "the network itself"
            )
        inputs = [x, timesteps] if class_labels is None else [x, timesteps, class_labels]
        if any(t.device.type != "cpu" for t in inputs):
            raise ValueError(f"an accelerated network expects inputs on the CPU, got {[str(t.device) for t in inputs]}")
        with torch.no_grad():
            return self.executable(inputs)(inputs, x.dtype)

    def warm_up(self, sample_shape: Sequence[int], num_classes: int | None = None, batch_size: int = 1) -> None:
        """Make what evaluates batches of this size, so that the first call does not wait for it."""
        inputs = [torch.zeros(batch_size, *sample_shape), torch.zeros(batch_size)]
        if num_classes is not None:
            inputs.append(torch.zeros(batch_size, dtype=torch.int64))
        self.executable(inputs)

    @property
    def weights(self) -> Weights:
        """The convolutions' weights as they have been packed so far."""
        return self._made.weights

    def executable(self, inputs: Sequence[Tensor]) -> Executable:
        """What evaluates the network for inputs of these shapes, made where there is none yet."""
        if self._version != self._current_version():
            self._forget()
        made, key = self._made, tuple((t.shape, t.is_floating_point()) for t in inputs)
        found = made.executables.get(key)
        if found is None:
            # In inference mode composite operators do not show their parts, and tensors cannot be used outside it.
            with made.lock, torch.inference_mode(False), torch.no_grad():
                found = made.executables.get(key) or self._make(made, inputs)
                made.executables[key] = found
                while len(made.executables) > _MOST_SHAPES:
                    made.executables.popitem(last=False)
        return found

    def _make(self, made: _Made, inputs: Sequence[Tensor]) -> Executable:
        graph = capture(self.accelerated, inputs)
        rewrites = {name: PASSES[name](graph) for name in self.passes}
        if self.cache is not None and made.stored is None:
            made.stored = cache.Stored(self.cache / f"{self._fingerprint(graph)}.safetensors")
        done = (lambda name: None) if self.keep_weights else giver_up(self.accelerated, graph)
        if made.weights.prepare(graph, made.choose, made.stored, done) and made.stored is not None:
            cache.write(made.stored.path, made.weights.packed)
        if isinstance(made.choose, Tuner):
            made.choose.save()
        return Executable(lower(graph, self.products), rewrites)

    def _tuner(self) -> Tuner:
        return Tuner(self.products, None if self.cache is None else self.cache / "forms.json")

    def _fingerprint(self, graph: Graph) -> str:
        named = {**dict(self.accelerated.named_parameters()), **dict(self.accelerated.named_buffers())}
        packed = sorted({str(arguments(node)["weight"].target) for node in graph.calls(CONV)})
        return cache.fingerprint(named, packed, self.products)

    def _current_version(self) -> int:
        return sum(p._version for p in self._watched)

    def _forget(self) -> None:
        """Start anew: with the parameters as they are now."""
        self._watch()
        self._made = _Made(self._tuner() if self.tune else functools.partial(choose, products=self.products))

    def _watch(self) -> None:
        """Remember the parameters, unless they are to be given up, and how often they have been written to."""
        own = [*self.accelerated.parameters(), *self.accelerated.buffers()]
        self._watched = own if self.keep_weights else []
        self._version = self._current_version()

    def _apply(self, fn: Any, recurse: bool = True) -> "AcceleratedUNet":
        if any(p.is_meta for p in self.accelerated.parameters()):
            raise RuntimeError("this network gave up its weights (keep_weights=False): it cannot be moved or converted")
        super()._apply(fn, recurse)
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_made"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
