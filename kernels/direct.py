"""Calls that go to a kernel of the processor without a detour, where it takes their tensors as they are.

Between an operator's call and its kernel stand torch's dispatcher, the choice of a backend and the preparation of the
operands: 70 µs. A call of plain tensors that nothing traces, maps or differentiates needs none of it. Each function
here returns None where the call is of another kind, which then takes the way that every call may take.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from . import backends, native
from .layout import empty_in_order
from .transforms import forward_mode


def group_norm(
    h: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> Tensor | None:
    """`cmfast.kernels.group_norm` of contiguous or channels-last images and rows of float32 or bfloat16."""
    tensors = (h, skip, weight, bias, add, scale, shift)
    if not is_plain(tensors) or not h.is_cpu or activation not in (None, "silu"):
        return None
    if skip is not None and skip.ndim != h.ndim:
        return None
    if h.is_contiguous():
        layout = torch.contiguous_format
    elif h.ndim == 4 and h.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    else:
        return None
    y = torch.empty_like(h, memory_format=layout) if skip is None else _concatenated(h, skip, layout)
    try:
        serve = native.cpu().group_norm_of
    except ImportError:
        return None
    rows = (weight, bias, add, scale, shift)
    done = serve(y, h, skip, num_groups, *rows, eps, activation is not None, torch.get_num_threads())
    return y if done else None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor | None:
    """`cmfast.kernels.attention` of tensors of any strides."""
    if not is_plain((q, k, v)) or not q.is_cpu or q.ndim != 4 or not q.numel():
        return None
    out = empty_in_order(q, q.shape)
    try:
        serve = native.cpu().attention_of
    except ImportError:
        return None
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    return out if serve(out, q, k, v, scale, torch.get_num_threads()) else None


def consistency_step(
    x: Tensor,
    model_output: Tensor,
    vectors: Sequence[Tensor | None],
    scalars: Sequence[float],
    low: float | None,
    high: float | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    draw: int,
    first_sample: int | Tensor,
    wants_sample: bool,
    wants_input: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """`cmfast.kernels.consistency_step` of arguments that it has checked, where coefficients are numbers or float32."""
    if not is_plain((x, model_output, noise, *vectors)) or not x.is_cpu or not x.numel():
        return None
    if isinstance(seed, Tensor) or isinstance(first_sample, Tensor):
        return None
    denoised = empty_in_order(x, x.shape)
    sample = torch.empty_like(denoised) if wants_sample else None
    model_input = torch.empty_like(denoised, dtype=model_output.dtype) if wants_input else None
    try:
        serve = native.cpu().consistency_step_of
    except ImportError:
        return None
    coefficients = [scalar if vector is None else vector for vector, scalar in zip(vectors, scalars, strict=True)]
    tensors = (x, model_output, noise, denoised, sample, model_input)
    done = serve(*tensors, *coefficients, low, high, seed, draw, first_sample, torch.get_num_threads())
    return (denoised, sample, model_input) if done else None


def of_operator(name: str, arguments: Sequence) -> tuple[Tensor, ...] | None:
    """What torch.ops.cmfast gives for inference, by the short way: to whom a mode told of the call, and who times it.

    What only a gradient reads, a group norm's statistics and attention's log-sum-exp, is empty.
    """
    *given, backend = arguments
    if backend is not None or torch.is_grad_enabled():
        return None
    if name == "group_norm":
        y = group_norm(*given[:-1], "silu" if given[-1] else None)  # type: ignore[call-arg]
        return None if y is None else (y, _NOTHING, _NOTHING)
    out = attention(*given) if name == "attention" else None
    return None if out is None else (out, _NOTHING)


def _concatenated(h: Tensor, skip: Tensor, layout: torch.memory_format) -> Tensor:
    """An uninitialised tensor for the pair's concatenation along the channels."""
    shape = (h.shape[0], h.shape[1] + skip.shape[1], *h.shape[2:])
    return torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=layout)


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call is of nothing but torch's own tensors, and nobody wants to know of it or to differentiate it.

    Modes of torch (fake tensors, tracing, torch.func, jit) are keys that its dispatcher includes in every call.
    """
    if torch.compiler.is_compiling() or backends.is_overridden() or forward_mode():
        return False
    if torch.autograd.profiler._is_profiler_enabled:  # which shows operators by their names
        return False
    if torch._C._len_torch_function_stack():  # modes that see functions, not what is dispatched
        return False
    if torch._C._dispatch_tls_local_include_set().raw_repr() not in _NO_MODES:
        return False
    differentiable = torch.is_grad_enabled()
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _TYPES or t.is_neg() or (differentiable and t.requires_grad):
            return False
    return True


_TYPES = (Tensor, Parameter)
_NOTHING = torch.empty(0, device="cpu")


def _keys(*names: str) -> int:
    found = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    for name in names:
        found = found.add(getattr(torch._C.DispatchKey, name))
    return found.raw_repr()


#: What the dispatcher includes where no mode is on; the second in inference mode.
_NO_MODES = (_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect"))
