"""Sampling as one replay: which batches are, and that they are the same samples."""

import copy
import dataclasses
import threading

import numpy as np
import pytest
import torch
from torch import nn

import cmfast
from cmfast import ConsistencyModel, kernels, sampling
from cmfast.engine import trace
from cmfast.engine.accelerator import accelerator_of
from cmfast.preconditioning import EDM, Consistency

from .device import DEVICE, ON_GPU

LEVELS = {"onestep": [80.0], "multistep": [80.0, 5.0, 0.5]}
CASES = {
    "onestep": {},
    "multistep": {},
    "heun": {"s_churn": 10.0},
    "dpmpp_2m": {},
    "ancestral": {},
}


class Tiny(nn.Module):
    """A network that torch serves, but for a linear layer: Triton's interpreter takes a millisecond for a program."""

    def __init__(self, num_classes):
        super().__init__()
        self.first, self.last = (nn.Conv2d(*sizes, 3, padding=1, groups=2) for sizes in ((2, 8), (8, 2)))
        self.time = nn.Linear(1, 8)
        self.label = None if num_classes is None else nn.Embedding(num_classes, 8)

    def forward(self, x, timesteps, class_labels=None):
        embedding = self.time(timesteps.sin()[:, None].to(x.dtype))
        if self.label is not None:
            embedding = embedding + self.label(class_labels)
        return self.last(nn.functional.silu(self.first(x) + embedding[:, :, None, None]))


def model(num_classes=10):
    torch.manual_seed(0)
    return ConsistencyModel(Tiny(num_classes), sample_shape=(2, 4, 4), num_classes=num_classes).eval().to(DEVICE)


@pytest.fixture
def fast():
    return cmfast.accelerate(model())


def replays(fast):
    return accelerator_of(fast.unet).target.replays


def ready(fast):
    return list(replays(fast).ready.values())


def stepwise(fast, count, **arguments):
    """The samples without a replay, which a callback must see made."""
    seen = []
    before = ready(fast)
    samples = fast.sample(count, callback=seen.append, **arguments)
    assert seen
    assert ready(fast) == before
    return samples


@pytest.mark.parametrize("sampler", CASES)
def test_one_replay_serves_every_seed_and_label(fast, sampler):
    arguments = {"sampler": sampler, "sigmas": LEVELS.get(sampler, [80.0, 5.0, 0.0])} | CASES[sampler]
    for seed, labels in ((0, [3, 1]), (2**63 + 5, [9, 9]), (7, [3, 1])):
        arguments |= {"seed": seed, "class_labels": labels, "first_sample": seed % 11}
        samples = fast.sample(2, **arguments)
        (replay,) = ready(fast)
        assert torch.equal(samples, stepwise(fast, 2, **arguments))
        arguments["class_labels"] = torch.tensor(labels, device=DEVICE)
        assert torch.equal(samples, fast.sample(2, **arguments))
        assert ready(fast) == [replay]
    assert not torch.equal(samples, fast.sample(2, **(arguments | {"seed": 8})))
    assert not torch.equal(samples, fast.sample(2, **(arguments | {"class_labels": [3, 2]})))


def test_samples_are_the_callers_own(fast):
    first = fast.sample(2, seed=1)
    kept = first.clone()
    second = fast.sample(2, seed=2)
    assert torch.equal(first, kept)
    second.zero_()
    assert torch.equal(fast.sample(2, seed=1), kept)


def test_each_batch_size_has_its_own():
    fast = cmfast.accelerate(model(num_classes=None))
    arguments = {"sigmas": LEVELS["multistep"], "seed": 3}
    samples = fast.sample(5, batch_size=2, **arguments)
    assert torch.equal(samples, stepwise(fast, 5, batch_size=2, **arguments))
    pair, single = ready(fast)
    assert torch.equal(samples[2:4], fast.sample(2, first_sample=2, **arguments))
    assert torch.equal(samples[4:], fast.sample(1, first_sample=4, **arguments))
    assert ready(fast) == [pair, single]


