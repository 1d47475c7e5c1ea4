"""What the compilers make of the kernels, found without a GPU.

Each case of `shapes` is planned on tensors without memory, specialised as Triton's run time would specialise it for
16-byte-aligned tensors, and compiled for the architecture asked for. The figures are those of ptxas and nvdisasm, or of
the AMDGCN assembly, that the triton package carries.
"""

import functools
import importlib.metadata
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..static import ARCHITECTURES, blocks_per_sm, counts, floor_us, sass, widths
from .launch import Launch
from .shapes import Case, cases


def report(arches: Sequence[str], ops: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield a row a launch of each case of the operators (None: all of them), compiled for each architecture."""
    for arch in arches:
        for case in cases(arch, ops):
            yield from rows(case, arch)


def rows(case: Case, arch: str) -> Iterator[dict[str, Any]]:
    """Yield the figures of each launch of a case."""
    for launch, flops in zip(case.launches, case.flops, strict=True):
        yield _row(case, launch, flops, arch)


def _row(case: Case, launch: Launch, flops: int, arch: str) -> dict[str, Any]:
    # Spills and stack are a thread's, in bytes; shared memory is a block's.
    target = ARCHITECTURES[arch]
    figures = inspect(launch, arch)
    moved = sum(t.numel() * t.element_size() for t in {id(t): t for t in launch.args if isinstance(t, Tensor)}.values())
    return {
        "op": case.call.op,
        "kernel": launch.kernel.__name__,
        "backend": "triton",
        "arch": arch,
        "shape": case.call.shape,
        "layout": case.call.layout,
        "form": case.call.form,
        "dtype": case.call.dtype,
        "grid": list(launch.grid),
        "programs": functools.reduce(int.__mul__, launch.grid),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **figures,
        "blocks_per_sm": blocks_per_sm(target, figures["registers"], figures["shared_bytes"], launch.num_warps),
        "bytes": moved,
        "flops": flops,
        "gpu": target.gpu,
        "floor_us": floor_us(target, case.call.dtype, moved, flops, bool(figures["matrix_instructions"])),
        "triton": importlib.metadata.version("triton"),
    }


def compile_launch(launch: Launch, arch: str):
    """Compile a launch for an architecture with the specialisations that its arguments would get at run time."""
    from triton.compiler import compile

    source, gpu, options = specialize(launch, arch)
    return compile(source, target=gpu, options=options)


def specialize(launch: Launch, arch: str) -> tuple[Any, Any, dict[str, Any]]:
    """What Triton's run time would compile for a launch: the source with its types and constants, target, options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if not isinstance(launch.kernel, JITFunction):
        raise RuntimeError("Triton's interpreter is on, and it compiles nothing: unset TRITON_INTERPRET")
    target = ARCHITECTURES[arch]
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(gpu)
    # The run time's own binder: a tensor without memory has address 0, which is aligned.
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    keywords = {**launch.constants, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bound, specialization, options = bind(*launch.args, **keywords)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, keywords, bound, specialization, options
    )
    return ASTSource(launch.kernel, signature, constants, attributes), gpu, options.__dict__


def inspect(launch: Launch, arch: str) -> dict[str, Any]:
    """Registers, spills, stack, shared memory, access widths and matrix instructions of a launch's code."""
    compiled = compile_launch(launch, arch)
    shared = {"shared_bytes": compiled.metadata.shared}
    if ARCHITECTURES[arch].backend == "hip":
        return {**_amdgcn(compiled.asm["amdgcn"]), **shared}
    return {**_ptx(compiled.asm["ptx"], ARCHITECTURES[arch].arch), **shared}


@functools.cache
def _ptx(ptx: str, arch: int) -> dict[str, Any]:
    from triton import knobs

    ptxas = knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        # As Triton calls it, with -v for the spills: its own log is not kept.
        options = ["-v", "--regAllocOptLevel=2", f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"]
        command = [ptxas.path, *options, str(source), "-o", str(binary)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        command = [knobs.nvidia.nvdisasm.path, "-c", str(binary)]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def figure(pattern: str) -> int:
        return sum(int(n) for n in re.findall(pattern, log))

    return {
        "registers": figure(r"Used (\d+) registers"),
        "spill_bytes": figure(r"(\d+) bytes spill stores") + figure(r"(\d+) bytes spill loads"),
        "stack_bytes": figure(r"(\d+) bytes stack frame"),
        **sass(code),
    }


@functools.cache
def _amdgcn(assembly: str) -> dict[str, Any]:
    def figure(name: str) -> int:
        found = re.search(rf"\.{name}: +(\d+)", assembly)
        return int(found.group(1)) if found else 0

    size = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2}
    accesses = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(?:lds_)?(dwordx\d|[a-z]+)", assembly)
    found = {kind: [size.get(width, 1) for name, width in accesses if name == kind] for kind in ("load", "store")}
    return {
        "registers": figure("vgpr_count"),
        # Scalar registers spill to lanes of vector registers, which moves nothing to memory.
        "spill_bytes": 4 * figure("vgpr_spill_count"),
        "stack_bytes": figure("private_segment_fixed_size"),
        **widths(found["load"], found["store"]),
        "matrix_instructions": counts({"MFMA": r"\bv_mfma_"}, assembly),
    }
