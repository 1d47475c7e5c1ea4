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
