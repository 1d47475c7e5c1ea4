"""Skip/out parameterisations: how a denoiser is made of a network.

Each scheme turns a noise level into four coefficients of

    D(x, sigma) = a · x + b · F(c_in · x, c_noise)

and a next level into the two of the renoising `alpha · D + beta · z`. Levels are host floats, or tensors [N] on any
device; coefficients are computed in float64 and are of the same kind (tensors come back as float32, or float64 for
float64 levels).

The level `sigma` is each scheme's own: the standard deviation of the noise for EDM, consistency and TrigFlow, the
fraction of noise in (0, 1] for flow, the timestep in [0, num_train_timesteps) for LCM and TCD.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sampling.schedules import karras_sigmas

#: A noise level: a host float, or a tensor [N].
Level = float | Tensor


class Coefficients(NamedTuple):
    """Coefficients of x and of the network's output, scale of the network's input, and its time."""

    a: Any
    b: Any
    c_in: Any
    c_noise: Any


@dataclasses.dataclass(frozen=True)
class Preconditioning:
    """What every scheme has; the subclasses say how.

    Attributes:
        clip_denoised: samplers clip each estimate to [-1, 1] unless they are told otherwise; False for models of data
            that has no such bounds.
    """

    clip_denoised: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if self.clip_denoised not in (True, False):
            raise ValueError(f"{type(self).__name__}: clip_denoised must be True or False, got {self.clip_denoised!r}")

    def check(self, sigma: Level) -> None:
        """Raise ValueError where the scheme has no such level, or not one of a tensor's (which a GPU is waited for)."""

    def coefficients(self, sigma: Level, sigma_next: Level | None = None) -> Coefficients:
        """(a, b, c_in, c_noise) at the level sigma; only trajectory consistency looks at the next level."""
        raise NotImplementedError

    def renoise(self, sigma_next: float) -> tuple[float, float]:
        """(alpha, beta) of the renoising `alpha · denoised + beta · z` to the level sigma_next."""
        raise NotImplementedError

    def noising(self, sigma: float) -> tuple[float, float]:
        """(alpha, beta) of `alpha · D(x, sigma') + beta · z`, which brings what `denoise` gives to the level sigma."""
        return self.renoise(sigma)

    def levels(self, steps: int) -> list[float]:
        """The levels at which a sampler of so many steps evaluates the model where the user names none."""
        raise NotImplementedError

    def initial_scale(self, sigma: float) -> float:
        """Standard deviation of the noise that sampling starts from at its first level."""
        return self.noising(sigma)[1]


@dataclasses.dataclass(frozen=True)
class EDM(Preconditioning):
    """Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", table 1.

    Attributes:
        sigma_data: standard deviation of the data.
        sigma_min: lowest level.
        sigma_max: highest level.
        rho: exponent of the grid of levels.
        num_train_timesteps: levels of the grid that the model was trained on, which `timesteps` are indices of.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    num_train_timesteps: int = dataclasses.field(default=40, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "sigma_data", "sigma_min", "rho")
        if not self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"{type(self).__name__}: sigma_max must be above sigma_min, {self.sigma_min}, got {self.sigma_max}"
            )
        _check_count(self, "num_train_timesteps")

    def check(self, sigma: Level) -> None:
        """Positive and finite."""
        _check_level(sigma, lambda s: (s > 0.0) & (s < math.inf), "a level sigma must be positive and finite")

    def coefficients(self, sigma: Level, sigma_next: Level | None = None) -> Coefficients:
        """(a, b, c_in, c_noise) of the denoiser, which comes to D(x, 0) = x; the network has no time at 0 itself."""
        s, sd = _float64(sigma), self.sigma_data
        total = s**2 + sd**2
        return _like(sigma, sd**2 / total, s * sd / total**0.5, total**-0.5, 250.0 * _log(s))

    def renoise(self, sigma_next: float) -> tuple[float, float]:
        """The forward process: D + sigma · z."""
        return 1.0, sigma_next

    def levels(self, steps: int) -> list[float]:
        """The first levels of a Karras grid of one value more, whose last, sigma_min, would change nothing."""
        return self.grid(steps + 1)[:steps]

    def grid(self, steps: int) -> list[float]:
        """This model's Karras grid: `steps` levels from sigma_max to sigma_min, and a final 0."""
        return karras_sigmas(steps, self.sigma_min, self.sigma_max, self.rho)

    def initial_scale(self, sigma: float) -> float:
        """The level itself."""
        return sigma


