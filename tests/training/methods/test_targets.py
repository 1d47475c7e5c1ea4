"""Both evaluations of a pair drop the same."""

import torch

from cmfast.training.methods.targets import same_dropout


def test_dropout_is_that_of_the_evaluation_that_follows():
    x = torch.ones(4, 50, requires_grad=True)
    torch.manual_seed(0)
    with same_dropout(x):
        first = torch.nn.functional.dropout(x)
    second, third = (torch.nn.functional.dropout(x) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not first.requires_grad
    assert second.requires_grad


def test_the_evaluation_that_follows_has_gradients_under_autocast():
    """torch 2.9 keeps weights that it has cast without gradients, and would take them again."""
    layer, x = torch.nn.Linear(8, 8), torch.ones(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        with same_dropout(x):
            first = layer(x)
        second = layer(x)
    second.float().sum().backward()
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert layer.weight.grad.abs().sum() > 0
