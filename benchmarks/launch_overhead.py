"""What a call costs the host beside the work of its kernel: python benchmarks/launch_overhead.py

On the processor: operators on tensors so small that their kernels take next to nothing, beside torch's. Of CUDA: a
launcher that does nothing is called through kernels/native.py with the arguments that a real one gets, and the
consistency step is planned without being launched; that needs cmfast._cuda, and no GPU. Microseconds, the best of
several runs, one thread.
"""

import timeit

import torch
from cmfast.kernels import attention, backends, consistency_step, cuda, group_norm, native
from torch.nn import functional as F


def microseconds(call) -> float:
    number = 20_000
    return min(timeit.repeat(call, number=number, repeat=7)) / number * 1e6


def planned(call) -> float:
    """The time of a call whose launches are written down instead of being made."""
    times: list[float] = []
    native.cuda().planned(lambda: times.append(microseconds(call)))
    return times[0]


def on_the_processor() -> dict[str, float]:
    x, row, rows = torch.randn(1, 32, 2, 2), torch.randn(32), torch.randn(1, 32)
    q = torch.randn(1, 1, 4, 32)
    film = {"scale": rows, "shift": rows, "activation": "silu"}
    calls = {
        "group_norm with FiLM and SiLU": lambda: group_norm(x, 32, row, row, 1e-5, **film),
        "torch's, without them": lambda: F.group_norm(x, 32, row, row),
        "attention": lambda: attention(q, q, q),
        "torch's": lambda: F.scaled_dot_product_attention(q, q, q),
        "consistency_step": lambda: consistency_step(x, x, 0.5, 0.5, clip=1.0),
        "the same in torch": lambda: (0.5 * x + 0.5 * x).clamp(-1.0, 1.0),
    }
    with torch.no_grad():
        return {name: microseconds(call) for name, call in calls.items()}


def of_cuda() -> dict[str, float]:
    x = torch.randn(1, 3, 64, 64)
    tensor = (x.data_ptr(), 0, x.stride())
    scalars = [0.5] * 5
    seed = (7, 0, 1, 0, 0)
    step = (x.shape, tensor, tensor, None, tensor, x.data_ptr(), x.data_ptr(), [None] * 5, scalars, -1.0, 1.0, *seed)
    arguments = (x, x, [None] * 5, scalars, -1.0, 1.0, None, 7, 1, 0, True, True)
    return {
        "native.launch of nothing": microseconds(lambda: native.launch("nothing", x)),
        "which backend serves": microseconds(lambda: backends.available("cuda", "consistency_step", (x, x))),
        "native.launch of the consistency step": planned(lambda: native.launch("consistency_step", x, *step)),
        "the step with its three outputs": planned(lambda: cuda.consistency_step(*arguments)),
        "three torch.empty_like": microseconds(lambda: [torch.empty_like(x) for _ in range(3)]),
    }


def main() -> None:
    torch.set_num_threads(1)
    try:
        native.cuda()
        rows = on_the_processor() | of_cuda()
    except ImportError as error:
        print(error)
        rows = on_the_processor()
    for name, time in rows.items():
        print(f"{name:40} {time:6.2f} µs")


if __name__ == "__main__":
    main()
