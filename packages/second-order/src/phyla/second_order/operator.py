"""Symmetric linear operators that are known by their products: the protocol, arithmetic on it, and preconditioning.

One flat-vector convention: a parameter vector has shape (P,), in the order of `named_parameters()`, C order inside each tensor.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from phyla.shared import checks

__all__ = ["CurvatureOperator", "PreconditionedOperator", "adam_preconditioner", "as_operator"]


class CurvatureOperator(abc.ABC):
    """A symmetric (P, P) matrix that offers its products.

    A subclass sets `shape`, `dtype`, `device` and implements `_matvec`; it overrides `_matmat` where a block of vectors is cheaper than one
    after the other. Operators add (`A + B`), scale (`2.0 * A`) and multiply tensors (`A @ x`).

    Attributes:
        shape: (P, P).
        dtype: of the vectors that go in and out.
        device: of the vectors that go in and out.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abc.abstractmethod
    def _matvec(self, vector: Tensor) -> Tensor:
        """The product with a checked (P,) vector."""

    def _matmat(self, matrix: Tensor) -> Tensor:
        """The product with a checked (P, k) matrix, k >= 1."""
        return torch.stack([self._matvec(column) for column in matrix.unbind(1)], 1)

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with one vector.

        Args:
            vector: (P,); it is converted to the operator's dtype and device.

        Returns: (P,).
        Raises: TypeError if `vector` is no floating Tensor, ValueError if it has another size.
        """
        checks.shape("vector", checks.floating("vector", vector), (self.shape[1],))
        return self._matvec(vector.to(self.device, self.dtype))

    def matmat(self, matrix: Tensor) -> Tensor:
        """The products with the columns of a matrix, together where that is cheaper.

        Args:
            matrix: (P, k); it is converted to the operator's dtype and device.

        Returns: (P, k).
        Raises: TypeError if `matrix` is no floating Tensor, ValueError if it has another number of rows.
        """
        checks.shape("matrix", checks.floating("matrix", matrix), (self.shape[1], None))
        matrix = matrix.to(self.device, self.dtype)
        return self._matmat(matrix) if matrix.shape[1] else torch.empty_like(matrix)

    def __matmul__(self, other: Tensor) -> Tensor:
        if isinstance(other, Tensor) and other.dim() == 2:
            return self.matmat(other)
        return self.matvec(other)

    def __add__(self, other: CurvatureOperator) -> CurvatureOperator:
        if not isinstance(other, CurvatureOperator):
            return NotImplemented
        return _Combination([(1.0, self), (1.0, other)])

    def __sub__(self, other: CurvatureOperator) -> CurvatureOperator:
        if not isinstance(other, CurvatureOperator):
            return NotImplemented
        return _Combination([(1.0, self), (-1.0, other)])

    def __mul__(self, scale: float) -> CurvatureOperator:
        return _Combination([(checks.in_range("scale", scale), self)])

    __rmul__ = __mul__

    def __neg__(self) -> CurvatureOperator:
        return self * -1.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"

    def to_dense(self) -> Tensor:
        """The matrix itself, (P, P), from P products."""
        return self.matmat(torch.eye(self.shape[0], dtype=self.dtype, device=self.device))

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The operator for `scipy.sparse.linalg`; numpy arrays go in and out, in the operator's precision (float32 for half precision)."""
        half = self.dtype not in (torch.float32, torch.float64)
        dtype = np.dtype(str(torch.float32 if half else self.dtype).removeprefix("torch."))

        def apply(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            block = torch.from_numpy(np.array(array, dtype=dtype).reshape(self.shape[1], -1))
            product: np.ndarray[Any, Any] = self.matmat(block).detach().to("cpu", torch.float32 if half else None).numpy()
            return product.reshape(array.shape)

        make: Any = scipy.sparse.linalg.LinearOperator
        result: scipy.sparse.linalg.LinearOperator = make(self.shape, matvec=apply, matmat=apply, rmatvec=apply, rmatmat=apply, dtype=dtype)
        return result


class _Combination(CurvatureOperator):
    """A weighted sum of operators on one space; nested sums are flattened."""

    def __init__(self, terms: list[tuple[float, CurvatureOperator]]) -> None:
        self.terms: list[tuple[float, CurvatureOperator]] = [
            (scale * inner, operator)
            for scale, term in terms
            for inner, operator in (term.terms if isinstance(term, _Combination) else [(1.0, term)])
        ]
        first = self.terms[0][1]
        self.shape, self.dtype, self.device = first.shape, first.dtype, first.device
        for _, operator in self.terms[1:]:
            if (operator.shape, operator.dtype, operator.device) != (self.shape, self.dtype, self.device):
                raise ValueError(f"other: expected {first!r} and an operator like it, got {operator!r}")

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._sum([operator.matvec(vector) for _, operator in self.terms])

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self._sum([operator.matmat(matrix) for _, operator in self.terms])

    def _sum(self, products: list[Tensor]) -> Tensor:
        total = products[0] * self.terms[0][0]
        for (scale, _), product in zip(self.terms[1:], products[1:], strict=True):
            total.add_(product, alpha=scale)
        return total


class _Dense(CurvatureOperator):
    """A matrix that is held."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape, self.dtype, self.device = (matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device

    def _matvec(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self.matrix @ matrix


class _Function(CurvatureOperator):
    """A function of one vector."""

    def __init__(self, function: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.function = function
        self.shape, self.dtype, self.device = (size, size), dtype, device

    def _matvec(self, vector: Tensor) -> Tensor:
        product = self.function(vector)
        return checks.shape("the product of obj", product, (self.shape[0],)).to(self.device, self.dtype)


class _SciPy(CurvatureOperator):
    """A `scipy.sparse.linalg.LinearOperator`."""

    def __init__(self, operator: scipy.sparse.linalg.LinearOperator, dtype: torch.dtype, device: torch.device) -> None:
        self.operator: Any = operator
        self.shape, self.dtype, self.device = (operator.shape[0], operator.shape[1]), dtype, device

    def _matvec(self, vector: Tensor) -> Tensor:
        return torch.as_tensor(self.operator.matvec(vector.detach().cpu().numpy())).to(self.device, self.dtype)

    def _matmat(self, matrix: Tensor) -> Tensor:
        return torch.as_tensor(self.operator.matmat(matrix.detach().cpu().numpy())).to(self.device, self.dtype)


def as_operator(
    obj: Tensor | Callable[[Tensor], Tensor] | scipy.sparse.linalg.LinearOperator | CurvatureOperator,
    *,
    size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> CurvatureOperator:
    """One protocol for a matrix, a function, a SciPy operator and a `CurvatureOperator`, which is given back as it is.

    The matrix must be symmetric; that is not checked.

    Args:
        obj: a (P, P) Tensor, a function (P,) -> (P,), a SciPy LinearOperator, or a CurvatureOperator.
        size: P; needed for a function, checked for the others.
        dtype: of the operator; default that of a Tensor, torch's default dtype for a function, the SciPy operator's own.
        device: of the operator; default that of a Tensor, the CPU otherwise.

    Raises:
        TypeError: `obj` is none of these, or a Tensor without floating values; `dtype` or `device` are not those of a CurvatureOperator.
        ValueError: not square, not of `size`, or a function without `size`.
    """
    place = None if device is None else torch.device(device)
    operator: CurvatureOperator
    if isinstance(obj, CurvatureOperator):
        operator = obj
        if (dtype or obj.dtype) != obj.dtype or (place or obj.device) != obj.device:
            raise TypeError(f"dtype, device: expected those of the operator, {obj.dtype} on {obj.device}, got {dtype}, {device}")
    elif isinstance(obj, Tensor):
        checks.shape("obj", checks.floating("obj", obj), ("P", "P"))
        operator = _Dense(obj.to(place or obj.device, dtype or obj.dtype))
    elif isinstance(obj, scipy.sparse.linalg.LinearOperator):
        if obj.shape[0] != obj.shape[1]:
            raise ValueError(f"obj: expected a square operator, got shape {tuple(obj.shape)}")
        own = torch.float32 if obj.dtype == np.float32 else torch.float64
        operator = _SciPy(obj, dtype or own, place or torch.device("cpu"))
    elif callable(obj):
        if size is None:
            raise ValueError("size: expected the size of the vectors, since obj is a function, got None")
        operator = _Function(obj, checks.positive_int("size", size), dtype or torch.get_default_dtype(), place or torch.device("cpu"))
    else:
        raise TypeError(f"obj: expected a Tensor, a function, a SciPy LinearOperator or a CurvatureOperator, got {type(obj).__name__}")
    if size is not None and operator.shape != (size, size):
        raise ValueError(f"size: expected {operator.shape[0]}, the size of obj, got {size}")
    return operator


class PreconditionedOperator(CurvatureOperator):
    """`D^-1/2 A D^-1/2` with a positive diagonal D: the curvature that a preconditioned optimizer feels.

    Args:
        operator: A.
        diagonal: D, (P,), positive; for Adam `adam_preconditioner(optimizer)`.

    Raises: ValueError if `diagonal` has another size or is not positive and finite.
    """

    def __init__(self, operator: CurvatureOperator, diagonal: Tensor) -> None:
        checks.shape("diagonal", checks.floating("diagonal", diagonal), (operator.shape[0],))
        checks.finite("diagonal", diagonal)
        if not bool((diagonal > 0).all()):
            raise ValueError(f"diagonal: expected positive entries, got a smallest of {float(diagonal.min())}")
        self.operator = operator
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self._scale = diagonal.detach().to(self.device, torch.float64).rsqrt().to(self.dtype)

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._scale * self.operator.matvec(self._scale * vector)

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self._scale[:, None] * self.operator.matmat(self._scale[:, None] * matrix)


def adam_preconditioner(optimizer: torch.optim.Optimizer) -> Tensor:
    """The diagonal `sqrt(v_hat) + eps` of Adam's present preconditioner, flat over the parameters in the order of the optimizer's groups.

    `v_hat` is the bias-corrected second moment (its running maximum with `amsgrad`). Sharpness of `PreconditionedOperator(H, this)` bounds
    Adam's learning rate.

    Args:
        optimizer: `torch.optim.Adam`, `AdamW`, or one with the same state, after at least one step.

    Returns: (P,).
    Raises: ValueError if a parameter has no second moment yet or the optimizer keeps none.
    """
    parts = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            moment = state.get("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
            if moment is None:
                raise ValueError(f"optimizer: expected Adam's state after a step, got {type(optimizer).__name__} with {sorted(state)}")
            correction = 1.0 - float(group["betas"][1]) ** float(state["step"])
            parts.append(((moment / correction).sqrt() + group["eps"]).flatten())
    if not parts:
        raise ValueError("optimizer: expected at least one parameter, got none")
    return torch.cat(parts)
