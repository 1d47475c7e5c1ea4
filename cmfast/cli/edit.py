"""`cmfast edit`: change pictures with a consistency model, as a picture of before and after."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..files import check_writable, whole_file
from ..model import ConsistencyModel
from ..noise import GaussianNoise
from ..pictures import grid, read_image
from ..preconditioning import EDM
from ..sampling import editing, karras_sigmas, sample_multistep
from . import options
from .options import integers, kernels_of, load_model, numbers

app = typer.Typer(help="Edit pictures with a consistency model.", no_args_is_help=True, rich_markup_mode=None)

Picture = Annotated[Path, typer.Option("--image", help="A picture of any size and mode that Pillow reads.")]
Out = Annotated[Path, typer.Option("--out", help="Write a PNG: what was given, and beside it the results.")]
Save = Annotated[
    Path | None, typer.Option("--save", help="Write the first result alone, as a PNG as large as the model's.")
]
Class = Annotated[
    str | None, typer.Option("--class", help="The class, or one a result (3,1,4); all in turn by default.")
]
Results = Annotated[int, typer.Option("--count", min=1, help="How many results, each of other noise.")]
Evaluations = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Evaluations of the model: 8 by default, 2 of strokes, else 1."),
]
Levels = Annotated[str | None, typer.Option("--sigmas", help="Instead of steps: the levels, such as 80,20,5,1.")]


@dataclasses.dataclass(frozen=True)
class _Edit:
    """What all edits need: the model and its arguments, and where the results go."""

    model: ConsistencyModel
    labels: Tensor | None
    seed: int
    count: int
    levels: list[float]
    out: Path
    save: Path | None
    backend: str

    def picture(self, path: Path, size: Sequence[int] | None = None, *, nearest: bool = False) -> Tensor:
        """A picture as the model takes it [1, C, H, W], or of another size; what was done to it is printed."""
        channels, *own = self.model.sample_shape
        image, told = read_image(path, 1 if nearest else channels, own if size is None else size, nearest=nearest)
        print(told)
        return image[None].to(self.model.device)

    def run(self, edit: Callable[..., Tensor], *given: Any, shown: Tensor, **settings: Any) -> None:
        """Edit, with the model's noise of the first level, and write the pictures."""
        size, device = (self.count, *self.model.sample_shape), self.model.device
        noise, (_, scale) = GaussianNoise(self.seed), self.model.preconditioning.noising(self.levels[0])
        with torch.no_grad(), kernels_of(self.backend):
            x = scale * noise(torch.zeros(size, device=device), 0)
            denoiser = self.model.denoiser(self.labels)
            self.write(edit(denoiser, *given, x, self.levels, noise=noise, **settings), shown)

    def write(self, results: Tensor, shown: Tensor | None) -> None:
        """Write what was given beside the results, and the first result."""
        from PIL import Image

        results = results.cpu()
        whole = results if shown is None else torch.cat((shown.cpu().expand_as(results[:1]), results))
        pictures = [(self.out, grid(whole, columns=min(len(whole), 8)))]
        if self.save is not None:
            pictures.append((self.save, grid(results[:1], margin=0, smallest=1)))
        for path, pixels in pictures:
            with whole_file(path) as file:
                Image.fromarray(pixels).save(file, format="PNG")
        results_of = f"{len(results)} result{'s' * (len(results) > 1)} of evaluations at {len(self.levels)} levels"
        print(f"{self.out}: {results_of}{'' if shown is None else ', after what was given'}")
        if self.save is not None:
            print(f"{self.save}: the first result")


@app.callback()
def edit() -> None:
    """Edit pictures with a consistency model: what is known of a picture is put back after each evaluation."""


