"""The bundled models beside the digits: sound, clothes, and video."""

import math

import pytest
import torch

import cmfast
from cmfast.checkpoints import asset
from cmfast.evaluation import evaluate, load_classifier
from cmfast.training import recipes
from cmfast.training.data import drums

from .engine.networks import error, exact

NAMES = ("drums", "fashion", "moving-digits")
BYTES = {"drums": 4_000_000, "fashion": 8_000_000, "moving-digits": 4_000_000}


@pytest.mark.parametrize("name", NAMES)
def test_they_are_those_of_their_recipes(name):
    """Licence, what is of sound alone, and size; tests/training/test_recipes.py compares the card and the settings."""
    recipe, student, teacher = recipes.RECIPES[name], cmfast.load(name), cmfast.load(f"{name}-teacher")
    assert f"Licence of the data: {recipe.licence}." in asset(f"{name}/README.md").read_text()
    assert student.representation == teacher.representation == recipe.representation
    assert teacher.preconditioning == recipe.preconditioning
    files = [*asset(name).rglob("*"), *asset(f"{name}-teacher").rglob("*")]
    assert sum(file.stat().st_size for file in files) <= BYTES[name]


@pytest.mark.parametrize(
    ("name", "count", "accuracy"), [("drums", 80, 0.9), ("fashion", 400, 0.85), ("moving-digits", 100, 0.9)]
)
@pytest.mark.parametrize("steps", [1, 2])
def test_they_are_recognised(name, count, accuracy, steps):
    model = cmfast.load(name)
    labels = torch.arange(count) % model.num_classes
    quality = evaluate(model.sample(count, steps=steps, batch_size=50), labels, load_classifier(name))
    assert quality.accuracy >= accuracy


def test_their_classifiers_know_real_samples():
    hits = torch.cat([drums.synthesise(name, 10, torch.Generator().manual_seed(9)) for name in drums.CLASSES])
    labels = torch.arange(8).repeat_interleave(10)
    assert evaluate(drums.REPRESENTATION.encode(hits), labels, load_classifier("drums")).accuracy >= 0.95
    noise = torch.randn(80, 1, 8192) * torch.linspace(0.1, 0.9, 8192)  # louder and louder
    assert evaluate(drums.REPRESENTATION.encode(noise), labels, load_classifier("drums-teacher")).accuracy < 0.3


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_evaluates_them(name):
    model = cmfast.load(name)
    x, labels = torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 5])
    inputs = [x, torch.tensor([-300.0, 1000.0]), labels]
    fast = cmfast.accelerate(model)
    with torch.no_grad():
        assert error(fast.unet(*inputs), exact(model.unet, inputs)) < 1e-5
    assert (fast.sample(2, seed=3) - model.sample(2, seed=3)).abs().max() < 1e-4


@torch.no_grad()
def test_students_know_all_levels():
    """Also those between the ones that a grid of its training has: what was noised there looks like what it was."""
    for name in (
        "digits",
        "drums",
        "fashion",
    ):  # of moving digits, whose frames have ghosts, noise leaves what is right
        model, generator = cmfast.load(name), torch.Generator().manual_seed(0)
        labels = torch.arange(40) % (model.num_classes or 1)
        images = model.sample(40, class_labels=labels)
        noise = torch.randn(images.shape, generator=generator)
        least = 0.02 * model.preconditioning.sigma_data
        for sigma in torch.logspace(math.log10(least), math.log10(model.preconditioning.sigma_max), 27):
            found = model.denoise(images + sigma * noise, torch.full((40,), sigma.item()), labels)
            assert found.std().item() == pytest.approx(images.std().item(), rel=0.1), f"{name} at {sigma:.3f}"