@dataclasses.dataclass(frozen=True)
class Consistency(EDM):
    """Song et al. 2023, "Consistency Models", appendix C: EDM moved so that D(x, sigma_min) = x exactly."""

    def coefficients(self, sigma: Level, sigma_next: Level | None = None) -> Coefficients:
        """(a, b, c_in, c_noise) of the consistency function with its boundary condition."""
        s, sd = _float64(sigma), self.sigma_data
        above, total = s - self.sigma_min, s**2 + sd**2
        return _like(sigma, sd**2 / (above**2 + sd**2), above * sd / total**0.5, total**-0.5, 250.0 * _log(s))

    def renoise(self, sigma_next: float) -> tuple[float, float]:
        """Algorithm 1: D is a sample at the level sigma_min, and the noise brings it to sigma_next."""
        return 1.0, math.sqrt(max(sigma_next**2 - self.sigma_min**2, 0.0))


@dataclasses.dataclass(frozen=True)
class TrigFlow(EDM):
    """Lu and Song 2024, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", equation 5.

    Samples are cos(t) · x0 + sin(t) · sigma_data · z with t = atan(sigma / sigma_data).

    Attributes:
        network: "trigflow" where the network estimates dx/dt / sigma_data and its time is t; "edm" for the network of
            an EDM model, which estimates the negative of that, and whose time is 250 · ln sigma.
    """

    network: str = dataclasses.field(default="trigflow", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network not in ("trigflow", "edm"):
            raise ValueError(f'network must be "trigflow" or "edm", got {self.network!r}')

    def coefficients(self, sigma: Level, sigma_next: Level | None = None) -> Coefficients:
        """(a, b, c_in, c_noise): cos t, ∓sigma_data · sin t, 1/sigma_data, t or 250 · ln sigma."""
        s = _float64(sigma)
        t = _atan(s / self.sigma_data)
        sign, c_noise = (1.0, 250.0 * _log(s)) if self.network == "edm" else (-1.0, t)
        return _like(sigma, _cos(t), sign * self.sigma_data * _sin(t), 1.0 / self.sigma_data, c_noise)

    def renoise(self, sigma_next: float) -> tuple[float, float]:
        """The forward process at the next time."""
        t = math.atan(sigma_next / self.sigma_data)
        return math.cos(t), self.sigma_data * math.sin(t)

    def initial_scale(self, sigma: float) -> float:
        """Standard deviation of the noise at the level."""
        return self.renoise(sigma)[1]


@dataclasses.dataclass(frozen=True)
class Flow(Preconditioning):
    """Rectified flow: x = (1 - sigma) · x0 + sigma · z, the network predicts z - x0 (Liu et al. 2022, equation 1).

    Attributes:
        num_train_timesteps: the network's time is this many times sigma.
    """

    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, "num_train_timesteps")

    def check(self, sigma: Level) -> None:
        """Above 0 and at most 1."""
        _check_level(sigma, lambda s: (s > 0.0) & (s <= 1.0), "a level of a flow must be above 0 and at most 1")

    def coefficients(self, sigma: Level, sigma_next: Level | None = None) -> Coefficients:
        """(a, b, c_in, c_noise): 1, -sigma, 1, 1000 · sigma."""
        s = _float64(sigma)
        if not isinstance(s, Tensor):
            self.check(s)
        return _like(sigma, 1.0, -s, 1.0, self.num_train_timesteps * s)

    def renoise(self, sigma_next: float) -> tuple[float, float]:
        """The forward process at the next level."""
        return 1.0 - sigma_next, sigma_next

    def levels(self, steps: int) -> list[float]:
        """1, 1 - 1/steps, …, 1/steps."""
        return [1.0 - i / steps for i in range(steps)]


