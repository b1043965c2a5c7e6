"""The inverse of a fixed empirical Fisher matrix, whole or block-diagonal: products, diagonal, elements, determinant."""

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from phyla.second_order.gram import cholesky, expand, factor_panels, gram, project
from phyla.second_order.operator import CurvatureOperator
from phyla.shared import checks

__all__ = ["InverseFisher", "block_parts", "check_damping", "check_grads"]

_GROUP = 1 << 20  # entries of the gradients of small blocks that are factored in one batched call


def check_damping(damping: float) -> float:
    """A finite number above 0. Raises: TypeError, ValueError."""
    return checks.in_range("damping", damping, 0, math.inf, low_open=True, high_open=True)


def check_grads(grads: Tensor) -> Tensor:
    """Gradients as rows: a floating (m, d) tensor, not empty, finite. Raises: TypeError, ValueError."""
    checks.shape("grads", checks.floating("grads", grads), (None, None))
    if grads.numel() == 0:
        raise ValueError(f"grads: expected at least one gradient of at least one weight, got shape {tuple(grads.shape)}")
    return checks.finite("grads", grads)


@dataclass(frozen=True)
class BlockPart:
    """`count` neighbouring blocks of equal `width`, from column `start`."""

    start: int
    count: int
    width: int

    def columns(self, rows: Tensor) -> Tensor:
        """The part's columns of (m, d) as (count, m, width), a view."""
        mine = rows.narrow(-1, self.start, self.count * self.width)
        return mine.view(rows.shape[0], self.count, self.width).transpose(0, 1)


