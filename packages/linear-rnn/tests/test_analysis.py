import math

import pytest
import torch
from torch import Tensor

from phyla.linear_rnn.analysis import effective_rank, householder_factors
from phyla.linear_rnn.functional import delta_product


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotation(m: int, seed: int, *batch: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*batch, m, m, dtype=torch.float64, generator=seeded(seed)))[0]


def applied(k: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """One token of `delta_product` with these reflections and v = 0."""
    m, width = state.shape[-2:]
    q, v = state.new_zeros(1, 1, 1, m), state.new_zeros(1, 1, m, 1, width)
    return delta_product(q, k[None, None, :, None], v, beta[None, None, :, None], initial_state=state[None, None])[1][0, 0]


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 16, 48])
@pytest.mark.parametrize("seed", range(4))
def test_the_factors_of_an_orthogonal_matrix_turn_a_state(m, seed):
    q = rotation(m, seed)
    state = torch.randn(m, 5, dtype=torch.float64, generator=seeded(seed + 100))
    k, beta = householder_factors(q)
    assert k.shape == (m, m)
    assert beta.shape == (m,)
    assert set(beta.tolist()) <= {0.0, 2.0}
    torch.testing.assert_close(applied(k, beta, state), q @ state, rtol=0, atol=1e-12)
    assert torch.linalg.det(q).sign() == (-1) ** int((beta == 2).sum())


@pytest.mark.parametrize("m", [2, 5, 9])
def test_permutations_take_as_many_reflections_as_points_minus_cycles(m):
    for seed in range(20):
        order = torch.randperm(m, generator=seeded(seed))
        q = torch.eye(m, dtype=torch.float64)[order]
        k, beta = householder_factors(q)
        torch.testing.assert_close(applied(k, beta, torch.eye(m, dtype=torch.float64)), q, rtol=0, atol=1e-13)
        left, cycles = set(range(m)), 0
        while left:
            cycles, point = cycles + 1, left.pop()
            while (point := int(order[point])) in left:
                left.remove(point)
        assert int((beta > 0).sum()) == m - cycles


def test_a_swap_is_the_reflection_of_the_paper():
    swap = torch.eye(4)[[0, 3, 2, 1]]
    k, beta = householder_factors(swap)
    assert beta.tolist() == [2.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(k[0].abs(), torch.tensor([0.0, math.sqrt(0.5), 0.0, math.sqrt(0.5)]))
    assert not k[1:].any()


@pytest.mark.parametrize("axes", [0, 1, 2, 5])
def test_reflections_and_the_identity(axes):
    q = torch.eye(5, dtype=torch.float64)
    q[:axes] *= -1
    k, beta = householder_factors(q)
    assert beta.tolist() == [2.0] * axes + [0.0] * (5 - axes)
    torch.testing.assert_close(applied(k, beta, torch.eye(5, dtype=torch.float64)), q, rtol=0, atol=1e-15)


@pytest.mark.parametrize("angle", [1e-2, 1e-5, 1e-8, 1e-11])
def test_small_rotations_keep_their_digits(angle):
    skew = torch.randn(8, 8, dtype=torch.float64, generator=seeded(0))
    q = torch.matrix_exp(angle * (skew - skew.T))
    k, beta = householder_factors(q)
    torch.testing.assert_close(applied(k, beta, torch.eye(8, dtype=torch.float64)), q, rtol=0, atol=1e-14)


def test_batches_and_single_precision():
    q = rotation(6, 0, 2, 3).float()
    k, beta = householder_factors(q)
    assert k.shape == (2, 3, 6, 6)
    assert beta.shape == (2, 3, 6)
    assert k.dtype == beta.dtype == torch.float32
    for row in range(2):
        for column in range(3):
            torch.testing.assert_close(applied(k[row, column], beta[row, column], torch.eye(6)), q[row, column], rtol=0, atol=3e-6)


def test_what_is_not_orthogonal_is_refused():
    for wrong in (2 * torch.eye(3), torch.ones(2, 2), torch.eye(3) + 1e-2, torch.zeros(1, 1)):
        with pytest.raises(ValueError, match="Q: expected an orthogonal matrix, got one whose Q"):
            householder_factors(wrong)
    for shape in ((3,), (2, 3), (4, 2, 3)):
        with pytest.raises(ValueError, match=r"Q: expected shape \((\*, )?m, m\), got shape"):
            householder_factors(torch.ones(shape))
    with pytest.raises(ValueError, match="Q: expected finite values"):
        householder_factors(torch.full((2, 2), math.nan))
    with pytest.raises(TypeError, match="Q: expected a float16"):
        householder_factors(torch.eye(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="Q: expected a Tensor, got list"):
        householder_factors([[1.0]])


def test_the_effective_rank_counts_equal_directions():
    for rank in (1, 2, 5):
        state = rotation(8, rank)[:, :rank] @ (3.0 * rotation(6, rank + 9)[:rank])
        assert effective_rank(state).item() == pytest.approx(rank, rel=1e-9)
    assert effective_rank(torch.zeros(3, 4)).item() == 0.0


def test_the_effective_rank_is_the_exponential_of_an_entropy():
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    states = torch.stack([rotation(3, seed) @ torch.diag(7 * shares) @ rotation(3, seed + 50) for seed in range(4)])
    found = effective_rank(states.view(2, 2, 3, 3))
    assert found.shape == (2, 2)
    torch.testing.assert_close(found, torch.full((2, 2), math.exp(-(shares * shares.log()).sum().item()), dtype=torch.float64))
    assert effective_rank(states.half()).dtype == torch.float32


def test_the_effective_rank_explains_wrong_states():
    with pytest.raises(ValueError, match=r"state: expected shape \(\.\.\., K, V\), got shape \(3,\)"):
        effective_rank(torch.ones(3))
    with pytest.raises(ValueError, match="state: expected finite values"):
        effective_rank(torch.full((2, 2), math.inf))
    with pytest.raises(TypeError, match="state: expected a float16"):
        effective_rank(torch.ones(2, 2, dtype=torch.int64))
