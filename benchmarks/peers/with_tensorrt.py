"""TensorRT by Torch-TensorRT: the whole network as one engine, which is kept in a folder."""

import torch

from .case import evaluated

PACKAGES = ("torch-tensorrt", "tensorrt")
DEVICES = ("cuda",)


def prepare(case, folder):
    import torch_tensorrt
    from torch_tensorrt.dynamo._engine_cache import DiskEngineCache

    network = case.exportable().to(case.device, case.torch_dtype())
    x, *conditions = case.torch_inputs("embedding")
    with torch.no_grad():
        exported = torch.export.export(network, (x, *conditions))
        compiled = torch_tensorrt.dynamo.compile(
            exported,
            arg_inputs=(x, *conditions),
            use_explicit_typing=True,  # each value in the dtype that the network has for it
            require_full_compilation=True,
            optimization_level=5,
            cache_built_engines=True,
            reuse_cached_engines=True,
            engine_cache=DiskEngineCache(str(folder / "engines"), 20 << 30),
        )
    return evaluated(compiled, x, *conditions)
