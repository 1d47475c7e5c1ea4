"""The loop that runs every method: batches, gradients, updates, averages, checkpoints."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model import ConsistencyModel
from ..unet import UNet
from .batches import Batches
from .data import Dataset, fingerprint
from .data.dataset import check
from .distributed import Processes
from .draws import UpdateDraws, module_seed
from .learning_rate import learning_rate
from .logs import Row
from .methods.losses import compared_by
from .methods.method import Method
from .run_folder import RunFolder
from .settings import LoopSettings
from .state import State


class DivergedError(ValueError):
    """A loss or a gradient was not finite."""


class Trained(NamedTuple):
    """What a training gives.

    Attributes:
        model: the method's, as the last update left it.
        averages: by name ("ema-0.999", "power-0.05"), copies with averaged weights.
    """

    model: ConsistencyModel
    averages: dict[str, ConsistencyModel]


def train(
    method: Method,
    data: Dataset,
    settings: LoopSettings,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    config: str | None = None,
    description: Mapping[str, Any] | None = None,
    progress: Callable[[int, float], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train the method's model, in place and where it is.

    Update i is a function of the weights, the settings, the data and i alone: a training that is stopped and resumed
    gives the same weights to the bit, on a CPU with as many threads. One that is divided among processes or by
    `accumulation` gives them up to rounding, but for dropout, whose masks depend on the division. (Adam enlarges the
    rounding where a gradient has nothing else, as those of biases that a norm takes out again.) Under torch.distributed
    (`torchrun`) each process takes its share of the batch, and gradients are averaged by DistributedDataParallel.

    Args:
        method: what a batch costs, with the model.
        data: what is trained on, on the CPU.
        settings: see there.
        out: folder for `checkpoints/`, `log.csv`, `tensorboard/` (where it is installed) and `snapshots/`; None writes
            nothing.
        resume: go on from the folder's last checkpoint; where there is none, begin.
        config: what the folder's `config.yaml` shall have in it; see `configuration`.
        description: what else has to be the same for the training to be resumed, as JSON can hold it.
        progress: called with (iteration, loss): on a CPU after each update; on a GPU with each row of the log, with
            the mean loss since the last, so that the host does not wait for the GPU each time.
        say: told in a line each what happens, such as that the training is resumed.

    Raises:
        DivergedError: a loss or a gradient is not finite; says at which update. Nothing of it is written.
        ValueError: settings, data and model that do not fit; or to resume what was begun with others.
        FileExistsError: the folder has checkpoints, and `resume` is False.
        OSError: the folder cannot be written to.
    """
    processes = Processes.current()
    share = _share(settings, processes)
    _check_compiler(settings.compile)
    _check_data(method.model, data, say if processes.rank == 0 else _silent)
    batches = Batches(data, settings.batch_size, settings.seed, settings.horizontal_flip)
    networks = [method.model, *method.networks().values()]
    _lay_out(networks, torch.channels_last)
    folder, unet, device = None, method.model.unet, method.model.device
    try:
        state = State(method, settings)
        if out is not None:
            everything = _description(method, data, settings, description)
            folder = RunFolder(Path(out), settings, everything, processes, say if processes.rank == 0 else _silent)
            folder.begin(state, resume, config)
        if settings.compile is not None:
            unet.compile(backend=settings.compile)
        method.model.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _run(state, batches, settings, share, processes, folder, progress)
    finally:
        method.model.eval()
        _lay_out(networks, torch.contiguous_format)
        if settings.compile is not None:
            unet._compiled_call_impl = None
        if folder is not None:
            folder.close()
    _lay_out(state.averages.models.values(), torch.contiguous_format)
    return Trained(method.model, state.averages.models)


def _run(
    state: State,
    batches: Batches,
    settings: LoopSettings,
    share: int,
    processes: Processes,
    folder: RunFolder | None,
    progress: Callable[[int, float], None] | None,
) -> None:
    loss_of: nn.Module = _LossOf(state.method)
    if processes.count > 1:
        loss_of = nn.parallel.DistributedDataParallel(loss_of)
    on_host = _on_host(state.method.model)
    watch, logged, since = _Watch(state.loss_sum), state.iteration, time.perf_counter()
    while state.iteration < settings.iterations:
        rate = learning_rate(settings, state.iteration)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad(set_to_none=True)
        loss = processes.mean(_gradients(loss_of, state, batches, settings, share, processes))
        norm = _clip([*state.method.parameters()], settings.gradient_clip)
        watch.look(state.iteration, loss, norm)
        if on_host:
            watch.check()
        state.optimizer.step()
        state.iteration += 1
        state.add_loss(loss)
        state.averages.update(state.method.model, state.iteration)
        state.method.updated(state.iteration)
        if on_host and progress is not None and processes.rank == 0:
            progress(state.iteration - 1, loss.item())
        if state.iteration % settings.log_interval == 0 or state.iteration == settings.iterations:
            watch.check()
            mean, now = state.take_mean_loss(), time.perf_counter()
            speed = (state.iteration - logged) * settings.batch_size / (now - since)
            logged, since = state.iteration, now
            if folder is not None:
                folder.log(Row(state.iteration, mean, rate, norm.item(), speed))
            if not on_host and progress is not None and processes.rank == 0:
                progress(state.iteration - 1, mean)
        if folder is not None and folder.due(state.iteration):
            watch.check()
            folder.write(state)


