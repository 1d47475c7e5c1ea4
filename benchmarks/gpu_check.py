"""Everything that waits for an NVIDIA GPU, in one call: python benchmarks/gpu_check.py [--out report.json]

1. The operators' own tests on the device, for the cuda and the triton backend.
2. The CUDA kernels under compute-sanitizer (memory, races, barriers, uninitialised reads), where it is installed.
3. Each operator at the released networks' shapes, compared with its definition and then timed against torch, with the
   bandwidth or the arithmetic that it reaches, and the share of the GPU's that this is.

`--emulate` goes the same way on a machine without a GPU, on the CPU's emulation and a few small shapes: its times say
nothing. The exit status is 1 where anything failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from cmfast.kernels import backends, native, reference, shapes
from cmfast.kernels.static import ARCHITECTURES
from torch import Tensor
from torch.utils import _pytree as pytree

from cmfast.environment import describe

ROOT = Path(__file__).resolve().parents[1]
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
#: The tests that run under compute-sanitizer, which slows them many times.
SANITIZED = "cuda and (test_forms or test_large_shapes or (test_shapes and 65))"


def run(title: str, command: list[str], **environment: str) -> dict:
    print(f"\n== {title}: {' '.join(command)}", flush=True)
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    print("\n".join((done.stdout + done.stderr).strip().splitlines()[-15:]), flush=True)
    return {"title": title, "command": command, "ok": done.returncode == 0}


def conformance(emulate: bool) -> list[dict]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = []
    for backend in ("cuda", "triton"):
        some = " and (test_forms or test_one_key or test_variants)" if emulate else ""
        found.append(run(f"tests of {backend}", [*pytest, "tests/kernels", "-k", backend + some]))
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None or emulate:
        print("\n== compute-sanitizer is not run here")
        return found
    for tool in SANITIZER_TOOLS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest, "tests/kernels", "-k", SANITIZED]
        # Its own allocator would hide what lies outside a tensor.
        found.append(run(f"compute-sanitizer {tool}", command, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    return found


def real(tensor: Tensor, device: str) -> Tensor:
    """A tensor of normal values with the strides of one without memory."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    values = torch.randn(size, device=device).to(tensor.dtype)
    return values.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def arguments(call: shapes.Call, device: str) -> tuple:
    """The call's arguments with values; what a backward gets of its forward is the definition's."""
    values = pytree.tree_map_only(Tensor, lambda t: real(t, device), call.arguments)
    if call.op == "group_norm_backward":
        _, h, skip, groups, weight, bias, add, scale, shift, silu, *_ = values
        statistics = reference.group_norm(h, skip, groups, weight, bias, 1e-5, add, scale, shift, silu)[1:]
        values = (*values[:10], *statistics)
    if call.op == "attention_backward":
        grad, q, k, v, _, _, factor = values
        values = (grad, q, k, v, *reference.attention(q, k, v, factor), factor)
    return values


def torch_peer(call: shapes.Call, values: tuple):
    """What a network in plain torch would run: its own fused operators where it has any, else the definition."""
    if call.op == "attention":
        q, k, v, factor = values
        return lambda: F.scaled_dot_product_attention(q, k, v, scale=factor)
    if call.op == "group_norm":
        h, skip, groups, weight, bias, eps, add, scale, shift, silu = values

        def norm():
            x = h if skip is None else torch.cat((h, skip), 1)
            x = x if add is None else x + add[:, :, None, None]
            y = F.group_norm(x, groups, weight, bias, eps)
            y = y if scale is None else y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
            return F.silu(y) if silu else y

        return norm
    return lambda: getattr(reference, call.op)(*values)


