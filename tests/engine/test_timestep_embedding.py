"""The spellings of the embedding of timesteps in other projects' networks, and what is none."""

import math

import pytest
import torch
from torch import nn

from cmfast import unet
from cmfast.engine import Accelerator, capture
from cmfast.engine.lower import lower
from cmfast.engine.passes import PASSES

from .test_spellings import Function, draw


@torch.no_grad()
def run(function, t, w):
    """The operators that serve a function, after its result is compared with torch's, also after each pass."""
    module = Function(function, w=w).eval()
    expected = module(t)
    fast = Accelerator(module, torch.float32)
    torch.testing.assert_close(fast(t), expected, rtol=0, atol=1e-6)
    graph = capture(module, (t,))
    for rewrite in PASSES.values():
        rewrite(graph)
        graph.nodes.lint()
        torch.testing.assert_close(graph.run(t), expected, rtol=0, atol=1e-6)
    return [step.operator for step in fast.executable((t,)).steps.steps]


def sinusoids(t, frequencies, flip=False, scale=1):
    """diffusers' get_timestep_embedding after its frequencies."""
    emb = scale * (t[:, None].float() * frequencies[None, :])
    emb = torch.cat([torch.sin(emb), torch.cos(emb)], dim=-1)
    half = len(frequencies)
    return torch.cat([emb[:, half:], emb[:, :half]], dim=-1) if flip else emb


def frequencies_of(x, count=20, shift=0):
    return torch.exp(-math.log(10000.0) * torch.arange(count, device=x.device) / (count - shift)).to(x)


def cat(*parts):
    return torch.cat(parts, -1)


def both(angles):
    return cat(angles.cos(), angles.sin())


TIMES, W = 300 * draw(3, seed=6).abs(), draw(20, seed=7)
EMBEDDINGS = {
    "ours": lambda m, t: unet.timestep_embedding(t, 40),
    "ours, of one sample": lambda m, t: unet.timestep_embedding(t[:1], 40),
    "ours, of two values": lambda m, t: unet.timestep_embedding(t, 2),
    "guided-diffusion's": lambda m, t: both(t[:, None] * frequencies_of(t)[None]),
    "DDPM's": lambda m, t: sinusoids(t, frequencies_of(t, shift=1)),
    "denoising-diffusion's": lambda m, t: (lambda e: cat(e.sin(), e.cos()))(t[:, None] * frequencies_of(t)[None, :]),
    "frequencies first": lambda m, t: both(frequencies_of(t) * t.unsqueeze(1)),
    "of a column": lambda m, t: both(t.reshape(-1, 1) * m.w),
    "of one sample's number": lambda m, t: both(t.mean() * m.w[None]),
    "scaled times": lambda m, t: both((1000 * t)[:, None] * frequencies_of(t)),
    "an outer product": lambda m, t: both(torch.outer(t, frequencies_of(t))),
    "a learned frequency": lambda m, t: both(t[:, None] * m.w[None, :] * 2 * math.pi),
    "k-diffusion's": lambda m, t: both(2 * math.pi * t[:, None] @ m.w[:, None].T),
    "scaled": lambda m, t: sinusoids(t, frequencies_of(t), scale=0.3),
    "flipped": lambda m, t: sinusoids(t, frequencies_of(t), flip=True),
    "flipped and scaled": lambda m, t: sinusoids(t, frequencies_of(t, shift=1), flip=True, scale=3),
    "flipped from the cosines": lambda m, t: (lambda e: cat(e[:, 20:], e[:, :20]))(both(t[:, None] * m.w)),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_of_timesteps(name):
    operators = run(EMBEDDINGS[name], TIMES, W)
    others = {"scaled times": ["aten.mul.Tensor"], "k-diffusion's": ["aten.mul.Tensor"]}
    others["of one sample's number"] = ["aten.mean"]
    assert operators == [*others.get(name, []), "timestep_embedding"]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("dim", "shift", "scale"), [(32, 1, 1), (32, 0, 1), (33, 0, 1), (7, 1, 250.0)])
def test_embeddings_of_diffusers(dim, shift, scale, flip):
    embeddings = pytest.importorskip("diffusers.models.embeddings")

    class Timesteps(nn.Module):
        def forward(self, t):
            return embeddings.get_timestep_embedding(t, dim, flip, shift, scale)

    fast = Accelerator(Timesteps().eval(), torch.float32)
    for t in (TIMES, torch.arange(3), TIMES.half()):
        torch.testing.assert_close(fast(t), Timesteps()(t), rtol=0, atol=0)
        operators = [step.operator for step in fast.executable((t,)).steps.steps]
        assert operators == ["timestep_embedding"] + ["aten.constant_pad_nd"] * (dim % 2)