def block_parts(grads: Tensor, block_size: int | None) -> list[BlockPart]:
    """The full blocks, and the shorter last block where there is one."""
    dim = grads.shape[-1]
    width = dim if block_size is None else min(checks.positive_int("block_size", block_size), dim)
    full = BlockPart(0, dim // width, width)
    rest = dim % width
    return [full, BlockPart(dim - rest, 1, rest)] if rest else [full]


class InverseFisher:
    """The inverse of F = damping I + GᵀG/m, factored once.

    Blocks of at least m weights keep W, F⁻¹ = I/damping - WᵀW, in the memory of one copy of G; narrower ones keep their inverse itself.
    All factorisations, and the sums of all products, are in float64. In float32 the entries of W are rounded, so that F⁻¹ x of an x in the
    span of the gradients loses digits as damping gets small; `InverseFisherWindow.push_ihvp` does not.

    Args:
        grads: gradients as rows, (m, d); not modified.
        damping: the multiple of the identity in F.
        block_size: F is block-diagonal over ranges of so many weights, the last one shorter; None for one block.

    Raises: TypeError, ValueError: naming the argument.
    Source: M-FAC, section 3.1; see `functional.mfac_factor`.
    """

    damping: float
    num_grads: int
    dim: int
    block_size: int | None

    @torch.no_grad()
    def __init__(self, grads: Tensor, *, damping: float = 1e-5, block_size: int | None = None) -> None:
        self.damping = check_damping(damping)
        check_grads(grads)
        self.num_grads, self.dim = grads.shape
        self._layout = block_parts(grads, block_size)
        self.block_size = block_size
        self._parts: list[_Part] = [
            (_Dense if part.width < self.num_grads else _LowRank)(part.columns(grads.detach()), self.damping) for part in self._layout
        ]

    def ihvp(self, x: Tensor) -> Tensor:
        """F⁻¹ x for x (..., d), in the shape and dtype of `x`. Raises: TypeError, ValueError: x not floating, or of another last size."""
        checks.last_dim("x", checks.floating("x", x), self.dim)
        rows = x.reshape(-1, self.dim)
        products = [
            part.ihvp(where.columns(rows).mT).permute(2, 0, 1).flatten(1) for where, part in zip(self._layout, self._parts, strict=True)
        ]
        return torch.cat(products, 1).reshape(x.shape).to(x.dtype)

    def diagonal(self) -> Tensor:
        """The diagonal of F⁻¹, (d,)."""
        return torch.cat([part.diagonal.flatten() for part in self._parts])

    def element(self, i: int | Tensor, j: int | Tensor) -> Tensor:
        """The elements (i, j) of F⁻¹, 0 across blocks; O(m) each.

        Args:
            i: row, an int or an integer tensor.
            j: column, likewise; the two broadcast.

        Returns: the broadcast shape.
        Raises: TypeError, ValueError: an index that is no integer, or outside [0, d).
        """
        row, column = self._index("i", i), self._index("j", j)
        first, second = row + torch.zeros_like(column), column + torch.zeros_like(row)
        out = torch.zeros(first.shape, dtype=self._parts[0].kept.dtype, device=first.device)
        for where, part in zip(self._layout, self._parts, strict=True):
            a, b = first - where.start, second - where.start
            inside = (
                (a >= 0)
                & (b >= 0)
                & (a < where.count * where.width)
                & (b < where.count * where.width)
                & (a // where.width == b // where.width)
            )
            out[inside] = part.element(a[inside] // where.width, a[inside] % where.width, b[inside] % where.width)
        return out

    def column(self, j: int) -> Tensor:
        """Column j of F⁻¹, (d,). Raises: TypeError, ValueError: see `element`."""
        return self.element(torch.arange(self.dim, device=self._parts[0].kept.device), j)

    def logdet(self) -> Tensor:
        """log det F, a float64 scalar (of F, not of its inverse)."""
        return torch.stack([part.logdet for part in self._parts]).sum()

    def as_operator(self) -> CurvatureOperator:
        """F⁻¹ as a linear operator, for conjugate gradients, Lanczos and the like."""
        return _InverseOperator(self)

    def to(self, device: torch.device | str) -> "InverseFisher":
        """A copy on another device (this object itself if it is there)."""
        if torch.device(device) == self._parts[0].kept.device:
            return self
        moved = copy.copy(self)
        moved._parts = [part.to(device) for part in self._parts]
        return moved

    def _index(self, name: str, index: int | Tensor) -> Tensor:
        if isinstance(index, bool) or not isinstance(index, int | Tensor):
            raise TypeError(f"{name}: expected an int or an integer tensor, got {type(index).__name__} {index!r}")
        tensor = torch.as_tensor(index, device=self._parts[0].kept.device)
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name}: expected an int or an integer tensor, got dtype {tensor.dtype}")
        if tensor.numel() and (int(tensor.min()) < 0 or int(tensor.max()) >= self.dim):
            raise ValueError(f"{name}: expected indices in [0, {self.dim}), got {int(tensor.min())} to {int(tensor.max())}")
        return tensor.long()


class _Part(ABC):
    """Blocks of one width, and what is kept of their inverse: `kept`, the diagonal (count, width) and the log-determinant of F."""

    kept: Tensor
    diagonal: Tensor
    logdet: Tensor

    @abstractmethod
    def ihvp(self, x: Tensor) -> Tensor:
        """(count, width, r) to the same, in float64."""

    @abstractmethod
    def element(self, block: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Elements inside blocks, (n,) each."""

    def to(self, device: torch.device | str) -> "_Part":
        """A copy on another device."""
        moved = copy.copy(self)
        moved.kept, moved.diagonal, moved.logdet = self.kept.to(device), self.diagonal.to(device), self.logdet.to(device)
        return moved


class _LowRank(_Part):
    """Blocks of at least m weights: W, (count, m, width)."""

    def __init__(self, grads: Tensor, damping: float) -> None:
        count, m, width = grads.shape
        self.damping = damping
        self.kept = torch.empty(grads.shape, dtype=_dtype(grads), device=grads.device)
        self.diagonal = torch.empty(count, width, dtype=self.kept.dtype, device=grads.device)
        self.logdet = torch.zeros((), dtype=torch.float64, device=grads.device)
        eye = torch.eye(m, dtype=torch.float64, device=grads.device)
        for blocks in _groups(grads):
            lower = cholesky(gram(grads[blocks]).add_(eye, alpha=m * damping))
            for columns, panel in factor_panels(grads[blocks], damping, lower):
                self.kept[blocks, :, columns] = panel
                self.diagonal[blocks, columns] = (1 / damping - panel.square().sum(1)).to(self.diagonal.dtype)
            self.logdet += 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum()
        self.logdet += count * (width * math.log(damping) - m * math.log(m * damping))

    def ihvp(self, x: Tensor) -> Tensor:
        return x.double() / self.damping - expand(self.kept, project(self.kept, x))

    def element(self, block: Tensor, i: Tensor, j: Tensor) -> Tensor:
        dots = (self.kept[block, :, i].double() * self.kept[block, :, j].double()).sum(-1)
        return torch.where(i == j, self.diagonal[block, i], -dots.to(self.kept.dtype))


class _Dense(_Part):
    """Blocks of fewer than m weights: their inverse, (count, width, width)."""

    def __init__(self, grads: Tensor, damping: float) -> None:
        count, m, width = grads.shape
        self.kept = torch.empty(count, width, width, dtype=_dtype(grads), device=grads.device)
        self.logdet = torch.zeros((), dtype=torch.float64, device=grads.device)
        eye = torch.eye(width, dtype=torch.float64, device=grads.device)
        for blocks in _groups(grads):
            rows = grads[blocks].double()
            lower = cholesky((rows.mT @ rows / m).add_(eye, alpha=damping))
            self.kept[blocks] = torch.cholesky_inverse(lower).to(self.kept.dtype)
            self.logdet += 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum()
        self.diagonal = self.kept.diagonal(dim1=-2, dim2=-1)

    def ihvp(self, x: Tensor) -> Tensor:
        return project(self.kept, x)

    def element(self, block: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.kept[block, i, j]


class _InverseOperator(CurvatureOperator):
    """F⁻¹ by its products."""

    def __init__(self, inverse: InverseFisher) -> None:
        self.inverse = inverse
        kept = inverse._parts[0].kept
        self.shape, self.dtype, self.device = (inverse.dim, inverse.dim), kept.dtype, kept.device

    def _matvec(self, vector: Tensor) -> Tensor:
        return self.inverse.ihvp(vector)

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self.inverse.ihvp(matrix.mT).mT


def _dtype(grads: Tensor) -> torch.dtype:
    return torch.promote_types(grads.dtype, torch.float32)


def _groups(grads: Tensor) -> list[slice]:
    """Ranges of blocks that are factored together."""
    count = grads.shape[0]
    size = max(1, _GROUP // (grads.shape[1] * max(grads.shape[1:])))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