def microseconds(function, emulate: bool) -> float:
    """The median time of a call; on a GPU, with a second cache's worth of writes between calls."""
    if emulate:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e6
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(5):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(30)]
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[len(events) // 2] * 1e3


def close(actual, expected) -> bool:
    """Is it the definition's result to a few roundings of its dtype? The tests are stricter."""
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    return all(
        (a.double() - e.double()).abs().max() <= 64 * torch.finfo(a.dtype).eps * (1 + e.double().abs().max())
        for a, e in pairs
    )


def architecture():
    """The limits of the GPU, as of its generation's in the static report."""
    if not torch.cuda.is_available():
        return None
    return ARCHITECTURES.get(f"sm_{torch.cuda.get_device_capability()[0]}0")


def timings(emulate: bool) -> list[dict]:
    device, target, rows = "cpu" if emulate else "cuda", architecture(), []
    known = [call for call in shapes.calls() if not emulate or _elements(call) <= 1 << 16]
    header = f"{'operator':26}{'shape':28}{'layout':7}{'form':24}{'dtype':10}{'backend':10}"
    header += f"{'µs':>10}{'GB/s':>9}{'TFLOP/s':>9}{'of peak':>9}"
    print(f"\n== timings on {target.gpu if target else 'no known GPU'}'s figures\n{header}", flush=True)
    for call in known:
        values = arguments(call, device)
        tensors = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
        expected = getattr(reference, call.op)(*values)
        served = {"torch": torch_peer(call, values)}
        for name in ("cuda", "triton"):
            if backends.available(name, call.op, tensors)[0]:
                served[name] = _bound(name, call.op, values)
        outputs = [t for t in pytree.tree_leaves(expected) if isinstance(t, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in (*tensors, *outputs))
        for name, function in served.items():
            ok = name == "torch" or close(function(), expected)
            taken = microseconds(function, emulate) if ok else float("nan")
            row = {
                **{k: getattr(call, k) for k in ("op", "shape", "layout", "form", "dtype")},
                "backend": name,
                "right": ok,
                "us": taken,
                "gb_per_s": moved / taken / 1e3,
                "tflop_per_s": sum(call.flops) / taken / 1e6,
            }
            if target:
                peak = target.matrix_flops[call.dtype] if call.op.startswith("attention") else target.vector_flops
                floor = max(moved / target.bandwidth, sum(call.flops) / peak) * 1e6
                row["share_of_peak"] = floor / taken
            rows.append(row)
            share = f"{row['share_of_peak']:9.0%}" if target else f"{'–':>9}"
            figures = f"{taken:10.1f}{row['gb_per_s']:9.0f}{row['tflop_per_s']:9.2f}{share}"
            state = figures if ok else "  WRONG: not the definition's result"
            case = f"{call.op:26}{call.shape:28}{call.layout:7}{call.form[:23]:24}{call.dtype:10}"
            print(f"{case}{name:10}{state}", flush=True)
    return rows


def _elements(call: shapes.Call) -> int:
    return sum(t.numel() for t in pytree.tree_leaves(call.arguments) if isinstance(t, Tensor))


def _bound(name: str, op: str, values: tuple):
    function = backends.resolve(op, (), name)
    return lambda: function(*values)


def emulation():
    """The module that the tests build, for CPU tensors."""
    sys.path.insert(0, str(ROOT))
    from tests.kernels.emulation import emulated

    return emulated()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulate", action="store_true", help="without a GPU, to see that this script works")
    parser.add_argument("--out", type=Path, help="write everything to this JSON file as well")
    options = parser.parse_args()
    if not options.emulate and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here; --emulate goes the same way without one")
    results = {"environment": describe(), "emulated": options.emulate, "checks": conformance(options.emulate)}
    if options.emulate:
        os.environ["CMFAST_GPU_ON_CPU"] = "1"
        with native.stand_in(emulation()):
            results["timings"] = timings(emulate=True)
    else:
        results["timings"] = timings(emulate=False)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    failed = [c["title"] for c in results["checks"] if not c["ok"]]
    failed += [f"{r['op']} {r['shape']} {r['dtype']} on {r['backend']}" for r in results["timings"] if not r["right"]]
    print("\nall is well" if not failed else "\nfailed: " + "; ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