@torch.no_grad()
def test_a_gpu_has_one_launch_for_it():
    pytest.importorskip("triton")
    from cmfast.engine.cuda.convolutions import Convolutions
    from cmfast.engine.cuda.rule import Rule
    from cmfast.engine.cuda.served import kernels

    device, dtype, arch = torch.device("meta"), torch.bfloat16, "sm_90"
    none = Convolutions(device, dtype, arch, lambda name, weight, backend: weight, Rule(arch))
    for t in (TIMES, torch.arange(3)):
        graph = capture(Function(lambda m, t: sinusoids(t, m.w, flip=True, scale=3), w=W), (t,))
        for rewrite in PASSES.values():
            rewrite(graph)
        steps = lower(graph, kernels(device, dtype, arch, none))
        assert [(step.operator, step.reason) for step in steps.steps] == [("timestep_embedding", "")]
        assert steps.outputs[0].dtype == torch.float32


def test_embeddings_in_either_order_of_the_same_angles():
    """Each is an embedding of its own; what is read of one in parts stays."""

    def function(m, t):
        y = both(t[:, None] * m.w)
        return cat(y, y[:, 20:], y[:, :20]) + cat(cat(y[:, 20:], y[:, :20]), y)

    assert run(function, TIMES, W).count("timestep_embedding") == 2


OTHER_EMBEDDINGS = {
    "other angles": lambda m, t: cat((t[:, None] * m.w).cos(), (t[:, None] * m.w * 1.5).sin()),
    "of two times": lambda m, t: cat((t[:, None] * m.w).cos(), ((t + 1)[:, None] * m.w).sin()),
    "values between": lambda m, t: (lambda a: cat(a.cos(), a, a.sin()))(t[:, None] * m.w),
    "cosines alone": lambda m, t: (lambda a: cat(a.cos(), a.cos()))(t[:, None] * m.w),
    "a sum": lambda m, t: (lambda a: a.cos() + a.sin())(t[:, None] * m.w),
    "one below the other": lambda m, t: (lambda a: torch.cat((a.cos(), a.sin())))(t[:, None] * m.w),
    "with a phase": lambda m, t: both(t[:, None] * m.w + 0.5),
    "read twice": lambda m, t: (lambda a: cat(a.cos(), a.sin()) + a.sin()[:, :1])(t[:, None] * m.w),
    "angles that are read": lambda m, t: (lambda a: cat(a.cos(), a.sin()) + a[:, :1])(t[:, None] * m.w),
    "two scales": lambda m, t: both(t[:, None] * m.w * 3 * 0.7),
    "of no constant": lambda m, t: both(t[:, None] * (t[None] + 1)),
    "of several features": lambda m, t: both(torch.stack((t, t + 1), 1) / 300 @ m.w.view(2, 10)),
    "of a matrix": lambda m, t: both(cat(t, t, t, t)[:10].expand(20, 10) * m.w[:, None])[:10],
    "of images": lambda m, t: both(t[:, None, None] * m.w.view(4, 5)),
}


@pytest.mark.parametrize("name", OTHER_EMBEDDINGS)
def test_other_sines_and_cosines_are_left_alone(name):
    assert "timestep_embedding" not in run(OTHER_EMBEDDINGS[name], TIMES, W)


OTHER_ORDERS = {
    "the same": lambda y: cat(y[:, :20], y[:, 20:]),
    "overlapping": lambda y: cat(y[:, 19:], y[:, :20]),
    "shorter": lambda y: cat(y[:, 20:], y[:, :19]),
    "one half twice": lambda y: cat(y[:, 20:], y[:, 20:]),
    "every other": lambda y: cat(y[:, 1::2], y[:, ::2]),
    "rows": lambda y: cat(y[2:], y[:2].reshape(1, -1)),
    "of two": lambda y: cat(y[:, 20:], (y + 1)[:, :20]),
}


@pytest.mark.parametrize("name", OTHER_ORDERS)
def test_other_parts_of_an_embedding_are_left_alone(name):
    found = run(lambda m, t: OTHER_ORDERS[name](both(t[:, None] * m.w)), TIMES, W)
    assert found.count("timestep_embedding") == 1
    assert len(found) > 1
