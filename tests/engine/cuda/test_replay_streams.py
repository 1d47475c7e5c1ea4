"""What a replay asks of torch.cuda, with stand-ins for it."""

import threading

import pytest
import torch

from cmfast.engine.cuda import executable as module
from cmfast.engine.cuda.replay import Replay

from .stand_in import Cuda, executable


class OnCpu(Replay):
    """Runs as on a GPU, with its inputs on the CPU."""

    def _places(self, inputs):
        return [torch.empty_like(torch.as_tensor(given)) for given in inputs]


@pytest.fixture
def cuda(monkeypatch):
    stand_in = Cuda([])
    stand_in.install(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: stand_in.log.append(f"{s.name} has the samples"))
    return stand_in


@pytest.fixture
def made(cuda):
    return executable(cuda, graphs=False)


@pytest.fixture
def replay(cuda, made):
    """Multiplies a row by 16, in two evaluations, and adds a number."""

    def function(number, x):
        (x,) = made([x])
        return made([x])[0] + number

    replay = OnCpu(made, function, torch.device("cuda:1"))
    cuda.launch = lambda: replay._samples.copy_(16 * replay._inputs[1] + replay._inputs[0])
    return replay


X = torch.tensor([1.0, 2.0, 3.0])
RUN = ["side waits for first", "on side", *["launch"] * 4, "first waits for side", "first has the samples"]


def test_the_first_call_runs_and_captures_and_later_ones_replay(cuda, replay):
    first = replay([1, X])
    assert first.equal(16 * X + 1)
    assert cuda.log == [*RUN, "capture"]
    cuda.log.clear()
    second = replay([2**40, -X])
    assert second.equal(-16 * X + 2**40)
    assert cuda.log == ["first waits for an event of side", "replay"]
    cuda.log.clear()
    assert replay([0, X]).equal(16 * X)
    assert cuda.log == ["replay"]
    assert first.equal(16 * X + 1)
    assert second.equal(-16 * X + 2**40)


def test_replays_and_evaluations_take_turns(cuda, replay, made):
    replay([1, X])
    replay([1, X])
    cuda.log.clear()
    cuda.current = "second"
    made([X])
    cuda.current = "third"
    replay([1, X])
    made([X])
    assert cuda.log == [
        "second waits for an event of first", "launch", "launch",
        "third waits for an event of second", "replay", "launch", "launch",
    ]  # fmt: skip


def test_what_a_replay_captured_lasts_no_longer_than_it(replay, made):
    replay([1, X])
    replay([1, X])
    assert made not in module._in_callers_graphs


def test_what_cannot_be_captured_runs_step_by_step(cuda, replay, caplog):
    cuda.broken = True
    assert replay([1, X]).equal(16 * X + 1)
    cuda.log.clear()
    for number in (2, 3):
        assert replay([number, -X]).equal(-16 * X + number)
    assert "replay" not in cuda.log
    assert "side waits for first" not in cuda.log
    assert "runs step by step: operation not permitted" in caplog.text
    assert len(caplog.records) == 1


def test_what_the_function_raises_is_raised_and_nothing_captured(cuda, replay):
    with pytest.raises(RuntimeError, match="must match"):
        replay([1, torch.ones(2)])
    assert "capture" not in cuda.log


def test_nothing_else_is_captured_meanwhile(cuda):
    made, other = executable(cuda, graphs=False), executable(cuda)
    thread = threading.Thread(target=lambda: other([X]), daemon=True)

    def function(x):
        if cuda.capturing:
            thread.start()
            thread.join(0.1)
            assert thread.is_alive()  # it waits, and has taken no turn that this capture waits for
            with other.turn():
                pass
        return made([x])[0]

    OnCpu(made, function, torch.device("cuda:1"))([X])
    thread.join(10)
    assert cuda.log.count("capture") == 2
