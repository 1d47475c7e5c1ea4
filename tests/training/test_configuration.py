import dataclasses
import re
import typing
from pathlib import Path

import pytest
import torch

import cmfast
from cmfast import UNet, UNetConfig
from cmfast.accelerate import accelerated_networks
from cmfast.evaluation.classifier import Classifier, save_classifier
from cmfast.preconditioning import EDM, Consistency, Flow
from cmfast.training import Dataset, LoopSettings, configuration, configured
from cmfast.training.configuration import Configuration, DataSettings, assignment, coerce, parse, set_values
from cmfast.training.methods import METHODS

DATA = Dataset(torch.zeros(6, 1, 8, 8), torch.arange(6) % 3)
TINY = {"model_channels": 32, "channel_mult": [1], "num_res_blocks": 1}


def made(data=DATA, **content):
    content = {"method": {"name": "diffusion"}, "data": {"path": "x"}, "network": TINY, **content}
    return configured.make(parse(content), data).method


def test_a_file_says_everything(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("""
        network: {model_channels: 32, channel_mult: [1, 2.0], num_classes: null}
        preconditioning: {type: EDM, sigma_data: 1}
        method: {name: diffusion, log_sigma_std: 1e0}
        loop: {iterations: 1e3, learning_rate: 1e-4, betas: [0, 0.99], ema_decays: [], gradient_clip: 1}
        data: {path: somewhere, size: 32}
        init_from: digits-teacher
    """)
    found = parse(configuration.read(path))
    assert found == Configuration(
        method={"name": "diffusion", "log_sigma_std": "1e0"},
        data=DataSettings("somewhere", size=32),
        loop=LoopSettings(iterations=1000, learning_rate=1e-4, betas=(0.0, 0.99), ema_decays=(), gradient_clip=1.0),
        network={"model_channels": 32, "channel_mult": [1, 2.0], "num_classes": None},
        preconditioning={"type": "EDM", "sigma_data": 1},
        init_from="digits-teacher",
    )
    assert isinstance(found.loop.gradient_clip, float)
    path.write_text(configuration.text(found))
    assert parse(configuration.read(path)) == found


def test_the_example_is_one():
    content = configuration.read(Path(__file__).parents[2] / "examples" / "training.yaml")
    found = configured.make(parse(content), DATA._replace(images=torch.zeros(6, 3, 32, 32)))
    assert found.configuration.loop.learning_rate == 2e-4
    assert found.method.model.unet.config.channels == (64, 128, 128)


def test_values_are_set_over_those_of_the_file():
    content = {"loop": {"iterations": 5}, "data": {"path": "a"}, "method": None}
    texts = ("loop.iterations=7", "loop.power_ema=[0.05, 0.1]", "method.name= diffusion", "teacher=x=y")
    assert set_values(content, dict(map(assignment, texts))) == {
        "loop": {"iterations": 7, "power_ema": [0.05, 0.1]},
        "data": {"path": "a"},
        "method": {"name": "diffusion"},
        "teacher": "x=y",
    }
    assert content == {"loop": {"iterations": 5}, "data": {"path": "a"}, "method": None}
    for wrong in ("loop.iterations", "=3"):
        with pytest.raises(ValueError, match=r"expected SECTION\.FIELD=VALUE"):
            assignment(wrong)
    with pytest.raises(ValueError, match="teacher is 'x' and has no fields"):
        set_values({"teacher": "x"}, {"teacher.a": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lop": {}}, "the configuration: unknown name 'lop': did you mean loop?"),
        ({"loop": {"learning_rat": 1}}, "loop: unknown name 'learning_rat': did you mean learning_rate?"),
        ({"loop": {"zzz": 1}}, "loop: unknown name 'zzz': expected one of iterations, batch_size"),
        ({"loop": {"iterations": 1.5}}, "loop.iterations: expected a whole number, got 1.5"),
        ({"loop": {"iterations": True}}, "loop.iterations: expected a whole number, got True"),
        ({"loop": {"horizontal_flip": 1}}, "loop.horizontal_flip: expected true or false, got 1"),
        ({"loop": {"gradient_clip": "x"}}, "loop.gradient_clip: expected a number or null, got 'x'"),
        ({"loop": {"betas": [0.5]}}, r"loop.betas: expected a list of 2, got \[0.5\]"),
        ({"loop": {"ema_decays": 0.9}}, "loop.ema_decays: expected a list, got 0.9"),
        ({"loop": {"iterations": 0}}, "loop: iterations: expected at least 1, got 0"),
        ({"loop": 3}, "loop: expected fields"),
        ({"data": {"size": 3}}, "data.path is missing"),
        ({"data": None}, "has no section data: give it, or --data"),
        ({"method": {"log_sigma_mean": 1}}, "method: its name is missing"),
        ({"teacher": 3}, "teacher: expected text or null, got 3"),
    ],
)
def test_what_a_configuration_cannot_say(content, message):
    with pytest.raises(ValueError, match=message):
        parse({"method": {"name": "diffusion"}, "data": {"path": "x"}, **content})


def test_files_that_are_none(tmp_path):
    path = tmp_path / "c.yaml"
    for text, message in (("a: [1", "is not YAML"), ("- 1", "expected sections"), ("1: 2", "expected sections")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            configuration.read(path)
    path.write_text("")
    assert configuration.read(path) == {}


def test_unions_and_choices():
    assert coerce(3, int | tuple[int, ...], "a") == 3
    assert coerce([3, 4], int | tuple[int, ...], "a") == (3, 4)
    assert coerce(None, int | None, "a") is None
    assert coerce("b", typing.Literal["a", "b"], "x") == "b"
    with pytest.raises(ValueError, match="x: expected one of a, b, got"):
        coerce("c", typing.Literal["a", "b"], "x")


def test_a_new_network_follows_the_data():
    method = made()
    config = method.model.unet.config
    assert (config.image_size, config.in_channels, config.out_channels, config.num_classes) == (8, 1, 1, 3)
    assert method.model.preconditioning == EDM()
    again = made()
    assert all(torch.equal(p, q) for p, q in zip(method.model.parameters(), again.model.parameters(), strict=True))
    other = made(loop={"seed": 1})
    assert not torch.equal(other.model.unet.time_embed[0].weight, method.model.unet.time_embed[0].weight)
    assert made(network={**TINY, "num_classes": None}).model.num_classes is None
    assert made(DATA._replace(labels=DATA.labels * 0)).model.num_classes is None
    wide = made(DATA._replace(images=torch.zeros(6, 3, 8, 16))).model.unet.config
    assert (wide.image_size, wide.in_channels, wide.dims) == ((8, 16), 3, 2)
    audio = made(DATA._replace(images=torch.zeros(6, 2, 32))).model.unet.config
    assert (audio.image_size, audio.in_channels, audio.dims) == (32, 2, 1)
    flow = made(preconditioning={"type": "Flow", "num_train_timesteps": 500})
    assert flow.model.preconditioning == Flow(num_train_timesteps=500)
    for given, found in (({}, "patch_size · .*, and image_size is 6"), ({"image_size": 8}, "and the data has 6 x 6")):
        network = {"model_channels": 32, "channel_mult": [1, 1, 1], **given}
        with pytest.raises(ValueError, match=f"network: .*3 levels need lengths that are multiples of 4, {found}"):
            made(DATA._replace(images=torch.zeros(6, 1, 6, 6)), network=network)
    with pytest.raises(ValueError, match="network: unknown name 'chanel_mult': did you mean channel_mult"):
        made(network={"chanel_mult": [1]})
    with pytest.raises(ValueError, match="unknown preconditioning 'EMD': did you mean EDM"):
        made(preconditioning={"type": "EMD"})


def test_what_is_written_makes_the_same_again(tmp_path, stored):
    """With every field said, and from any folder."""
    content = {"method": {"name": "diffusion"}, "data": {"path": "x"}, "network": TINY, "loop": {"seed": 4}}
    for extra in ({}, {"init_from": stored, "network": {}}, {"preconditioning": {"type": "Flow"}}):
        first = configured.make(parse({**content, **extra}), DATA)
        path = tmp_path / "config.yaml"
        path.write_text(configuration.text(first.configuration))
        second = configured.make(parse(configuration.read(path)), DATA)
        assert second.configuration == first.configuration
        assert first.configuration.data.path.startswith("/")
        assert first.configuration.network["attention_resolutions"] == ()
        assert "log_sigma_mean" in first.configuration.method
        model, again = first.method.model, second.method.model
        assert model.preconditioning == again.preconditioning
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A diffusion model in a folder."""
    folder = tmp_path_factory.mktemp("stored") / "teacher"
    torch.manual_seed(3)
    config = UNetConfig(image_size=8, in_channels=1, out_channels=1, num_classes=3, **TINY)
    cmfast.ConsistencyModel(UNet(config), EDM(sigma_data=0.4)).save(folder)
    return str(folder)


def test_models_start_from_checkpoints(stored):
    weights = cmfast.load(stored).state_dict()
    method = made(network={}, init_from=stored)
    assert all(torch.equal(value, weights[name]) for name, value in method.model.state_dict().items())
    assert method.model.preconditioning == EDM(sigma_data=0.4)
    assert method.model.unet.config.model_channels == 32
    assert all(p.requires_grad for p in method.model.parameters())
    student = made(method={"name": "distillation"}, network={}, teacher=stored)  # starts from the teacher
    assert student.model.preconditioning == Consistency(sigma_data=0.4)
    assert accelerated_networks(student.teacher, "this test")  # it is only evaluated
    assert not any(p.requires_grad for p in student.teacher.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in student.model.state_dict().items())
    assert made(method={"name": "distillation"}, network={}, init_from=stored).teacher is not None
    with pytest.raises(ValueError, match=r"network\.model_channels: 64 was given, and .* has 32"):
        made(network={"model_channels": 64}, init_from=stored)


def test_a_classifier_whose_layers_a_loss_compares(stored, tmp_path, monkeypatch):
    """From anywhere: its path becomes an absolute one, and the name of a bundled model stays."""
    save_classifier(Classifier(), tmp_path / "layers.safetensors")
    monkeypatch.chdir(tmp_path)
    for given, written in (("layers.safetensors", str(tmp_path / "layers.safetensors")), ("digits", "digits")):
        fields = {"name": "distillation", "features": given, "feature_weight": 2}
        said = {"method": fields, "data": {"path": "x"}, "teacher": stored}
        complete = configured.make(parse(said), DATA).configuration
        assert complete.method["features"] == written
        assert complete.method["feature_weight"] == 2.0
    with pytest.raises(FileNotFoundError, match="no classifier at nowhere"):
        made(method={"name": "easy-consistency-tuning", "features": "nowhere"}, network={}, init_from=stored)


def test_methods_and_teachers_that_do_not_go_together(stored):
    with pytest.raises(ValueError, match="unknown method 'difusion': did you mean diffusion"):
        made(method={"name": "difusion"})
    with pytest.raises(ValueError, match="needs a diffusion model to learn from: give it as teacher"):
        made(method={"name": "distillation"})
    with pytest.raises(
        ValueError, match="diffusion has no teacher: to start from a model's weights, give it as init_from"
    ):
        made(teacher=stored)
    with pytest.raises(ValueError, match="method: unknown name 'log_sigma_maen': did you mean log_sigma_mean"):
        made(method={"name": "diffusion", "log_sigma_maen": 1})
    with pytest.raises(FileNotFoundError, match="no model at"):
        made(init_from="nowhere")


def test_every_method_has_settings_that_yaml_can_say():
    for settings, method in METHODS.values():
        fields = dataclasses.asdict(settings())
        assert configuration.build(settings, fields, "method") == settings()
        assert isinstance(method.needs_teacher, bool)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "TrigFlow"}, "preconditioning.type: TrigFlow was given, and digits-teacher has EDM, in whose terms"),
        ({"type": "EDM", "rho": 0}, "EDM: rho must be positive, got 0"),
        ({"sigma_min": 100}, "EDM: sigma_max must be above sigma_min, 100.0, got 80"),
        ({"sigma_data": -0.5}, "EDM: sigma_data must be positive, got -0.5"),
    ],
)
def test_a_checkpoint_keeps_the_terms_of_its_weights(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        configured._loaded("digits-teacher", fields)


def test_fields_that_are_given_leave_a_checkpoints_others(monkeypatch):
    model = cmfast.load("drums-teacher")
    found = configured._loaded("drums-teacher", {"rho": 5})
    assert found.preconditioning == dataclasses.replace(model.preconditioning, rho=5.0)
    assert found.preconditioning.sigma_data != EDM().sigma_data
    monkeypatch.setattr(configured, "says_preconditioning", lambda path: False)  # as of a file of weights alone
    given = configured._loaded("digits-teacher", {"type": "EDM", "sigma_data": 0.25})
    assert given.preconditioning == EDM(sigma_data=0.25)


@pytest.mark.parametrize("method", ["distillation", "progressive-distillation"])
def test_a_student_is_for_data_of_its_teachers_spread(method):
    settings_type, kind = METHODS[method]
    teacher = cmfast.load("digits-teacher")
    student = kind.student(teacher)
    student.preconditioning = dataclasses.replace(student.preconditioning, sigma_data=0.25)
    with pytest.raises(ValueError, match=r"the student's 0\.25: they must be equal"):
        kind(student, settings_type(), 8, teacher)


def test_bundled_names_stay_names_beside_folders_of_the_same_name(tmp_path, monkeypatch):
    """As they win when a model is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits-teacher").mkdir()
    assert configured._absolute("digits-teacher") == "digits-teacher"
    (tmp_path / "mine").mkdir()
    assert configured._absolute("mine") == str(tmp_path / "mine")


def test_a_network_of_three_dimensions_is_known_by_any_field():
    model = cmfast.load("moving-digits-teacher")
    configured._check_network({"model_channels": model.unet.config.model_channels}, model, "moving-digits-teacher")


def test_numbers_beyond_all_floats():
    with pytest.raises(ValueError, match=r"loop\.seed: expected a whole number"):
        coerce(10**400, int, "loop.seed")
