import dataclasses
import json
import math

import pytest
import torch

from cmfast import ConsistencyModel, preconditioning, sampling
from cmfast.noise import GaussianNoise
from cmfast.sampling import editing

from ..fixture_files import tensors, tiny_unet

DATA, METADATA = tensors("editing")
SIGMAS = sampling.karras_sigmas(int(METADATA["steps"]))
LEVELS = [SIGMAS[i] for i in json.loads(METADATA["ts"])[:-1]]  # after the last of these no noise is added


def denoiser(x, sigma):
    """The exact denoiser of Gaussian data with mean mu and standard deviation sd."""
    s = sigma.reshape(-1, *(1,) * (x.ndim - 1))
    return (DATA["sd"] ** 2 * x + s**2 * DATA["mu"]) / (DATA["sd"] ** 2 + s**2)


def recorded(name):
    return lambda like, draw: DATA[f"{name}.noise"][draw - 1]


def rough(x, sigma):
    """A denoiser of any samples, whose results are beyond [-1, 1] too."""
    return 1.5 * torch.sin(x + sigma.reshape(-1, *(1,) * (x.ndim - 1)))


@pytest.mark.parametrize("known", ["superres.input", "images"])
def test_super_resolution_of_the_published_code(known):
    """Of the small picture, and of the large one whose patches' means it has."""
    given = DATA[known] if known == "images" else DATA[known][..., ::8, ::8]
    found = editing.super_resolve(denoiser, given, DATA["x_T"], LEVELS, factor=8, noise=recorded("superres"))
    assert (found - DATA["superres.out"]).abs().max() < 1e-5


@pytest.mark.parametrize("known", ["colorization.input", "images"])
def test_colorization_of_the_published_code(known):
    found = editing.colorize(denoiser, DATA[known], DATA["x_T"], LEVELS, noise=recorded("colorization"))
    assert (found - DATA["colorization.out"]).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(2, 3, 10), (2, 1, 7, 9), (1, 4, 3, 6, 5)], ids=["audio", "images", "video"])
def test_what_is_known_is_kept_exactly(shape):
    known, x = torch.randn(shape), 80 * torch.randn(shape)
    kept = torch.rand(shape[2:]) < 0.5
    known[..., ~kept] = float("nan")
    found = editing.inpaint(rough, known[:1], kept, x, LEVELS, noise=GaussianNoise(3))
    assert torch.equal(found[..., kept], known[:1].expand(shape)[..., kept])
    assert (found[..., ~kept].abs() <= 1).all()
    other = editing.inpaint(rough, known[:1], kept.float(), x, LEVELS, noise=GaussianNoise(4))
    assert not torch.equal(other[..., ~kept], found[..., ~kept])


