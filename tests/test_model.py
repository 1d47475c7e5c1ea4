import math
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmfast import ConsistencyModel, UNet, UNetConfig, load, noise, sampling
from cmfast.noise import GaussianNoise, gaussian
from cmfast.preconditioning import (
    EDM,
    Consistency,
    Flow,
    LatentConsistency,
    TrajectoryConsistency,
    TrigFlow,
)

from .fixture_files import tiny_unet


@pytest.fixture(scope="module")
def model():
    return ConsistencyModel(tiny_unet(), Consistency())


def test_default_is_one_evaluation(model):
    calls = []
    hook = model.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    images = model.sample(4, class_labels=3, seed=0)
    hook.remove()
    assert len(calls) == 1
    assert images.shape == (4, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1.0
    x = 80.0 * GaussianNoise(0)(torch.zeros(4, 1, 8, 8), 0)
    expected = model.denoise(x, 80.0, torch.full((4,), 3)).detach().clamp(-1, 1)
    torch.testing.assert_close(images, expected)


def test_samples_do_not_depend_on_the_batch(model):
    whole = model.sample(10, steps=2, seed=1)
    for size in (1, 3, 7):
        torch.testing.assert_close(model.sample(10, steps=2, seed=1, batch_size=size), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.sample(4, steps=2, seed=1, first_sample=6), whole[6:], rtol=0, atol=1e-4)


def test_seeds_and_labels_change_samples(model):
    base = model.sample(2, class_labels=1, seed=0)
    assert torch.equal(base, model.sample(2, class_labels=[1, 1], seed=0))
    assert torch.equal(base, model.sample(2, class_labels=torch.tensor([1, 1]), seed=0))
    assert not torch.equal(base, model.sample(2, class_labels=1, seed=1))
    assert not torch.equal(base, model.sample(2, class_labels=2, seed=0))


@pytest.mark.parametrize(
    ("sampler", "levels", "options"),
    [("multistep", [80.0, 5.0, 0.5], {}), ("heun", [80.0, 5.0, 0.5, 0.0], {"s_churn": 10.0})],
)
def test_one_graph_of_the_sampler_serves_every_seed(model, sampler, levels, options):
    function = sampling.SAMPLERS[sampler]

    @torch.no_grad()
    def sample(seed, first_sample, labels):
        return model._sample_batch(function, levels, 2, GaussianNoise(seed, first_sample), labels, **options)

    model.eval()
    graph = make_fx(sample)(torch.tensor(0), torch.tensor([0]), torch.tensor([0, 1]))
    for seed, first, labels in ((0, 0, [3, 1]), (2**40 + 1, 5, [9, 9]), (2**63 - 1, 2**32 - 2, [0, 4])):
        expected = model.sample(
            2, sampler=sampler, sigmas=levels, seed=seed, first_sample=first, class_labels=labels, **options
        )
        replayed = graph(torch.tensor(seed), torch.tensor([first]), torch.tensor(labels))
        torch.testing.assert_close(replayed, expected, rtol=0, atol=0)


class OnOneDevice(TorchDispatchMode):
    """Raise where an operator makes a tensor elsewhere than on the device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.calls = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **kwargs or {})
        self.calls += 1
        for t in tree_leaves(outputs):
            assert not isinstance(t, torch.Tensor) or t.device.type == self.device, func
        return outputs


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_a_batch_is_made_without_the_host(sampler):
    model = ConsistencyModel(tiny_unet(), Consistency()).to("meta").eval()  # its tensors have no data to read
    levels = {"onestep": [80.0], "multistep": [80.0, 5.0]}.get(sampler, [80.0, 5.0, 0.0])
    options = {"s_churn": 10.0} if sampler in ("heun", "dpm2") else {}
    seed, first, labels = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((), (1,), (2,)))
    with torch.no_grad(), OnOneDevice("meta") as watched:
        x = model._sample_batch(sampling.SAMPLERS[sampler], levels, 2, GaussianNoise(seed, first), labels, **options)
    assert x.shape == (2, 1, 8, 8)
    assert watched.calls > 50


def test_labels_in_turn(model):
    labels = [i % 10 for i in range(12)]
    assert torch.equal(model.sample(12), model.sample(12, class_labels=labels))
    torch.testing.assert_close(model.sample(2, first_sample=9), model.sample(12)[9:11], rtol=0, atol=1e-4)


def test_timesteps_index_the_karras_grid(model):
    grid = sampling.karras_sigmas(40)
    assert torch.equal(model.sample(2, timesteps=(0, 22)), model.sample(2, sigmas=(grid[0], grid[22])))
    grid = sampling.karras_sigmas(18)
    assert torch.equal(model.sample(2, timesteps=(0, 9), grid_steps=18), model.sample(2, sigmas=(grid[0], grid[9])))


def test_multistep_fuses_what_the_sampler_does(model):
    """The fused step after the network gives what the plain sampler computes around denoise()."""
    labels, noise = torch.tensor([1, 2]), GaussianNoise(7)
    x, levels = 80.0 * noise(torch.zeros(2, 1, 8, 8), 0), [80.0, 5.0, 0.7]
    with torch.no_grad():
        plain = sampling.sample_multistep(
            lambda x, sigma: model.denoise(x, sigma, labels, clip=1.0), x, levels, noise=noise
        )
        fused = sampling.sample_multistep(model.denoiser(labels), x, levels, noise=noise)
        given = sampling.sample_multistep(model.denoiser(labels), x, levels, noise=lambda like, i: noise(like, i))
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given, fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_every_sampler(model, sampler):
    steps = 1 if sampler == "onestep" else 3
    seen = []
    images = model.sample(2, sampler=sampler, steps=steps, callback=seen.append)
    assert torch.isfinite(images).all()
    assert len(seen) == steps
    assert torch.equal(images, model.sample(2, sampler=sampler, steps=steps))


def test_sampler_options(model):
    plain = model.sample(2, sampler="heun", steps=4)
    assert not torch.equal(plain, model.sample(2, sampler="heun", steps=4, s_churn=4.0))


@pytest.mark.parametrize(
    ("sampler", "option", "known"),
    [
        (None, "renoise", "it has none"),
        ("multistep", "sigma_min", "it has none"),
        ("heun", "eta", "its options are s_churn, s_tmin, s_tmax, s_noise"),
        ("euler", "noise", "it has none"),
        ("onestep", "function", "it has none"),
    ],
)
def test_an_option_that_the_sampler_does_not_have_is_refused(model, sampler, option, known):
    with pytest.raises(TypeError, match=f"sampler '{sampler or 'multistep'}' has no option '{option}': {known}$"):
        model.sample(1, sampler=sampler, **{option: 3})


def test_diffusion_models_sample_with_heun():
    teacher = ConsistencyModel(tiny_unet(), EDM())
    assert teacher.default_sampler == ("heun", 18)
    calls = []
    hook = teacher.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    teacher.sample(1)
    hook.remove()
    assert len(calls) == 2 * 18 - 1


@pytest.mark.parametrize("levels", [{"sigmas": [20.0, 2.0]}, {"timesteps": [0, 9], "grid_steps": 10}])
def test_levels_of_ones_own_are_those_of_multistep(levels):
    teacher = ConsistencyModel(tiny_unet(), EDM())
    expected = teacher.sample(1, seed=2, sampler="multistep", **levels)
    assert torch.equal(teacher.sample(1, seed=2, **levels), expected)
    assert not torch.equal(teacher.sample(1, seed=2, sampler="heun", **levels), expected)


@pytest.mark.parametrize("scheme", [TrigFlow(), Flow(), LatentConsistency(), TrajectoryConsistency()])
def test_other_schemes(scheme):
    model = ConsistencyModel(tiny_unet(), scheme)
    images = model.sample(2, steps=3)
    assert images.shape == (2, 1, 8, 8)
    assert torch.isfinite(images).all()
    if not isinstance(scheme, TrigFlow):
        with pytest.raises(ValueError, match=f"'ddim' needs levels sigma, which {type(scheme).__name__} does not have"):
            model.sample(1, sampler="ddim")


def test_noisy_estimates_are_not_clipped():
    """Between levels a trajectory's D is a noisy sample; all deviations are those of data of deviation 1."""

    class Normal(nn.Module):
        def forward(self, x, timesteps, class_labels=None):
            return (1 - TrajectoryConsistency().alphas_cumprod[timesteps.long()]).sqrt()[:, None, None, None].to(x) * x

    model = ConsistencyModel(Normal(), TrajectoryConsistency(), sample_shape=(1, 32, 32))
    model.register_parameter("one", nn.Parameter(torch.zeros(1)))
    seen = []
    model.sample(64, steps=4, callback=lambda step: seen.append(step["denoised"]))
    assert all(denoised.abs().max() > 2 for denoised in seen)
    assert model.sample(64, steps=4, clip=1.0).abs().max() == 1


@pytest.mark.parametrize("given", [{"steps": 2, "grid_steps": 7}, {"timesteps": [0, 22], "grid_steps": 0}])
def test_a_grid_is_that_of_timesteps(given):
    with pytest.raises(ValueError, match="grid_steps is the positive size of the grid of timesteps, got"):
        ConsistencyModel(tiny_unet()).sample(1, **given)


def test_numbers_of_numpy_are_numbers():
    model = ConsistencyModel(tiny_unet())
    assert model.sample(2, class_labels=np.int64(3)).equal(model.sample(2, class_labels=3))
    assert model.sample(2, timesteps=np.array([0, 22])).equal(model.sample(2, timesteps=[0, 22]))


@pytest.mark.parametrize("sampler", ["heun", "euler", "dpm2", "dpmpp_2m", "ddim", "ancestral"])
def test_diffusion_samplers_of_a_trigflow_model(sampler):
    """An EDM model in TrigFlow's variables gives the EDM model's samples."""
    model = ConsistencyModel(tiny_unet().double(), EDM())
    viewed = ConsistencyModel(model.unet, TrigFlow(network="edm"))
    churn = {"s_churn": 2.0} if sampler == "heun" else {}
    options = {"sampler": sampler, "steps": 4, "seed": 5, **churn}
    torch.testing.assert_close(viewed.sample(2, **options), model.sample(2, **options), rtol=0, atol=1e-9)
    assert not torch.equal(viewed.sample(2, **options), viewed.sample(2, steps=4, seed=5))


class Velocity(nn.Module):
    """dx/dsigma = (x + sigma) / 2, whose solution from x at 1 is (x + 3) · exp((sigma - 1) / 2) - sigma - 2."""

    def forward(self, x, timesteps, class_labels=None):
        return (x + timesteps.reshape(-1, 1, 1, 1).to(x.dtype) / 1000) / 2


@pytest.mark.parametrize(("sampler", "steps", "bound"), [("euler", 64, 0.02), ("heun", 64, 3e-4), ("dpm2", 64, 1e-3)])
def test_samplers_of_a_flow(sampler, steps, bound):
    model = ConsistencyModel(Velocity(), Flow(), sample_shape=(1, 2, 2))
    model.register_parameter("one", nn.Parameter(torch.zeros(1, dtype=torch.float64)))  # which says the dtype
    x = noise.gaussian((3, 1, 2, 2), seed=3, dtype=torch.float64)
    expected = (x + 3) * math.exp(-0.5) - 2
    found = model.sample(3, sampler=sampler, steps=steps, seed=3, clip=None)
    assert 0 < (found - expected).abs().max() < bound
    with pytest.raises(ValueError, match="its samplers are onestep, multistep, euler, heun, dpm2"):
        model.sample(1, sampler="ancestral")
    with pytest.raises(ValueError, match="the highest one of a flow is 1"):
        model.sample(1, sampler="heun", s_churn=1.0)


def test_recommended_levels():
    model = ConsistencyModel(tiny_unet(), recommended_levels={2: (80.0, 0.8)})
    assert torch.equal(model.sample(1, steps=2), model.sample(1, sigmas=(80.0, 0.8)))
    assert torch.equal(model.sample(1, steps=3), model.sample(1, sigmas=Consistency().levels(3)))


def test_sigma_as_tensor_or_float(model):
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    with torch.no_grad():
        together = model(x, torch.tensor([0.5, 0.5]), labels)
        torch.testing.assert_close(model.denoise(x, 0.5, labels), together, rtol=1e-4, atol=1e-5)
        mixed = model.denoise(x, torch.tensor([0.5, 3.0]), labels)
        torch.testing.assert_close(mixed[0], together[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mixed[1], together[1])


def test_boundary_condition_holds(model):
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model.denoise(x, 0.002, torch.tensor([0, 1])), x)


def test_denoise_is_differentiable(model):
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    model.denoise(x, torch.tensor([1.0]), torch.tensor([0])).sum().backward()
    assert x.grad.abs().sum() > 0


def test_bfloat16_network_keeps_float32_samples():
    model = ConsistencyModel(tiny_unet(), Consistency())
    expected = model.sample(2, seed=0)
    low = model.to(torch.bfloat16).sample(2, seed=0)
    assert low.dtype == torch.float32
    assert (low - expected).abs().mean() < 0.05


def test_float64_networks_have_float64_samples():
    model = ConsistencyModel(tiny_unet(), Consistency())
    expected = model.sample(2, steps=2, seed=0)
    wide = model.double().sample(2, steps=2, seed=0)
    assert (model.state_dtype, wide.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(wide.float(), expected, rtol=0, atol=1e-4)


def test_the_times_of_a_network_are_as_wide_as_its_samples():
    seen = []
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = ConsistencyModel(tiny_unet().to(dtype), Consistency())
        model.unet.register_forward_pre_hook(lambda module, args: seen.append(args))
        model.denoise(torch.zeros(2, 1, 8, 8, dtype=wide), 3.0, torch.tensor([0, 1]))
        x, times, _ = seen[-1]
        assert (x.dtype, times.dtype) == (dtype, wide)
        assert torch.equal(times, torch.full((2,), 250 * math.log(3.0), dtype=wide))


@pytest.mark.parametrize(
    ("preconditioning", "sampler", "evaluations"),
    [
        (EDM(), "multistep", 1),
        (EDM(), "onestep", 1),
        (EDM(), "euler", 18),
        (EDM(), None, 35),
        (Consistency(), "onestep", 1),
        (Consistency(), "ddim", 18),
        (Consistency(), "progdist", 18),
        (Consistency(), None, 1),
        (Flow(), None, 1),
    ],
)
def test_the_steps_of_a_sampler_that_is_told_none(preconditioning, sampler, evaluations):
    model, calls = ConsistencyModel(tiny_unet(), preconditioning), []
    model.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    model.sample(1, sampler=sampler)
    assert len(calls) == evaluations


def test_grids_of_samplers(model):
    """Steps are levels of the Karras grid; progdist, which stops at the last one, has one more."""
    levels = {}
    for sampler in ("euler", "progdist"):
        seen = []
        model.sample(1, sampler=sampler, steps=3, callback=seen.append)
        levels[sampler] = [entry["sigma"] for entry in seen]
    assert levels == {"euler": sampling.karras_sigmas(3)[:3], "progdist": sampling.karras_sigmas(4)[:3]}
    grid = sampling.karras_sigmas(40)
    given = model.sample(1, sampler="euler", timesteps=(0, 22, 39))
    assert torch.equal(given, model.sample(1, sampler="euler", sigmas=(grid[0], grid[22], grid[39], 0.0)))


def test_timesteps_are_those_of_a_karras_grid():
    for scheme in (Flow(), LatentConsistency()):
        with pytest.raises(ValueError, match="index a Karras grid, which this preconditioning has not"):
            ConsistencyModel(tiny_unet(), scheme).sample(1, timesteps=(0, 1))


def test_estimates_are_clipped(model):
    x, labels = 3 * GaussianNoise(0)(torch.zeros(2, 1, 8, 8), 0), torch.tensor([0, 1])
    with torch.no_grad():
        plain = model.denoise(x, 0.1, labels)
        assert plain.abs().max() > 1
        assert torch.equal(model.denoise(x, 0.1, labels, clip=0.5), plain.clamp(-0.5, 0.5))
        assert torch.equal(model.denoise(x, 0.1, labels, clip=(-0.25, 0.75)), plain.clamp(-0.25, 0.75))
        assert torch.equal(model.denoiser(labels)(x, 0.1), plain.clamp(-1, 1))
        assert torch.equal(model.denoiser(labels, clip=None).at(x, 0.1), plain)
    assert torch.equal(model.sample(2, sigmas=[0.1], clip=0.01).abs().amax((1, 2, 3)), torch.full((2,), 0.01))


def test_a_model_saves_itself(model, tmp_path):
    model.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved").sample(2), model.sample(2))


def test_parts_of_a_model():
    model = ConsistencyModel(tiny_unet())
    assert model.preconditioning == Consistency()
    assert (model.sample_shape, model.num_classes, model.recommended_levels) == ((1, 8, 8), 10, {})
    other = ConsistencyModel(
        tiny_unet(), EDM(), sample_shape=[1, 16, 8], num_classes=4, recommended_levels={"2": [9, 1]}
    )
    assert (other.sample_shape, other.num_classes, other.recommended_levels) == ((1, 16, 8), 4, {2: (9, 1)})
    assert other.sample(2, steps=2).shape == (2, 1, 16, 8)


def test_any_network_with_the_interface():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.1))

        def forward(self, x, timesteps, class_labels=None):
            return self.gain * x

    with pytest.raises(ValueError, match="sample_shape"):
        ConsistencyModel(Linear())
    assert ConsistencyModel(Linear(), sample_shape=(2, 5)).sample(3, steps=2).shape == (3, 2, 5)


