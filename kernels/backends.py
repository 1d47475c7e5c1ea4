"""Which backend serves a call, and why the others do not.

A backend is a module with one function an operator and `available(op, tensors) -> (bool, reason)`; where an answer
depends on more than the tensors, also `serves(op, arguments) -> (bool, reason)`. `auto` takes the first of
`BACKENDS`, or of the operator's `ORDERS`, that is available. A backend that is asked for by name (the argument
`backend=`, then `use_backend`, then the environment variable CMFAST_BACKEND) serves or raises `BackendError`: it is
never replaced.
"""

import contextlib
import functools
import importlib
import logging
import os
import types
from collections.abc import Callable, Iterator, Sequence

import torch

#: Fastest first: the order in which `auto` asks.
BACKENDS = ("cuda", "triton", "cpu", "reference")

#: The orders of operators that have one of their own: no measurement says yet which GPU backend convolves faster.
ORDERS = {"conv2d": ("triton", "cuda", "cpu", "reference")}

#: Every operator that a backend implements, by the name of its function.
OPERATORS = (
    "group_norm",
    "group_norm_backward",
    "attention",
    "attention_backward",
    "consistency_step",
    "consistency_step_backward",
    "conv2d",
    "channel_moments",
    "fold_group_norm",
    "apply_group_norm",
    "channel_norm",
    "timestep_embedding",
)

_log = logging.getLogger("cmfast.kernels")
_override: str | None = None


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message says why and what to do."""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator inside the `with` block by the backend `name` ("auto" for the automatic choice).

    The choice holds for the whole process, as torch.backends flags do; for one call use its `backend` argument.
    Raises BackendError for a name that does not exist.
    """
    global _override
    _check_name(name)
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def override() -> str | None:
    """The name that `use_backend` has given; None outside of it."""
    return _override


def resolve(
    op: str, tensors: Sequence[torch.Tensor], backend: str | None = None, arguments: Sequence | None = None
) -> Callable:
    """Return the function that serves the operator `op` for these tensors, and for these arguments of that function.

    Raises BackendError where a backend asked for by name (argument, `use_backend` or CMFAST_BACKEND) cannot.
    """
    name = require(op, tensors, backend, arguments)
    if name != "auto":
        return function(name, op)
    for candidate in _candidates(op, tensors):
        ok, reason = available(candidate, op, tensors, arguments)
        if ok:
            return function(candidate, op)
        _log_refusal(candidate, op, reason)
    raise BackendError(f"no backend can serve {op}")  # pragma: no cover - the reference serves everything


def require(
    op: str, tensors: Sequence[torch.Tensor], backend: str | None = None, arguments: Sequence | None = None
) -> str:
    """Return the name that is asked for, or "auto".

    Raises BackendError where that backend cannot serve `op` for these tensors.
    """
    name = chosen(backend)
    if name != "auto":
        ok, reason = available(name, op, tensors, arguments)
        if not ok:
            raise BackendError(f"backend {name!r} cannot serve {op}: {reason}")
    return name


def _candidates(op: str, tensors: Sequence[torch.Tensor]) -> Sequence[str]:
    """The backends that `auto` asks: of CPU tensors not those of GPUs, whose answer takes longer than a small call."""
    on_cpu = len(tensors) > 0 and all(t.is_cpu for t in tensors) and os.environ.get("CMFAST_GPU_ON_CPU") != "1"
    return BACKENDS[2:] if on_cpu else ORDERS.get(op, BACKENDS)


def chosen(backend: str | None = None) -> str:
    """The name that is asked for: the argument, that of `use_backend`, CMFAST_BACKEND, or "auto".

    Raises BackendError for a name that does not exist.
    """
    name = backend or _override or os.environ.get("CMFAST_BACKEND") or "auto"
    _check_name(name)
    return name


def available(
    name: str, op: str, tensors: Sequence[torch.Tensor] = (), arguments: Sequence | None = None
) -> tuple[bool, str]:
    """Say whether the backend can serve `op` for these tensors (none: in general, on this machine), and why not.

    `arguments` are those of the backend's function; without them, only the tensors are looked at.
    """
    try:
        module = _module(name)
    except ImportError as error:
        return False, str(error)
    answer = module.available(op, tensors)
    serves = getattr(module, "serves", None)
    return serves(op, arguments) if answer[0] and arguments is not None and serves else answer


def backend_report() -> dict[str, dict[str, str]]:
    """For each backend and operator: "yes", or the reason why the backend does not serve it on this machine."""
    return {
        name: {op: "yes" if (answer := available(name, op))[0] else answer[1] for op in OPERATORS} for name in BACKENDS
    }


def _check_name(name: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise BackendError(f"unknown backend {name!r}: choose one of {', '.join(('auto', *BACKENDS))}")


@functools.cache
def _module(name: str):
    return importlib.import_module(f".{name}", __package__)


def function(name: str, op: str) -> Callable:
    """A backend's function for an operator."""
    found = getattr(_module(name), op)
    # An operator's file in a package has the operator's name: once it is imported, that name is the file.
    return getattr(found, op) if isinstance(found, types.ModuleType) else found


@functools.cache
def _log_refusal(name: str, op: str, reason: str) -> None:
    _log.info("backend %s does not serve %s: %s", name, op, reason)
