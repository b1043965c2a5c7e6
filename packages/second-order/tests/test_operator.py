import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from phyla.second_order import CurvatureOperator, PreconditionedOperator, adam_preconditioner, as_operator
from phyla.shared.testing import assert_close


def symmetric(size: int, seed: int = 0) -> Tensor:
    a = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a + a.T


A, B = symmetric(6), symmetric(6, 1)


@pytest.mark.parametrize(
    "operator",
    [
        as_operator(A),
        as_operator(lambda v: A @ v, size=6, dtype=torch.float64),
        as_operator(scipy.sparse.linalg.aslinearoperator(A.numpy())),
        as_operator(as_operator(A)),
        as_operator(as_operator(A).to_scipy()),
    ],
    ids=["tensor", "function", "scipy", "operator", "round trip"],
)
def test_one_protocol(operator: CurvatureOperator) -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    assert operator.shape == (6, 6)
    assert operator.dtype == torch.float64
    assert_close("matvec", operator @ x[:, 0], A @ x[:, 0], 1e-12)
    assert_close("matmat", operator @ x, A @ x, 1e-12)
    assert_close("dense", operator.to_dense(), A, 1e-12)
    assert operator.matmat(x[:, :0]).shape == (6, 0)
    assert_close("arithmetic", (2.0 * operator - as_operator(B) + as_operator(B) * 3 + -as_operator(A)).to_dense(), A + 2 * B, 1e-12)


def test_scipy_solvers_run_on_it() -> None:
    positive = A @ A + torch.eye(6, dtype=torch.float64)
    operator = as_operator(positive).to_scipy()
    top = scipy.sparse.linalg.eigsh(operator, k=2, which="LA", return_eigenvectors=False)
    assert np.allclose(np.sort(top), torch.linalg.eigvalsh(positive)[-2:].numpy(), rtol=1e-8)
    assert as_operator(positive.bfloat16()).to_scipy().matvec(np.ones(6)).dtype == np.float32


def test_preconditioned_by_adam() -> None:
    weights = [torch.nn.Parameter(torch.randn(2, 2)), torch.nn.Parameter(torch.randn(2))]
    for amsgrad in (False, True):
        optimizer = torch.optim.Adam(weights, lr=1e-3, amsgrad=amsgrad)
        grads = []
        for scale in (3.0, 0.1):
            grads.append(torch.cat([torch.full((p.numel(),), scale * (1 + i)) for i, p in enumerate(weights)]))
            for i, p in enumerate(weights):
                p.grad = torch.full_like(p, scale * (1 + i))
            optimizer.step()
        first, second = 1e-3 * grads[0] ** 2, 1e-3 * (0.999 * grads[0] ** 2 + grads[1] ** 2)
        v = torch.maximum(first, second) if amsgrad else second
        diagonal = adam_preconditioner(optimizer)
        assert_close("diagonal", diagonal, (v / (1 - 0.999**2)).sqrt() + 1e-8, 1e-5)
        scaled = PreconditionedOperator(as_operator(A), diagonal)
        assert_close("scaled", scaled.to_dense(), A / (diagonal[:, None] * diagonal).double().sqrt(), 1e-6)
        assert_close("matvec", scaled @ torch.ones(6), scaled.to_dense().sum(1), 1e-12)


def test_errors() -> None:
    operator = as_operator(A)
    with pytest.raises(ValueError, match=r"vector: expected shape \(6,\), got shape \(5,\)"):
        operator.matvec(torch.zeros(5))
    with pytest.raises(ValueError, match=r"matrix: expected shape \(6, \*\)"):
        operator.matmat(torch.zeros(5, 2))
    with pytest.raises(TypeError, match="vector: expected a Tensor, got ndarray"):
        operator @ np.zeros(6)  # type: ignore[operator]
    with pytest.raises(TypeError, match="vector: expected a float16"):
        operator @ torch.zeros(6, dtype=torch.int64)
    with pytest.raises(TypeError):
        operator + A  # type: ignore[operator]
    with pytest.raises(ValueError, match="other: expected"):
        operator + as_operator(symmetric(5))
    with pytest.raises(ValueError, match="obj: expected shape"):
        as_operator(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="size: expected the size of the vectors"):
        as_operator(lambda v: v)
    with pytest.raises(ValueError, match="size: expected 6"):
        as_operator(A, size=5)
    with pytest.raises(TypeError, match="obj: expected a Tensor, a function"):
        as_operator(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype, device"):
        as_operator(operator, dtype=torch.float32)
    with pytest.raises(ValueError, match="the product of obj: expected shape"):
        as_operator(lambda v: v[:2], size=6) @ torch.zeros(6)
    with pytest.raises(ValueError, match="diagonal: expected positive"):
        PreconditionedOperator(operator, torch.zeros(6))
    with pytest.raises(ValueError, match="optimizer: expected Adam"):
        adam_preconditioner(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1))