@app.command()
def inpaint(
    image: Picture,
    mask: Annotated[Path, typer.Option(help="A picture: white where the image is kept, black where it is filled in.")],
    out: Out,
    model: options.Model = "digits",
    class_labels: Class = None,
    count: Results = 1,
    steps: Evaluations = None,
    sigmas: Levels = None,
    seed: options.Seed = 0,
    save: Save = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
) -> None:
    """Fill in the part of a picture where the mask is black."""
    task = _prepare(model, class_labels, count, steps, sigmas, seed, out, save, device, dtype, backend)
    known, kept = task.picture(image), task.picture(mask, nearest=True) >= 0
    if kept.all() or not kept.any():
        raise ValueError(f"{mask} is {'white' if kept.all() else 'black'} everywhere: nothing is filled in or kept")
    task.run(editing.inpaint, known, kept, shown=torch.where(kept, known, 0.0))


@app.command()
def colorize(
    image: Picture,
    out: Out,
    model: options.Model = "digits",
    class_labels: Class = None,
    count: Results = 1,
    steps: Evaluations = None,
    sigmas: Levels = None,
    seed: options.Seed = 0,
    save: Save = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
) -> None:
    """Colour a picture: its luma is kept."""
    task = _prepare(model, class_labels, count, steps, sigmas, seed, out, save, device, dtype, backend)
    if task.model.sample_shape[0] != 3:
        raise ValueError(f"colorize needs a model of three channels; {model} has {task.model.sample_shape[0]}")
    known = task.picture(image)
    luma = (known * torch.tensor(editing.LUMA).to(known)[:, None, None]).sum(1, keepdim=True)
    task.run(editing.colorize, luma / sum(editing.LUMA), shown=luma)


