"""Every method through the fused operators: gradients as accurate as plain PyTorch's, and a few updates that learn."""

import functools

import pytest
import torch
from cmfast.kernels.backends import available

from cmfast import ConsistencyModel, kernels
from cmfast.preconditioning import EDM
from cmfast.training.methods import METHODS, Method

from ...fixture_files import tiny_unet
from ...kernels import emulation
from ...kernels.backends import ON_GPU, gpu_kernels


class Draws:
    """The numbers of a generator, drawn in float32 whatever the dtype that is asked for."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, like):
        return torch.randn(like.shape, generator=self.generator).to(like)

    def uniform(self, like):
        return torch.rand(like.shape, generator=self.generator).to(like)


#: What brings a short run to where all of a method is at work.
SETTINGS = {
    "consistency-training": {"last_steps": 8},
    "improved-consistency-training": {"first_steps": 4, "last_steps": 16},
    "continuous-consistency-training": {"warmup_iterations": 4},
    "continuous-consistency-distillation": {"warmup_iterations": 4},
    "progressive-distillation": {"first_steps": 4},
}
ITERATIONS = 10
DEVICE = "cuda" if ON_GPU else "cpu"


def make(name, dtype=torch.float32, **sizes) -> Method:
    settings, method = METHODS[name]
    teacher = ConsistencyModel(tiny_unet(1, **sizes), EDM()).to(DEVICE, dtype).requires_grad_(False)
    student = method.student(ConsistencyModel(tiny_unet(**sizes), EDM())).to(DEVICE, dtype).train()
    chosen = settings(**SETTINGS.get(name, {}))
    return method(student, chosen, ITERATIONS, teacher if method.needs_teacher else None)


def batch(dtype):
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(2, 1, 8, 8, generator=generator) * 2 - 1
    return images.to(DEVICE, dtype), torch.tensor([3, 7], device=DEVICE)


def gradients(name, dtype, backend):
    method = make(name, dtype)
    with gpu_kernels(), kernels.use_backend(backend):
        loss = method.loss(*batch(dtype), Draws(), ITERATIONS - 1)
        assert loss.shape == (2,)
        loss.mean().backward()
    found = [p.grad for p in method.parameters()]
    return torch.cat([torch.zeros(0) if g is None else g.double().cpu().flatten() for g in found])


@functools.cache
def without_kernels(name):
    """In float64, and in float32."""
    return gradients(name, torch.float64, "reference"), gradients(name, torch.float32, "reference")


@pytest.mark.parametrize("backend", ["cuda", "triton"] if ON_GPU else ["cuda"])  # interpreted, Triton takes minutes
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_as_accurate_as_plain_torchs(name, backend):
    with gpu_kernels():
        ok, reason = available(backend, "group_norm_backward")
    if not ok:
        pytest.skip(f"{backend}: {'' if ON_GPU else emulation.missing()} {reason}")
    exact, plain = without_kernels(name)
    found = gradients(name, torch.float32, backend)
    assert exact.norm() > 0
    assert not torch.equal(found, plain)
    allowed = 2 * (plain - exact).norm() + torch.finfo(torch.float32).eps * exact.norm()
    assert (found - exact).norm() <= allowed
    assert allowed < 1e-2 * exact.norm()


@pytest.mark.parametrize("name", METHODS)
def test_updates_lower_the_loss(name):
    """On one batch with the same random numbers, as every method's loss must; what it learns samples."""
    method = make(name, channel_mult=(1,), attention_resolutions=())
    parameters = list(method.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = method.loss(*batch(torch.float32), Draws(), ITERATIONS - 1).mean()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0]
    samples = method.model.eval().sample(2, class_labels=[3, 7])
    assert samples.shape == (2, 1, 8, 8)
    assert torch.isfinite(samples).all()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_stored_is_all_that_a_run_needs(name):
    """A method that takes the model's weights, its networks and its state of another goes on as that one does."""
    first = make(name, channel_mult=(1,), attention_resolutions=())
    optimizer = torch.optim.SGD(first.parameters(), lr=1e-3)
    for iteration in range(4):
        optimizer.zero_grad()
        first.loss(*batch(torch.float32), Draws(iteration), iteration).mean().backward()
        optimizer.step()
        first.updated(iteration + 1)
    second = make(name, channel_mult=(1,), attention_resolutions=())
    second.model.load_state_dict(first.model.state_dict())
    assert first.networks().keys() == second.networks().keys()
    for key, network in second.networks().items():
        network.load_state_dict(first.networks()[key].state_dict())
    second.load_state(first.state())
    expected, found = (m.loss(*batch(torch.float32), Draws(9), 4) for m in (first, second))
    assert torch.equal(found, expected)


def test_methods_are_found_by_name():
    for name, (settings, method) in METHODS.items():
        assert method.__name__.lower() == name.replace("-", "")
        assert "Attributes:" in settings.__doc__
        said = "".join(kind.__doc__ for kind in settings.__mro__)
        assert all(f"{field}:" in said for field in settings.__dataclass_fields__)
