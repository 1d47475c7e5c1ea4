"""What the operators' short ways share: which calls are plain, and their kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _dispatch_tls_local_include_set, _len_torch_function_stack
from torch.autograd import profiler
from torch.compiler import is_compiling
from torch.nn import Parameter

from .. import native
from ..transforms import forward_mode


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call is of nothing but torch's own tensors, and nobody wants to know of it or to differentiate it.

    Modes of torch (fake tensors, tracing, torch.func, jit) are keys that its dispatcher includes in every call.
    """
    if is_compiling() or forward_mode():
        return False
    if profiler._is_profiler_enabled:  # which shows operators by their names
        return False
    if _len_torch_function_stack():  # modes that see functions, not what is dispatched
        return False
    if _dispatch_tls_local_include_set().raw_repr() not in _NO_MODES:
        return False
    differentiable, types = torch.is_grad_enabled(), _TYPES
    for t in tensors:
        if t is not None and (type(t) not in types or t.is_neg() or (differentiable and t.requires_grad)):
            return False
    return True


def ran(name: str, *arguments: Any) -> bool:
    """Whether a launcher that reads torch's tensors took the call: false too where it was not built."""
    try:
        return getattr(native.cpu(), name)(*arguments, torch.get_num_threads())
    except (ImportError, TypeError):  # TypeError: of what is no number, say, of which the long way tells
        return False


_TYPES = (Tensor, Parameter)


def _keys(*names: str) -> int:
    found = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    for name in names:
        found = found.add(getattr(torch._C.DispatchKey, name))
    return found.raw_repr()


#: What the dispatcher includes where no mode is on; the second in inference mode.
_NO_MODES = (_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect"))
