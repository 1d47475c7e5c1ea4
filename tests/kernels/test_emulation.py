"""The emulation of a GPU (csrc/emulation): what it computes, and that it notices what a GPU would hide."""

import ctypes
import mmap
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from . import emulation

pytestmark = pytest.mark.skipif(bool(emulation.missing()), reason=emulation.missing())

unsanitized = pytest.mark.skipif(emulation.sanitizes(), reason="the address sanitizer ends the process")
SOURCE = emulation.HERE / "emulated_kernels.cu"


@pytest.fixture(scope="module", params=["assembly", "ucontext"])
def kernels(request):
    """The kernels of emulated_kernels.cu, with each way of switching between threads."""
    folder = emulation.folder() / request.param
    target = folder / f"emulated_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    options = ["-DCMFAST_PORTABLE_FIBERS"] if request.param == "ucontext" else []
    emulation.toolchain().build_emulation(
        target,
        folder,
        sanitize=emulation.sanitizes(),
        module=target.name.split(".")[0],
        bindings=SOURCE,
        kernels=[],
        options=options,
    )
    return emulation.load("emulated_kernels", target)


@pytest.fixture(autouse=True)
def _as_it_was(kernels):
    yield
    kernels.set_schedule(0)
    kernels.set_fault("", 0)


@pytest.fixture(params=[*emulation.SCHEDULES, 3])
def schedule(request, kernels):
    kernels.set_schedule(request.param)
    return request.param


def fault(kernels, number):
    kernels.set_fault(SOURCE.name, number)


def poison(*shape):
    return torch.full(shape, -1.0)


@pytest.mark.parametrize("threads", [32, 256])
def test_a_barrier_and_its_removal(kernels, schedule, threads):
    x, y = torch.arange(threads, dtype=torch.float32), poison(threads)
    assert kernels.reverse(x.data_ptr(), y.data_ptr(), threads, False) == ""
    assert torch.equal(y, x.flip(0))
    fault(kernels, 1)
    assert kernels.reverse(x.data_ptr(), y.data_ptr(), threads, False) == ""
    assert y.isnan().any()


def test_lanes_of_a_warp_are_not_in_step(kernels, schedule):
    x, y = torch.arange(32.0), poison(32)
    assert kernels.reverse(x.data_ptr(), y.data_ptr(), 32, True) == ""
    assert torch.equal(y, x.flip(0))
    fault(kernels, 2)
    assert kernels.reverse(x.data_ptr(), y.data_ptr(), 32, True) == ""
    assert y.isnan().any()


def line(text):
    """The number of the first line of the kernels with the text."""
    return next(i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if text in line)


@pytest.mark.parametrize("threads", [1, 40, 63])
def test_divergent_barriers_name_the_line(kernels, schedule, threads):
    y = poison(64)
    message = kernels.skips_a_barrier(y.data_ptr(), threads)
    assert f"emulated_kernels.cu:{line('< threads) __syncthreads()')}: divergent barrier" in message
    assert "of block (" in message
    assert kernels.skips_a_barrier(y.data_ptr(), 64) == ""  # the next launch is as good as new
    assert (y == 1).all()


def test_threads_that_wait_in_different_places(kernels, schedule):
    message = kernels.waits_in_two_places(0)
    first = line("if (threadIdx.x < 32) {") + 1
    assert "divergent barrier: other threads wait at emulated_kernels.cu" in message
    assert all(f":{number}" in message for number in (first, first + 2))
    message = kernels.waits_in_two_places(1)
    assert "__syncwarp: the calling lane is not in the mask" in message or "divergent barrier" in message


def test_shared_memory_is_poisoned_for_every_block(kernels, schedule):
    y = poison(4 * 64)
    assert kernels.reads_first(y.data_ptr()) == ""
    assert y.isnan().all()


