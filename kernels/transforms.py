"""How torch's transformations reach an operator: which of them the kernels serve, and what serves the others.

| transformation                                                       | value      | derivative |
|----------------------------------------------------------------------|------------|------------|
| backward, torch.func.grad and vjp                                    | kernel     | kernel     |
| the derivative of that backward: create_graph, grad of grad          | kernel     | definition |
| torch.func.vmap, its batch folded into the samples of one launch     | kernel     | kernel     |
| torch.func.vmap over a group norm's weight or bias                   | definition | definition |
| forward mode: torch.func.jvp, jacfwd, hessian, dual_level            | definition | definition |
| any of torch.func inside torch.compile; torch.func.functionalize     | definition | definition |

The definition is that of `reference`, in operators of torch, which torch differentiates to any order. In forward mode
it computes the value too, so that value and tangent come from one formula, and from its intermediates once.

A backend asked for by name serves all that it has a kernel for. What no kernel computes has one formula whichever
backend is asked for; but that backend must be able to serve the plain call: else BackendError is raised, under a
transformation as without one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def forward_mode() -> bool:
    """Whether this is inside a level of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def needs_definition() -> bool:
    """Whether the definition serves a call: in forward mode, and where a transformation is traced by torch."""
    return forward_mode() or (transformed() and (torch.compiler.is_compiling() or _functionalized()))


def _functionalized() -> bool:
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Functionalize for level in levels)


def transformed() -> bool:
    """Whether this is inside a transformation of torch.func: a tensor then hides what the levels below it need."""
    return torch._C._are_functorch_transforms_active()


def refuse_gradients(op: str, why: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError where a derivative of an operator for inference is asked for, or might be."""
    if forward_mode():
        raise RuntimeError(f"{op}: {why}: it has no forward-mode derivative: call it outside of jvp and dual_level")
    if torch.is_grad_enabled() and (transformed() or any(t is not None and t.requires_grad for t in tensors)):
        raise RuntimeError(f"{op}: {why}: call it under torch.no_grad()")


def apply(function: type[torch.autograd.Function], *arguments):
    """`function.apply(*arguments)`; without a transformation of torch.func, at a fraction of its cost.

    It binds the arguments to the signature of `forward` at each call, which takes the host longer than a launch.
    """
    if torch.compiler.is_compiling() or transformed():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def batched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether torch.autograd.grad(is_grads_batched=True) maps a backward over these gradients."""
    return not torch.compiler.is_compiling() and any(
        t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors
    )


def differentiates_backward() -> bool:
    """Whether a backward that runs now is differentiated in turn: under create_graph, or by a transformation."""
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transformed())


def pullback(
    function: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
    *constants: object,
) -> list[Tensor | None]:
    """The gradients of those of `tensors` that are needed, given those of the outputs of `function` (None is zero).

    `function` is called with the tensors and the constants after them. Differentiable to any order.
    """
    places = [i for i, (t, need) in enumerate(zip(tensors, needed, strict=True)) if need and t is not None]

    def of_needed(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = list(tensors)
        for place, value in zip(places, values, strict=True):
            arguments[place] = value
        return tuple(function(*arguments, *constants))

    outputs, pull, *_ = torch.func.vjp(of_needed, *(tensors[i] for i in places))
    found: list[Tensor | None] = [None] * len(tensors)
    cotangents = tuple(torch.zeros_like(y) if g is None else g for y, g in zip(outputs, grads, strict=True))
    for place, gradient in zip(places, pull(cotangents), strict=True):
        found[place] = gradient
    return found


def apply_folded(
    function: type[torch.autograd.Function], size: int, dims: Sequence[int | None], arguments: Sequence, shared=()
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The `vmap` of an operator over samples: `function` of the batch of `size` folded into them, [size · N, …].

    A tensor whose place in `arguments` is in `shared` has no samples and no batch, and is passed on.
    """
    folded, samples = list(arguments), 0
    for place, (t, dim) in enumerate(zip(arguments, dims, strict=True)):
        if isinstance(t, Tensor) and place not in shared:
            batched = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            folded[place], samples = batched.flatten(0, 1), batched.shape[1]
    outputs = function.apply(*folded)
    return tuple(y.unflatten(0, (size, samples)) for y in outputs), (0,) * len(outputs)