def test_sampling_leaves_the_mode_alone(model):
    model.train()
    model.sample(1)
    assert model.training
    model.eval()


def test_threads_that_sample_leave_dropout_off():
    """A model in training mode has none in any of them, and is in training mode when the last one is done."""
    torch.manual_seed(0)
    config = UNetConfig(image_size=8, in_channels=1, out_channels=1, model_channels=32, channel_mult=(1,), dropout=0.5)
    model = ConsistencyModel(UNet(config))
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    expected = model.sample(2, steps=20)
    began, found = threading.Event(), []

    def long(i, *rest):
        began.set()
        time.sleep(0.005)

    thread = threading.Thread(target=lambda: found.append(model.sample(2, steps=20, callback=long)))
    thread.start()
    began.wait()
    while thread.is_alive():
        model.sample(1)
    assert torch.equal(found[0], expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_labels_of_every_integer_dtype(dtype):
    network = Labelled()
    model = ConsistencyModel(network, sample_shape=(1, 4, 4), num_classes=1000)
    labels = torch.tensor([3, 100]).to(dtype)
    assert torch.equal(model.sample(2, class_labels=labels), model.sample(2, class_labels=[3, 100]))
    x, sigma = torch.ones(2, 1, 4, 4), torch.tensor([1.0, 2.0])
    assert torch.equal(model.denoise(x, sigma, labels), model.denoise(x, sigma, labels.long()))


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.classes = nn.Embedding(1000, 1)

    def forward(self, x, timesteps, class_labels=None):
        return x + self.classes(class_labels)[:, :, None, None]


def test_seeds_of_numpy(model):
    for seed in (2**63, 2**64 - 1):
        assert torch.equal(model.sample(1, seed=np.uint64(seed)), model.sample(1, seed=seed))
        assert torch.equal(gaussian((1, 3), np.uint64(seed)), gaussian((1, 3), seed))


def test_progress_over_batches(model, capsys):
    model.sample(4, batch_size=2, progress=True)
    assert "2/2" in capsys.readouterr().err
    model.sample(2, steps=3, batch_size=2, progress=True)
    assert "3/3" in capsys.readouterr().err  # of the steps of the one batch
    model.sample(4, steps=2, batch_size=2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"class_labels": 10}, r"0 … 9, got 10"),
        ({"class_labels": 10, "steps": 2}, r"0 … 9, got 10"),
        ({"class_labels": [[0, 1]]}, "or 2 of them"),
        ({"class_labels": torch.tensor([True, False])}, r"got \[2\] torch.bool"),
        ({"timesteps": ()}, r"0 … 39"),
        ({"timesteps": (-1, 3)}, r"0 … 39"),
        ({"class_labels": [0, -1]}, "got -1"),
        ({"class_labels": [0]}, "or 2 of them"),
        ({"class_labels": torch.tensor([0.5, 1.0])}, "integer"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 2, "timesteps": (0, 22)}, "one of steps"),
        ({"timesteps": (0, 40)}, r"0 … 39"),
        ({"timesteps": (22, 0)}, "must decrease"),
        ({"sigmas": (1.0, 2.0)}, "must decrease"),
        ({"sampler": "plms"}, "unknown sampler"),
        ({"sampler": "onestep", "steps": 2}, "one step"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.sample(**({"count": 2} | arguments))


@pytest.mark.parametrize(
    ("x", "sigma", "labels", "message"),
    [
        (torch.randn(2, 3, 8, 8), 1.0, [0, 1], r"expected floating-point x \[N, 1, 8, 8\]"),
        (torch.randn(2, 8, 8), 1.0, [0, 1], "expected floating-point x"),
        (torch.randn(2, 1, 8, 8), torch.ones(3), [0, 1], r"expected sigma \[2\]"),
        (torch.randn(2, 1, 8, 8), 1.0, [0, 10], "got 10"),
        (torch.randn(2, 1, 8, 8), 0.0, [0, 1], "must be positive"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), 1.0, [0, 1], "expected floating-point x .* torch.int64"),
        (torch.randn(2, 1, 8, 8), 1.0, [-1, 1], "got -1"),
        (torch.randn(2, 1, 8, 8), 1.0, [0.0, 1.0], r"class_labels of 2 integers, got \[2\] torch.float32"),
        (torch.randn(2, 1, 8, 8), 1.0, [0], r"class_labels of 2 integers, got \[1\] torch.int64"),
    ],
)
def test_bad_inputs(model, x, sigma, labels, message):
    with pytest.raises(ValueError, match=message):
        model.denoise(x, sigma, torch.tensor(labels))