@app.command("super-resolve")
def super_resolve(
    image: Picture,
    out: Out,
    factor: Annotated[int, typer.Option(min=2, help="How many times as high and wide the result is.")] = 2,
    model: options.Model = "digits",
    class_labels: Class = None,
    count: Results = 1,
    steps: Evaluations = None,
    sigmas: Levels = None,
    seed: options.Seed = 0,
    save: Save = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
) -> None:
    """Enlarge a picture to the model's size: the means of its patches are kept."""
    task = _prepare(model, class_labels, count, steps, sigmas, seed, out, save, device, dtype, backend)
    spatial = task.model.sample_shape[1:]
    known = task.picture(image, [-(-size // factor) for size in spatial])
    shown = known.repeat_interleave(factor, 2).repeat_interleave(factor, 3)[..., : spatial[0], : spatial[1]]
    task.run(editing.super_resolve, known, shown=shown, factor=factor)


@app.command()
def strokes(
    image: Picture,
    out: Out,
    sigma: Annotated[
        float | None, typer.Option(help="The first level, 2 by default: how far a result may be from the drawing.")
    ] = None,
    model: options.Model = "digits",
    class_labels: Class = None,
    count: Results = 1,
    steps: Evaluations = None,
    sigmas: Levels = None,
    seed: options.Seed = 0,
    save: Save = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
) -> None:
    """Make a picture of a rough drawing."""
    task = _prepare(model, class_labels, count, steps, sigmas, seed, out, save, device, dtype, backend)
    if sigmas is None:
        task = dataclasses.replace(task, levels=_below(task.model, 2.0 if sigma is None else sigma, steps or 2))
    elif sigma is not None:
        raise ValueError("--sigmas are the levels themselves: leave out --sigma")
    known = task.picture(image)
    task.run(editing.edit_strokes, known, shown=known)


@app.command()
def interpolate(
    out: Out,
    model: options.Model = "digits",
    class_labels: Annotated[
        str | None, typer.Option("--class", help="The class, 0 by default, or one a result.")
    ] = None,
    count: Results = 8,
    steps: Evaluations = None,
    sigmas: Levels = None,
    seed: options.Seed = 0,
    to_sample: Annotated[int, typer.Option(min=1, help="Index of the sample of the same seed that is gone to.")] = 1,
    save: Save = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
) -> None:
    """Go from the first sample of a seed to another one, on a sphere of noise; of the class 0 by default."""
    task = _prepare(model, class_labels, count, steps, sigmas, seed, out, save, device, dtype, backend, 1, classes=1)
    _, scale = task.model.preconditioning.noising(task.levels[0])
    zero = torch.zeros((1, *task.model.sample_shape), device=task.model.device)
    first, second = (scale * GaussianNoise(seed, i)(zero, 0)[0] for i in (0, to_sample))
    same = GaussianNoise(seed)  # of one sample, for all
    with torch.no_grad(), kernels_of(backend):
        results = editing.interpolate(
            task.model.denoiser(task.labels),
            first,
            second,
            task.levels,
            weights=[i / max(count - 1, 1) for i in range(count)],
            noise=lambda like, draw: same(torch.zeros_like(like[:1]), draw).expand_as(like),
        )
    task.write(results, None)


@app.command()
def denoise(
    image: Picture,
    out: Out,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the picture's noise, in units of [-1, 1].")],
    model: options.Model = "digits",
    class_labels: Class = None,
    count: Results = 1,
    steps: Evaluations = None,
    seed: options.Seed = 0,
    save: Save = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
) -> None:
    """Take the noise out of a picture."""
    task = _prepare(model, class_labels, count, steps, None, seed, out, save, device, dtype, backend)
    task = dataclasses.replace(task, levels=_below(task.model, sigma, steps or 1))
    known = task.picture(image)

    def of_picture(denoiser: Any, x: Tensor, levels: Sequence[float], **given: Any) -> Tensor:
        # What the noisy picture is multiplied by, in the model's own terms.
        signal, _ = task.model.preconditioning.noising(levels[0])
        return sample_multistep(denoiser, signal * known.expand_as(x), levels, **given)

    task.run(of_picture, shown=known)


def _prepare(
    model: str,
    class_labels: str | None,
    count: int,
    steps: int | None,
    sigmas: str | None,
    seed: int,
    out: Path,
    save: Path | None,
    device: str | None,
    dtype: str,
    backend: str,
    default_steps: int = 8,
    classes: int | None = None,
) -> _Edit:
    """The task of the options; without --class results have the first so many classes in turn, None for all."""
    if sigmas is not None and steps is not None:
        raise ValueError("--sigmas are the levels themselves: leave out --steps")
    for path in (out, save):
        if path is not None:
            if path.suffix.lower() != ".png":
                raise ValueError(f"{path} must end in .png")
            check_writable(path)
    loaded = load_model(model, device, dtype)
    if len(loaded.sample_shape) != 3 or loaded.sample_shape[0] not in (1, 3):
        raise ValueError(f"edit needs a model of pictures [1 or 3, H, W]; {model} has {list(loaded.sample_shape)}")
    labels = None
    if loaded.num_classes is not None:
        given = integers(class_labels, "--class") or list(range(classes or loaded.num_classes))
        if len(given) not in (1, count) and class_labels is not None:
            raise ValueError(f"--class must be one class or {count}, got {class_labels}")
        wrong = [label for label in given if not 0 <= label < loaded.num_classes]
        if wrong:
            raise ValueError(f"--class must be in 0 … {loaded.num_classes - 1}, got {wrong[0]}")
        labels = torch.tensor([given[i % len(given)] for i in range(count)], device=loaded.device)
    elif class_labels is not None:
        raise ValueError(f"--class was given, and {model} has no classes")
    levels = numbers(sigmas, "--sigmas") or loaded.preconditioning.levels(steps or default_steps)
    return _Edit(loaded, labels, seed, count, levels, out, save, backend)


def _below(model: ConsistencyModel, sigma: float, steps: int) -> list[float]:
    """So many levels from this one down: a Karras grid of one more, whose last, sigma_min, would change nothing."""
    p = model.preconditioning
    if not isinstance(p, EDM):
        raise ValueError(f"denoise needs a model whose levels are those of a Karras grid, not {type(p).__name__}'s")
    if not p.sigma_min < sigma <= p.sigma_max:
        raise ValueError(f"--sigma must be above {p.sigma_min:g} and at most {p.sigma_max:g}, got {sigma:g}")
    return karras_sigmas(steps + 1, p.sigma_min, sigma, p.rho)[:steps]
