"""Calls that go to a kernel of the processor without a detour, where it takes their tensors as they are.

Between an operator's call and its kernel stand torch's dispatcher, the choice of a backend and the preparation of the
operands: 70 µs. A call of plain tensors that nothing traces, maps or differentiates needs none of it. Each function
here returns None where the call is of another kind, which then takes the way that every call may take.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from . import backends, native
from .transforms import forward_mode


def kernel(op: str, tensors: Sequence[Tensor | None]) -> Callable | None:
    """The function of the `cpu` backend that serves an operator for such tensors."""
    if not is_plain(tensors):
        return None
    if any(t is not None and not (t.is_cpu and t.dtype in native.DTYPES) for t in tensors):
        return None
    try:
        extension = native.cpu()
    except ImportError:
        return None
    if not extension.serves_by_default():
        return None
    return backends.function("cpu", op)


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


def of_operator(name: str, arguments: Sequence) -> tuple[Tensor, ...] | None:
    """What torch.ops.cmfast gives for inference, by the short way: to whom a mode told of the call, and who times it.

    The statistics of a group norm, which only its gradient reads, are empty.
    """
    *given, backend = arguments
    if backend is not None or torch.is_grad_enabled():
        return None
    if name == "group_norm":
        y = group_norm(*given[:-1], "silu" if given[-1] else None)  # type: ignore[call-arg]
        return None if y is None else (y, _NOTHING, _NOTHING)
    serve = kernel(name, given[:3]) if name == "attention" else None
    return None if serve is None else serve(*given)


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
