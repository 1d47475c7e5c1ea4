"""The stated bound of the error of a convolution by Winograd's minimal filtering: see `error_scale`."""

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


def convolve(u: Tensor, weight: Tensor, tile: int, padding: int, absolute: bool = False) -> Tensor:
    """The convolution by F(tile × tile, 3 × 3) in float64; `absolute` takes the absolute value of everything."""
    a, g, b = (m.abs() if absolute else m for m in matrices(tile))
    u, weight = (t.double().abs() if absolute else t.double() for t in (u, weight))
    height, width = (s + 2 * padding - 2 for s in u.shape[2:])
    down, right = -height % tile, -width % tile
    u = F.pad(u, (padding, padding + right, padding, padding + down))
    tiles = u.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)  # [N, C, Y, X, tile + 2, tile + 2]
    points = torch.einsum("ai,ncyxij,bj->abncyx", b, tiles, b)
    weights = torch.einsum("ai,ocij,bj->aboc", g, weight, g)
    products = torch.einsum("abncyx,aboc->abnoyx", points, weights)
    out = torch.einsum("ia,abnoyx,jb->noyixj", a, products, a)
    return out.flatten(4).flatten(2, 3)[:, :, :height, :width]


def error_scale(u: Tensor, weight: Tensor, tile: int, stride: int, padding: int) -> Tensor:
    """What a rounding error of each operation is relative to: Σ |Aᵀ|·((|G||w||Gᵀ|) ⊙ (|Bᵀ||u||B|))·|A|."""
    if tile == 1:
        return F.conv2d(u.double().abs(), weight.double().abs(), None, stride, padding)
    return convolve(u, weight, tile, padding, absolute=True)
