"""ConsistencyModel: a network, a preconditioning, and sample()."""

import dataclasses
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .kernels import consistency_step
from .kernels.direct import plain
from .modes import in_eval_mode
from .noise import GaussianNoise, noise_arguments
from .preconditioning import EDM, Consistency, Flow, Preconditioning, TrigFlow
from .sampling import SAMPLERS, sample_multistep, sample_onestep
from .sampling.protocol import Callback, NoiseFunction
from .sampling.schedules import host_levels
from .sound import Mdct
from .storage import Storage

#: A bound of absolute values, none, or what the model's preconditioning says.
Clip = float | Literal["model"] | None


def samplers_of(preconditioning: Preconditioning) -> list[str]:
    """The samplers, by their names, that suit models with a preconditioning."""
    suitable = ["onestep", "multistep"]
    if isinstance(preconditioning, EDM):
        return list(SAMPLERS)
    if isinstance(preconditioning, Flow):  # whose levels are the times of its equation: these solve it as it is
        return [*suitable, "euler", "heun", "dpm2"]
    return suitable


class ConsistencyModel(Storage):
    """A network F(x, timesteps, class_labels) with the preconditioning that makes it a denoiser D(x, sigma).

    Attributes:
        unet: the network; anything with UNet's forward.
        preconditioning: one of `cmfast.preconditioning`.
        sample_shape: [C, *spatial] of one sample.
        num_classes: number of classes; None for an unconditional model.
        recommended_levels: for a number of steps, the levels that were found best for this model.
        default_sampler: ("heun", 18) for an EDM model, ("multistep", 1) for any other: what `sample` does when it is
            told neither a sampler nor steps nor levels.
        representation: of a model of sound, how waveforms are made of its samples: `representation.decode(samples)`;
            None where samples are what is seen or heard.
    """

    def __init__(
        self,
        unet: nn.Module,
        preconditioning: Preconditioning | None = None,
        *,
        sample_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        recommended_levels: Mapping[int, Sequence[float]] | None = None,
        representation: Mdct | None = None,
    ) -> None:
        """Take the parts; sample_shape and num_classes are those of a UNet's configuration unless given.

        Raises:
            ValueError: the network has no configuration and sample_shape was not given.
        """
        super().__init__()
        config = getattr(unet, "config", None)
        shape = getattr(config, "sample_shape", None) if sample_shape is None else sample_shape
        if shape is None:
            raise ValueError("ConsistencyModel: this network does not tell its sample_shape [C, *spatial]: pass it")
        self.unet = unet
        self.preconditioning = Consistency() if preconditioning is None else preconditioning
        self.sample_shape: tuple[int, ...] = tuple(shape)
        self.num_classes: int | None = getattr(config, "num_classes", None) if num_classes is None else num_classes
        self.recommended_levels = {int(k): tuple(v) for k, v in (recommended_levels or {}).items()}
        self.representation = representation

    @property
    def device(self) -> torch.device:
        """Where the parameters are: those that an accelerated network gave up are nowhere. Without any, the CPU."""
        first = next(self.parameters(), None)
        if first is None:
            return torch.device("cpu")
        return (
            first.device if not first.is_meta else next((p for p in self.parameters() if not p.is_meta), first).device
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, in which the network computes; without any, float32."""
        return next((p.dtype for p in self.parameters()), torch.float32)

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of samples: float32, or float64 for a float64 network."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def default_sampler(self) -> tuple[str, int]:
        """The sampler and the number of steps of a plain `sample(count)`."""
        return ("heun", 18) if type(self.preconditioning) is EDM else ("multistep", 1)

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Same as `denoise`."""
        return self.denoise(x, sigma, class_labels)

    def denoise(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        *,
        clip: float | tuple[float, float] | None = None,
    ) -> Tensor:
        """D(x, sigma), the estimate of the clean sample; differentiable.

        Args:
            x: [N, C, *spatial] of any floating dtype, at the level sigma.
            sigma: [N], or one Python float for the whole batch (then nothing is computed on the device); in the
                preconditioning's own unit of levels.
            class_labels: [N] integers below num_classes; None for an unconditional model.
            clip: bound of the result's absolute value, or (low, high).

        Returns:
            [N, C, *spatial] in the dtype of x.

        Raises:
            ValueError: shapes or labels that do not fit, or a level that the preconditioning does not have.
        """
        self._check(x, sigma, class_labels)
        a, b, c_in, c_noise = self.preconditioning.coefficients(sigma)
        output = self._network(_scaled(x, c_in), c_noise, class_labels)
        return consistency_step(x, output, a, b, clip=clip).denoised

    def denoiser(self, class_labels: Tensor | None = None, clip: Clip = "model") -> "ModelDenoiser":
        """The model as samplers take it, with its labels [N] and the clipping of each estimate bound."""
        if isinstance(clip, str):
            if clip != "model":
                raise ValueError(f'denoiser: clip must be a number, None or "model", got {clip!r}')
            clip = 1.0 if self.preconditioning.clip_denoised else None
        return ModelDenoiser(self, class_labels, clip)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        timesteps: Sequence[int] | None = None,
        grid_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        seed: int = 0,
        first_sample: int = 0,
        batch_size: int | None = None,
        clip: Clip = "model",
        progress: bool = False,
        callback: Callback | None = None,
        **sampler_options: Any,
    ) -> Tensor:
        """Draw samples. Sample i is a function of the weights, the arguments, the seed and i alone.

        Where `accelerate` returned the model and it is on a GPU, the first batch of a kind is captured in a CUDA graph:
        the initial noise, every evaluation and every step of the sampler. Later batches of the same size, sampler,
        levels, options and dtype are one replay of that graph, whatever their seed, first sample and class labels. They
        are the same samples. Nothing waits for the GPU until they are read, but that class labels which are on the GPU
        are checked. The network is checked for changes before each replay; one that has changed is captured anew.

        Step by step, as everywhere else, run batches with a callback, a progress bar over the steps, or an option that
        is not a number or a string; networks that have hooks or cannot be captured as a whole; models of a subclass,
        or with a preconditioning that is not a frozen dataclass of such values; and `accelerate(..., graphs=False)`.

        Args:
            count: how many.
            class_labels: one label for all, or one a sample; None gives sample i the class i mod num_classes.
            steps: of the sampler: evaluations for a consistency sampler, levels of the Karras grid for the others.
            sampler: a name of `cmfast.sampling.SAMPLERS`; None means heun for an EDM model that is given neither
                timesteps nor sigmas, and else multistep consistency sampling: name the sampler of a TrigFlow or flow
                diffusion model, and of any diffusion model at levels of your own.
            timesteps: instead of steps, increasing indices of the levels on the Karras grid of `grid_steps` levels:
                (0, 22) are OpenAI's `--ts 0,22,39 --steps 40`.
            grid_steps: size of that grid; None takes the one that the model was trained on, 40 for most.
            sigmas: instead of steps, the levels themselves: those of the evaluations for consistency samplers, a grid
                that ends in 0 for the others.
            seed: of the counter-based noise, 0 ≤ seed < 2⁶⁴.
            first_sample: index of the first sample; 64 samples from 64 on continue a run of 64.
            batch_size: evaluate so many at a time; None evaluates all at once. The samples do not depend on
                it, up to rounding.
            clip: bound of each estimate's absolute value; None does not clip; "model" clips at 1 unless the
                preconditioning's clip_denoised is False.
            progress: show a progress bar over the batches, or over the steps of a single batch.
            callback: called after each step of the sampler (see `cmfast.sampling.protocol`).
            **sampler_options: of the sampler, such as s_churn or eta.

        Returns:
            [count, C, *spatial] in [-clip, clip] for consistency samplers, float32 (of a float64 network float64), on
            the model's device.

        Raises:
            ValueError: an argument out of range, an unknown sampler, or levels that do not decrease.
            TypeError: an option that the sampler does not have, or a seed or first sample that is no whole number.
        """
        if count < 1 or (batch_size is not None and batch_size < 1):
            raise ValueError(f"sample: count and batch_size must be at least 1, got {count} and {batch_size}")
        if isinstance(self.preconditioning, Flow) and sampler_options.get("s_churn"):
            raise ValueError("sample: s_churn raises levels, and the highest one of a flow is 1")
        seed, first_sample = operator.index(seed), operator.index(first_sample)
        labels = self._labels(class_labels, count, first_sample)
        function, levels = self._plan(sampler, steps, timesteps, grid_steps, sigmas)
        _check_options(function, sampler_options)
        batch_size = min(batch_size or count, count)
        starts: Any = range(0, count, batch_size)
        if progress and batch_size < count:
            from tqdm.auto import tqdm

            starts, progress = tqdm(starts, desc="sampling", unit="batch"), False
        # An accelerated network may have batches made at once: cmfast/replay.py.
        replayed = getattr(getattr(self.unet, "_compiled_call_impl", None), "replayed", None)
        batches = []
        with in_eval_mode(self):
            for start in starts:
                size = min(batch_size, count - start)
                noise = GaussianNoise(seed, first_sample + start)
                batch_labels = None if labels is None else labels[start : start + size]
                batch = (function, levels, size, noise, batch_labels, clip)
                options = {"callback": callback, "progress": progress, **sampler_options}
                samples = None if replayed is None else replayed(self, *batch, **options)
                batches.append(self._sample_batch(*batch, **options) if samples is None else samples)
        return torch.cat(batches) if len(batches) > 1 else batches[0]

    def _sample_batch(
        self,
        function: Callable[..., Tensor],
        levels: Sequence[float],
        size: int,
        noise: NoiseFunction,
        labels: Tensor | None,
        clip: Clip = "model",
        **options: Any,
    ) -> Tensor:
        """A batch of `size` samples, from the noise to the sampler's last step; the options are the sampler's.

        On a GPU it has no synchronisation and draws nothing on the host. Where the noise is a GaussianNoise whose seed
        and first sample are tensors, the samples are a function of these, the labels [size] and the weights: all of it
        is device data.
        """
        zero = torch.zeros((size, *self.sample_shape), dtype=self.state_dtype, device=self.device)
        denoiser, p = self.denoiser(labels, clip), self.preconditioning
        scale = p.initial_scale(levels[0])
        if isinstance(p, TrigFlow) and function not in (sample_multistep, sample_onestep):
            denoiser, scale = dataclasses.replace(denoiser, exploding=True), levels[0]
        return function(denoiser, scale * noise(zero, 0), levels, noise=noise, **options)

    def _network(self, x: Tensor, c_noise: Tensor | float, class_labels: Tensor | None) -> Tensor:
        if not isinstance(c_noise, Tensor):
            c_noise = torch.full(x.shape[:1], c_noise, dtype=self.state_dtype, device=x.device)
        if class_labels is not None and class_labels.dtype not in (torch.int64, torch.int32):
            class_labels = class_labels.to(torch.int64)  # torch's embedding takes these two
        return self.unet(x.to(self.dtype), c_noise, class_labels)

    def _check(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None) -> None:
        if x.ndim != len(self.sample_shape) + 1 or x.shape[1] != self.sample_shape[0] or not x.is_floating_point():
            wanted = ", ".join(str(length) for length in self.sample_shape)
            raise ValueError(f"denoise: expected floating-point x [N, {wanted}], got {list(x.shape)} {x.dtype}")
        if isinstance(sigma, Tensor) and sigma.shape != x.shape[:1]:
            raise ValueError(f"denoise: expected sigma [{x.shape[0]}] or a float, got {list(sigma.shape)}")
        if not isinstance(sigma, Tensor) or (sigma.device.type == "cpu" and plain.is_plain((sigma,))):
            self.preconditioning.check(sigma)  # but no device tensor, which would be waited for
        if class_labels is not None and class_labels.device.type == "cpu":  # a device tensor is not read: no sync
            if class_labels.shape != x.shape[:1] or not _are_integers(class_labels):
                raise ValueError(
                    f"denoise: expected class_labels of {x.shape[0]} integers, got {list(class_labels.shape)} "
                    f"{class_labels.dtype}"
                )
            self._check_labels(class_labels)

    def _check_labels(self, labels: Tensor) -> None:
        if self.num_classes is None:
            raise ValueError("class_labels were given to an unconditional model")
        labels = labels.to(torch.int64)  # in which the number of classes is what it is
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if wrong.numel():
            raise ValueError(f"class_labels must be in 0 … {self.num_classes - 1}, got {int(wrong.flatten()[0])}")

    def _labels(self, given: int | Sequence[int] | Tensor | None, count: int, first_sample: int) -> Tensor | None:
        if given is None:
            if self.num_classes is None:
                return None
            given = [(first_sample + i) % self.num_classes for i in range(count)]
        labels = torch.as_tensor(given)
        labels = labels.repeat(count) if labels.ndim == 0 else labels
        if labels.shape != (count,) or not _are_integers(labels):
            raise ValueError(
                f"class_labels: expected one integer, or {count} of them, got {list(labels.shape)} {labels.dtype}"
            )
        self._check_labels(labels)
        return labels.to(torch.int64).to(self.device, non_blocking=True)  # to a GPU: without waiting for it

    def _plan(
        self,
        sampler: str | None,
        steps: int | None,
        timesteps: Sequence[int] | None,
        grid_steps: int | None,
        sigmas: Sequence[float] | None,
    ) -> tuple[Callable[..., Tensor], list[float]]:
        """The sampler's function and its levels."""
        if sum(option is not None for option in (steps, timesteps, sigmas)) > 1:
            raise ValueError("sample: give one of steps, timesteps and sigmas")
        default_name, default_steps = self.default_sampler
        if sampler is None:
            sampler = "multistep" if timesteps is not None or sigmas is not None else default_name
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
        few = sampler in ("multistep", "onestep")
        p = self.preconditioning
        if sampler not in (suitable := samplers_of(p)):
            raise ValueError(
                f"the sampler {sampler!r} needs levels sigma, which {type(p).__name__} does not have; its samplers are "
                f"{', '.join(suitable)}"
            )
        if grid_steps is not None and (timesteps is None or grid_steps < 1):
            raise ValueError(f"sample: grid_steps is the positive size of the grid of timesteps, got {grid_steps}")
        if sigmas is not None or timesteps is not None:
            given = sigmas if timesteps is None else self._grid_levels(timesteps, grid_steps, few)
            levels = host_levels(given, final_zero=not few)  # type: ignore[arg-type]
            if sampler == "onestep" and len(levels) != 1:
                raise ValueError(f"sample: onestep takes one level, got {levels}")
            if sampler == "progdist" and len(levels) - (levels[-1] == 0.0) < 2:
                raise ValueError(f"sample: progdist takes two levels at least before the final 0, got {levels}")
            return SAMPLERS[sampler], levels
        if steps is None:
            steps = default_steps if sampler == default_name else {"multistep": 1, "onestep": 1}.get(sampler, 18)
        if steps < 1:
            raise ValueError(f"sample: steps must be at least 1, got {steps}")
        if sampler == "onestep" and steps != 1:
            raise ValueError(f"sample: onestep takes one step, got {steps}")
        if few:
            return SAMPLERS[sampler], list(self.recommended_levels.get(steps) or p.levels(steps))
        grid = p.grid(steps + (sampler == "progdist")) if isinstance(p, EDM) else [*p.levels(steps), 0.0]
        return SAMPLERS[sampler], grid

    def _grid_levels(self, timesteps: Sequence[int], grid_steps: int | None, few: bool) -> list[float]:
        if not isinstance(self.preconditioning, EDM):
            raise ValueError("sample: timesteps index a Karras grid, which this preconditioning has not: give sigmas")
        grid_steps = grid_steps or self.preconditioning.num_train_timesteps
        grid = self.preconditioning.grid(grid_steps)
        if not len(timesteps) or any(not 0 <= t < grid_steps for t in timesteps):
            raise ValueError(f"sample: timesteps must be indices in 0 … {grid_steps - 1}, got {tuple(timesteps)}")
        return [grid[t] for t in timesteps] + ([] if few else [0.0])


