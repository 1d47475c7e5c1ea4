"""Programs of recorded calls, and what else the engine takes from the CPU kernels."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cmfast.kernels import native
from cmfast.kernels.cpu import memory
from cmfast.kernels.cpu.attention import launch_attention
from cmfast.kernels.cpu.group_norm import launch_group_norm
from cmfast.kernels.cpu.moments import launch_moments

from .backends import served

BACKENDS = [parameter for parameter in served("group_norm") if parameter.values[0] == "cpu"]


def images(*shape):
    return [torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2)]


def record(*calls):
    program = native.cpu().Program()
    with native.recording(program):
        for launch, *arguments in calls:
            launch(*arguments)
    return program


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_program_does_what_its_calls_do(threads, backend):
    x, y = images(2, 12, 9, 7)
    statistics = [torch.empty(2, 3) for _ in range(2)]
    moments, expected = torch.full((2, 2, 12), torch.nan), torch.empty(2, 2, 12)
    norm = (launch_group_norm, y, *statistics, x, None, 3, None, None, 1e-5, None, None, None, True)
    kept = y.clone()
    program = record(norm, (launch_moments, moments, y))
    assert torch.equal(y, kept)  # nothing ran yet
    for factor in (1, 3):
        x.mul_(factor)
        assert program.run(threads) == ""
        found = y.clone()
        norm[0](*norm[1:])
        assert torch.equal(found, y)
        launch_moments(expected, y)
        assert torch.equal(moments, expected)
    assert len(program) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_call_is_timed(backend):
    x, y = images(1, 8, 40, 40)
    moments = torch.empty(1, 2, 8)
    error, seconds = record((launch_moments, moments, x), (launch_moments, moments, y)).time(1)
    assert error == ""
    assert len(seconds) == 2
    assert all(0 < s < 1 for s in seconds)


def test_a_program_stops_at_an_error():
    x, y = images(1, 8, 4, 4)
    statistics = [torch.empty(1, 3) for _ in range(2)]
    moments = torch.full((1, 2, 8), torch.nan)
    wrong = (launch_group_norm, y, *statistics, x, None, 3, None, None, 1e-5, None, None, None, False)
    program = record(wrong, (launch_moments, moments, x))
    assert "number of groups must divide" in program.run(1)
    assert moments.isnan().all()


def test_recording_ends_with_the_block():
    q = torch.randn(1, 1, 4, 8)
    out, lse = torch.empty_like(q), torch.empty(1, 1, 4)
    program = native.cpu().Program()
    with pytest.raises(ZeroDivisionError), native.recording(program):
        raise ZeroDivisionError
    launch_attention(out, lse, q, q, q, 1.0)
    assert len(program) == 0
    torch.testing.assert_close(out, torch.softmax(q @ q.mT, -1) @ q)


def checksum(tensor, threads=1):
    return native.cpu().checksum(tensor.data_ptr(), tensor.nbytes, threads)


def test_a_checksum_notices_every_bit():
    data = torch.randint(0, 256, (3000,), dtype=torch.uint8)
    expected = checksum(data)
    for at in [*range(0, 3000, 97), 2999]:
        for bit in range(8):
            data[at] ^= 1 << bit
            assert checksum(data) != expected
            data[at] ^= 1 << bit
    assert checksum(data) == expected
    swapped = data.clone()
    swapped[:64], swapped[64:128] = data[64:128], data[:64]
    assert len({expected, checksum(swapped), checksum(data[1:]), checksum(data[:-1]), checksum(data[:0])}) == 5


def test_a_checksum_is_the_same_by_any_number_of_threads():
    data = torch.randint(0, 256, (3_500_001,), dtype=torch.uint8)
    assert len({checksum(data, threads) for threads in (1, 2, 3)}) == 1
    data[-1] ^= 1
    assert checksum(data, 2) != checksum(data[:-1], 2)


def flags_of(address):
    """What the system notes of the memory at an address, where it is the process's own and not shared."""
    of_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        place = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ", line)
        if place:
            of_ours = int(place[1], 16) <= address < int(place[2], 16) and place[3] == "rw-p"
        elif of_ours and line.startswith("VmFlags:"):
            return {*line.split()[1:]}
    return set()


def test_a_mapped_file_is_the_same_while_it_moves_to_huge_pages(tmp_path):
    data = torch.randint(0, 256, ((70 << 20) + 12345,), dtype=torch.uint8)
    (tmp_path / "data").write_bytes(data.numpy().data)
    size = data.numel() - 7
    file = native.cpu().MappedFile(str(tmp_path / "data"), size)
    mapped, expected, found = torch.frombuffer(file, dtype=torch.uint8), checksum(data[:size]), set()
    while not file.settled:
        found.add(checksum(mapped))
    found.add(checksum(mapped))
    assert found == {expected}
    page = 2 << 20
    first, last = mapped.data_ptr() + page - 1, mapped.data_ptr() + size
    assert file.moved in (0, (last // page - first // page) * page)  # nothing where the system has no huge pages
    (tmp_path / "data").unlink()
    del file
    assert torch.equal(mapped, data[:size])


def test_a_file_is_given_up_while_it_moves(tmp_path):
    (tmp_path / "data").write_bytes(bytes(70 << 20))
    for _ in range(10):
        assert memory.mapped(tmp_path / "data", 70 << 20)[-1] == 0


def test_a_process_ends_while_a_file_moves(tmp_path):
    (tmp_path / "data").write_bytes(bytes(300 << 20))
    code = f"""
import os, sys, pathlib
from cmfast.kernels.cpu import memory
mapped = memory.mapped(pathlib.Path({str(tmp_path / "data")!r}), 300 << 20)
if not os.fork():
    assert mapped[-1] == 0
    sys.exit()
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_mapped_file_is_there_at_once(tmp_path):
    (tmp_path / "data").write_bytes(bytes(range(256)) * 20_000)
    mapped = memory.mapped(tmp_path / "data", 256 * 19_999)
    assert torch.equal(mapped, torch.arange(256, dtype=torch.uint8).repeat(19_999))
    with pytest.raises(EOFError, match="data ends too soon: it has 5120000 bytes, 5120001 were expected"):
        memory.mapped(tmp_path / "data", 5120001)
    with pytest.raises(OSError, match=str(tmp_path)):
        memory.mapped(tmp_path, 1)


@pytest.mark.parametrize("size", [0, 1, 4095, (4 << 20) - 1, 4 << 20, (9 << 20) + 12])
def test_memory(size):
    tensor = memory.empty(size)
    assert tensor.dtype == torch.uint8
    assert tensor.numel() == size
    tensor.fill_(7)
    assert tensor.data_ptr() % (2 << 20 if size >= 4 << 20 else 64) == 0
    if size >= 4 << 20 and Path("/proc/self/smaps").exists():
        assert flags_of(tensor.data_ptr()) >= {"hg"}
    kept = tensor[-3:]
    del tensor
    assert (kept == 7).all()
