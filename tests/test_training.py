import copy
import dataclasses
import math

import pytest
import torch

import cmfast
from cmfast import ConsistencyModel, UNet
from cmfast.checkpoints import asset
from cmfast.evaluation import Classifier, load_classifier, nearest_distance
from cmfast.evaluation.classifier import feature_statistics
from cmfast.preconditioning import EDM, Consistency
from cmfast.training import DiffusionTraining, DistillationTraining, distill, recipes, train_diffusion
from cmfast.training.classifier import train_classifier
from cmfast.training.data import Dataset, batches, load_digits
from cmfast.training.distillation import heun_step
from cmfast.training.loop import RunningAverage, average_into, averaged_copy, optimize

from .fixture_files import tiny_config


def test_digits():
    train, test = load_digits()
    assert train.images.shape == (1438, 1, 8, 8)
    assert test.images.shape == (359, 1, 8, 8)
    assert (train.images.min(), train.images.max()) == (-1, 1)
    assert set(train.labels.tolist()) == set(range(10))
    again, _ = load_digits()
    assert torch.equal(again.images, train.images)
    pictures = torch.cat((train.images, test.images)).flatten(1)
    assert len(pictures) == 1797
    assert not (train.images[:, None] == test.images[None, :50]).flatten(2).all(2).any()


def test_batches_go_through_the_data():
    data = Dataset(torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10))
    source = batches(data, 5, torch.Generator().manual_seed(0))
    drawn = [next(source)[1] for _ in range(4)]
    assert sorted(torch.cat(drawn[:2]).tolist()) == list(range(10))
    assert drawn[0].tolist() != drawn[2].tolist()


def test_average():
    model = torch.nn.Linear(2, 2)
    average = averaged_copy(model)
    before = average.weight.clone()
    with torch.no_grad():
        model.weight += 1.0
    average_into(average, model, 0.75)
    torch.testing.assert_close(average.weight, before + 0.25)
    assert not average.weight.requires_grad


def test_running_average_forgets_its_start():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 100.0)
    average = RunningAverage(model, 0.999)
    torch.nn.init.constant_(model.weight, 1.0)
    for _ in range(200):
        average.update(model)
    assert average.model.weight.item() == pytest.approx(1.0, abs=1e-3)


