import copy
import math

import pytest
import torch

from cmfast.training import DivergedError, LoopSettings, loop, train
from cmfast.training.averages import averaged_copy
from cmfast.training.batches import Batches
from cmfast.training.draws import UpdateDraws
from cmfast.training.learning_rate import learning_rate

from .tiny import Denoising, data, same, weights

SHORT = LoopSettings(iterations=5, batch_size=4, learning_rate=0.01, ema_decays=(0.5, 0.9), log_interval=2)


def changed(settings=SHORT, **fields):
    return LoopSettings(**{**settings.__dict__, **fields})


def close(first, second, bound):
    """Whether weights are equal to the bound, which is far less than training moves them."""
    return all((v - second[k]).abs().max() <= bound for k, v in first.items() if v.is_floating_point())


def test_training_is_what_it_says():
    """Against one that is written by hand: Adam's updates of clipped gradients, averages, the target network."""
    losses, method = [], Denoising()
    settings = changed(gradient_clip=0.15, schedule="linear-tail", linear_tail=0.8, warmup=2, seed=3)
    found = train(method, data(), settings, progress=lambda i, loss: losses.append((i, loss)))
    assert found.model is method.model
    assert not found.model.training

    method = Denoising()
    model, batches = method.model.train(), Batches(data(), 4, 3)
    averages = {decay: averaged_copy(model) for decay in (0.5, 0.9)}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    expected, norms = [], []
    for i in range(5):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (i + 1) / 2) * min(1, (1 - i / 5) / 0.8)
        optimizer.zero_grad()
        loss = method.loss(*batches.part(i), UpdateDraws(3, i), i).mean()
        loss.backward()
        norms.append(math.sqrt(sum(p.grad.square().sum() for p in model.parameters())))
        for p in model.parameters():
            p.grad *= min(1, 0.15 / norms[-1])
        optimizer.step()
        method.updated(i + 1)
        for decay, average in averages.items():
            d = min(decay, (i + 1) / (i + 11))
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.data.copy_(d * a + (1 - d) * p)
        expected.append(loss.item())
    assert min(norms) < 0.15 < max(norms)
    assert losses == [(i, pytest.approx(loss, rel=1e-5)) for i, loss in enumerate(expected)]
    assert list(found.averages) == ["ema-0.5", "ema-0.9"]
    for mine, other in ((found.model, model), *zip(found.averages.values(), averages.values(), strict=True)):
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert found.averages["ema-0.5"].unet.seen == found.model.unet.seen == 5


