"""What a call of a CUDA launcher costs the host, without the kernel: python benchmarks/launch_overhead.py

A launcher that does nothing is called through kernels/native.py with the arguments that a real one gets, and the
consistency step is planned without being launched. Microseconds, the best of several runs; needs cmfast._cuda, no GPU.
"""

import timeit

import torch
from cmfast.kernels import backends, cuda, native


def microseconds(call) -> float:
    number = 20_000
    return min(timeit.repeat(call, number=number, repeat=7)) / number * 1e6


def planned(call) -> float:
    """The time of a call whose launches are written down instead of being made."""
    times: list[float] = []
    native.cuda().planned(lambda: times.append(microseconds(call)))
    return times[0]


def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(1, 3, 64, 64)
    tensor = (x.data_ptr(), 0, x.stride())
    scalars = [0.5] * 5
    seed = (7, 0, 1, 0, 0)
    step = (x.shape, tensor, tensor, None, tensor, x.data_ptr(), x.data_ptr(), [None] * 5, scalars, -1.0, 1.0, *seed)
    arguments = (x, x, [None] * 5, scalars, -1.0, 1.0, None, 7, 1, 0, True, True)
    rows = {
        "native.launch of nothing": microseconds(lambda: native.launch("nothing", x)),
        "which backend serves": microseconds(lambda: backends.available("cuda", "consistency_step", (x, x))),
        "native.launch of the consistency step": planned(lambda: native.launch("consistency_step", x, *step)),
        "the step with its three outputs": planned(lambda: cuda.consistency_step(*arguments)),
        "three torch.empty_like": microseconds(lambda: [torch.empty_like(x) for _ in range(3)]),
    }
    for name, time in rows.items():
        print(f"{name:40} {time:6.2f} µs")


if __name__ == "__main__":
    main()
