"""What nvcc made of the kernels: the machine code in the built extension, read without a GPU.

Each call of `shapes` is made on memory that is never touched, with its launches written down instead of being made: so
a row's grid, threads and dynamic shared memory are those of that call. Registers, stack and the widths of accesses are
read from the kernel's machine code by cuobjdump and nvdisasm, of the CUDA toolkit or of the triton package.
"""

import dataclasses
import functools
import importlib.util
import math
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import cuda, native
from ..shapes import Call, calls
from ..static import ARCHITECTURES, blocks_per_sm, floor_us, sass


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a kernel takes of a multiprocessor, and its instructions, as the columns of the report."""

    registers: int
    figures: dict[str, Any]


def report(arches: Sequence[str], ops: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield a row a launch of each call of the operators (None: of all) that is served, for each architecture."""
    for arch in arches:
        for call in served(ops):
            yield from rows(call, arch)


def served(ops: Sequence[str] | None = None) -> Iterator[Call]:
    """Yield the calls of the operators (None: all that have a kernel) that the kernels serve."""
    for call in calls(cuda.OPERATORS if ops is None else ops):
        if cuda.serves(call.op, call.arguments)[0]:
            yield call


def architectures() -> list[str]:
    """Those that the extension has machine code for."""
    return [arch for arch in ARCHITECTURES if arch in native.cuda().build_info()["architectures"].split(", ")]


def rows(call: Call, arch: str) -> Iterator[dict[str, Any]]:
    """Yield the figures of each launch of a call. Bytes are those of the call's tensors, each moved once."""
    target = ARCHITECTURES[arch]
    # As long as nothing is written to it, memory that is asked for is not taken.
    arguments = pytree.tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype), call.arguments
    )
    outputs: list[Any] = []
    with native.planning(int(arch.removeprefix("sm_"))):
        launches = native.cuda().planned(lambda: outputs.append(getattr(cuda, call.op)(*arguments)))
    tensors = [t for t in pytree.tree_leaves((arguments, outputs)) if isinstance(t, Tensor)]
    moved = sum(t.numel() * t.element_size() for t in tensors)
    for (offset, grid, threads, shared, cluster), flops in zip(launches, _flops(call, len(launches)), strict=True):
        name = _host_functions()[offset]
        kernel = _kernels(arch)[name]
        yield {
            "op": call.op,
            "kernel": _readable(name),
            "backend": "cuda",
            "arch": arch,
            "shape": call.shape,
            "layout": call.layout,
            "form": call.form,
            "dtype": call.dtype,
            "grid": list(grid),
            "programs": math.prod(grid),
            "num_warps": -(-threads // 32),
            "cluster": cluster,
            "registers": kernel.registers,
            **kernel.figures,
            "shared_bytes": shared,
            "blocks_per_sm": blocks_per_sm(target, kernel.registers, shared, -(-threads // 32)),
            "bytes": moved,
            "flops": flops,
            "gpu": target.gpu,
            "floor_us": floor_us(target, call.dtype, moved, flops, bool(kernel.figures["matrix_instructions"])),
            "compiler": native.cuda().build_info()["compiler"],
        }


def _flops(call: Call, launches: int) -> tuple[int, ...]:
    """Those of each launch; of a convolution's all are the first one's, and what follows adds up and merges."""
    return (sum(call.flops), *(0,) * (launches - 1)) if call.op == "conv2d" else call.flops_of(launches)


@functools.cache
def _kernels(arch: str) -> dict[str, Kernel]:
    """The kernels of the extension for an architecture, by their names less the marks of their files."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        _tool("cuobjdump", "-xelf", f".{arch}.cubin", str(_extension()), cwd=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            usage = _tool("cuobjdump", "-res-usage", str(cubin))
            code = _sections(_tool("nvdisasm", "-c", str(cubin)))
            for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
                local = [_local_bytes(width) for width in re.findall(r"\b(?:LDL|STL)((?:\.\w+)*)\s", code[name])]
                # The build fails where a register is spilled: all that could be here is an array that is indexed.
                figures = {"spill_bytes": sum(local), "stack_bytes": int(stack), **sass(code[name])}
                found[_without_file(name)] = Kernel(int(registers), figures)
    return found


def _extension() -> Path:
    return Path(str(native.cuda().__file__)).resolve()


def _local_bytes(modifiers: str) -> int:
    return 16 if "128" in modifiers else 8 if "64" in modifiers else 4


def _sections(disassembly: str) -> dict[str, str]:
    """The code of each kernel."""
    parts = re.split(r"^\s*\.section\s+\.text\.([^,\s]+),.*$", disassembly, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _without_file(mangled: str) -> str:
    """A mangled name with one mark for every unnamed namespace, which nvcc names after the file.

    The host's compiler marks what is in one with an L besides.
    """
    while match := re.search(r"(\d+)_GLOBAL__N_", mangled):
        start = match.start(1) + len(match[1])
        mangled = mangled[: match.start(1)] + "UNNAMED" + mangled[start + int(match[1]) :]
    return mangled.replace("UNNAMEDL", "UNNAMED")


def _readable(name: str) -> str:
    """The kernel's own name and template arguments, of a mangled name."""
    match = re.search(r"UNNAMED(\d+)|_ZN6cmfast(\d+)", name)
    if match is None:
        return name
    start = match.end()
    end = start + int(match[1] or match[2])
    arguments = re.match(r"I(.*?)E(?:E|v)", name[end:])
    if arguments is None:
        return name[start:end]
    words = {"f": "float", "6__half": "half", "13__nv_bfloat16": "bfloat16", "S2_": "", "S1_": ""}
    pattern = r"6__half|13__nv_bfloat16|f|S\d?_|L[ijb]\d+E?"
    found: list[str] = []
    for word in re.findall(pattern, arguments[1] + "E"):
        found.append(word[2:].rstrip("E") if word.startswith("L") else words.get(word) or found[-1])
    return f"{name[start:end]}<{', '.join(found)}>"


@functools.cache
def _host_functions() -> dict[int, str]:
    """The names of the extension's functions by their offsets, from its symbol table."""
    data = _extension().read_bytes()
    (sections,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, sections + i * size) for i in range(count)]
    found = {}
    for _, kind, _, _, start, length, link, _, _, entry in headers:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = headers[link][4]
        for at in range(start, start + length, entry):
            name, info, _, _, value = struct.unpack_from("<IBBHQ", data, at)
            if info & 15 == 2:  # STT_FUNC
                end = data.index(b"\0", names + name)
                found[value] = _without_file(data[names + name : end].decode())
    if not found:
        raise RuntimeError(f"{_extension()} has no symbol table: it was stripped, and its kernels have no names")
    return found


def _tool(name: str, *arguments: str, cwd: str | None = None) -> str:
    command = [_find(name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


@functools.cache
def _find(name: str) -> str:
    """A program of the CUDA toolkit, or of the triton package."""
    places: list[str | None] = [None]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    for place in places:
        if found := shutil.which(name, path=place):
            return found
    raise FileNotFoundError(f'{name} was not found: install the CUDA toolkit, or pip install "cmfast[triton]"')
