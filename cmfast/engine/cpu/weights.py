"""The weights of a network's convolutions as the kernels read them, packed once for all shapes of its inputs."""

import dataclasses
from collections.abc import Callable

from torch import Tensor, fx

from ...kernels.conv_forms import ConvForm, conv_forms
from ...kernels.cpu.conv import pack
from ..graph import CONV, Graph, arguments, change
from .cache import Stored


@dataclasses.dataclass
class Weights:
    """Packed weights by the names of what was packed; the form that a convolution has been given, it keeps.

    Attributes:
        forms: chosen so far, by the names of the weights.
        packed: by the names of the weights and their forms.
    """

    forms: dict[str, ConvForm] = dataclasses.field(default_factory=dict)
    packed: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def prepare(
        self,
        graph: Graph,
        choose: Callable[[fx.Node], ConvForm],
        stored: Stored | None = None,
        done: Callable[[str], None] = lambda name: None,
    ) -> int:
        """Give every conv2d call of the graph its packed weights; how many were packed for it.

        `choose` gives the form of a call whose weights have none yet. What is `stored` is read, not packed. `done` is
        called with the name of each tensor of the graph that is not read any more.

        Raises:
            RuntimeError: weights are to be packed that were given up.
        """
        count = 0
        for node in graph.calls(CONV):
            a = arguments(node)
            name, weight = str(a["weight"].target), graph.tensor(a["weight"])
            assert weight is not None
            form = self.forms.get(name)
            if form is None or form not in conv_forms(weight.shape, a["stride"], form.dtype):
                form = choose(node)  # for the first time, or since these weights have another stride here
                self.forms.setdefault(name, form)
            key = f"{name}: {form}"
            if key not in self.packed:
                if stored is not None and key in stored:
                    done(name)
                    self.packed[key] = stored.read(key)
                elif weight.is_meta:
                    raise RuntimeError(f"{name} was given up (keep_weights=False): accelerate the whole model again")
                else:
                    self.packed[key] = pack(weight, *form)
                    count += 1
            packed = graph.attribute(key, self.packed[key], node)
            change(node, packed=packed, **form._asdict())
            done(name)
        return count
