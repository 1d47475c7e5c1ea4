"""Stage e: whole samples, of the accelerated model and of the plain one: one consistency step, two, and Heun's 40."""

import torch

import cmfast

from . import network, stage

#: name: arguments of `sample`, evaluations
SAMPLERS = {
    "consistency 1": ({"steps": 1}, 1),
    "consistency 2": ({"steps": 2}, 2),
    "heun 40": ({"sampler": "heun", "steps": 40}, 79),
}


def cases(device, folder, until):
    """Batch 1 and 16 of each."""
    for batch in (1,) if device.emulated else (1, 16):
        for kind in ("accelerated", "plain"):
            work = lambda a=(kind, batch): measure(*a, device)  # noqa: E731
            yield stage.Case(f"{kind} batch {batch}", work, patience=300 if kind == "accelerated" else 120)


def measure(kind: str, batch: int, device) -> list[dict]:
    """A row a sampler: seconds a batch, samples a second, and how many times Heun's time it is faster."""
    unet = network.network(device, torch.bfloat16).to(memory_format=torch.channels_last)
    model = cmfast.ConsistencyModel(unet)
    samplers = SAMPLERS
    if kind == "accelerated":
        model = cmfast.accelerate(model, torch.bfloat16)
        samplers = dict(list(SAMPLERS.items())[:1]) if device.emulated else SAMPLERS
    rows = []
    for name, (arguments, evaluations) in samplers.items():
        if device.emulated and evaluations > 2:
            arguments, evaluations, name = {**arguments, "steps": 2}, 3, "heun 2"
        samples = []
        times = device.called(lambda a=arguments, to=samples: to.append(model.sample(batch, **a)), 3)
        row = {"model": kind, "sampler": name, "evaluations": evaluations, "batch": batch, "dtype": "bfloat16"}
        if not torch.isfinite(samples[-1]).all():
            rows.append({**row, "error": "samples are not finite"})
            continue
        row |= {"seconds": times.median / 1e6, "low_s": times.low / 1e6, "high_s": times.high / 1e6}
        rows.append({**row, "samples_per_s": round(1e6 * batch / times.median, 2)})
    slowest = rows[-1].get("seconds") if len(rows) > 1 else None
    return [
        {**row, "faster_than_heun": round(slowest / row["seconds"], 2)} if slowest and "seconds" in row else row
        for row in rows
    ]


if __name__ == "__main__":
    stage.main("sampling", cases)
