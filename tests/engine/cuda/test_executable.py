"""What runs on a GPU, with stand-ins for what torch.cuda has."""

import pytest
import torch

from cmfast.engine.cuda import executable as module
from cmfast.engine.cuda.executable import ALIGNMENT, Executable

from .stand_in import Cuda, doubling, executable


@pytest.fixture
def cuda(monkeypatch):
    stand_in = Cuda([])
    stand_in.install(monkeypatch)
    return stand_in


X = torch.tensor([1.0, 2.0, 3.0])
CAPTURED = ["side waits for first", "on side", "launch", "launch", "first waits for side", "capture"]


def test_the_first_call_captures_and_all_replay(cuda):
    made = executable(cuda)
    assert made.steps.buffers[0].offset == made.steps.buffers[2].offset  # the input is overwritten
    assert made([X])[0].equal(4 * X)
    assert cuda.log == [*CAPTURED, "replay"]
    cuda.log.clear()
    assert made([-X])[0].equal(-4 * X)
    assert cuda.log == ["replay"]


def test_a_graph_shares_no_memory_of_cublas(cuda):
    """It is given back before a capture, whose graph gets its own, and after it, so that nothing else gets that."""
    executable(cuda)([X])
    assert cuda.workspaces == [len(CAPTURED) - 1, len(CAPTURED)]


def test_without_graphs_the_steps_are_launched(cuda):
    made = executable(cuda, graphs=False)
    for _ in range(2):
        assert made([X])[0].equal(4 * X)
    assert cuda.log == ["launch"] * 4


def test_what_cannot_be_captured_is_launched(cuda, caplog):
    cuda.broken = True
    made = executable(cuda)
    for _ in range(2):
        assert made([X])[0].equal(4 * X)
    assert cuda.log.count("replay") == 0
    assert "launched step by step: operation not permitted" in caplog.text
    assert cuda.current == "first"
    assert len(caplog.records) == 1


def test_another_stream_waits_for_the_last_evaluation(cuda):
    made = executable(cuda)
    made([X])
    cuda.log.clear()
    made([X])
    cuda.current = "second"
    made([X])
    made([X])
    assert cuda.log == ["replay", "second waits for an event of first", "replay", "replay"]


def test_within_a_capture_of_the_callers_the_steps_are_launched(cuda):
    made = executable(cuda)
    made([X])
    cuda.log.clear()
    cuda.capturing, cuda.current = True, "callers"
    assert made([X])[0].equal(4 * X)
    assert cuda.log == ["launch"] * 2
    assert made in module._in_callers_graphs  # which have its addresses
    module._in_callers_graphs.discard(made)


def test_the_allocator_waits_for_every_stream_that_has_used_the_memory(cuda, monkeypatch):
    made = executable(cuda, graphs=False)
    noted = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda t, stream: noted.append((t.untyped_storage().data_ptr(), stream.name))
    )
    for current in ("first", "first", "second", "first"):
        cuda.current = current
        made([X])
    assert {stream for _, stream in noted} == {"first", "second"}
    assert len(noted) == len(set(noted))
    assert (made._values.untyped_storage().data_ptr(), "second") in noted


def test_an_evaluation_that_raises_is_waited_for(cuda):
    made = executable(cuda, graphs=False)

    def fail(*_):
        raise RuntimeError("in the middle")

    made._calls.append((fail, ()))
    with pytest.raises(RuntimeError, match="in the middle"):
        made([X])
    del made._calls[-1]
    cuda.log.clear()
    cuda.current = "second"
    made([X])
    assert cuda.log[0] == "second waits for an event of first"


def test_steps_are_timed_between_events(cuda):
    made = executable(cuda)
    timed = made.time([X], [torch.float16])
    assert [(step.name, seconds) for step, seconds in timed.steps] == [("a", 1.0), ("b", 1.0)]
    assert (timed.filling, timed.giving) == (1.0, 1.0)
    assert timed.outputs[0].equal(4 * X.half())
    # What is measured was compiled before; Nsight shows the names of what is measured.
    measured = ["push a block", "push double", "launch", "pop", "push double", "launch", "pop", "pop"]
    assert cuda.log == ["launch", "launch", "sleep", *measured]


def test_values_lie_apart_and_outputs_have_the_dtypes_asked_for():
    made = Executable(doubling(), {}, [torch.float32], torch.device("cpu"))
    assert all(buffer.offset % ALIGNMENT == 0 for buffer in made.steps.buffers)
    assert made.bytes == 2 * ALIGNMENT
    (out,), (half,) = made([X]), made([X], [torch.float16])
    assert (out.dtype, half.dtype) == (torch.float32, torch.float16)
    assert out.equal(4 * X)
    assert half.equal(4 * X.half())
