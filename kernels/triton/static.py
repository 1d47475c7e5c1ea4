"""What the compilers make of the kernels, found without a GPU.

Each case of `shapes` is planned on tensors without memory, specialised as Triton's run time would specialise it for
16-byte-aligned tensors, and compiled for the architecture asked for. The figures are those of ptxas and nvdisasm, or of
the AMDGCN assembly, that the triton package carries.
"""

import dataclasses
import functools
import importlib.metadata
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .launch import Launch
from .shapes import Case, cases


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture's limits, and the GPU that stands for it in floor times.

    Attributes:
        backend: Triton's name of the compiler, "cuda" or "hip".
        arch: Triton's name of the architecture.
        warp_size: threads of a warp.
        gpu: the GPU of the floor times.
        bandwidth: of its memory, in bytes a second.
        matrix_flops: dense operations a second of its matrix units by dtype, with float32 sums.
        vector_flops: float32 operations a second outside them.
        shared_bytes: shared memory of a multiprocessor.
        reserved_bytes: what the driver takes of it for each block.
        max_warps: resident warps of a multiprocessor.
        max_blocks: resident blocks of a multiprocessor.
    """

    backend: str
    arch: int | str
    warp_size: int
    gpu: str
    bandwidth: float
    matrix_flops: dict[str, float]
    vector_flops: float
    shared_bytes: int
    reserved_bytes: int
    max_warps: int
    max_blocks: int


def _nvidia(arch: int, gpu: str, bandwidth: float, half: float, tf32: float, vector: float, *limits: int):
    matrix = {"float16": half, "bfloat16": half, "float32": tf32}
    shared, warps, blocks = limits
    return Architecture("cuda", arch, 32, gpu, bandwidth, matrix, vector, shared * 1024, 1024, warps, blocks)


# Limits: CUDA C++ Programming Guide 13.0, "Compute Capabilities"; AMD CDNA 3 ISA guide, section 3.
ARCHITECTURES = {
    # NVIDIA A100 80GB datasheet (2021)
    "sm_80": _nvidia(80, "A100 SXM 80GB", 2.039e12, 312e12, 156e12, 19.5e12, 164, 64, 32),
    # NVIDIA H100 datasheet (2023), dense rates
    "sm_90": _nvidia(90, "H100 SXM", 3.35e12, 989.4e12, 494.7e12, 66.9e12, 228, 64, 32),
    # NVIDIA HGX B200 datasheet (2025), an eighth of the board's dense rates
    "sm_100": _nvidia(100, "B200", 7.7e12, 2250e12, 1125e12, 75e12, 228, 64, 32),
    # NVIDIA RTX Blackwell GPU architecture whitepaper (2025), appendix A
    "sm_120": _nvidia(120, "RTX 5090", 1.792e12, 209.5e12, 104.8e12, 104.8e12, 100, 48, 24),
    # AMD Instinct MI300X datasheet (2023); 64 KB of LDS, 4 SIMDs of 8 waves
    "gfx942": Architecture(
        "hip",
        "gfx942",
        64,
        "MI300X",
        5.3e12,
        {"float16": 1307.4e12, "bfloat16": 1307.4e12, "float32": 163.4e12},
        163.4e12,
        64 * 1024,
        0,
        32,
        32,
    ),
}

#: Larger is worse, and smaller is worse: the figures that a change of the kernels may not spoil.
_LESS_IS_BETTER = ("spill_bytes", "stack_bytes", "shared_bytes")
_MORE_IS_BETTER = ("load_bytes", "store_bytes", "load_bytes_min", "store_bytes_min", "blocks_per_sm")
_KEY = ("op", "kernel", "arch", "shape", "layout", "form", "dtype")


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
    peak = target.matrix_flops[case.dtype] if figures["matrix_instructions"] else target.vector_flops
    return {
        "op": case.op,
        "kernel": launch.kernel.__name__,
        "backend": "triton",
        "arch": arch,
        "shape": case.shape,
        "layout": case.layout,
        "form": case.form,
        "dtype": case.dtype,
        "grid": list(launch.grid),
        "programs": functools.reduce(int.__mul__, launch.grid),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **figures,
        "blocks_per_sm": blocks_per_sm(target, figures["registers"], figures["shared_bytes"], launch.num_warps),
        "bytes": moved,
        "flops": flops,
        "gpu": target.gpu,
        "floor_us": round(max(moved / target.bandwidth, flops / peak) * 1e6, 3),
        "triton": importlib.metadata.version("triton"),
    }


def worse(new: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]]) -> list[str]:
    """Say what got worse in the rows of both reports: spills, stack, shared memory, widths, blocks, matrix units."""
    before = {tuple(r[k] for k in _KEY): r for r in old}
    found = []
    for after in new:
        key = tuple(after[k] for k in _KEY)
        if key not in before:
            continue
        was, name = before[key], " ".join(key)
        found += [f"{name}: {k} {was[k]} → {after[k]}" for k in _LESS_IS_BETTER if after[k] > was[k]]
        found += [f"{name}: {k} {was[k]} → {after[k]}" for k in _MORE_IS_BETTER if after[k] < was[k]]
        lost = set(was["matrix_instructions"]) - set(after["matrix_instructions"])
        found += [f"{name}: no {family} any more" for family in sorted(lost)]
    return found


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


def blocks_per_sm(target: Architecture, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Blocks that a multiprocessor (compute unit) holds at a time."""
    blocks = [target.max_blocks, target.max_warps // num_warps]
    if shared_bytes:
        blocks.append(target.shared_bytes // (shared_bytes + target.reserved_bytes))
    if target.backend == "cuda":  # 65,536 registers, given to warps in pieces of 256
        blocks.append(65536 // (-(-registers * 32 // 256) * 256) // num_warps)
    else:  # 512 registers a lane of each SIMD, given in pieces of 8
        blocks.append(4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8)) // num_warps)
    return min(blocks)


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
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def figure(pattern: str) -> int:
        return sum(int(n) for n in re.findall(pattern, log))

    accesses = re.findall(r"\b(LDG|LDGSTS|STG)((?:\.\w+)*)\s", sass)
    widths = {
        kind: [_sass_bytes(modifiers) for name, modifiers in accesses if name.startswith(kind)] for kind in ("LD", "ST")
    }
    bulk = {"LD": "UTMALDG", "ST": "UTMASTG"}  # the tensor memory accelerator moves whole tiles
    for kind, name in bulk.items():
        widths[kind] += [16] * len(re.findall(rf"\b{name}\b", sass))
    families = {"HMMA": r"\bHMMA\b", "HGMMA": r"\bHGMMA\b", "tcgen05": r"\bUTC\w*MMA\b"}
    return {
        "registers": figure(r"Used (\d+) registers"),
        "spill_bytes": figure(r"(\d+) bytes spill stores") + figure(r"(\d+) bytes spill loads"),
        "stack_bytes": figure(r"(\d+) bytes stack frame"),
        **_widths(widths["LD"], widths["ST"]),
        "matrix_instructions": _counts(families, sass),
    }


def _sass_bytes(modifiers: str) -> int:
    for name, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if name in modifiers.split("."):
            return size
    return 4


@functools.cache
def _amdgcn(assembly: str) -> dict[str, Any]:
    def figure(name: str) -> int:
        found = re.search(rf"\.{name}: +(\d+)", assembly)
        return int(found.group(1)) if found else 0

    size = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2}
    accesses = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(?:lds_)?(dwordx\d|[a-z]+)", assembly)
    widths = {kind: [size.get(width, 1) for name, width in accesses if name == kind] for kind in ("load", "store")}
    return {
        "registers": figure("vgpr_count"),
        # Scalar registers spill to lanes of vector registers, which moves nothing to memory.
        "spill_bytes": 4 * figure("vgpr_spill_count"),
        "stack_bytes": figure("private_segment_fixed_size"),
        **_widths(widths["load"], widths["store"]),
        "matrix_instructions": _counts({"MFMA": r"\bv_mfma_"}, assembly),
    }


def _widths(loads: list[int], stores: list[int]) -> dict[str, int]:
    return {
        "load_bytes": max(loads, default=0),
        "load_bytes_min": min(loads, default=0),
        "store_bytes": max(stores, default=0),
        "store_bytes_min": min(stores, default=0),
    }


def _counts(families: dict[str, str], text: str) -> dict[str, int]:
    return {name: n for name, pattern in families.items() if (n := len(re.findall(pattern, text)))}
