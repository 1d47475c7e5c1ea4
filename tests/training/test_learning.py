import pytest
import torch

from cmfast import ConsistencyModel, UNet
from cmfast.preconditioning import EDM, Consistency
from cmfast.training import Dataset, LoopSettings
from cmfast.training.methods.diffusion import DiffusionSettings
from cmfast.training.methods.distillation import DistillationSettings
from cmfast.training.recipe import Stage
from cmfast.training.recipes import train_stage

from ..fixture_files import tiny_config


@pytest.fixture(scope="module")
def trained():
    """A teacher of 60 iterations on two blurred classes; enough to see that it learns."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    images = (labels * 1.2 - 0.6).reshape(-1, 1, 1, 1) + 0.1 * torch.randn(64, 1, 8, 8, generator=generator)
    data, losses = Dataset(images, labels), []
    torch.manual_seed(0)
    model = ConsistencyModel(UNet(tiny_config(channel_mult=(1,), attention_resolutions=(), num_classes=2)), EDM())
    loop = LoopSettings(iterations=60, batch_size=16, learning_rate=3e-3, schedule="cosine")
    stage = Stage("diffusion", DiffusionSettings(), loop)
    return train_stage(stage, model, data, progress=lambda i, loss: losses.append(loss)), data, losses


def test_diffusion_training_learns(trained):
    teacher, data, losses = trained
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    samples = teacher.sample(8, class_labels=data.labels[:8], steps=6)
    assert ((samples.mean((1, 2, 3)) > 0) == (data.labels[:8] == 1)).all()


def test_distillation_gives_a_one_step_model(trained):
    (teacher, data, _), losses = trained, []
    loop = LoopSettings(
        iterations=25, batch_size=16, learning_rate=5e-4, schedule="linear-tail", ema_decays=(0.9,), ema_warmup=False
    )
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    stage = Stage("distillation", DistillationSettings(), loop)
    student = train_stage(stage, teacher, data, teacher, lambda i, loss: losses.append(loss))
    assert student.preconditioning == Consistency()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert sum(losses[-5:]) < sum(losses[:5])
    samples = student.sample(8, class_labels=data.labels[:8])
    assert ((samples.mean((1, 2, 3)) > 0) == (data.labels[:8] == 1)).all()
    assert not any(m.training for m in (*teacher.modules(), *student.modules()))