@pytest.mark.parametrize(("shape", "factor"), [((2, 3, 10), 4), ((2, 1, 7, 9), 3), ((1, 4, 3, 6, 5), 2)])
def test_means_of_patches_are_kept_where_the_factor_divides_no_size(shape, factor):
    x = 80 * torch.randn(shape)
    small = 0.1 * torch.randn(*shape[:2], *(-(-size // factor) for size in shape[2:]))
    found = editing.super_resolve(rough, small, x, LEVELS, factor=factor, noise=GaussianNoise(0))
    for position in torch.cartesian_prod(*(torch.arange(size) for size in small.shape[2:])).reshape(-1, len(shape) - 2):
        patch = (..., *(slice(factor * p, factor * (p + 1)) for p in position.tolist()))
        torch.testing.assert_close(found[patch].flatten(2).mean(2), small[(..., *position.tolist())], atol=1e-5, rtol=0)


def test_a_grey_picture_keeps_its_luma():
    grey, x = 0.3 * torch.randn(1, 1, 5, 6), 80 * torch.randn(2, 3, 5, 6)
    found = editing.colorize(rough, grey, x, LEVELS, noise=GaussianNoise(0))
    luma = torch.tensor(editing.LUMA).reshape(3, 1, 1)
    torch.testing.assert_close((found * luma).sum(1), (grey * luma).sum(1).expand(2, 5, 6))
    assert (found.amax(1) - found.amin(1)).mean() > 0.1


def test_drawings_start_from_their_first_level():
    drawing, x = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 4, 4)
    found = editing.edit_strokes(rough, drawing, x, [2.0, 0.5], noise=GaussianNoise(1))
    assert torch.equal(found, sampling.sample_multistep(rough, drawing + x, [2.0, 0.5], noise=GaussianNoise(1)))
    flow = preconditioning.Flow()
    found = editing.edit_strokes(rough, drawing, 0.6 * x, [0.6], renoise=flow.renoise)
    torch.testing.assert_close(found, rough(0.4 * drawing + 0.6 * x, torch.full((2,), 0.6)))


def test_interpolation_is_on_a_sphere():
    first, second = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    path = editing.between(first, second, [0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(path[[0, 3]], torch.stack((first, second)))
    angle = torch.arccos((first * second).sum() / first.norm() / second.norm())
    turned = torch.arccos((path[0] * path[1]).sum() / path[0].norm() / path[1].norm())
    normal = editing.between(first / first.norm(), second / second.norm(), [0.25])
    torch.testing.assert_close(normal.norm(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(torch.arccos((normal[0] * first).sum() / first.norm()), 0.25 * angle)
    assert turned < angle
    torch.testing.assert_close(editing.between(first, 3 * first, [0.5]), 2 * first[None])
    x = editing.interpolate(rough, first, second, [80.0], weights=[0.0, 1.0])
    torch.testing.assert_close(x, rough(torch.stack((first, second)), torch.full((2,), 80.0)))


@pytest.mark.parametrize("scheme", [preconditioning.Consistency(), preconditioning.LatentConsistency()])
def test_models_and_latents(scheme):
    """With a model's own noise and renoising the result is that of steps written out; latents are not clipped."""
    channels = 4 if isinstance(scheme, preconditioning.LatentConsistency) else 1
    unet = tiny_unet(in_channels=channels, out_channels=channels)
    model, labels = ConsistencyModel(unet, scheme), torch.tensor([3, 5])
    levels, noise, clip = scheme.levels(3), GaussianNoise(7), None if channels == 4 else 1.0
    x = scheme.initial_scale(levels[0]) * noise(torch.zeros(2, channels, 8, 8), 0)
    known, kept = 2 * torch.randn(2, channels, 8, 8), torch.rand(8, 8) < 0.5
    given = {"noise": noise, "clip": clip, "renoise": scheme.renoise}
    with torch.no_grad():
        found = editing.inpaint(model.denoiser(labels, clip), known, kept, x, levels, **given)
        for i, level in enumerate(levels):
            denoised = torch.where(kept, known, model.denoise(x, level, labels, clip=clip))
            if i < 2:
                alpha, beta = scheme.renoise(levels[i + 1])
                x = alpha * denoised + beta * noise(x, i + 1)
    torch.testing.assert_close(found, denoised)
    assert (found.abs().max() > 1) or clip


@pytest.mark.parametrize(
    "scheme",
    [
        preconditioning.TrajectoryConsistency(),
        preconditioning.LatentConsistency(),
        preconditioning.TrigFlow(),
        preconditioning.Flow(),
        preconditioning.Consistency(sigma_min=0.1),
    ],
    ids=lambda scheme: type(scheme).__name__,
)
def test_a_model_says_how_its_samples_are_renoised(scheme):
    """Where nothing is known, an edit is multistep sampling by full estimates, each noised as the scheme has it."""
    unet = tiny_unet(in_channels=1, out_channels=1, num_classes=None)
    model, levels, noise = ConsistencyModel(unet, scheme), scheme.levels(3), GaussianNoise(7)
    x = first = scheme.initial_scale(levels[0]) * noise(torch.zeros(2, 1, 8, 8), 0)
    with torch.no_grad():
        nothing = torch.zeros(8, 8)
        found = editing.inpaint(model.denoiser(clip=None), first, nothing, first, levels, noise=noise, clip=None)
        for i, level in enumerate(levels):
            denoised = model.denoise(x, level)
            if i < 2:
                alpha, beta = (
                    dataclasses.replace(scheme, eta=1.0).renoise(levels[i + 1])
                    if hasattr(scheme, "eta")
                    else scheme.renoise(levels[i + 1])
                )
                x = alpha * denoised + beta * noise(x, i + 1)
        torch.testing.assert_close(found, denoised)
        drawn = editing.edit_strokes(model.denoiser(clip=None), 0 * first, first, levels, noise=noise)
        expected = model.sample(2, sigmas=levels, seed=7, clip=None)
    torch.testing.assert_close(drawn, expected)


def test_the_least_level_is_the_callers_to_say():
    model = ConsistencyModel(tiny_unet(in_channels=1, out_channels=1, num_classes=None))
    x, noise = 80 * torch.randn(1, 1, 8, 8), GaussianNoise(0)
    with torch.no_grad():
        found = sampling.sample_multistep(model.denoiser(), x, [80.0, 1.0], noise=noise, sigma_min=0.9)
        clean = model.denoise(x, 80.0, clip=1.0)
        expected = model.denoise(clean + math.sqrt(1 - 0.81) * noise(x, 1), 1.0, clip=1.0)
    torch.testing.assert_close(found, expected)


def test_nothing_lies_on_a_line_with_all():
    """Of zeros there is no angle to other noise: what is between them is its share."""
    first, second = torch.zeros(1, 4, 4), torch.randn(1, 4, 4)
    torch.testing.assert_close(editing.between(first, second, [0.0, 0.25]), torch.stack((first, 0.25 * second)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_videos_of_half_precision(dtype):
    x, small = torch.randn(1, 1, 4, 6, 5).to(dtype), (0.1 * torch.randn(1, 1, 2, 3, 3)).to(dtype)
    bent = lambda x, sigma: 1.5 * torch.sin(x)  # noqa: E731
    found = editing.super_resolve(bent, small, x, [1.0], factor=2)
    assert found.dtype == dtype
    exact = editing.super_resolve(bent, small.float(), x.float(), [1.0], factor=2)
    torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0.02)


def test_steps_are_reported():
    seen = []
    x, known = 80 * torch.randn(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    editing.inpaint(rough, known, torch.ones(4, 4), x, LEVELS, callback=seen.append)
    assert [step["i"] for step in seen] == [0, 1, 2]
    assert all((step["denoised"] == 0).all() for step in seen)


X = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda: editing.inpaint(rough, X[:, :1, :4], X[0, 0] > 0, X, [1.0]), r"known.*\[2, 3, 8, 8\].*\[2, 1, 4, 8\]"),
        (lambda: editing.inpaint(rough, X, torch.ones(3, 5), X, [1.0]), r"mask.*\[3, 5\]"),
        (lambda: editing.inpaint(rough, X, X[0, 0], X, [1.0]), "other values"),
        (lambda: editing.colorize(rough, X, X[:, :2], [1.0]), "2 channels"),
        (lambda: editing.super_resolve(rough, X, X, [1.0], factor=1), "at least 2, got 1"),
        (lambda: editing.super_resolve(rough, X, X, [1.0], factor=2.5), "a whole number of at least 2, got 2.5"),
        (lambda: editing.super_resolve(rough, X, X, [1.0], factor=math.nan), "a whole number of at least 2, got nan"),
        (lambda: editing.super_resolve(rough, X, X, [1.0], factor=2, clip=-1.0), "a positive bound, or None, got -1.0"),
        (lambda: editing.inpaint(rough, X, X[0, 0] > 0, X, [1.0], clip=math.nan), "a positive bound, or None, got nan"),
        (lambda: editing.inpaint(rough, X, X[0, 0] > 0, X, [1.0], sigma_min=math.nan), "sigma_min must be .* got nan"),
        (lambda: editing.colorize(rough, X, X, [1.0], clip=0), "a positive bound, or None, got 0"),
        (lambda: editing.colorize(rough, X, X, [1.0], weights=(0, 0, 0)), r"finite, and not all 0, got \(0, 0, 0\)"),
        (lambda: editing.colorize(rough, X, X, [1.0], weights=(1, 1, math.nan)), r"finite, .* got \(1, 1, nan\)"),
        (lambda: editing.colorize(rough, X, X, [1.0], weights=(1, math.inf, 0)), r"finite, .* got \(1, inf, 0\)"),
        (lambda: editing.interpolate(rough, X[0], X[1], [1.0], weights=[math.nan]), r"weights must be finite, got"),
        (lambda: editing.super_resolve(rough, X[..., :3], X, [1.0], factor=2), r"\[2, 3, 8, 8\] or .*\[2, 3, 4, 4\]"),
        (lambda: editing.interpolate(rough, X[0], X[1, :2], [1.0], weights=[0.5]), "one shape"),
        (lambda: editing.interpolate(rough, X[0], X[1], [1.0], weights=[]), "0 weights"),
        (lambda: editing.edit_strokes(rough, X, X, [1.0, 2.0]), "must decrease"),
    ],
)
def test_errors_say_what_was_expected(edit, message):
    with pytest.raises(ValueError, match=message):
        edit()
