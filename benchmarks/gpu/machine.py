"""Stage a: the machine as found, and what it can do at most: copies, reads, matrix products, launches."""

import shutil
import subprocess

import torch

from cmfast.benchmarking import ceilings
from cmfast.environment import describe

from . import stage

_QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,compute_mode,mig.mode.current"
)


def cases(device, folder, until):
    """The environment, then each ceiling."""
    yield stage.Case("environment", lambda: [environment(device)])
    size = 1 << (12 if device.emulated else 30)  # bytes: much more than any cache
    for name, measure in (("copy", copy), ("read", read)):
        yield stage.Case(name, lambda measure=measure, name=name: [{"ceiling": name, **measure(device, size)}])
    for dtype in ("bfloat16", "float16", "float32"):
        yield stage.Case(f"product {dtype}", lambda dtype=dtype: [product(device, dtype)])
    yield stage.Case("launch", lambda: [launch(device)])


def environment(device) -> dict:
    """Versions and commit, the card and its clocks, the compiler of CUDA."""
    found = {**describe(), "card": device.properties.name if not device.emulated else "emulation on a CPU"}
    if not device.emulated:
        p = device.properties
        found |= {"multiprocessors": p.multi_processor_count, "cache_bytes": p.L2_cache_size, "memory": p.total_memory}
    found["nvidia-smi"] = _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv")
    found["nvcc"] = _output("nvcc", "--version")
    return found


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not here"
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()


def copy(device, size: int) -> dict:
    """Bytes a second of a copy within the memory, read and written."""
    times = device.replayed([ceilings.copy(device.name, size)] * 2)
    return {"us": times.median, "bytes_per_s": 2 * size / times.median * 1e6}


def read(device, size: int) -> dict:
    """Bytes a second that a sum reads."""
    times = device.replayed([ceilings.read(device.name, size)] * 2)
    return {"us": times.median, "bytes_per_s": size / times.median * 1e6}


def product(device, dtype: str) -> dict:
    """Operations a second of a product of random matrices."""
    n = 64 if device.emulated else 8192
    times = device.replayed([ceilings.product(device.name, dtype, n)] * 2)
    return {"ceiling": f"product {dtype}", "us": times.median, "flops_per_s": 2 * n**3 / times.median * 1e6}


def launch(device) -> dict:
    """Microseconds of the smallest kernel, each waiting for the last: one by one from Python, and in a graph."""
    x = torch.zeros(1, device=device.name)

    def many():
        for _ in range(200):
            x.add_(1)

    return {
        "ceiling": "launch",
        "from_python_us": device.called(many).median / 200,
        "in_a_graph_us": device.replayed([lambda: x.add_(1)] * 200).median,
    }


if __name__ == "__main__":
    stage.main("machine", cases)
