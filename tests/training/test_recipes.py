import dataclasses
import shutil

import pytest
import torch

import cmfast
from cmfast import ConsistencyModel, UNet
from cmfast.checkpoints import BUNDLED, asset
from cmfast.evaluation import load_classifier, nearest_distance
from cmfast.preconditioning import EDM, Consistency
from cmfast.training import load_digits, recipes
from cmfast.training.classifier import train_classifier


@pytest.mark.parametrize("name", sorted(recipes.RECIPES.keys() & set(BUNDLED)))
def test_the_bundled_models_are_those_of_their_recipe(name):
    """What the recipe has, defaults included, is what the card says that the bundled weights were made with."""
    recipe = recipes.RECIPES[name]
    lines = asset(f"{name}/README.md").read_text().splitlines()
    parts = {"unet": [dataclasses.asdict(recipe.unet)]}
    for part in ("teacher", "student"):
        stage = getattr(recipe, part)
        parts[part] = [dataclasses.asdict(stage.settings), stage.loop.of_the_weights()]
    for part, fields in parts.items():
        listed = "; ".join(", ".join(f"{k}={v}" for k, v in group.items()) for group in fields)
        method = "" if part == "unet" else f"{getattr(recipe, part).method}: "
        assert f"{part:8} {method}{listed}" in lines
    assert f"Measured on {recipe.measured_samples} samples of the stored float16 weights, seed 0: accuracy of" in (
        "\n".join(lines)
    )
    levels = "; ".join(", ".join(f"{sigma:g}" for sigma in row) for row in recipe.recommended_levels.values())
    assert f"Levels (sigma) of the consistency model's evaluations: {levels}." in lines
    model, teacher = cmfast.load(name), cmfast.load(f"{name}-teacher")
    assert model.unet.config == teacher.unet.config == recipe.unet
    assert model.recommended_levels == recipe.recommended_levels
    assert f"{name}-teacher" in BUNDLED
    load_classifier(name)


def shortened(stage):
    return dataclasses.replace(stage, loop=dataclasses.replace(stage.loop, iterations=2, batch_size=8))


def test_a_recipe_writes_everything(tmp_path):
    digits = recipes.RECIPES["digits"]
    recipe = dataclasses.replace(
        digits,
        name="short",
        teacher=shortened(digits.teacher),
        student=shortened(digits.student),
        classifier_iterations=2,
        measured_samples=10,
    )
    seen = []
    rows = recipes.run(recipe, tmp_path / "out", progress=lambda *event: seen.append(event))
    assert [event[:3] for event in seen] == [
        (stage, i, 2) for stage in ("classifier", "teacher", "student") for i in (1, 2)
    ]
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    folders = [f"{name}/{file}" for name in ("short", "short-teacher") for file in ("config.json", "model.safetensors")]
    assert [file for file in files if not file.startswith("runs/")] == sorted(
        ["short/README.md", "short-classifier.safetensors", *folders]
    )
    assert {"runs/teacher/log.csv", "runs/student/log.csv"} <= set(files)
    student, teacher = cmfast.load(tmp_path / "out" / "short"), cmfast.load(tmp_path / "out" / "short-teacher")
    assert isinstance(student.preconditioning, Consistency)
    assert teacher.preconditioning == EDM()
    assert student.recommended_levels == recipe.recommended_levels
    load_classifier(tmp_path / "out" / "short-classifier.safetensors")
    assert [(row.sampler, row.evaluations) for row in rows] == [
        *((f"student, {n} step{'s' if n > 1 else ''}", n) for n in (1, 2, 4)),
        *((f"teacher, heun {n}", 2 * n - 1) for n in (5, 8, 10, 18, 40)),
        ("teacher, euler 1", 1),
        ("the real test set", 0),
    ]
    card = (tmp_path / "out" / "short" / "README.md").read_text()
    assert all(
        f"| {row.sampler} | {row.evaluations or ''} | {row.quality.accuracy:.3f} | {row.second_accuracy:.3f} |" in card
        for row in rows
    )
    train, _ = load_digits()
    torch.manual_seed(recipe.teacher.loop.seed)  # the networks depend on the recipe's seeds alone
    expected = recipes.train_stage(recipe.teacher, ConsistencyModel(UNet(recipe.unet), EDM()), train)
    for stored, value in zip(teacher.parameters(), expected.parameters(), strict=True):
        assert torch.equal(stored, value.half().float())
    samples = student.sample(10, class_labels=list(range(10)))
    assert rows[0].nearest == pytest.approx(nearest_distance(samples, train.images))
    assert "iterations=2" in card


def test_a_recipe_trains_the_classifier_that_its_loss_compares_by(tmp_path):
    """One of a third seed, kept with the logs; it goes on with it as well."""
    digits = recipes.RECIPES["digits"]
    settings = dataclasses.replace(digits.student.settings, features="layers.safetensors")
    recipe = dataclasses.replace(
        digits,
        teacher=shortened(digits.teacher),
        student=dataclasses.replace(shortened(digits.student), settings=settings),
        classifier_iterations=2,
        measured_samples=10,
    )
    stages = []
    expected = recipes.run(recipe, tmp_path, progress=lambda stage, *_: stages.append(stage))
    assert stages[::2] == stages[1::2] == ["classifier", "teacher", "features", "student"]
    compared = load_classifier(tmp_path / "runs" / "layers.safetensors")
    train, test = load_digits()
    third = train_classifier(train, test, iterations=2, seed=2)
    assert torch.equal(compared.conv1.weight, third.conv1.weight)
    assert "features=layers.safetensors" in (card := (tmp_path / "digits" / "README.md").read_text())
    assert "by the layers of a third classifier" in card
    shutil.rmtree(tmp_path / "digits")
    (tmp_path / "digits").mkdir()
    assert recipes.run(recipe, tmp_path, resume=True) == expected


def test_a_recipe_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    """Killed in the student's training, it takes the classifier and the teacher that are there, and gives the same."""
    digits = recipes.RECIPES["digits"]
    recipe = dataclasses.replace(
        digits,
        teacher=shortened(digits.teacher),
        student=shortened(digits.student),
        classifier_iterations=2,
        measured_samples=10,
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = recipes.run(recipe, whole)
    stages = []

    def kill(stage, done, total, loss):
        stages.append(stage)
        if (stage, done) == ("student", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipes.run(recipe, killed, progress=kill)
    assert stages == ["classifier", "classifier", "teacher", "teacher", "student"]
    assert not (killed / "digits").exists() or not any((killed / "digits").iterdir())
    del stages[:]
    found = recipes.run(recipe, killed, resume=True, progress=lambda stage, *_: stages.append(stage))
    assert set(stages) == {"student"}
    assert found == expected
    for name in ("digits/model.safetensors", "digits-teacher/model.safetensors", "digits-classifier.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(FileExistsError, match="resume"):
        recipes.run(recipe, killed)
    shutil.rmtree(killed / "runs")  # the models alone are enough for the card
    assert recipes.run(recipe, killed, resume=True) == expected
    card = (killed / "digits" / "README.md").read_text()
    assert "The teacher took a time that no log tells and the student a time that no log tells, by" in card


def test_a_recipe_finds_out_first_that_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        recipes.run(recipes.RECIPES["digits"], tmp_path / "file")
