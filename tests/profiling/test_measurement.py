import itertools

import torch

from cmfast.profiling.measurement import fastest_in_turn, measure


def test_each_of_torchs_operators_took_as_long_as_when_it_was_fastest():
    device, large, small = torch.device("cpu"), torch.ones(800, 800), torch.ones(8, 8)
    turns = itertools.cycle([(large, small), (small, large)])
    measured = measure(lambda: None, {}, device, rounds=4, recorded=lambda: [x @ x for x in next(turns)])
    assert [operation.operator for operation in measured.recording.operations] == ["aten.mm", "aten.mm"]
    (alone,) = fastest_in_turn([lambda: large @ large], device)
    assert measured.recording.busy < 0.5 * alone


def test_calls_in_turn_have_as_many_rounds():
    calls = []
    fastest_in_turn([lambda: calls.append("a"), lambda: calls.append("b")], torch.device("cpu"), rounds=3)
    assert calls.count("a") == calls.count("b") >= 4
    first, second = fastest_in_turn([lambda: torch.ones(300, 300).mm(torch.ones(300, 300))] * 2, torch.device("cpu"))
    assert 0.5 < first / second < 2


def test_calls_of_other_operators_are_not_mixed():
    device, x = torch.device("cpu"), torch.ones(8, 8)
    turns = itertools.cycle([lambda: [x @ x for _ in range(40)], x.sin])
    recording = measure(lambda: None, {}, device, rounds=4, recorded=lambda: next(turns)()).recording
    assert [operation.operator for operation in recording.operations] == ["aten.sin"]
