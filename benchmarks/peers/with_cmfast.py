"""cmfast: the accelerated network."""

import cmfast

from .case import evaluated

PACKAGES = ("cmfast",)
DEVICES = ("cpu", "cuda")


def prepare(case, folder):
    # On the CPU the dtype is that of products; the parameters are float32.
    unet = case.unet() if case.device == "cpu" else case.unet().to(case.device, case.torch_dtype())
    fast = cmfast.accelerate(unet, dtype=case.torch_dtype(), cache=folder, keep_weights=False)
    return evaluated(fast, *case.torch_inputs())
