import torch

from cmfast.engine.steps import Step, Steps


def test_a_value_lives_from_its_step_to_its_last_reader():
    steps = Steps()
    first = steps.row(4)
    steps.add(Step("a", "a", print, (first,)))
    second, unread = steps.row(4), steps.row(4)
    steps.add(Step("b", "b", print, (second, {"x": first[2:]})))  # a view of it
    steps.add(Step("c", "c", print, (torch.zeros(3), second, 1.5)))
    steps.want([second])
    assert [(b.first, b.last) for b in map(steps.buffer, (first, second, unread))] == [
        (0, 1),
        (1, 3),
        (1, 1),
    ]
    assert steps.owns(first[1:])
    assert not steps.owns(torch.zeros(3))
