import pytest
import torch

from cmfast.profiling import ceilings
from cmfast.profiling.ceilings import Ceilings, measure_ceilings

CPU = torch.device("cpu")


def test_the_least_time_is_of_what_takes_longer():
    found = Ceilings(bandwidth=100.0, copied=10, products={"float32": 1000.0, "bfloat16": 2000.0})
    assert found.floor(0, 50, None) == 0.5
    assert found.floor(4000, 50, torch.float32) == 4.0
    assert found.floor(4000, 50, torch.bfloat16) == 2.0
    assert found.floor(4000, 500, torch.bfloat16) == 5.0
    assert found.floor(4000, 50, torch.int8) == 0.5  # nothing is known of these products


def test_rates_follow_from_seconds(monkeypatch):
    calls = []

    def best(call, device):
        call()
        calls.append(device)
        return 0.5

    monkeypatch.setattr(ceilings, "_best", best)
    found = measure_ceilings(CPU, [torch.float64], 1 << 22)
    assert found.copied == 1 << 22
    assert found.bandwidth == 2 * (1 << 22)
    assert found.products == {
        "float32": max(2 * 512**2 * 32**2, 2 * 128**3) / 0.5,  # by the kernels or by torch
        "float64": 2 * 128**3 / 0.5,
    }
    assert set(calls) == {CPU}


def test_narrow_products_are_no_slower_than_those_of_float32():
    found = measure_ceilings(CPU, [torch.bfloat16, torch.float16, torch.int16], 0)
    assert found.copied == pytest.approx(1 << 20, rel=0.01)
    assert {"float32", "bfloat16", "float16"} <= found.products.keys()
    assert found.products["bfloat16"] >= found.products["float32"] <= found.products["float16"]
