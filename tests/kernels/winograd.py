"""The stated bound of the error of a convolution by Winograd's minimal filtering: see `error_scale`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}


def matrices(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Aᵀ, G and Bᵀ of F(tile, 3) from its points and ∞ (Lavin and Gray 2016; the construction of Toom and Cook)."""
    points = torch.tensor(POINTS[tile], dtype=torch.float64)
    size = tile + 2
    a, g, b = torch.zeros(tile, size), torch.zeros(size, 3), torch.zeros(size, size)
    a, g, b = (m.double() for m in (a, g, b))
    for i, p in enumerate(points):
        others = torch.cat((points[:i], points[i + 1 :]))
        a[:, i] = p ** torch.arange(tile)
        g[i] = p ** torch.arange(3) / (p - others).prod()
        b[i, : size - 1] = polynomial(others)
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = polynomial(points)
    return a, g, b


def polynomial(roots: Tensor) -> Tensor:
    """The coefficients of Π (x − root), from the lowest power."""
    coefficients = torch.ones(1, dtype=torch.float64)
    for root in roots:
        coefficients = F.pad(coefficients, (1, 0)) - root * F.pad(coefficients, (0, 1))
    return coefficients


def pad(u: Tensor, padding: Sequence[int]) -> Tensor:
    """Zeros before and after each spatial dimension."""
    pairs = [*zip(padding[::2], padding[1::2], strict=True)]
    return F.pad(u, [side for pair in reversed(pairs) for side in pair])


def convolve(u: Tensor, weight: Tensor, tile: int, absolute: bool = False) -> Tensor:
    """The convolution of a padded image by F(tile × tile, 3 × 3) in float64; `absolute` takes all absolute values."""
    a, g, b = (m.abs() if absolute else m for m in matrices(tile))
    u, weight = (t.double().abs() if absolute else t.double() for t in (u, weight))
    height, width = (s - 2 for s in u.shape[2:])
    u = F.pad(u, (0, -width % tile, 0, -height % tile))
    tiles = u.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)  # [N, C, Y, X, tile + 2, tile + 2]
    points = torch.einsum("ai,ncyxij,bj->abncyx", b, tiles, b)
    weights = torch.einsum("ai,ocij,bj->aboc", g, weight, g)
    products = torch.einsum("abncyx,aboc->abnoyx", points, weights)
    out = torch.einsum("ia,abnoyx,jb->noyixj", a, products, a)
    return out.flatten(4).flatten(2, 3)[:, :, :height, :width]


def error_scale(u: Tensor, weight: Tensor, tile: int, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """What a rounding error of each operation is relative to: Σ |Aᵀ|·((|G||w||Gᵀ|) ⊙ (|Bᵀ||u||B|))·|A|.

    Padding is before and after each spatial dimension; of three of them, the sum is over the taps of the first too.
    """
    u = pad(u, padding)
    if tile == 1:
        direct = (F.conv1d, F.conv2d, F.conv3d)[u.ndim - 3]
        return direct(u.double().abs(), weight.double().abs(), None, tuple(stride))
    if u.ndim == 4:
        return convolve(u, weight, tile, absolute=True)
    depth = (u.shape[2] - weight.shape[2]) // stride[0] + 1
    images = [
        sum(convolve(u[:, :, z * stride[0] + d], weight[:, :, d], tile, True) for d in range(weight.shape[2]))
        for z in range(depth)
    ]
    return torch.stack(images, dim=2)
