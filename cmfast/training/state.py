"""All that changes while a training runs."""

from typing import Any

import torch
from torch import Tensor, nn

from .averages import Averages
from .methods.method import Method
from .settings import LoopSettings


class State:
    """Where a training stands.

    Attributes:
        method: with the model that is trained.
        optimizer: over the method's parameters.
        averages: of the model's weights.
        iteration: updates made.
        loss_sum: sum of the losses since the log's last row [], float64.
        losses: how many these are.
    """

    def __init__(self, method: Method, settings: LoopSettings) -> None:
        self.method, self.iteration, self.losses = method, 0, 0
        self.optimizer = make_optimizer(method, settings)
        self.averages = Averages(method.model, settings.ema_decays, settings.ema_warmup, settings.power_ema)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=method.model.device)

    def add_loss(self, loss: Tensor) -> None:
        """Count an update's loss []."""
        self.loss_sum += loss
        self.losses += 1

    def take_mean_loss(self) -> float:
        """The mean of the losses since this was last called."""
        mean = self.loss_sum.item() / self.losses
        self.loss_sum.zero_()
        self.losses = 0
        return mean

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has to be stored as tensors, by names of its own."""
        tensors = {"loop/loss_sum": self.loss_sum}
        for kind, module in self._modules().items():
            tensors |= {f"{kind}/{name}": value for name, value in module.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in values.items()}
        return tensors

    def numbers(self) -> dict[str, Any]:
        """What has to be stored as numbers, as JSON can hold it."""
        return {"iteration": self.iteration, "losses": self.losses, "method": self.method.state()}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Take what `tensors` and `numbers` gave.

        Raises:
            RuntimeError, LookupError, StopIteration: names or shapes are another training's.
        """
        of_modules: dict[str, dict[str, Tensor]] = {kind: {} for kind in self._modules()}
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = self.optimizer.param_groups[0]["params"]
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                moments.setdefault(int(index), {})[key] = _laid_out(value, parameters[int(index)])
            elif name != "loop/loss_sum":
                kind = next(kind for kind in of_modules if name.startswith(f"{kind}/"))
                of_modules[kind][name.removeprefix(f"{kind}/")] = value
        for kind, module in self._modules().items():
            module.load_state_dict(of_modules[kind])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.loss_sum.copy_(tensors["loop/loss_sum"])
        self.iteration, self.losses = int(numbers["iteration"]), int(numbers["losses"])
        self.method.load_state(numbers["method"])

    def _modules(self) -> dict[str, nn.Module]:
        networks = {f"network/{name}": network for name, network in self.method.networks().items()}
        averages = {f"average/{name}": average for name, average in self.averages.models.items()}
        return {"model": self.method.model, **networks, **averages}


def make_optimizer(method: Method, settings: LoopSettings) -> torch.optim.Optimizer:
    """The optimizer over the method's parameters that require gradients; the loop sets its learning rate."""
    make: Any = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam, "adamw": torch.optim.AdamW}[settings.optimizer]
    parameters = [p for p in method.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("there is nothing to train: no parameter of the model requires a gradient")
    s = settings
    more = {} if s.optimizer == "radam" else {"fused": True}  # one kernel a tensor; torch has none for radam
    return make(parameters, lr=s.learning_rate, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay, **more)


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of one of the optimizer's tensors, laid out in memory as its parameter is where it has its shape."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.clone()