@pytest.fixture(scope="module")
def trained():
    """A teacher of 60 iterations on two blurred classes; enough to see that it learns."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    images = (labels * 1.2 - 0.6).reshape(-1, 1, 1, 1) + 0.1 * torch.randn(64, 1, 8, 8, generator=generator)
    data, losses = Dataset(images, labels), []
    torch.manual_seed(0)
    model = ConsistencyModel(UNet(tiny_config(channel_mult=(1,), attention_resolutions=(), num_classes=2)), EDM())
    settings = DiffusionTraining(iterations=60, batch_size=16, learning_rate=3e-3)
    teacher = train_diffusion(model, data, settings, lambda i, loss: losses.append(loss))
    return teacher, data, losses


def test_diffusion_training_learns(trained):
    teacher, data, losses = trained
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    samples = teacher.sample(8, class_labels=data.labels[:8], steps=6)
    assert ((samples.mean((1, 2, 3)) > 0) == (data.labels[:8] == 1)).all()


def test_distillation_gives_a_one_step_model(trained):
    teacher, data, _ = trained
    losses = []
    settings = DistillationTraining(iterations=25, batch_size=16, ema_decay=0.9)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = distill(teacher, data, settings, lambda i, loss: losses.append(loss))
    assert student.preconditioning == Consistency()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert sum(losses[-5:]) < sum(losses[:5])
    samples = student.sample(8, class_labels=data.labels[:8])
    assert ((samples.mean((1, 2, 3)) > 0) == (data.labels[:8] == 1)).all()


def test_heun_step_is_the_samplers(trained):
    teacher, _, _ = trained
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    with torch.no_grad():
        stepped = heun_step(teacher, x, torch.full((2,), 2.0), torch.full((2,), 1.0), labels)
        expected = cmfast.sampling.sample_heun(teacher.denoiser(labels, clip=None), x, [2.0, 1.0])
    torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-5)


def test_training_is_reproducible(trained):
    _, data, _ = trained

    def weights():
        torch.manual_seed(0)
        config = tiny_config(channel_mult=(1,), attention_resolutions=(), num_classes=2)
        model = ConsistencyModel(UNet(config), EDM())
        return train_diffusion(model, data, DiffusionTraining(iterations=3, batch_size=8)).state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("num_classes", [None, 2])
def test_networks_train_in_training_mode(num_classes):
    """The student alone; the teacher and the target are evaluated as they will be used. Classes are not needed."""
    config = tiny_config(channel_mult=(1,), attention_resolutions=(), num_classes=num_classes)
    model, modes = ConsistencyModel(UNet(config), EDM()).eval(), []
    model.unet.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    teacher = train_diffusion(model, tiny_data(), DiffusionTraining(iterations=2, batch_size=4))
    assert modes == [True, True]
    modes.clear()
    student = distill(teacher, tiny_data(), DistillationTraining(iterations=2, batch_size=4))
    assert modes == [False, False, False, True] * 2
    assert not any(m.training for m in (*teacher.modules(), *student.modules()))
    assert student.sample(1).shape == (1, 1, 8, 8)


def test_the_bundled_models_are_those_of_their_recipe():
    """What the recipe has, defaults included, is what the card says that the bundled weights were made with."""
    recipe = recipes.RECIPES["digits"]
    lines = asset("README.md").read_text().splitlines()
    for name in ("unet", "teacher", "student"):
        fields = dataclasses.asdict(getattr(recipe, name))
        assert f"{name:8} {', '.join(f'{k}={v}' for k, v in fields.items())}" in lines
    assert f"Measured on {recipe.measured_samples} samples of the stored float16 weights, seed 0: accuracy of" in (
        "\n".join(lines)
    )
    levels = "; ".join(", ".join(f"{sigma:g}" for sigma in row) for row in recipe.recommended_levels.values())
    assert f"Levels (sigma) of the consistency model's evaluations: {levels}." in lines
    model = cmfast.load("digits")
    assert model.unet.config == recipe.unet
    assert model.recommended_levels == recipe.recommended_levels


def test_wrong_preconditionings(trained):
    teacher, data, _ = trained
    student = ConsistencyModel(teacher.unet, Consistency())
    with pytest.raises(ValueError, match="EDM"):
        train_diffusion(student, data, DiffusionTraining(iterations=1))
    with pytest.raises(ValueError, match="EDM"):
        distill(student, data, DistillationTraining(iterations=1))


def test_a_recipe_writes_everything(tmp_path):
    recipe = dataclasses.replace(
        recipes.RECIPES["digits"],
        name="short",
        teacher=DiffusionTraining(iterations=2, batch_size=8),
        student=DistillationTraining(iterations=2, batch_size=8),
        classifier_iterations=2,
        measured_samples=10,
    )
    seen = []
    rows = recipes.run(recipe, tmp_path / "out", lambda *event: seen.append(event))
    assert [event[:3] for event in seen] == [
        (stage, i, 2) for stage in ("classifier", "teacher", "student") for i in (1, 2)
    ]
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    folders = [f"{name}/{file}" for name in ("short", "short-teacher") for file in ("config.json", "model.safetensors")]
    assert files == sorted(["README.md", "short-classifier.safetensors", *folders])
    student, teacher = cmfast.load(tmp_path / "out" / "short"), cmfast.load(tmp_path / "out" / "short-teacher")
    assert isinstance(student.preconditioning, Consistency)
    assert teacher.preconditioning == EDM()
    assert student.recommended_levels == recipe.recommended_levels
    load_classifier(tmp_path / "out" / "short-classifier.safetensors")
    assert [(row.sampler, row.evaluations) for row in rows] == [
        *((f"student, {n} step{'s' if n > 1 else ''}", n) for n in (1, 2, 4)),
        *((f"teacher, heun {n}", 2 * n - 1) for n in (5, 8, 10, 18, 40)),
        ("teacher, euler 1", 1),
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"| {row.sampler} | {row.evaluations} | {row.quality.accuracy:.3f} |" in card for row in rows)
    train, _ = load_digits()
    torch.manual_seed(recipe.teacher.seed)  # the networks depend on the recipe's seeds alone
    expected = train_diffusion(ConsistencyModel(UNet(recipe.unet), EDM()), train, recipe.teacher)
    for stored, value in zip(teacher.parameters(), expected.parameters(), strict=True):
        assert torch.equal(stored, value.half().float())
    samples = student.sample(10, class_labels=list(range(10)))
    assert rows[0].nearest == pytest.approx(nearest_distance(samples, train.images))
    assert "iterations=2" in card


def test_a_recipe_finds_out_first_that_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        recipes.run(recipes.RECIPES["digits"], tmp_path / "file")


# --- each loss, step and schedule against one that is written by hand


def tiny_model(preconditioning, seed=0):
    torch.manual_seed(seed)
    sizes = {"channel_mult": (1,), "attention_resolutions": (), "num_classes": 2}
    model = ConsistencyModel(UNet(tiny_config(**sizes)), preconditioning)
    torch.nn.init.normal_(model.unet.out[2].weight, std=0.1)  # it is zero at first: nothing would be learned before it
    return model


def tiny_data(count=12):
    generator = torch.Generator().manual_seed(3)
    return Dataset(torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(count) % 2)


def image(row):
    return row.reshape(-1, 1, 1, 1)


def by_hand(model, loss, learning_rates, clip, after):
    """Adam (Kingma and Ba 2015, algorithm 1) with a learning rate and a bound of the gradient's norm for each step."""
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    losses = []
    for step, rate in enumerate(learning_rates, 1):
        value = loss()
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        factor = 1.0 if clip is None else min(1.0, clip / norm.item())
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * factor * g)
                v.mul_(0.999).add_(0.001 * (factor * g) ** 2)
                p -= rate * (m / (1 - 0.9**step)) / (torch.sqrt(v / (1 - 0.999**step)) + 1e-8)
        losses.append(value.item())
        after(step)
    return losses