@pytest.mark.parametrize("sampler", ["multistep", "onestep", "heun"])
@pytest.mark.parametrize(
    ("sigmas", "message"),
    [([], "at least"), (torch.tensor([]), "at least"), ([1.0, 2.0], "decrease"), ([float("nan"), 0.0], "finite")],
    ids=["none", "empty", "increasing", "nan"],
)
def test_bad_levels(model, sampler, sigmas, message):
    if sampler == "onestep" and message == "decrease":
        sigmas, message = [-1.0], "positive"  # only the first is used
    with pytest.raises(ValueError, match=message):
        model.sample(2, sampler=sampler, sigmas=sigmas)
    with pytest.raises(ValueError, match=message):
        sampling.SAMPLERS[sampler](lambda x, sigma: x, torch.zeros(1, 1, 2, 2), sigmas)


def test_labels_for_an_unconditional_model():
    model = ConsistencyModel(tiny_unet(num_classes=None))
    assert model.sample(1).shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="unconditional"):
        model.sample(1, class_labels=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": (22, 0)}, "sigmas must decrease"),
        ({"timesteps": (5, 5), "sampler": "heun"}, "sigmas must decrease"),
        ({"timesteps": (3,), "sampler": "progdist"}, "progdist takes two levels at least before the final 0"),
        ({"sigmas": (80.0, 0.0), "sampler": "progdist"}, "progdist takes two levels at least before the final 0"),
        ({"timesteps": (0, 22), "sampler": "onestep"}, "onestep takes one level"),
        ({"sigmas": (80.0, 5.0), "sampler": "onestep"}, "onestep takes one level"),
    ],
)
def test_levels_that_a_sampler_does_not_take(model, options, message):
    """Found out before anything is evaluated, as a service and bulk runs need it."""
    calls = []
    hook = model.unet.register_forward_pre_hook(lambda *given: calls.append(given))
    with pytest.raises(ValueError, match=message):
        model.sample(2, **options)
    hook.remove()
    assert not calls
