"""Students start from the same function, or the nearest one."""

import math

import pytest
import torch

import cmfast
from cmfast import ConsistencyModel
from cmfast.preconditioning import EDM, Consistency, Flow, TrigFlow
from cmfast.training.methods.conversion import consistency_from, trigflow_from

from ...fixture_files import tiny_unet
from .toy import model


def test_an_edm_model_is_a_trigflow_model(tmp_path):
    """D_trigflow(x, sigma) = D_edm(x / cos t, sigma), after a visit to the disk too."""
    source = ConsistencyModel(tiny_unet(), EDM(sigma_data=0.6))
    converted = trigflow_from(source)
    assert converted.preconditioning == TrigFlow(sigma_data=0.6, network="edm")
    converted.save(tmp_path / "converted")
    x, labels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    sigma = torch.tensor([0.01, 0.6, 50.0])
    cos = torch.cos(torch.atan(sigma / 0.6)).reshape(3, 1, 1, 1)
    with torch.no_grad():
        expected = source.denoise(x, sigma, labels)
        for found in (converted, cmfast.load(tmp_path / "converted")):
            torch.testing.assert_close(found.denoise(cos * x, sigma, labels), expected, rtol=1e-4, atol=1e-5)
    assert converted.sample(2, steps=2).shape == (2, 1, 8, 8)


def test_a_trigflow_model_stays_one():
    source = model(TrigFlow(sigma_max=20.0))
    converted = trigflow_from(source)
    assert converted.preconditioning == source.preconditioning
    assert torch.equal(converted.unet.w, source.unet.w)
    assert converted.unet.w is not source.unet.w


def test_an_edm_model_is_nearly_a_consistency_model():
    source = model(EDM())
    converted = consistency_from(source)
    x, labels = torch.full((2, 1, 2, 2), 0.5).double(), torch.tensor([0, 1])
    sigma = torch.tensor([0.2, 80.0]).double()
    with torch.no_grad():
        a, b = (m.denoise(x, sigma, labels) for m in (source, converted))
    assert 0 < (a - b).abs().max() < 0.002 / 0.2
    frozen = model(EDM()).requires_grad_(False)
    assert consistency_from(frozen).unet.w.requires_grad
    assert not frozen.unet.w.requires_grad


@pytest.mark.parametrize(("convert", "given"), [(trigflow_from, Consistency()), (consistency_from, Flow())])
def test_what_cannot_be_converted(convert, given):
    with pytest.raises(ValueError, match=f"{convert.__name__}: expected .* got {type(given).__name__}"):
        convert(model(given))


def test_network_of_trigflow():
    with pytest.raises(ValueError, match='network must be "trigflow" or "edm", got \'other\''):
        TrigFlow(network="other")
    a, b, c_in, c_noise = TrigFlow(network="edm").coefficients(3.0)
    t = math.atan(3.0 / 0.5)
    assert (a, b, c_in, c_noise) == pytest.approx((math.cos(t), 0.5 * math.sin(t), 2.0, 250 * math.log(3.0)))
