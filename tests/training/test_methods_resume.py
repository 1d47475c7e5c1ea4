import pytest
import torch

from cmfast import ConsistencyModel, UNet
from cmfast.preconditioning import EDM
from cmfast.training import Dataset, LoopSettings, train
from cmfast.training.methods import METHODS

from ..fixture_files import tiny_config
from .tiny import same, weights

LOOP = LoopSettings(iterations=2, batch_size=4, learning_rate=1e-3, ema_decays=(), checkpoint_interval=1)


def make(name):
    """A method with a network that has dropout."""
    torch.manual_seed(0)
    config = tiny_config(channel_mult=(1,), attention_resolutions=(), dropout=0.2)
    source = ConsistencyModel(UNet(config), EDM())
    torch.nn.init.normal_(source.unet.out[2].weight, std=0.1)  # it is zero at first: nothing would be learned before it
    settings, method = METHODS[name]
    return method(method.student(source), settings(), 64, source.eval() if method.needs_teacher else None)


def test_a_processor_trains_channels_last(tmp_path):
    """Weights, gradients and moments; where the training fails, the weights are as they were."""
    method, seen = make("distillation"), []
    conv = method.model.unet.out[2]
    conv.register_forward_pre_hook(lambda module, given: seen.extend((given[0].stride(), module.weight.stride())))
    data = Dataset(torch.rand(4, 1, 8, 8), torch.arange(4))
    average = train(method, data, LoopSettings(iterations=1, batch_size=4, ema_decays=(0.5,))).averages["ema-0.5"]
    assert [stride[1] for stride in seen] == [1, 1]
    for model in (method.model, method.target, average):
        assert all(p.is_contiguous() for p in model.parameters())
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        train(method, data, LoopSettings(iterations=1, batch_size=4), out=tmp_path / "file")
    assert all(p.is_contiguous() for p in method.model.parameters())


@pytest.mark.parametrize("dims", [1, 3])
def test_sound_and_video_are_trained_too(dims):
    config = tiny_config(dims=dims, image_size=(8,) * dims, channel_mult=(1,), attention_resolutions=())
    method = METHODS["diffusion"][1](ConsistencyModel(UNet(config), EDM()), METHODS["diffusion"][0](), 1)
    before = [p.detach().clone() for p in method.model.parameters()]
    data = Dataset(torch.rand(4, 1, *(8,) * dims), torch.arange(4))
    trained = train(method, data, LoopSettings(iterations=1, batch_size=4, ema_decays=())).model
    assert any(not torch.equal(p, q) for p, q in zip(trained.parameters(), before, strict=True))
    assert all(p.is_contiguous() for p in trained.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_to_the_bit(tmp_path, name):
    generator = torch.Generator().manual_seed(1)
    data = Dataset(torch.rand(8, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(8) % 10)
    expected = weights(train(make(name), data, LOOP))

    def stop(i, loss):
        if i == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make(name), data, LOOP, out=tmp_path, progress=stop)
    seen = []
    found = train(make(name), data, LOOP, out=tmp_path, resume=True, progress=lambda i, loss: seen.append(i))
    assert seen == [1]
    assert same(weights(found), expected)
    assert all(value.is_contiguous() for value in weights(found).values())
    assert not same(weights(found), {f"model.{k}": v for k, v in make(name).model.state_dict().items()})
