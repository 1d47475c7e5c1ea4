import json
import math
import os
import subprocess
import sys

import pytest
import torch
from cmfast.kernels import timestep_embedding
from hypothesis import given, settings
from hypothesis import strategies as st

from .backends import served
from .memory import guarded

#: N, F: a tile of frequencies, one more or less, several.
SHAPES = ((1, 96), (3, 128), (2, 129), (5, 1), (4, 300))


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def frequencies_of(count):
    return torch.exp(-math.log(10000.0) / count * torch.arange(count))


def ulp(y):
    """The distance from each value to the next float32."""
    return torch.nextafter(y.abs(), torch.tensor(2.0)) - y.abs()


def check(t, frequencies, backend, scale=1.0, sin_first=False):
    """Within two units of rounding of the sines and cosines of the angles that torch has."""
    y = timestep_embedding(t, frequencies, scale=scale, sin_first=sin_first, backend=backend)
    count = len(frequencies)
    assert y.shape == (len(t), 2 * count)
    assert y.dtype == torch.float32
    assert y.is_contiguous()
    angles = t[:, None].float() * frequencies[None] * scale
    assert angles.dtype == torch.float32
    halves = [angles.double().cos(), angles.double().sin()]
    expected = torch.cat(halves[::-1] if sin_first else halves, 1)
    assert ((y.double() - expected).abs() <= 2 * ulp(expected.float())).all()


@pytest.mark.parametrize("backend", served("timestep_embedding"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sin_first", [False, True], ids=["cos first", "sin first"])
def test_it_is_its_definition(sin_first, shape, backend):
    n, count = shape
    check(guarded(1000 * draw(n).abs()), guarded(frequencies_of(count)), backend, sin_first=sin_first)


@pytest.mark.parametrize("backend", served("timestep_embedding"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8], ids=str)
def test_dtypes_of_timesteps(dtype, backend):
    check((200 * draw(3).abs()).to(dtype), frequencies_of(40), backend)


@pytest.mark.parametrize("backend", served("timestep_embedding"))
def test_the_scale_is_applied_to_the_rounded_product(backend):
    t, frequencies = 1000 * draw(4), draw(200, seed=1)
    for scale in (1000.0, 2 * math.pi, -0.25, 0.0):
        check(t, frequencies, backend, scale)


@pytest.mark.parametrize("backend", served("timestep_embedding"))
def test_large_angles_of_every_quadrant(backend):
    """Up to 10⁶, both signs, and the float32 numbers about multiples of π/2, where one of the two is small."""
    near = torch.arange(2.0**20 * 2 / math.pi) if backend == "reference" else torch.arange(1.0, 6e5, 991)
    near = (near.double() * (math.pi / 2)).float()
    some = torch.logspace(-30, 6, 1000, base=10)
    for angles in (near, torch.nextafter(near, torch.tensor(torch.inf)), some, torch.tensor([0.0, 1e-42, 1e6])):
        check(torch.tensor([1.0, -1.0]), angles[angles <= 1e6], backend)


@pytest.mark.parametrize("backend", served("timestep_embedding"))
def test_what_is_no_number_gives_none(backend):
    y = timestep_embedding(torch.tensor([torch.nan, torch.inf, 1.0]), torch.tensor([1.0, 2.0]), backend=backend)
    assert y[:2].isnan().all()
    assert y[2].isfinite().all()


@pytest.mark.parametrize("backend", served("timestep_embedding"))
def test_views(backend):
    t, frequencies = 100 * draw(6, 4), draw(300, 2, seed=1)
    check(t[:, 1], frequencies[:, 0], backend)
    check(t[0, :1].expand(3), frequencies[::3, 1], backend)
    assert timestep_embedding(t[:0, 0], frequencies[:, 0], backend=backend).shape == (0, 600)
    assert timestep_embedding(t[0], frequencies[:0, 0], backend=backend).shape == (4, 0)


@pytest.mark.parametrize("backend", served("timestep_embedding"))
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 5), count=st.integers(1, 300), sin_first=st.booleans(), seed=st.integers(0, 100))
def test_drawn(backend, n, count, sin_first, seed):
    check(300 * draw(n, seed=seed), draw(count, seed=seed + 1), backend, 1 + seed / 7, sin_first)


def test_float64_is_served_in_float64():
    t, frequencies = 1000 * draw(3).double(), frequencies_of(20)
    for inputs in ((t, frequencies), (t.float(), frequencies.double())):
        y = timestep_embedding(*inputs)
        angles = inputs[0].double()[:, None] * frequencies.double()
        assert torch.equal(y, torch.cat((angles.cos(), angles.sin()), 1))


@pytest.mark.parametrize("backend", served("timestep_embedding"))
def test_opcheck(backend):
    for t in (draw(3), torch.arange(3)):
        torch.library.opcheck(torch.ops.cmfast.timestep_embedding.default, (t, draw(5, seed=1), 2.5, True, backend))


T, F = torch.ones(2), torch.ones(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: timestep_embedding(T[:, None], F), r"t must be .* got \[2, 1\] float32"),
        (lambda: timestep_embedding(T > 0, F), r"t must be .* got \[2\] bool"),
        (lambda: timestep_embedding(T + 1j, F), "t must be"),
        (lambda: timestep_embedding(T, F[None]), r"frequencies must be .* got \[1, 4\] float32"),
        (lambda: timestep_embedding(T, F.long()), "frequencies must be"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_there_are_no_gradients():
    with pytest.raises(RuntimeError, match="serves inference"):
        timestep_embedding(T.clone().requires_grad_(), F)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda t: timestep_embedding(t, F), (T,), (T,))


_FIGURES = """
import json
import torch
from cmfast.kernels.triton.static import inspect
from cmfast.kernels.triton.timestep_embedding import plan_timestep_embedding
rows = []
for dtype in (torch.float32, torch.int64):
    for count in (96, 33):
        t, frequencies = torch.empty(3, dtype=dtype, device="meta"), torch.empty(count, device="meta")
        (launch,), y = plan_timestep_embedding(t, frequencies, 1.0, False)
        rows.append(inspect(launch, "sm_90"))
print(json.dumps(rows))
"""


def test_it_is_one_launch_without_a_stack_frame():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _FIGURES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert all(row["stack_bytes"] == row["spill_bytes"] == 0 for row in rows)
    assert [row["store_bytes_min"] for row in rows] == [16, 4, 16, 4]
