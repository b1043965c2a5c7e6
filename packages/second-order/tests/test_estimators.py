"""Lanczos, eigenpairs, conjugate gradients, trace, diagonal and spectral density against dense matrices and golden files."""

import math
import warnings

import numpy as np
import pytest
import scipy.integrate
import torch
from oracles_curvature import GOLDEN, hutchpp, leave_one_out, symmetric, wasserstein
from torch import Tensor

from phyla.second_order import as_operator, conjugate_gradient, diagonal, eigsh, lanczos, spectral_density, trace
from phyla.second_order import functional as SF
from phyla.shared.testing import assert_close, load_golden


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["lanczos_slq", "lanczos_slq_psd"])
def test_golden_quadrature(name: str) -> None:
    data = load_golden(GOLDEN / f"{name}.npz")
    operator, steps = as_operator(data["matrix"]), int(data["num_steps"])
    run = lanczos(operator, steps, start=data["probes"][0])
    assert_close("alphas", run.alphas, data["alphas"], 1e-9)
    assert_close("betas", run.betas, data["betas"], 1e-9)
    slq = spectral_density(operator, num_steps=steps, probes=data["probes"], grid=data["grid"], bandwidth=float(data["bandwidth"]))
    for key in ("density", "stderr", "nodes", "weights"):
        assert_close(key, getattr(slq, key), data[key], 1e-8)


def test_golden_trace() -> None:
    data = load_golden(GOLDEN / "trace.npz")
    operator = as_operator(data["matrix"])
    for method, key, rows, products in (("xtrace", "xtrace", 10, 20), ("hutch++", "hutchpp", 12, 18), ("hutchinson", "hutchinson", 24, 24)):
        estimate = trace(operator, method=method, probes=data["probes"][:rows])  # type: ignore[arg-type]
        assert estimate.value == pytest.approx(float(data[key]), rel=1e-9)
        assert estimate.num_matvecs == products


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_lanczos_identities(dtype: torch.dtype, tolerance: float) -> None:
    a = symmetric(160).to(dtype)
    run = lanczos(as_operator(a), 150, generator=seeded())
    q, t = run.basis.double(), torch.diag(run.alphas) + torch.diag(run.betas, 1) + torch.diag(run.betas, -1)
    assert run.alphas.dtype == torch.float64
    assert run.basis.shape == (160, 150)
    assert_close("orthonormal", q.T @ q, torch.eye(150, dtype=torch.float64), tolerance)
    assert_close("projection", q.T @ a.double() @ q, t, 10 * tolerance)
    exact, ritz = torch.linalg.eigvalsh(a.double()), torch.linalg.eigvalsh(t)
    assert_close("extremes", ritz[[0, -1]], exact[[0, -1]], 1e-4 if dtype == torch.float32 else 1e-9)


def test_lanczos_stops_on_an_invariant_space() -> None:
    values = torch.tensor([1.0, 1, 1, 2, 2, 5, 5, 5], dtype=torch.float64)
    run = lanczos(as_operator(torch.diag(values)), 8, generator=seeded())
    assert len(run.alphas) == 3
    nodes, _ = SF.tridiagonal_quadrature(run.alphas, run.betas)
    assert_close("nodes", nodes, torch.tensor([1.0, 2, 5]), 1e-10)
    slq = spectral_density(as_operator(torch.diag(values)), num_steps=8, num_probes=3, generator=seeded())
    assert_close("weights of signs", slq.weights[:, :3], torch.tensor([3.0, 2, 3]).expand(3, 3) / 8, 1e-10)
    assert float(slq.weights[:, 3:].abs().max()) == 0
    assert torch.equal(slq.nodes[:, 3:], slq.nodes[:, 2:3].expand(3, 5))
    assert len(lanczos(as_operator(torch.zeros(4, 4)), 4).alphas) == 1


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("k", [1, 4])
def test_eigsh(which: str, k: int) -> None:
    a = symmetric(90) - 2 * torch.eye(90, dtype=torch.float64)
    found = eigsh(as_operator(a), k, which=which, tol=1e-9, generator=seeded())  # type: ignore[arg-type]
    values = torch.linalg.eigvalsh(a)
    order = {"LA": -values, "SA": values, "LM": -values.abs()}[which].argsort()[:k]
    assert bool(found.converged.all())
    assert_close("values", found.eigenvalues, values[order], 1e-9)
    assert_close(
        "residuals",
        torch.linalg.vector_norm(a @ found.eigenvectors - found.eigenvectors * found.eigenvalues, dim=0),
        found.residuals,
        1e-6,
        least=1e-5,
    )
    assert_close("orthonormal", found.eigenvectors.T @ found.eigenvectors, torch.eye(k, dtype=torch.float64), 1e-10)