def _are_integers(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def _check_options(sampler: Callable[..., Tensor], given: Mapping[str, Any]) -> None:
    """Refuse options that a sampler does not have, or that the model gives it."""
    parameters = inspect.signature(sampler).parameters.values()
    its_own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _GIVEN_BY_THE_MODEL]
    for name in given:
        if name not in its_own:
            known = f"its options are {', '.join(its_own)}" if its_own else "it has none"
            of = sampler.__name__.removeprefix("sample_")
            raise TypeError(f"sample: the sampler {of!r} has no option {name!r}: {known}")


_GIVEN_BY_THE_MODEL = ("noise", "callback", "progress", "renoise", "sigma_min")


@dataclasses.dataclass(frozen=True)
class ModelDenoiser:
    """A model's D(x, sigma) with its labels bound: a denoiser function, and a `sampling.protocol.HostDenoiser`."""

    model: ConsistencyModel
    class_labels: Tensor | None
    clip: float | None
    #: At a level, x is x0 + sigma · z, as diffusion samplers have it, which times alpha is a sample of the model's.
    exploding: bool = False

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """D(x, sigma [N])."""
        return self.model.denoise(x, sigma, self.class_labels, clip=self.clip)

    def at(self, x: Tensor, sigma: float) -> Tensor:
        """D(x, sigma) at one level."""
        return self(self.model.preconditioning.renoise(sigma)[0] * x if self.exploding else x, sigma)

    def noising(self, sigma: float) -> tuple[float, float]:
        """(alpha, beta) of `alpha · D + beta · z` at a level, for D of `at`."""
        return self.model.preconditioning.noising(sigma)

    def step(
        self, x: Tensor, sigma: float, sigma_next: float, noise: NoiseFunction, draw: int
    ) -> tuple[Tensor, Tensor]:
        """(D(x, sigma), the sample at sigma_next), in one launch after the network."""
        p = self.model.preconditioning
        a, b, c_in, c_noise = p.coefficients(sigma, sigma_next)
        alpha, beta = p.renoise(sigma_next)
        output = self.model._network(_scaled(x, c_in), c_noise, self.class_labels)
        drawn = noise_arguments(noise, x, draw)
        result = consistency_step(x, output, a, b, clip=self.clip, alpha=alpha, beta=beta, **drawn)
        assert result.sample is not None
        return result.denoised, result.sample


def _scaled(x: Tensor, c_in: Tensor | float) -> Tensor:
    if isinstance(c_in, Tensor):
        c_in = c_in.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    return x * c_in


load = ConsistencyModel.load
