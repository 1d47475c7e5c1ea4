"""What calls a network several times, such as a sampler, as one replay of a CUDA graph."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from .executable import Executable, capture_lock, capture_stream, capturing

_log = logging.getLogger(__name__)

#: Kinds of runs that are kept ready; each has memory for its values, and keeps that of its network evaluation.
_MOST_REPLAYS = 8


class Replays:
    """The most recent replays of one network, by what they depend on beside their inputs and the network's weights.

    They belong to a target of the engine. A network that has changed has a new target, so that no replay outlives the
    weights that it was captured with. Several threads may call, on any streams.

    Attributes:
        ready: the replays, the most recent last.
    """

    def __init__(self, device: torch.device) -> None:
        self.ready: OrderedDict[Hashable, Replay] = OrderedDict()
        self._device = device
        self._lock = threading.Lock()

    def __call__(
        self,
        key: Hashable,
        executable: Executable,
        function: Callable[..., Tensor],
        inputs: Sequence[int | Tensor],
    ) -> Tensor:
        """Return `function(*inputs)`.

        Args:
            key: all that the function depends on but its inputs and the network.
            executable: what evaluates the network for the function. Where it is another than before, the network has
                changed, or was asked for too many other shapes: the function is captured anew.
            function: of tensors on the device. On a GPU it must not wait for the GPU, nor draw random numbers.
            inputs: integers, which the function takes as int64 tensors [], and tensors on the device, whose shapes and
                dtypes are the same for one key.
        """
        with self._lock:
            found = self.ready.get(key)
            if found is None or found.executable is not executable:
                found = self.ready[key] = Replay(executable, function, self._device)
            self.ready.move_to_end(key)
            while len(self.ready) > _MOST_REPLAYS:
                self.ready.popitem(last=False)
            return found(inputs)


class Replay:
    """A function of tensors on a GPU, captured in a CUDA graph that reads them where they always lie.

    The first call runs the function, which compiles its kernels and prepares the libraries, and captures it; later ones
    put the inputs in their places and replay the graph. On the CPU, where there is nothing to capture, every call puts
    the inputs in their places and runs the function.

    Attributes:
        executable: what evaluates the network for the function; the graph uses its memory.
    """

    def __init__(self, executable: Executable, function: Callable[..., Tensor], device: torch.device) -> None:
        self.executable = executable
        self._function = function
        self._device = device
        self._inputs: list[Tensor] | None = None
        self._samples: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refused = False

    def __call__(self, inputs: Sequence[int | Tensor]) -> Tensor:
        """The function's result, which is the caller's own."""
        if self._device.type != "cuda":
            self._inputs = self._inputs or self._places(inputs)
            self._fill(self._inputs, inputs)
            return self._function(*self._inputs)
        with torch.cuda.device(self._device):
            if self._graph is None:
                if self._refused:
                    return self._run(inputs)
                with capture_lock:
                    return self._run_and_capture(inputs)
            assert self._inputs is not None
            assert self._samples is not None
            # The inputs and all values are overwritten, on whatever stream: one replay, or evaluation, at a time.
            with self.executable.turn():
                self._fill(self._inputs, inputs)
                self._graph.replay()
                return self._samples.clone()

    def _run(self, inputs: Sequence[int | Tensor]) -> Tensor:
        """The function of inputs in memory of their own, which no other call overwrites."""
        given = self._places(inputs)
        self._fill(given, inputs)
        return self._function(*given)

    def _run_and_capture(self, inputs: Sequence[int | Tensor]) -> Tensor:
        """The function's result for the inputs; from then on, there is a graph, or the function is refused."""
        current, stream = torch.cuda.current_stream(), capture_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            samples = self._run(inputs)
        current.wait_stream(stream)
        samples.record_stream(current)  # once it is freed, its memory is not used again before this stream has read it
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph, stream):  # what is allocated here is the graph's, as long as that lives
                self._inputs = self._places(inputs)
                self._samples = self._function(*self._inputs)
        except RuntimeError as error:
            self._refused, self._inputs, self._samples = True, None, None
            _log.warning("sampling is not captured in a CUDA graph, and runs step by step: %s", error)
        else:
            self._graph = graph
        return samples

    @torch.inference_mode(False)  # a tensor that is made in inference mode could not be written to outside it
    def _places(self, inputs: Sequence[int | Tensor]) -> list[Tensor]:
        """Memory for the inputs."""
        number = torch.empty((), dtype=torch.int64, device=self._device)
        return [torch.empty_like(number if isinstance(given, int) else given) for given in inputs]

    def _fill(self, places: Sequence[Tensor], inputs: Sequence[int | Tensor]) -> None:
        """Put the inputs in their places, without waiting for the GPU."""
        for place, given in zip(places, inputs, strict=True):
            if isinstance(given, int):
                place.fill_(given)
            else:
                place.copy_(given)
