"""stable-fast: its compilation of a UNet of diffusers, with CUDA graphs, and xFormers and Triton where installed."""

import importlib.util

import torch

from . import with_diffusers
from .case import evaluated
from .others import OTHERS

PACKAGES = ("stable-fast", "diffusers")
DEVICES = ("cuda",)


def prepare(case, folder):
    from sfast.compilers.diffusion_pipeline_compiler import CompilationConfig, compile_unet

    config = CompilationConfig.Default()
    config.enable_xformers = importlib.util.find_spec("xformers") is not None
    config.enable_triton = importlib.util.find_spec("triton") is not None
    config.enable_cuda_graph = True
    if case.network in OTHERS:
        unet = case.unet().to(case.device, case.torch_dtype(), memory_format=torch.channels_last)
    else:
        unet = with_diffusers.network(case)
    compiled = compile_unet(unet, config)
    x, *conditions = case.torch_inputs()
    x = x.to(memory_format=torch.channels_last)

    def evaluate(*inputs):
        if case.network in OTHERS:
            return compiled(*inputs)
        return compiled(*inputs, return_dict=False)[0]

    return evaluated(evaluate, x, *conditions)
