"""What continuous-time consistency training and distillation share: the tangent, its normalisation, the loss.

Lu and Song 2024, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", algorithm 1. The
consistency function is f(x, t) = cos(t) · x - sin(t) · sigma_data · F(x / sigma_data, t), with
t = atan(sigma / sigma_data).

The tangent has the network's derivative by its time, so the network must be smooth in it (section 4.1 of the paper). A
TrigFlow network is. One with EDM's time, 250 · ln sigma, is not: its fastest sinusoid turns by 250 radians while sigma
grows by a factor of e, and the derivative of what it has learned is mostly noise. So start from a TrigFlow diffusion
model, which the method "diffusion" trains; or take finite differences with a difference_step near 0.1, which average
over such turns.
"""

import abc
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...model import ConsistencyModel
from ...preconditioning import TrigFlow
from .checks import preconditioning_of, require
from .conversion import trigflow_from
from .levels import log_normal, noised, per_sample
from .method import Draws, Method
from .targets import same_dropout
from .weighting import AdaptiveWeighting


@dataclasses.dataclass(frozen=True)
class ContinuousConsistencySettings:
    """Settings of `ContinuousConsistencyTraining` and `ContinuousConsistencyDistillation`, as the paper has them.

    Attributes:
        log_sigma_mean: mean of ln(sigma), with t = atan(sigma / sigma_data).
        log_sigma_std: its standard deviation.
        warmup_iterations: updates over which the part of the tangent that has the network's derivative is faded in.
        tangent_c: c of the normalisation g / (‖g‖ + c).
        derivative: of the network along the trajectory: "jvp" by torch.func.jvp, or "finite-differences".
        difference_step: h of the central differences, which move t by h · sin t · cos t to both sides. The network is
            evaluated for them as its weights are, without autocast.
    """

    log_sigma_mean: float = -1.0
    log_sigma_std: float = 1.4
    warmup_iterations: int = 10000
    tangent_c: float = 0.1
    derivative: str = "jvp"
    difference_step: float = 1e-3

    def __post_init__(self) -> None:
        require(self, "log_sigma_std", self.log_sigma_std > 0.0, "positive")
        require(self, "warmup_iterations", self.warmup_iterations >= 0, "at least 0")
        require(self, "tangent_c", self.tangent_c > 0.0, "positive")
        require(self, "derivative", self.derivative in ("jvp", "finite-differences"), "jvp or finite-differences")
        require(self, "difference_step", self.difference_step > 0.0, "positive")


class ContinuousConsistency(Method):
    """f does not change along a trajectory; the velocity of the trajectory is the subclasses'.

    exp(w(t)) · ‖F - F⁻ - g‖² / d - w(t), where F⁻ is F without a gradient, w an `AdaptiveWeighting`, and g the tangent:

        g = -cos²t · (sigma_data · F⁻ - dx/dt) - r · cos t · sin t · (x + sigma_data · dF⁻/dt)
        g ← g / (‖g‖ + c)          r = min(1, iteration / warmup_iterations)

    g is cos t · df/dt, d the elements of a sample, and the norm that of a whole sample.
    """

    settings: ContinuousConsistencySettings

    def __init__(
        self,
        model: ConsistencyModel,
        settings: ContinuousConsistencySettings,
        iterations: int,
        teacher: ConsistencyModel | None = None,
    ) -> None:
        super().__init__(model, settings, iterations, teacher)
        self.preconditioning = preconditioning_of(f"{type(self).__name__}: student", model, TrigFlow)
        self.settings = settings
        self.weighting = AdaptiveWeighting().to(model.device)

    @classmethod
    def student(cls, source: ConsistencyModel) -> ConsistencyModel:
        """A TrigFlow model with the weights of a TrigFlow or EDM model."""
        return trigflow_from(source)

    @abc.abstractmethod
    def velocity(self, x: Tensor, images: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """dx/dt of the trajectory through x [N, C, *spatial], which was made of images and noise for the levels [N]."""

    def loss(self, images: Tensor, labels: Tensor | None, draws: Draws, iteration: int) -> Tensor:
        """The weighted loss of each sample [N]; negative where the weight has learned that the loss is small."""
        s, p = self.settings, self.preconditioning
        sigma = log_normal(draws, images, s.log_sigma_mean, s.log_sigma_std)
        noise = draws.normal(images)
        x = noised(p, images, sigma, noise)
        with torch.no_grad():
            dxdt = self.velocity(x, images, noise, sigma, labels)
        with same_dropout(images):
            slope = self.slope(x, dxdt, sigma, labels)
        output = self._network(labels)(x / p.sigma_data, p.coefficients(sigma).c_noise)
        fixed = output.detach()
        t = torch.atan(sigma / p.sigma_data)
        cos, sin = per_sample(torch.cos(t), x), per_sample(torch.sin(t), x)
        r = min(1.0, iteration / s.warmup_iterations) if s.warmup_iterations else 1.0
        tangent = -(cos**2) * (p.sigma_data * fixed - dxdt) - r * (cos * sin * x + p.sigma_data * slope)
        norm = per_sample(tangent.flatten(1).norm(dim=1), x)
        error = (output - fixed - tangent / (norm + s.tangent_c)).flatten(1).square().mean(1)
        weight = self.weighting(t)
        return torch.exp(weight) * error - weight

    def slope(self, x: Tensor, dxdt: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """The network's part of the tangent: cos t · sin t · dF/dt along dx/dt.

        The factor is put into the direction of the derivative, which is not large at any t then: the time of an EDM
        network, 250 · ln sigma, changes by 250 along it. Lu and Song 2024, section 4.3, "JVP rearrangement".

        Args:
            x: [N, C, *spatial], samples at the levels sigma.
            dxdt: of the shape of x.
            sigma: [N].
            labels: [N], or None.
        """
        p, s = self.preconditioning, self.settings
        t = torch.atan(sigma / p.sigma_data)
        factor = torch.cos(t) * torch.sin(t)
        time = p.coefficients(sigma).c_noise
        rate = torch.full_like(time, 250.0) if p.network == "edm" else factor.to(time.dtype)
        at, along = (x / p.sigma_data, time), (per_sample(factor, x) * dxdt / p.sigma_data, rate)
        network = self._network(labels)
        if s.derivative == "jvp":
            return torch.func.jvp(network, at, along)[1]
        h, kind = s.difference_step, x.device.type
        with torch.autocast(kind, enabled=False):  # the difference is smaller than what bfloat16 rounds off
            with torch.random.fork_rng([] if kind == "cpu" else [x.device], device_type=kind):
                after = network(at[0] + h * along[0], at[1] + h * along[1])
            return (after - network(at[0] - h * along[0], at[1] - h * along[1])) / (2.0 * h)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the model and of the weighting."""
        return itertools.chain(self.model.parameters(), self.weighting.parameters())

    def networks(self) -> dict[str, nn.Module]:
        """The weighting."""
        return {"weighting": self.weighting}

    def _network(self, labels: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """TrigFlow's F as a function of its input and its time, in the dtype of samples."""
        model, sign = self.model, -1.0 if self.preconditioning.network == "edm" else 1.0
        return lambda x, time: sign * model.unet(x.to(model.dtype), time, labels).to(x.dtype)
