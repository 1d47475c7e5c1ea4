"""What the static reports share: the architectures, the reading of machine code, and what counts as worse."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch


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


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A card: what a plan's least times follow from.

    Attributes:
        arch: its architecture, as kernels are planned for it.
        bandwidth: of its memory, in bytes a second.
        limits: the rates of its architecture's GPU above.
    """

    arch: str
    bandwidth: float
    limits: Architecture

    def flops(self, products: torch.dtype | None) -> float:
        """Operations a second: of products of this dtype on matrix units, or (None) outside them.

        Products of float32 are three of tf32 on NVIDIA's.
        """
        if products is None:
            return self.limits.vector_flops
        thirds = 3 if products == torch.float32 and self.limits.backend == "cuda" else 1
        return self.limits.matrix_flops[str(products).removeprefix("torch.")] / thirds


#: The cards that evaluations can be planned for.
GPUS = {
    "H100": Gpu("sm_90", 3.35e12, ARCHITECTURES["sm_90"]),
    "H200": Gpu("sm_90", 4.8e12, ARCHITECTURES["sm_90"]),  # NVIDIA H200 datasheet (2023)
    "A100": Gpu("sm_80", 2.039e12, ARCHITECTURES["sm_80"]),
    "B200": Gpu("sm_100", 7.7e12, ARCHITECTURES["sm_100"]),
    # NVIDIA Ada GPU architecture whitepaper (2022), appendix A
    "RTX4090": Gpu("sm_89", 1.008e12, _nvidia(89, "RTX 4090", 1.008e12, 165.2e12, 82.6e12, 82.6e12, 100, 48, 24)),
    "MI300X": Gpu("gfx942", 5.3e12, ARCHITECTURES["gfx942"]),
}

#: Larger is worse, and smaller is worse: the figures that a change of the kernels may not spoil.
_LESS_IS_BETTER = ("spill_bytes", "stack_bytes", "shared_bytes")
_MORE_IS_BETTER = ("load_bytes", "store_bytes", "load_bytes_min", "store_bytes_min", "blocks_per_sm")
#: What each version of the compiler decides anew.
_OF_A_COMPILER = ("shared_bytes", "blocks_per_sm")
_KEY = ("op", "kernel", "arch", "shape", "layout", "form", "dtype")


def worse(new: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]]) -> list[str]:
    """Say what got worse in the rows of both reports: spills, stack, shared memory, widths, blocks, matrix units.

    Shared memory and blocks are compared where both rows are of the same version of Triton.
    """
    before = {tuple(r[k] for k in _KEY): r for r in old}
    found = []
    for after in new:
        key = tuple(after[k] for k in _KEY)
        if key not in before:
            continue
        was, name = before[key], " ".join(key)
        skipped = _OF_A_COMPILER if after.get("triton") != was.get("triton") else ()
        spoilt = [k for k in _LESS_IS_BETTER if after[k] > was[k]] + [k for k in _MORE_IS_BETTER if after[k] < was[k]]
        found += [f"{name}: {k} {was[k]} → {after[k]}" for k in spoilt if k not in skipped]
        lost = set(was["matrix_instructions"]) - set(after["matrix_instructions"])
        found += [f"{name}: no {family} any more" for family in sorted(lost)]
    return found


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


def floor_us(target: Architecture, dtype: str, moved: int, flops: int, matrix: bool) -> float:
    """The time that the bytes or the operations take on the architecture's GPU, whichever is longer."""
    peak = target.matrix_flops[dtype] if matrix else target.vector_flops
    return round(max(moved / target.bandwidth, flops / peak) * 1e6, 3)


def sass(code: str) -> dict[str, Any]:
    """Widths of the global accesses and counts of the matrix instructions of NVIDIA's machine code."""
    accesses = re.findall(r"\b(LDG|LDGSTS|STG)((?:\.\w+)*)\s", code)
    found = {
        kind: [sass_bytes(modifiers) for name, modifiers in accesses if name.startswith(kind)] for kind in ("LD", "ST")
    }
    bulk = {"LD": "UTMALDG", "ST": "UTMASTG"}  # the tensor memory accelerator moves whole tiles
    for kind, name in bulk.items():
        found[kind] += [16] * len(re.findall(rf"\b{name}\b", code))
    families = {"HMMA": r"\bHMMA\b", "HGMMA": r"\bHGMMA\b", "tcgen05": r"\bUTC\w*MMA\b"}
    return {**widths(found["LD"], found["ST"]), "matrix_instructions": counts(families, code)}


def sass_bytes(modifiers: str) -> int:
    """The bytes of an access, by the modifiers of its instruction."""
    for name, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if name in modifiers.split("."):
            return size
    return 4


def widths(loads: list[int], stores: list[int]) -> dict[str, int]:
    """The widest and the narrowest access of each kind; 0 where there is none."""
    return {
        "load_bytes": max(loads, default=0),
        "load_bytes_min": min(loads, default=0),
        "store_bytes": max(stores, default=0),
        "store_bytes_min": min(stores, default=0),
    }


def counts(families: dict[str, str], text: str) -> dict[str, int]:
    """How often each pattern occurs, of those that do."""
    return {name: n for name, pattern in families.items() if (n := len(re.findall(pattern, text)))}