def test_all_that_a_run_depends_on_makes_another(fast):
    plain = fast.sample(1, sampler="heun", steps=2)
    for changes in ({"steps": 3}, {"sampler": "euler"}, {"s_churn": 5.0}, {"clip": 0.1}, {"clip": None}):
        arguments = {"sampler": "heun", "steps": 2} | changes
        count = len(ready(fast))
        samples = fast.sample(1, **arguments)
        assert len(ready(fast)) == count + 1
        assert torch.equal(samples, stepwise(fast, 1, **arguments))
        assert not torch.equal(samples, plain)
    fast.preconditioning = EDM()
    count = len(ready(fast))
    assert torch.equal(fast.sample(1, sampler="heun", steps=2), stepwise(fast, 1, sampler="heun", steps=2))
    assert len(ready(fast)) == count + 1
    with kernels.use_backend("triton"):  # not replayed by what it was captured with
        fast.sample(1, sampler="heun", steps=2)
    assert len(ready(fast)) == count + 2


def test_the_least_recently_used_goes(fast, monkeypatch):
    monkeypatch.setattr("cmfast.engine.cuda.replay._MOST_REPLAYS", 2)
    fast.sample(1)
    fast.sample(1, steps=2)
    one, two = ready(fast)
    fast.sample(1, seed=5)
    assert ready(fast) == [two, one]
    fast.sample(1, clip=None)
    assert ready(fast)[0] is one
    assert len(ready(fast)) == 2


@torch.no_grad()
def test_changed_weights_are_noticed(fast):
    before = fast.sample(2, seed=1)
    for change in (
        lambda: fast.unet.first.weight.mul_(1.5),
        lambda: fast.load_state_dict({k: 1.1 * v for k, v in fast.state_dict().items()}),
        lambda: setattr(fast.unet.last, "bias", nn.Parameter(fast.unet.last.bias + 0.1)),
        lambda: setattr(fast.unet, "last", nn.Sequential(fast.unet.last, nn.Tanh())),
    ):
        old = replays(fast)
        change()
        after = fast.sample(2, seed=1)
        assert replays(fast) is not old
        assert len(ready(fast)) == 1
        assert torch.equal(after, stepwise(fast, 2, seed=1))
        assert not torch.equal(after, before)
        before = after


def test_a_program_that_was_made_anew(fast, monkeypatch):
    monkeypatch.setattr("cmfast.engine.accelerator._MOST_PROGRAMS", 1)
    samples = fast.sample(2)
    (replay,) = ready(fast)
    fast.sample(1)
    assert torch.equal(fast.sample(2), samples)
    assert ready(fast)[-1] is not replay
    assert len(ready(fast)) == 2


def test_what_is_restored_or_copied_is_plain(fast):
    samples = fast.sample(1)
    copied = copy.deepcopy(fast)
    assert accelerator_of(copied.unet) is None
    (replay,) = ready(fast)
    held = replays(fast)
    cmfast.restore(fast)
    for plain in (copied, fast):
        torch.testing.assert_close(plain.sample(1), samples, rtol=1e-4, atol=1e-4)
    assert list(held.ready.values()) == [replay]


def test_without_graphs():
    fast = cmfast.accelerate(model(), graphs=False)
    assert replays(fast) is None
    assert torch.equal(fast.sample(2, seed=4), cmfast.accelerate(model()).sample(2, seed=4))


def test_a_callback_or_progress_bar_sees_every_step(fast, capsys):
    stepwise(fast, 1, steps=2)
    samples = fast.sample(1, steps=2, progress=True)
    assert "2/2" in capsys.readouterr().err
    assert not ready(fast)
    assert torch.equal(samples, fast.sample(1, steps=2))
    assert len(ready(fast)) == 1
    fast.sample(2, steps=2, batch_size=1, progress=True)  # a bar over the batches
    assert len(ready(fast)) == 1


class Guided(ConsistencyModel):
    def denoise(self, *args, **kwargs):
        return super().denoise(*args, **kwargs) / 2


def _guided(fast):
    fast.__class__ = Guided


def _overridden(fast):
    denoise = fast.denoise
    fast.denoise = lambda *args, **kwargs: denoise(*args, **kwargs) / 2


class Halved(Consistency):
    def coefficients(self, sigma, sigma_next=None):
        found = super().coefficients(sigma, sigma_next)
        return found._replace(a=found.a / 2, b=found.b / 2)