def _gradients(
    loss_of: nn.Module, state: State, batches: Batches, settings: LoopSettings, share: int, processes: Processes
) -> Tensor:
    """Accumulate the gradients of this process's share of an update's batch, and return its mean loss []."""
    model = state.method.model
    size, total = share // settings.accumulation, torch.zeros((), dtype=torch.float64, device=model.device)
    for part in range(settings.accumulation):
        first = processes.rank * share + part * size
        torch.manual_seed(module_seed(settings.seed, state.iteration, first))
        images, labels = batches.part(state.iteration, first, size, model.device)
        draws = UpdateDraws(settings.seed, state.iteration, first)
        classes = None if model.num_classes is None else labels
        last = part == settings.accumulation - 1
        waits = not last and isinstance(loss_of, nn.parallel.DistributedDataParallel)  # for the last part
        with loss_of.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.autocast is not None):
                losses = loss_of(images, classes, draws, state.iteration)
            if losses.shape != labels.shape:
                raise ValueError(
                    f"{type(state.method).__name__}.loss: expected a loss for each of {size} samples, got "
                    f"{list(losses.shape)}"
                )
            loss = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32)) / share
            loss.backward()
        total += loss.detach()
    return total


def _clip(parameters: list[nn.Parameter], bound: float | None) -> Tensor:
    """Scale the gradients so that their norm is at most the bound, and return the norm that they had []."""
    if bound is not None:
        return nn.utils.clip_grad_norm_(parameters, bound)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class _LossOf(nn.Module):
    """A method's loss as the forward of a module, which DistributedDataParallel can wrap."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.model, self.networks = method.model, nn.ModuleDict(method.networks())
        self.method = method

    def forward(self, images: Tensor, labels: Tensor | None, draws: UpdateDraws, iteration: int) -> Tensor:
        return self.method.loss(images, labels, draws, iteration)


class _Watch:
    """Remembers the first loss that was not finite, on the device, so that the host can ask for it rarely."""

    def __init__(self, like: Tensor) -> None:
        self._iteration = torch.full_like(like, -1.0)
        self._loss, self._norm = torch.zeros_like(like), torch.zeros_like(like)

    def look(self, iteration: int, loss: Tensor, norm: Tensor) -> None:
        """Look at an update's loss and gradient."""
        new = ~torch.isfinite(loss + norm) & (self._iteration < 0)
        self._iteration = torch.where(new, float(iteration), self._iteration)
        self._loss, self._norm = torch.where(new, loss, self._loss), torch.where(new, norm.double(), self._norm)

    def check(self) -> None:
        """Raise DivergedError where one was not finite."""
        iteration = int(self._iteration)
        if iteration >= 0:
            raise DivergedError(
                f"the training diverged at update {iteration}: its loss is {self._loss.item():g}, the norm of its "
                f"gradient {self._norm.item():g}; a lower learning rate, warm-up or a gradient_clip may help"
            )


def _lay_out(networks: Iterable[nn.Module], layout: torch.memory_format) -> None:
    """Lay out the weights of 2-D convolutions; on a processor a `UNet` is trained channels-last, a tenth faster."""
    for network in networks:
        unet = getattr(network, "unet", None)
        if isinstance(unet, UNet) and unet.config.dims == 2 and network.device.type == "cpu":
            unet.to(memory_format=layout)  # type: ignore[call-overload]


def _on_host(model: ConsistencyModel) -> bool:
    """Whether a loss can be read at each update: nothing is waited for."""
    return model.device.type == "cpu"


def _share(settings: LoopSettings, processes: Processes) -> int:
    """How many samples of a batch are this process's."""
    parts = processes.count * settings.accumulation
    if settings.batch_size % parts:
        raise ValueError(
            f"batch_size: expected a multiple of {parts}, processes times accumulation, got {settings.batch_size}"
        )
    return settings.batch_size // processes.count


def _check_compiler(name: str | None) -> None:
    """Before anything is written; here alone, since torch's compiler takes seconds to import."""
    if name is None:
        return
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        lookup_backend(name)
    except InvalidBackend:
        known = ", ".join(torch.compiler.list_backends())
        raise ValueError(f"compile: expected a backend of torch.compile ({known}), got {name!r}") from None


def _check_data(model: ConsistencyModel, data: Dataset, say: Callable[[str], None]) -> None:
    check(data)
    if data.images.shape[1:] != model.sample_shape:
        raise ValueError(
            f"the model is for samples {list(model.sample_shape)}, and the data has {list(data.images.shape[1:])}"
        )
    if model.num_classes is not None and int(data.labels.max()) >= model.num_classes:
        raise ValueError(f"the model has {model.num_classes} classes, and the data has label {int(data.labels.max())}")
    if (model.num_classes or 1) > 1 and data.num_classes is None:
        say(f"the data has no classes, and the model has {model.num_classes}: all samples are trained as class 0")
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f'a model is trained with float32 weights, got {model.dtype}: autocast="bfloat16" evaluates in that'
        )


def _description(
    method: Method, data: Dataset, settings: LoopSettings, more: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What has to be the same for a training to be resumed."""

    def fields(value: object) -> dict[str, Any]:
        return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else {}  # type: ignore[arg-type]

    model, settings_of = method.model, getattr(method, "settings", None)
    return {
        "method": {"name": type(method).__name__, **fields(settings_of), **compared_by(settings_of)},
        "loop": settings.of_the_weights(),
        "network": fields(getattr(model.unet, "config", None)),
        "preconditioning": {"type": type(model.preconditioning).__name__, **fields(model.preconditioning)},
        "data": {"samples": len(data.labels), "fingerprint": fingerprint([data.images, data.labels])},
        **(more or {}),
    }


def _silent(line: str) -> None:
    pass
