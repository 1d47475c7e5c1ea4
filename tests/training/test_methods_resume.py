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
    assert not same(weights(found), {f"model.{k}": v for k, v in make(name).model.state_dict().items()})
