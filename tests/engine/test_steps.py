import torch

from cmfast.engine.steps import Step, Steps


def test_images_are_given_with_their_channels_innermost():
    steps = Steps()
    for like in (torch.zeros(2, 3, 5), torch.zeros(2, 3, 5, 7), torch.zeros(2, 3, 5, 7, 4).bfloat16()):
        steps.give(like)
        assert steps.inputs[-1].shape == like.shape
        assert steps.inputs[-1].dtype == like.dtype
        assert steps.inputs[-1].stride(1) == 1
    for like in (torch.zeros(2, 3), torch.zeros(2, 3, 5, 7, dtype=torch.int64)):
        steps.give(like)
        assert steps.inputs[-1].is_contiguous()
        assert steps.inputs[-1].dtype == like.dtype
    assert all(x.is_meta for x in steps.inputs)


def test_a_value_lives_from_its_step_to_its_last_reader():
    steps = Steps()
    steps.give(torch.zeros(2, 3))
    first = steps.row(4)
    steps.add(Step("a", "a", print, (first, steps.inputs[0])))
    second, unread = steps.row(4), steps.row(4)
    steps.add(Step("b", "b", print, (second, {"x": first[2:]})))  # a view of it
    steps.add(Step("c", "c", print, (torch.zeros(3), second, 1.5)))
    steps.want([second])
    assert [(b.first, b.last) for b in map(steps.buffer, (steps.inputs[0], first, second, unread))] == [
        (-1, 0),
        (0, 1),
        (1, 3),
        (1, 1),
    ]
    assert steps.owns(first[1:])
    assert not steps.owns(torch.zeros(3))