@pytest.mark.parametrize(
    ("optimizer", "kind"), [("radam", torch.optim.RAdam), ("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)]
)
def test_optimizers(optimizer, kind):
    settings = changed(iterations=7, optimizer=optimizer, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, ema_decays=())
    found = train(Denoising(), data(), settings)
    method = Denoising()
    optimizer = kind(method.model.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    method.model.train()
    for i in range(7):
        optimizer.zero_grad()
        method.loss(*Batches(data(), 4, 0).part(i), UpdateDraws(0, i), i).mean().backward()
        optimizer.step()
        method.updated(i)
    assert close(found.model.state_dict(), method.model.state_dict(), 1e-6)
    assert found.averages == {}


def test_an_accumulated_batch_is_the_whole_batch():
    plain = weights(train(Denoising(), data(), SHORT))
    parts = weights(train(Denoising(), data(), changed(accumulation=4)))
    start = Denoising().model.state_dict()
    assert max((plain[f"model.{k}"] - v).abs().max() for k, v in start.items() if "seen" not in k) > 0.01
    assert all((v - parts[k]).abs().max() < 1e-6 for k, v in plain.items() if "seen" not in k)


def test_autocast_is_near_float32():
    seen = []
    method = Denoising()
    method.model.unet.first.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    rounded = weights(train(method, data(), changed(autocast="bfloat16", iterations=2)))
    plain = weights(train(Denoising(), data(), changed(iterations=2)))
    assert set(seen) == {torch.bfloat16}
    assert not same(rounded, plain)
    assert close(rounded, plain, 0.02)
    assert all(v.dtype == torch.float32 for v in rounded.values())


def test_a_compiled_network_is_trained_as_it_is():
    method, calls = Denoising(), []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.register_backend(backend, name="counted")
    compiled = weights(train(method, data(), changed(compile="counted", iterations=3)))
    assert calls
    assert method.model.unet._compiled_call_impl is None
    assert close(compiled, weights(train(Denoising(), data(), changed(iterations=3))), 1e-6)


def test_dropout_is_the_runs_own():
    """It is a function of the seed and the update; torch's generator is left as it was."""
    torch.manual_seed(5)
    first = weights(train(Denoising(dropout=0.5), data(), SHORT))
    after = torch.rand(1)
    torch.manual_seed(6)
    assert same(weights(train(Denoising(dropout=0.5), data(), SHORT)), first)
    assert not same(weights(train(Denoising(dropout=0.5), data(), changed(seed=1))), first)
    torch.manual_seed(0)  # which the method's constructor leaves
    Denoising()
    assert torch.equal(torch.rand(1), after)


def test_an_unconditional_model_gets_no_labels():
    method = Denoising(num_classes=None)
    classes = copy.deepcopy(method.model.unet.classes.weight)
    found = train(method, data(), SHORT)
    assert torch.equal(found.model.unet.classes.weight, classes)


@pytest.mark.parametrize("interval", [1, 100])
def test_a_training_that_diverges_stops(tmp_path, interval):
    settings = changed(iterations=10, checkpoint_interval=2, keep_checkpoints=9, log_interval=interval)
    with pytest.raises(DivergedError, match=r"diverged at update 5: its loss is nan, .* gradient nan"):
        train(Denoising(poison=5), data(), settings, out=tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000000002", "000000004"]


def test_where_the_host_would_wait_losses_are_read_with_the_log(tmp_path, monkeypatch):
    """As on a GPU: progress has the mean since the last row, and what is not finite is found before it is written."""
    losses, means = [], []
    train(Denoising(), data(), SHORT, progress=lambda i, loss: losses.append(loss))
    monkeypatch.setattr(loop, "_on_host", lambda model: False)
    train(Denoising(), data(), SHORT, progress=lambda i, loss: means.append((i, loss)))
    pairs = [(1, sum(losses[:2]) / 2), (3, sum(losses[2:4]) / 2), (4, losses[4])]
    assert means == [(i, pytest.approx(mean)) for i, mean in pairs]
    method = Denoising(poison=3)
    settings = changed(iterations=10, checkpoint_interval=6, log_interval=100)
    with pytest.raises(DivergedError, match="diverged at update 3: its loss is nan"):
        train(method, data(), settings, out=tmp_path)
    assert method.count == 6
    assert not (tmp_path / "checkpoints").exists()


def test_schedules_of_the_learning_rate():
    def rates(**fields):
        settings = LoopSettings(iterations=8, learning_rate=2.0, **fields)
        return [learning_rate(settings, i) for i in range(8)]

    assert rates() == [2.0] * 8
    assert rates(schedule="cosine") == pytest.approx([1 + math.cos(math.pi * i / 8) for i in range(8)])
    assert rates(schedule="linear-tail", linear_tail=0.25) == pytest.approx([2.0] * 7 + [1.0])
    expected = [2 / math.sqrt(max(1, i / 2)) for i in range(8)]
    assert rates(schedule="inverse-square-root", decay_start=2) == pytest.approx(expected)
    assert rates(warmup=4) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iterations": 0}, "iterations: expected at least 1, got 0"),
        ({"optimizer": "sgd"}, "optimizer: expected one of adam, radam, adamw, got 'sgd'"),
        ({"schedule": "step"}, "schedule: expected one of constant, cosine"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\)"),
        ({"autocast": "float16"}, 'autocast: expected None or "bfloat16"'),
        ({"seed": 1 << 32}, "seed"),
        ({"power_ema": (0.3,)}, "power_ema"),
        ({"ema_decays": (1.0,)}, "ema_decays"),
        ({"gradient_clip": 0.0}, "gradient_clip: expected positive"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        LoopSettings(**fields)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3, processes times accumulation, got 4"):
        train(Denoising(), data(), changed(accumulation=3))
    larger = data()._replace(images=torch.zeros(10, 1, 8, 8))
    with pytest.raises(ValueError, match=r"the model is for samples \[1, 4, 4\], and the data has \[1, 8, 8\]"):
        train(Denoising(), larger, SHORT)
    with pytest.raises(ValueError, match="the model has 2 classes, and the data has label 9"):
        train(Denoising(), data()._replace(labels=torch.arange(10)), SHORT)
    method = Denoising()
    method.model.bfloat16()
    with pytest.raises(ValueError, match=r"float32 weights, got torch\.bfloat16"):
        train(method, data(), SHORT)
    method = Denoising()
    method.loss = lambda images, labels, draws, iteration: method.model.unet.first.weight.sum()
    with pytest.raises(ValueError, match=r"a loss for each of 4 samples, got \[\]"):
        train(method, data(), SHORT)
    method = Denoising()
    method.model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(method, data(), SHORT)


def test_data_without_classes_is_told_of():
    said = []
    train(
        Denoising(), data()._replace(labels=torch.zeros(len(data().labels), dtype=torch.int64)), SHORT, say=said.append
    )
    assert said == ["the data has no classes, and the model has 2: all samples are trained as class 0"]
    train(Denoising(), data(), SHORT, say=said.append)
    assert len(said) == 1
