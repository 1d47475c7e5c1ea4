"""The drop-in: one verb that makes a model faster and leaves its interface as it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from . import pipelines
from .model import ConsistencyModel
from .unet import UNet

Model = TypeVar("Model")


def accelerate(
    model: Model,
    dtype: torch.dtype | None = None,
    *,
    tune: bool = False,
    cache: str | Path | None = None,
    keep_weights: bool = True,
    graphs: bool = True,
    backend: str | None = None,
) -> Model:
    """Return the model with its network evaluated by fused kernels; the same interface, for inference.

    The network is captured as a graph, which passes make faster: group norms, SiLUs, residuals, resampling and
    concatenations are done inside the convolutions that they surround, weights are packed once, all values share one
    block of memory. What the passes do not recognise is left to torch; `cmfast.explain` says what that is.
    Where a network's course depends on the values of tensors, random numbers are drawn, or its forward keeps something
    in its modules or in a list that it is given, its own forward runs, and the largest of its submodules that can be
    captured are made faster; a warning of the logger cmfast.engine says which are not.

    What changes in the result is noticed at its next call, which then captures it anew: weights that were written to,
    loaded or replaced, modules that were added, replaced or removed, attributes that were set. torch does not count
    writes through `.data` or numpy, nor to tensors made in inference mode: of a tensor above 256 bytes only a few words
    are compared, so that such a write, even to a whole channel, can be missed; on a GPU, where looking would wait, it
    always is.

    A diffusers pipeline is changed in place and returned: its `unet` or `transformer`, and the encoder and the decoder
    of its `vae`, are evaluated by the engine, in evaluation mode. They are the same modules, so that the pipeline's own
    methods act on them as before: loading, scaling, fusing and unloading LoRAs, `save_pretrained`, `to`.

    The network is evaluated where its parameters are. On a GPU the kernels are Triton's, and the launches for inputs of
    one shape are captured in a CUDA graph at the first call. `ConsistencyModel.sample` captures a whole batch, from the
    noise to the sampler's last step, at the first batch of a kind: see there. Calls run on the current stream, and
    return before the GPU is done. Several threads and streams may call the model. CMFAST_GPU_ON_CPU=1 lets Triton's
    interpreter (TRITON_INTERPRET=1) run the same launches on CPU tensors, to test them.

    Args:
        model: a ConsistencyModel, a diffusers pipeline, or any network with parameters on the CPU or on one GPU: any
            arguments of its forward that are tensors, None, numbers, strings, and tuples, lists, dicts and dataclasses
            of them. A network is left as it was, its training mode too, and shares its parameters and submodules with
            the result.
        dtype: of the operands of products: float32, or bfloat16 for about half the time at about bfloat16's accuracy
            where the processor has such products, and as in float32 where it has none (AVX2) and they would be
            slower. Sums are float32, and so are values between layers, but for bfloat16 on a processor with AMX and
            on a GPU: there images between layers have this dtype. On a GPU also float16. None means the parameters'
            own, where it is one of these, else float32.
        tune: measure on this machine which form of each convolution is fastest, instead of taking the rule's. On a GPU
            these are tiles of the kernels, and torch's own convolution with our kernels around it; of group norms and
            attention, the kernels of both backends. Each is compiled first, which takes minutes, once for a card, the
            sizes and the versions. A sample's last bits may then depend on the batch that it is in.
        cache: a folder for packed weights and what was measured; what it holds of these weights is read, not made.
            Other weights are another file, and none is ever removed. Each network of a pipeline has a folder in it. For
            a GPU it holds what was measured alone: weights are packed at each start.
        keep_weights: False frees the model's own weights one by one as they are packed, which takes less memory: the
            model that was given is then of no use, and the result cannot be saved, copied or given other weights.
        graphs: on a GPU, capture the launches of an evaluation, and of a whole batch of samples, in a CUDA graph; False
            launches them one by one.
        backend: on a GPU, "triton" or "cuda": the kernels that must serve every operator that the engine has kernels
            for. None takes what `cmfast.kernels.use_backend` and CMFAST_BACKEND say at each call; without them the
            engine chooses, and lets torch serve what no kernel can. On the CPU, "cpu" is all that there is.

    Returns:
        A model of the same type, with the same attributes, parameters and keys of its state_dict, in evaluation mode;
        of a pipeline, the pipeline itself.
        Its calls raise RuntimeError in training mode, for inputs that require gradients, and where submodules have
        hooks, or all modules. Copies and pickles of it are plain models, whose submodules are in the mode that they
        had, and what records its operators (torch.export, torch.jit.trace, make_fx) records those of the network's own
        forward in evaluation mode.

    Raises:
        TypeError: neither a network nor a pipeline; or a network of TorchScript.
        ValueError: a dtype that is not served on the device, or parameters on several devices or of float64.
        BackendError: a backend asked for by name cannot serve an operator of the network (or at a later call, for
            networks whose shapes of inputs are not known before).
        ImportError: the CPU kernels were not built; the message says how.
        CaptureError: the network cannot be captured, nor has it submodules that could be (at the first call, for
            networks whose shapes of inputs are not known before).
    """
    from .engine.accelerator import detached

    options: dict[str, Any] = {"tune": tune, "cache": cache, "keep_weights": keep_weights}
    options |= {"graphs": graphs, "backend": backend}
    if isinstance(model, ConsistencyModel):
        fast = detached(model)
        network = accelerate(model.unet, dtype, **options)
        fast.__dict__["_modules"] = {**model._modules, "unet": network}
        fast.training = False
        assert isinstance(network, nn.Module)
        _warm_up(network, model.sample_shape, model.num_classes, with_labels=True)
        return cast(Model, fast)
    if not isinstance(model, nn.Module):
        _accelerate_parts(model, dtype, options)
        return model
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"accelerate: expected a network of Python, got a {type(model).__name__}: accelerate the network that was "
            "scripted or traced"
        )
    fast = detached(model)
    _install(fast, dtype, options)
    if isinstance(model, UNet):
        _warm_up(fast, model.config.sample_shape, model.config.num_classes)
    return cast(Model, fast)


def restore(model: Model) -> Model:
    """Undo `accelerate` in place: the model, or the networks of a pipeline, are evaluated as before; return it.

    They are in evaluation mode then, with all their submodules, which the network that was given shares.

    Raises:
        ValueError: the model is not an accelerated one, or has given up its weights (keep_weights=False).
    """
    networks = accelerated_networks(model, "restore")
    for name, network in networks.items():
        if any(p.is_meta for p in network.parameters()):
            of = f"its {name}" if name else "the network"
            raise ValueError(f"restore: {of} has given up its weights (keep_weights=False): load it anew")
    for network in networks.values():
        network._compiled_call_impl = None
        network.eval()
    return model


def accelerated_networks(model: Any, caller: str) -> dict[str, nn.Module]:
    """What `accelerate` made faster of a model, by its names there; of a network, that is itself, by the name "".

    Raises:
        ValueError: nothing of it is accelerated; the message begins with the caller's name.
    """
    from .engine.accelerator import accelerator_of

    if isinstance(model, ConsistencyModel):
        networks = {"unet": model.unet}
    else:
        networks = {"": model} if isinstance(model, nn.Module) else pipelines.networks(model)
    found = {name: network for name, network in networks.items() if accelerator_of(network) is not None}
    if not found:
        raise ValueError(
            f"{caller}: expected a model that cmfast.accelerate returned, got a plain {type(model).__name__}"
        )
    return found


def _accelerate_parts(pipeline: Any, dtype: torch.dtype | None, options: dict[str, Any]) -> None:
    networks = pipelines.networks(pipeline)
    if not networks:
        raise TypeError(
            "accelerate: expected a torch network, a ConsistencyModel, or a diffusers pipeline with a unet, a "
            f"transformer or a vae, got {type(pipeline).__name__}"
        )
    for name, network in networks.items():
        cache = options["cache"]
        _install(network, dtype, options | {"cache": None if cache is None else Path(cache) / name})


def _install(network: nn.Module, dtype: torch.dtype | None, options: dict[str, Any]) -> None:
    from .engine import Accelerator
    from .engine.accelerator import install, products_of
    from .replay import replayed

    accelerator = Accelerator(network, products_of(list(network.parameters()), dtype), **options)
    network.training = False
    install(network, accelerator)
    network._compiled_call_impl.replayed = replayed  # type: ignore[union-attr]


def _warm_up(
    network: nn.Module, sample_shape: Sequence[int], num_classes: int | None, *, with_labels: bool = False
) -> None:
    """Make what evaluates one sample, so that the first call does not wait for it.

    A ConsistencyModel calls its network `with_labels`, which are None where there are no classes.
    """
    from .engine.accelerator import accelerator_of
    from .engine.capture import CaptureError

    accelerator = accelerator_of(network)
    assert accelerator is not None
    device = accelerator.target.device
    inputs: list[Tensor | None] = [torch.zeros(1, *sample_shape, device=device), torch.zeros(1, device=device)]
    if num_classes is not None:
        inputs.append(torch.zeros(1, dtype=torch.int64, device=device))
    elif with_labels:
        inputs.append(None)
    try:
        accelerator.executable(inputs)
    except CaptureError:
        if not accelerator.has_parts:
            raise