def assert_same_weights(found, expected, start):
    """Adam divides gradients that are nearly zero by their size: single weights may differ, the whole may not."""
    a, b, before = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (found, expected, start))
    assert (b - before).norm() > 1e-3
    assert (a - b).norm() < 0.06 * (b - before).norm()


@torch.no_grad()
def mix(average, model, decay):
    for a, m in zip(average.parameters(), model.parameters(), strict=True):
        a.copy_(decay * a + (1 - decay) * m)


def test_diffusion_training_is_that_of_the_paper():
    """Karras et al. 2022, equation 8 and table 1: weights 1 / c_out², levels log-normal."""
    data, count = tiny_data(), 5
    settings = DiffusionTraining(iterations=count, batch_size=4, learning_rate=2e-3, ema_decay=0.1, seed=7)
    losses, model = [], tiny_model(EDM())
    found = train_diffusion(model, data, settings, lambda i, loss: losses.append(loss))

    model = tiny_model(EDM())
    average = averaged_copy(model)
    generator = torch.Generator().manual_seed(7)
    source = batches(data, 4, generator)

    def loss():
        images, labels = next(source)
        sigma = torch.exp(-1.2 + 1.2 * torch.randn(4, generator=generator))
        x = images + image(sigma) * torch.randn(images.shape, generator=generator)
        c_out = sigma * 0.5 / torch.sqrt(sigma**2 + 0.25)
        return (((model.denoise(x, sigma, labels) - images) / image(c_out)) ** 2).mean()

    model.train()
    rates = [2e-3 * 0.5 * (1 + math.cos(math.pi * i / count)) for i in range(count)]
    expected = by_hand(model, loss, rates, None, lambda u: mix(average, model, min(0.1, u / (u + 10))))
    assert losses == pytest.approx(expected, rel=5e-3)
    assert_same_weights(found, average, tiny_model(EDM()))


def test_distillation_is_that_of_the_paper():
    """Song et al. 2023, algorithm 2; the pseudo-Huber distance of Song and Dhariwal 2024, equation 7 (c = 0.03 √d)."""
    data, count = tiny_data(), 6
    settings = DistillationTraining(
        iterations=count,
        batch_size=4,
        learning_rate=1e-3,
        linear_tail=0.7,
        grid_steps=5,
        target_ema_decay=0.6,
        ema_decay=0.8,
        huber_c=0.03,
        gradient_clip=0.05,
        seed=7,
    )
    teacher = tiny_model(EDM(), seed=1).eval().requires_grad_(False)
    losses = []
    found = distill(teacher, data, settings, lambda i, loss: losses.append(loss))

    student = ConsistencyModel(averaged_copy(teacher.unet), Consistency()).requires_grad_(True).train()
    target, average = averaged_copy(student), averaged_copy(student)
    generator = torch.Generator().manual_seed(7)
    source = batches(data, 4, generator)
    low, high, rho = 0.002, 80.0, 7.0
    grid = [(low ** (1 / rho) + i / 4 * (high ** (1 / rho) - low ** (1 / rho))) ** rho for i in range(5)]

    def loss():
        images, labels = next(source)
        lower = torch.randint(4, (4,), generator=generator)
        t, s = (torch.tensor([grid[i + more] for i in lower.tolist()]) for more in (0, 1))
        x = images + image(s) * torch.randn(images.shape, generator=generator)
        with torch.no_grad():
            slope = (x - teacher.denoise(x, s, labels)) / image(s)
            euler = x + image(t - s) * slope
            slope = (slope + (euler - teacher.denoise(euler, t, labels)) / image(t)) / 2
            wanted = target.denoise(x + image(t - s) * slope, t, labels)
        squares = ((student.denoise(x, s, labels) - wanted) ** 2).sum((1, 2, 3))
        c = 0.03 * math.sqrt(64)
        return (torch.sqrt(squares + c**2) - c).mean()

    def after(_):
        mix(target, student, 0.6)
        mix(average, student, 0.8)

    rates = [1e-3 * min(1.0, (1 - i / count) / 0.7) for i in range(count)]
    expected = by_hand(student, loss, rates, 0.05, after)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert_same_weights(found, average, teacher)