def test_eigsh_at_the_borders() -> None:
    a = symmetric(5)
    assert_close("all pairs", eigsh(as_operator(a), 5, which="SA").eigenvalues, torch.linalg.eigvalsh(a), 1e-9)
    repeated = torch.diag(torch.tensor([3.0, 3, 3, 1], dtype=torch.float64))
    assert_close("multiple", eigsh(as_operator(repeated), 4, generator=seeded()).eigenvalues, torch.tensor([3.0, 3, 3, 1]), 1e-9)
    assert_close("zero", eigsh(as_operator(torch.zeros(4, 4)), 2).eigenvalues, torch.zeros(2), 1e-9)
    assert_close(
        "single",
        eigsh(as_operator(symmetric(60).float()), 2, generator=seeded()).eigenvalues,
        torch.linalg.eigvalsh(symmetric(60)).flip(0)[:2],
        1e-5,
    )
    short = eigsh(as_operator(symmetric(60)), 2, max_steps=3, generator=seeded())
    assert not bool(short.converged.any())


def test_conjugate_gradient() -> None:
    a, b = (
        symmetric(40, positive=True) + 0.01 * torch.eye(40, dtype=torch.float64),
        torch.randn(40, dtype=torch.float64, generator=seeded()),
    )
    operator = as_operator(a)
    plain = conjugate_gradient(operator, b, damping=0.1, rtol=1e-10)
    solution = torch.linalg.solve(a + 0.1 * torch.eye(40, dtype=torch.float64), b)
    assert plain.converged
    assert len(plain.residual_norms) == plain.iterations + 1
    assert_close("solution", plain.x, solution, 1e-8)
    exact = conjugate_gradient(operator, b, rtol=1e-8, preconditioner=lambda v: torch.linalg.solve(a, v))
    assert exact.iterations <= 2
    assert conjugate_gradient(operator, b, damping=0.1, x0=solution).iterations == 0
    few = conjugate_gradient(operator, b, max_iter=2)
    assert (few.iterations, few.converged) == (2, False)
    assert not conjugate_gradient(as_operator(-a), b).converged
    assert conjugate_gradient(operator, torch.zeros_like(b)).converged


def test_trace_and_diagonal_are_the_papers() -> None:
    a = symmetric(30)
    signs = torch.randint(0, 2, (12, 30), generator=seeded(), dtype=torch.int8).double() * 2 - 1
    samples, expected = leave_one_out(a, signs)
    estimate = trace(as_operator(a), num_matvecs=24, method="xtrace", generator=seeded())
    assert estimate.value == pytest.approx(np.mean(samples), rel=1e-9)
    assert estimate.stderr == pytest.approx(np.std(samples, ddof=1) / math.sqrt(12), rel=1e-9)
    assert_close("xdiag", diagonal(as_operator(a), num_matvecs=24, generator=seeded()), expected, 1e-9)
    assert_close(
        "hutchinson",
        diagonal(as_operator(a), num_matvecs=12, method="hutchinson", generator=seeded()),
        (signs * (signs @ a)).mean(0),
        1e-12,
    )
    assert trace(as_operator(a), num_matvecs=18, generator=seeded()).value == pytest.approx(hutchpp(a, signs[:6], signs[6:]), rel=1e-9)


def test_low_rank_is_exact() -> None:
    left = torch.randn(40, 3, dtype=torch.float64, generator=seeded())
    a = left @ left.T
    for method in ("hutch++", "xtrace"):
        estimate = trace(as_operator(a), num_matvecs=30, method=method, generator=seeded())  # type: ignore[arg-type]
        assert estimate.value == pytest.approx(float(a.trace()), rel=1e-9)
        assert estimate.stderr < 1e-8
    assert_close("diagonal", diagonal(as_operator(a), num_matvecs=20, generator=seeded()), a.diagonal(), 1e-8)
    assert trace(as_operator(torch.zeros(5, 5)), method="xtrace").value == 0


def test_errors_of_the_estimates_are_honest() -> None:
    a = symmetric(40)
    exact = float(a.trace())
    for method in ("hutchinson", "xtrace", "hutch++"):
        runs = [trace(as_operator(a), num_matvecs=30, method=method, generator=seeded(s)) for s in range(60)]  # type: ignore[arg-type]
        z = np.array([(run.value - exact) / run.stderr for run in runs])
        assert abs(z.mean()) < 0.6
        assert 0.6 < np.sqrt(np.mean(z**2)) < 1.7