def test_copies_arrive_at_their_wait(kernels, schedule):
    x, y = torch.arange(256.0), poison(256)
    assert kernels.copies(x.data_ptr(), y.data_ptr(), 1, True) == ""
    assert torch.equal(y, x)
    assert kernels.copies(0, y.data_ptr(), 1, False) == ""
    assert (y == 0).all()
    fault(kernels, 3)
    assert "cp.async that it has not waited for" in kernels.copies(x.data_ptr(), y.data_ptr(), 1, True)


@pytest.mark.parametrize("read", [0, 2])
def test_a_copy_that_is_read_before_its_wait(kernels, read):
    for seed, some, none in ((0, False, True), (1, True, False), (2, True, True)):
        kernels.set_schedule(seed)
        x, y = torch.arange(256.0), poison(256)
        message = kernels.copies(x.data_ptr(), y.data_ptr(), read, True)
        assert ("has not waited for" in message) == (read == 2)
        if read == 0:
            assert (~y.isnan()).any() == some
            assert y.isnan().any() == none


def test_a_wait_leaves_the_younger_groups_in_flight(kernels):
    x, y = torch.arange(8.0), poison(8)
    assert kernels.copies_two_groups(x.data_ptr(), y.data_ptr()) == ""
    assert torch.equal(y[:4], x[:4])
    assert y[4:].isnan().all()


def test_a_copy_may_come_at_once(kernels):
    x, y = torch.zeros(4), poison(64)
    kernels.set_schedule(1)
    assert kernels.copies_over(x.data_ptr(), y.data_ptr()) == ""
    assert (y == 0).any()


@unsanitized
@pytest.mark.parametrize("i", [1024, -1, -1024, 1 << 40])
def test_bad_addresses_end_the_launch_and_not_the_process(kernels, i):
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None).mprotect
    for forbidden in (start, start + 2 * page):
        assert protect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0
    message = kernels.writes_at(start + page, i)
    assert "which is no memory" in message
    assert "of block (0, 0, 0)" in message
    assert kernels.writes_at(start + page, 5) == ""
    assert ctypes.c_float.from_address(start + page + 20).value == 1.0
    for forbidden in (start, start + 2 * page):
        protect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE)


@unsanitized
def test_writes_behind_the_shared_memory(kernels):
    assert kernels.writes_shared(64, 15) == ""
    assert "wrote behind its 64 bytes of shared memory" in kernels.writes_shared(64, 16)