def test_classifier_training_is_adams_on_shifted_images():
    """Cross entropy with smoothed labels (Szegedy et al. 2016, section 7), the learning rate falling to 0 linearly."""
    data, test, count = tiny_data(300), tiny_data(20), 4
    losses = []
    torch.manual_seed(99)
    found = train_classifier(data, test, iterations=count, progress=lambda i, loss: losses.append((i, loss)))

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    classifier = Classifier(1, 8, 2).train()
    start = copy.deepcopy(classifier)
    source = batches(data, 128, generator)

    def loss():
        images, labels = next(source)
        down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
        logits = classifier(torch.roll(torch.roll(images, down, 2), right, 3)).log_softmax(1)
        smooth = 0.95 * torch.nn.functional.one_hot(labels, 2) + 0.05 / 2
        return -(smooth * logits).sum(1).mean()

    rates = [1e-3 * (1 - i / count) for i in range(count)]
    expected = by_hand(classifier, loss, rates, None, lambda step: None)
    assert [i for i, _ in losses] == list(range(count))
    assert [value for _, value in losses] == pytest.approx(expected, rel=1e-3)
    assert_same_weights(found, classifier, start)
    assert not found.training
    assert all(torch.equal(p, p.half().float()) for p in found.parameters())  # as they are stored
    for name, images in (("train", data.images), ("test", test.images)):
        for stored, value in zip(found.statistics(name), feature_statistics(found.features(images)), strict=True):
            torch.testing.assert_close(stored, value.float())
    other = train_classifier(data, test, iterations=1, seed=1)
    assert not torch.equal(other.conv1.weight, train_classifier(data, test, iterations=1).conv1.weight)


def test_the_schedule_begins_with_the_whole_rate():
    """`schedule` is asked for the fractions 0, 1/n, …; `progress` is told each update; None clips nothing."""
    parameter = torch.nn.Parameter(torch.tensor([0.0]))
    model = torch.nn.ParameterList([parameter])
    seen, values = [], []
    for clip in (None, 0.5):
        parameter.data.zero_()
        optimize(
            model,
            lambda: 3 * parameter.sum(),
            iterations=4,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            schedule=lambda fraction: 1 - fraction,
            clip=clip,
            after_step=lambda: values.append(parameter.item()),
            progress=lambda i, loss: seen.append(i),
        )
    assert values == pytest.approx([-3, -5.25, -6.75, -7.5, -0.5, -0.875, -1.125, -1.25], rel=1e-5)
    assert seen == [0, 1, 2, 3] * 2


def test_updates_of_an_average_weigh_less_and_less():
    """Update u has the decay u / (u + 10), at most the one that was asked for."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 0.0)
    average = RunningAverage(model, 0.15)
    torch.nn.init.constant_(model.weight, 1.0)
    left = 1.0
    for decay in (1 / 11, 0.15, 0.15):  # 2 / 12 is more
        average.update(model)
        left *= decay
        assert average.model.weight.item() == pytest.approx(1 - left)


def test_a_batch_that_is_not_whole_is_left_out():
    data = Dataset(torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10))
    source = batches(data, 4, torch.Generator().manual_seed(0))
    drawn = [next(source) for _ in range(6)]
    assert all(len(images) == len(labels) == 4 for images, labels in drawn)
    assert all(torch.equal(images.flatten(), labels.float()) for images, labels in drawn)
    for i in (0, 2, 4):
        assert len({*drawn[i][1].tolist(), *drawn[i + 1][1].tolist()}) == 8
    assert len(next(batches(data, 10, torch.Generator()))[1]) == 10
    for size in (0, 11):
        with pytest.raises(ValueError, match=rf"batch_size in 1 … 10, the data's length, got {size}"):
            next(batches(data, size, torch.Generator()))
    source = batches(data, 5, torch.Generator().manual_seed(0))
    assert sorted([*next(source)[1].tolist(), *next(source)[1].tolist()]) == list(range(10))