def test_spectral_density() -> None:
    a = symmetric(200) * math.sqrt(2 / 200)  # off-diagonal variance 1/200: a semicircle of radius 2
    values = torch.linalg.eigvalsh(a)
    slq = spectral_density(as_operator(a), num_steps=40, num_probes=8, generator=seeded())
    spread = float(values[-1] - values[0])
    sampling = math.sqrt(2 * 0.25 / (8 * 200))  # of the distribution function in the middle, where it is largest
    assert wasserstein(slq.nodes, slq.weights, values) < sampling * spread
    assert float(torch.trapezoid(slq.density, slq.grid)) == pytest.approx(1, abs=0.02)
    for order in (1, 2, 3):
        value, error = slq.moment(order)
        assert abs(value - float((values**order).mean())) < 4 * error + 1e-12
    value, error = slq.mass(0, math.inf)
    assert abs(value - float((values >= 0).double().mean())) < 0.05
    again = spectral_density(as_operator(a), num_steps=40, num_probes=8, generator=seeded())
    assert torch.equal(again.density, slq.density)
    alone = spectral_density(as_operator(a), num_steps=40, num_probes=1, generator=seeded())
    assert bool(alone.stderr.isinf().all())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import matplotlib

        matplotlib.use("Agg")
    for density in (slq, alone):
        assert density.plot().get_yscale() == "log"


def test_closed_densities() -> None:
    def integral(density: object, low: float, high: float, power: int = 0) -> float:
        return float(scipy.integrate.quad(lambda x: x**power * float(density(torch.tensor(x, dtype=torch.float64))), low, high)[0])  # type: ignore[operator]

    assert integral(lambda x: SF.semicircle_density(x, 1.5), -1.5, 1.5) == pytest.approx(1, abs=1e-6)
    assert integral(lambda x: SF.semicircle_density(x, 1.5), -1.5, 1.5, 2) == pytest.approx(1.5**2 / 4, abs=1e-6)
    for ratio in (0.3, 2.0):
        edges = [1.7 * (1 + s * math.sqrt(ratio)) ** 2 for s in (-1, 1)]
        assert integral(lambda x, r=ratio: SF.marchenko_pastur_density(x, r, 1.7), *edges) == pytest.approx(min(1, 1 / ratio), abs=1e-5)
        assert integral(lambda x, r=ratio: SF.marchenko_pastur_density(x, r, 1.7), *edges, 1) == pytest.approx(1.7, abs=1e-5)
    assert float(SF.marchenko_pastur_density(torch.zeros(1), 1.0, 1.0)) == 0
    nodes, weights, grid = torch.randn(2, 3, requires_grad=True), torch.rand(2, 3), torch.linspace(-1, 1, 5)
    value = SF.gaussian_density(nodes, weights, grid, 0.3)
    bells = torch.distributions.Normal(nodes[..., None], 0.3).log_prob(grid).exp()
    assert_close("bells", value, (weights[..., None] * bells).sum(-2), 1e-5)
    assert_close("in place or not", SF.gaussian_density(nodes.detach(), weights, grid, 0.3), value, 1e-6)
    value.sum().backward()


def bad(a: Tensor) -> list[tuple[str, object]]:
    operator = as_operator(a)
    return [
        ("num_steps: expected at most 4", lambda: lanczos(operator, 5)),
        ("num_steps: expected a positive int", lambda: spectral_density(operator, num_steps=0)),
        ("start: expected shape", lambda: lanczos(operator, 2, start=torch.zeros(3))),
        ("start: expected a vector that is not zero", lambda: lanczos(operator, 2, start=torch.zeros(4))),
        ("probes: expected rows that are not zero", lambda: spectral_density(operator, num_steps=2, probes=torch.zeros(1, 4))),
        ("probes: expected shape", lambda: trace(operator, probes=torch.ones(1, 5))),
        ("probes: expected an even number", lambda: trace(operator, probes=torch.ones(3, 4))),
        ("num_matvecs: expected at least 4", lambda: trace(operator, num_matvecs=3, method="xtrace")),
        ("num_matvecs: expected at least 2", lambda: diagonal(operator, num_matvecs=1)),
        ("k: expected at most 4", lambda: eigsh(operator, 5)),
        ("which: expected one of", lambda: eigsh(operator, 1, which="LX")),  # type: ignore[arg-type]
        ("rhs: expected shape", lambda: conjugate_gradient(operator, torch.zeros(3))),
        ("damping: expected a number", lambda: conjugate_gradient(operator, torch.zeros(4), damping=-1.0)),
        ("betas: expected shape", lambda: SF.tridiagonal_quadrature(torch.ones(3), torch.ones(3))),
        ("bandwidth: expected a number", lambda: spectral_density(operator, num_steps=2, bandwidth=0.0)),
        ("low: expected at most", lambda: spectral_density(operator, num_steps=2).mass(2, 1)),
    ]


@pytest.mark.parametrize("index", range(len(bad(symmetric(4)))))
def test_errors(index: int) -> None:
    message, call = bad(symmetric(4))[index]
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