_OVERRUN = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import emulated_kernels as kernels
x = torch.zeros(4)
print(kernels.writes_at(x.data_ptr(), 4) if sys.argv[2] == "global" else kernels.writes_shared(64, 16))
"""


@pytest.mark.skipif(not emulation.sanitizes(), reason="make sanitize")
@pytest.mark.parametrize(("space", "finding"), [("global", "heap-buffer-overflow"), ("shared", "use-after-poison")])
def test_the_sanitizer_ends_the_process(kernels, space, finding):
    command = [sys.executable, "-c", _OVERRUN, str(Path(kernels.__file__).parent), space]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"AddressSanitizer: {finding}" in done.stderr


@unsanitized
def test_a_stack_that_overflows(kernels):
    x = torch.zeros(4)
    assert "stack overflowed" in kernels.overflows_its_stack(x.data_ptr())


def test_vectors_are_aligned(kernels):
    x, y = torch.arange(8.0), poison(8)
    assert kernels.loads_a_vector(x.data_ptr(), y.data_ptr() + 16) == ""
    assert torch.equal(y[4:], x[:4])
    expected = f"emulated_kernels.cu:{line('load_vector<float, 4>(in)')}: misaligned access of 16 bytes"
    assert expected in kernels.loads_a_vector(x.data_ptr() + 4, y.data_ptr())
    assert "misaligned" in kernels.loads_a_vector(x.data_ptr(), y.data_ptr() + 8)


def test_shuffles_and_votes(kernels, schedule):
    x, y = torch.randint(0, 100, (32,), dtype=torch.int32), torch.empty(12, 32, dtype=torch.int32)
    assert kernels.shuffles(x.data_ptr(), y.data_ptr()) == ""
    lane = torch.arange(32)
    segment = lane // 8 * 8
    sources = [
        torch.full((32,), 5),
        segment + (lane + 3) % 8,
        lane ^ 6,
        torch.where((lane ^ 12) >= segment + 8, lane, lane ^ 12),
        torch.where(lane + 3 < 32, lane + 3, lane),
        torch.where(lane % 8 + 3 < 8, lane + 3, lane),
        torch.where(lane >= 3, lane - 3, lane),
        torch.where(lane % 8 >= 3, lane - 3, lane),
    ]
    assert torch.equal(y[:8], torch.stack([x[source] for source in sources]))
    ballot = sum(1 << i for i in range(32) if x[i] & 1)
    assert (y[8] & 0xFFFFFFFF).unique().tolist() == [ballot - (1 << 32 if ballot >> 31 else 0)]
    assert y[9].unique().tolist() == [int((x == 7).any())]
    assert y[10].unique().tolist() == [1]
    assert torch.equal(y[11], x[lane ^ 1])


def test_masks_are_checked(kernels, schedule):
    assert kernels.shuffles_outside_its_mask(0xFFFFFFFF, 32) == ""
    assert "the calling lane is not in the mask" in kernels.shuffles_outside_its_mask(1, 32)
    assert "lanes that are not there" in kernels.shuffles_outside_its_mask(0xFFFFFFFF, 31)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_instructions(kernels, schedule, dtype):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, n, generator=g).to(dtype) for n in (16, 8))
    d = torch.randn(16, 8, generator=g)
    expected = d.double() + a.double() @ b.double()
    assert kernels.multiply(dtype == torch.float16, a.data_ptr(), b.data_ptr(), d.data_ptr()) == ""
    torch.testing.assert_close(d.double(), expected, rtol=1e-6, atol=1e-5)


def test_clusters_read_each_other(kernels, schedule):
    y = poison(8, 64)
    assert kernels.neighbours(y.data_ptr(), True) == ""
    block = torch.arange(8)
    assert torch.equal(y, (block // 4 * 4 + (block + 1) % 4)[:, None] * 100.0 + torch.arange(64))
    assert "of a block that has ended" in kernels.neighbours(y.data_ptr(), False)
    fault(kernels, 4)
    message = kernels.neighbours(y.data_ptr(), True)
    assert message or y.isnan().any()


def test_schedules(kernels):
    def order(seed):
        kernels.set_schedule(seed)
        counter, found = torch.zeros(1, dtype=torch.int32), torch.empty(192, dtype=torch.int32)
        assert kernels.tickets(counter.data_ptr(), found.data_ptr()) == ""
        assert sorted(found.tolist()) == list(range(192))
        return found.tolist()

    assert order(0) == list(range(192))
    assert order(1) == list(range(191, -1, -1))
    assert order(2) == order(2)
    assert len({tuple(order(seed)) for seed in range(6)}) == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions(kernels, dtype):
    narrow = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype)
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=g).to(torch.int32).view(torch.float32)
    between = (narrow[:-1].float() + narrow[1:].float()) / 2  # ties
    near = torch.nextafter(between, torch.tensor(float("inf")))
    x = torch.cat([narrow.float(), drawn, between, between[:1], near, near[:1]])
    y, wide = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    half = dtype == torch.float16
    assert kernels.convert(half, x.data_ptr(), y.data_ptr(), wide.data_ptr(), x.numel() // 256) == ""
    expected = x.to(dtype)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit()[~y.isnan()], expected.signbit()[~y.isnan()])
    torch.testing.assert_close(wide, expected.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1025, 4, 1), "1 to 1024 threads"),
        ((0, 32, 4, 1), "a grid has"),
        ((1, 32, 1 << 20, 1), "bytes of shared memory"),
        ((8, 32, 4, 16), "a cluster has"),
        ((6, 32, 4, 4), "divides the grid"),
    ],
)
def test_launches_that_a_gpu_refuses(kernels, shape, message):
    assert message in kernels.empty(*shape)
    assert kernels.empty(8, 32, 4, 4) == ""
