import pytest
import torch

from cmfast.engine import Accelerator

from ..networks import network


@pytest.fixture(scope="module")
def made():
    unet, inputs = network("film")
    return Accelerator(unet, torch.float32).executable(inputs), inputs


def test_every_step_is_timed_in_order(made):
    executable, inputs = made
    timed = executable.time(inputs, [torch.bfloat16])
    assert [step.step for step in timed.steps] == executable.steps.steps
    assert all(step.seconds > 0 for step in timed.steps)
    assert timed.filling > 0 < timed.giving
    assert torch.equal(timed.outputs[0], executable(inputs, [torch.bfloat16])[0])


def test_outputs_have_the_dtypes_that_are_asked_for(made):
    executable, inputs = made
    (plain,) = executable(inputs)
    assert executable.dtypes == [plain.dtype] == [torch.float32]
    (half,) = executable(inputs, [torch.bfloat16])
    assert torch.equal(half, plain.bfloat16())


def test_what_the_kernels_say_is_raised(made, monkeypatch):
    executable, inputs = made

    class Broken:
        def run(self, threads):
            return "out of luck"

        def time(self, threads):
            return "out of luck", []

    monkeypatch.setattr(executable, "_segments", [(Broken(), [])])
    for call in (executable, executable.time):
        with pytest.raises(RuntimeError, match=r"cmfast\._cpu: out of luck"):
            call(inputs)