@dataclasses.dataclass(frozen=True)
class _Discrete(Preconditioning):
    """Schemes on the discrete timesteps of a variance-preserving diffusion; the subclasses say their attributes."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    original_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, "num_train_timesteps")
        _check_count(self, "original_steps", self.num_train_timesteps)
        for name in ("beta_start", "beta_end"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 0 and below 1, got {value}")

    @functools.cached_property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ [num_train_timesteps], float64, on the host."""
        ends = (self.beta_start**0.5, self.beta_end**0.5)
        betas = torch.linspace(*ends, self.num_train_timesteps, dtype=torch.float64) ** 2
        return torch.cumprod(1.0 - betas, dim=0)

    def check(self, sigma: Level) -> None:
        """A whole number in [0, num_train_timesteps)."""
        end = self.num_train_timesteps
        expected = f"a timestep must be a whole number in [0, {end})"
        _check_level(sigma, lambda s: (s >= 0) & (s < end) & (s == s // 1), expected)

    def alpha_bar(self, timestep: Level) -> Any:
        """ᾱ at the timestep, which must be a whole number in [0, num_train_timesteps)."""
        if isinstance(timestep, Tensor):
            return self.alphas_cumprod.to(timestep.device)[timestep.long()]
        self.check(timestep)
        return self.alphas_cumprod[int(timestep)].item()

    def levels(self, steps: int) -> list[float]:
        """Timesteps spread evenly over those of the distillation, from the last (Luo et al. 2023, section 4.3)."""
        if not 1 <= steps <= self.original_steps:
            raise ValueError(f"steps must be in 1 … {self.original_steps}, got {steps}")
        stride = self.num_train_timesteps // self.original_steps
        picked = (self.original_steps - i * self.original_steps // steps for i in range(steps))
        return [float(stride * index - 1) for index in picked]

    def initial_scale(self, sigma: float) -> float:
        """1 at every timestep, as diffusers has it: sampling starts from the last ones, where there is only noise."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LatentConsistency(_Discrete):
    """Luo et al. 2023, "Latent Consistency Models", equations 9 to 12.

    Attributes:
        num_train_timesteps: number of timesteps.
        beta_start: first beta of the "scaled linear" schedule (√beta is linear), that of Stable Diffusion.
        beta_end: last beta.
        original_steps: the solver steps of the distillation, whose timesteps sampling picks from.
        prediction_type: "epsilon" or "v_prediction", what the network predicts.
        sigma_data: of the skip mix.
        timestep_scaling: factor of the timestep in the skip mix.
    """

    prediction_type: str = "epsilon"
    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "sigma_data", "timestep_scaling")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f'prediction_type must be "epsilon" or "v_prediction", got {self.prediction_type!r}')

    def coefficients(self, sigma: Level, sigma_next: Level | None = None) -> Coefficients:
        """(a, b, c_in, c_noise) with the prediction of x0 folded into the skip mix."""
        t, alpha_bar = _float64(sigma), self.alpha_bar(sigma)
        tau = self.timestep_scaling * t
        c_skip = self.sigma_data**2 / (tau**2 + self.sigma_data**2)
        c_out = tau / (tau**2 + self.sigma_data**2) ** 0.5
        signal, noise = alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5
        if self.prediction_type == "epsilon":
            return _like(sigma, c_skip + c_out / signal, -c_out * noise / signal, 1.0, t)
        return _like(sigma, c_skip + c_out * signal, -c_out * noise, 1.0, t)

    def renoise(self, sigma_next: float) -> tuple[float, float]:
        """The forward process at the next timestep."""
        alpha_bar = self.alpha_bar(sigma_next)
        return math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)


@dataclasses.dataclass(frozen=True)
class TrajectoryConsistency(_Discrete):
    """Zheng et al. 2024, "Trajectory Consistency Distillation", strategic stochastic sampling (algorithm 4).

    D is the sample at timestep s = ⌊(1 - eta) · next⌋ on the trajectory, and the renoising goes from s to the next one.

    Attributes:
        num_train_timesteps: number of timesteps.
        beta_start: first beta of the "scaled linear" schedule (√beta is linear), that of Stable Diffusion.
        beta_end: last beta.
        original_steps: the solver steps of the distillation, whose timesteps sampling picks from.
        eta: 0 for deterministic sampling, 1 for multistep consistency sampling (the paper's gamma).
        clip_denoised: False unless it is set: between levels D is a noisy sample, which goes beyond [-1, 1].
    """

    eta: float = 0.3
    clip_denoised: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"{type(self).__name__}: eta must be in [0, 1], got {self.eta}")

    def coefficients(self, sigma: Level, sigma_next: Level | None = None) -> Coefficients:
        """(a, b, c_in, c_noise) of the jump from sigma to s; without sigma_next, to timestep 0."""
        alpha_bar = self.alpha_bar(sigma)
        target = sigma * 0 if sigma_next is None else sigma_next
        target_bar = self.alpha_bar(self._middle(target))
        a = (target_bar / alpha_bar) ** 0.5
        return _like(sigma, a, (1.0 - target_bar) ** 0.5 - a * (1.0 - alpha_bar) ** 0.5, 1.0, _float64(sigma))

    def renoise(self, sigma_next: float) -> tuple[float, float]:
        """From timestep s to the next one."""
        ratio = self.alpha_bar(sigma_next) / self.alpha_bar(self._middle(sigma_next))
        return math.sqrt(ratio), math.sqrt(1.0 - ratio)

    def noising(self, sigma: float) -> tuple[float, float]:
        """From timestep 0, to which D jumps where it is told no next level."""
        ratio = self.alpha_bar(sigma) / self.alpha_bar(0.0)
        return math.sqrt(ratio), math.sqrt(1.0 - ratio)

    def _middle(self, timestep: Level) -> Any:
        if isinstance(timestep, Tensor):
            return ((1.0 - self.eta) * timestep.double()).floor()
        return float(math.floor((1.0 - self.eta) * timestep))


def _check_positive(scheme: Preconditioning, *names: str) -> None:
    """Raise ValueError where a number of a scheme is not positive and finite."""
    for name in names:
        value = getattr(scheme, name)
        if not 0.0 < value < math.inf:
            raise ValueError(f"{type(scheme).__name__}: {name} must be positive, got {value}")


def _check_count(scheme: Preconditioning, name: str, most: int | None = None) -> None:
    """Raise ValueError where a scheme does not have a whole number of things, or more than the most."""
    value = getattr(scheme, name)
    is_whole = isinstance(value, numbers.Integral)
    if not is_whole or not 1 <= value <= (most or math.inf):
        expected = "of at least 1" if most is None else f"in 1 … {most}"
        raise ValueError(f"{type(scheme).__name__}: {name} must be a whole number {expected}, got {value!r}")


def _check_level(level: Level, right: Callable[[Any], Any], expected: str) -> None:
    """Raise ValueError where a level, or one of a tensor's, is not what is expected."""
    if not isinstance(level, Tensor):
        if not right(level):
            raise ValueError(f"{expected}, got {level:g}")
    elif not bool((good := right(level)).all()):
        raise ValueError(f"{expected}, got {level[~good][0].item():g} among {len(level)} levels")


def _float64(value: Level) -> Any:
    return value.double() if isinstance(value, Tensor) else float(value)


def _like(level: Level, *values: Any) -> Coefficients:
    """Values as Coefficients of the kind of the level: floats, or tensors [N] of float32 (float64 for float64)."""
    if not isinstance(level, Tensor):
        return Coefficients(*values)
    dtype = torch.float64 if level.dtype == torch.float64 else torch.float32
    return Coefficients(
        *(v.to(dtype) if isinstance(v, Tensor) else torch.full_like(level, v, dtype=dtype) for v in values)
    )


def _log(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.log(x)
    if not 0.0 < x < math.inf:
        raise ValueError(f"a level sigma must be positive and finite, got {x:g}")
    return math.log(x)


def _atan(x: Any) -> Any:
    return torch.atan(x) if isinstance(x, Tensor) else math.atan(x)


def _cos(x: Any) -> Any:
    return torch.cos(x) if isinstance(x, Tensor) else math.cos(x)


def _sin(x: Any) -> Any:
    return torch.sin(x) if isinstance(x, Tensor) else math.sin(x)
