"""When a kernel is right: against float64, at most twice the error of the plain formula at the same precision."""

import torch
from torch import Tensor


def error(plain: Tensor, exact: Tensor) -> float:
    """The largest error of `plain`."""
    return (plain.double() - exact).abs().max().item() if plain.numel() else 0.0


def assert_as_accurate(name: str, actual: Tensor, exact: Tensor, plain: Tensor, others: float = 0.0) -> None:
    """Compare `actual` with the float64 answer `exact`, given what plain PyTorch makes of the same inputs.

    The error allowed is twice the largest of `plain`, plus one unit of rounding of each element. Where a tensor is so
    small that `plain` may be right by luck, `others` is the largest error of plain PyTorch on inputs like these.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, expected {plain.dtype}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if not actual.numel():
        return
    allowed = 2.0 * max(error(plain, exact), others) + torch.finfo(actual.dtype).eps * exact.abs()
    excess = (actual.double() - exact).abs() - allowed
    worst = excess.argmax()
    assert excess.max() <= 0, (
        f"{name}: off by {(actual.double() - exact).abs().flatten()[worst]:.3g} at {worst.item()}, "
        f"allowed {allowed.flatten()[worst]:.3g}"
    )