def _preconditioned(fast):
    fast.preconditioning = Halved()


@dataclasses.dataclass(frozen=True)
class Scaled(Consistency):
    factors: list = dataclasses.field(default_factory=lambda: [0.5])

    def coefficients(self, sigma, sigma_next=None):
        found = super().coefficients(sigma, sigma_next)
        return found._replace(a=found.a * self.factors[0], b=found.b * self.factors[0])


def _preconditioned_by_a_list(fast):
    fast.preconditioning = Scaled()


@pytest.mark.parametrize("change", [_guided, _overridden, _preconditioned, _preconditioned_by_a_list])
def test_what_could_change_unnoticed_runs_step_by_step(fast, change):
    plain = fast.sample(1, clip=None)
    before = ready(fast)
    change(fast)
    torch.testing.assert_close(fast.sample(1, clip=None), plain / 2)
    assert ready(fast) == before


def test_hooks_run_at_each_evaluation(fast):
    seen = []
    hook = fast.unet.register_forward_hook(lambda module, inputs, output: seen.append(output))
    fast.sample(1, steps=2)
    assert len(seen) == 2
    hook.remove()
    fast.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    fast.sample(1, steps=2)
    assert len(seen) == 4
    assert not ready(fast)


def test_options_that_are_no_numbers_run_step_by_step(fast):
    fast.sample(1, sampler="ddim", steps=2, eta=np.float64(0.5))
    assert not ready(fast)
    fast.sample(1, sampler="ddim", steps=2, eta=0.5)
    assert ready(fast)


def test_a_network_in_parts_runs_step_by_step():
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Tiny(None)

        def forward(self, x, timesteps, class_labels=None):
            return self.inner(x if x.sum() > 0 else -x, timesteps)

    torch.manual_seed(0)
    network = Loud().eval().to(DEVICE)
    plain, fast = (ConsistencyModel(unet, sample_shape=(2, 4, 4)) for unet in (network, cmfast.accelerate(network)))
    for seed in range(3):
        torch.testing.assert_close(fast.sample(1, seed=seed), plain.sample(1, seed=seed), rtol=1e-4, atol=1e-4)
    assert not ready(fast)


def test_evaluations_that_are_noted_run_step_by_step(fast):
    fast.sample(1, steps=2)
    with trace.tracing() as found:
        fast.sample(1, steps=2)
    assert len(found.runs) == 2


@pytest.mark.parametrize("arguments", [{"seed": 2**64}, {"seed": -1}, {"first_sample": 2**32 - 1}])
def test_numbers_out_of_range_are_refused(fast, arguments):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"seed must be|sample indices"):
            fast.sample(2, **arguments)
        fast.sample(2)


def test_numbers_of_other_types_run_step_by_step(fast):
    samples = fast.sample(1, seed=3)
    before = ready(fast)
    assert torch.equal(fast.sample(1, seed=np.int64(3)), samples)
    assert ready(fast) == before


def test_wrong_options_raise_as_they_do_step_by_step(fast):
    for _ in range(2):
        with pytest.raises(TypeError, match="the sampler 'multistep' has no option 'eta'"):
            fast.sample(1, eta=0.5)


def test_replays_of_inference_mode_serve_outside_it(fast):
    with torch.inference_mode():
        samples = fast.sample(1, seed=3)
    assert torch.equal(fast.sample(1, seed=3), samples)


def test_threads_take_turns(fast):
    expected = [fast.sample(1, seed=seed, sigmas=LEVELS["multistep"]) for seed in range(2)]
    wrong = []

    def sample(seed):
        for _ in range(3):
            if not torch.equal(fast.sample(1, seed=seed, sigmas=LEVELS["multistep"]), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=sample, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU")
@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_a_gpu_is_not_waited_for(fast, sampler):
    steps = 1 if sampler == "onestep" else 3
    fast.sample(2, sampler=sampler, steps=steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        samples = fast.sample(2, sampler=sampler, steps=steps, seed=1, class_labels=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ready(fast)[0]._graph is not None
    assert torch.equal(samples, stepwise(fast, 2, sampler=sampler, steps=steps, seed=1, class_labels=4))
