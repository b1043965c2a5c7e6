import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.linear_rnn import (
    MLSTM,
    RWKV7,
    DeltaNet,
    DeltaProduct,
    GatedDeltaProduct,
    GatedLinearAttention,
    KimiDeltaAttention,
    LayerState,
    LinearRNNLM,
    Mamba2,
    MLSTMState,
)
from phyla.linear_rnn.analysis import effective_rank, householder_factors, receptive_decay, transition_eigenvalues
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


LAYERS = {
    "DeltaProduct": lambda: DeltaProduct(24, num_heads=2, num_householder=3),
    "GatedDeltaProduct": lambda: GatedDeltaProduct(24, num_heads=2, num_v_heads=4),
    "DeltaNet": lambda: DeltaNet(24, num_heads=2),
    "KimiDeltaAttention": lambda: KimiDeltaAttention(24, num_heads=2),
    "GatedLinearAttention": lambda: GatedLinearAttention(24, num_heads=2),
    "Mamba2": lambda: Mamba2(24, state_size=6, head_dim=8),
    "RWKV7": lambda: RWKV7(24, head_dim=8),
    "MLSTM": lambda: MLSTM(24, num_heads=2),
}

every_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


def built(build: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return build().double(), torch.randn(2, 5, 24, dtype=torch.float64)


@torch.no_grad()
def transitions(layer: nn.Module, x: Tensor) -> Tensor:
    """The matrices (T, heads, K, K) for a sequence (1, T, hidden), seen from outside: tokens read unit vectors as states, and zeros."""

    def memory(state: LayerState) -> Tensor:
        kept = state.recurrent
        return kept.c * kept.m.exp()[..., None, None] if isinstance(kept, MLSTMState) else kept

    def opened(state: LayerState, columns: Tensor) -> LayerState:
        kept = state.recurrent
        copies = tuple(each.expand(len(columns), *each.shape[1:]) for each in state.conv)
        if isinstance(kept, MLSTMState):
            n, m = (torch.zeros(len(columns), *each.shape[1:], dtype=each.dtype) for each in (kept.n, kept.m))
            return LayerState(MLSTMState(columns, n, m), copies)
        return LayerState(columns, copies)

    start = layer(x[:, :1])[1]
    width = memory(start).shape[-2]
    units = torch.zeros(width + 1, *memory(start).shape[1:], dtype=x.dtype)
    units[torch.arange(width), :, torch.arange(width), 0] = 1.0
    state = LayerState(start.recurrent, tuple(torch.zeros_like(each) for each in start.conv))
    found = []
    for t in range(x.shape[1]):
        token = x[:, t : t + 1]
        after = memory(layer(token.expand(width + 1, 1, -1), opened(state, units))[1])
        found.append((after[:-1] - after[-1])[..., 0].permute(1, 2, 0))
        state = layer(token, state)[1]
    return torch.stack(found)


@every_layer
def test_eigenvalues_are_those_of_what_a_token_does_to_the_state(build):
    layer, x = built(build)
    found = transition_eigenvalues(layer, x)
    for row, sequence in enumerate(x.split(1)):
        matrices = transitions(layer, sequence)
        assert found.shape == (2, *matrices.shape[:3])
        power = torch.eye(matrices.shape[-1], dtype=torch.float64).expand_as(matrices)
        for exponent in range(1, matrices.shape[-1] + 1):  # the traces of the powers determine the eigenvalues
            power = power @ matrices
            traces = power.diagonal(dim1=-2, dim2=-1).sum(-1)
            torch.testing.assert_close((found[row] ** exponent).sum(-1), traces.to(torch.complex128), rtol=1e-9, atol=1e-9)


@every_layer
def test_decays_are_shares(build):
    layer, x = built(build)
    found = receptive_decay(layer, x)
    assert found.shape == transition_eigenvalues(layer, x).shape[2:3]
    assert (found > 0).all()
    assert (found <= 1).all()
    assert layer.training


def test_decays_are_the_mean_of_the_gate():
    layer, x = built(LAYERS["GatedDeltaProduct"])
    gate = torch.exp(-layer.A_log.exp() * F.softplus(layer.a_proj(x) + layer.dt_bias))
    torch.testing.assert_close(receptive_decay(layer, x), gate.detach().mean((0, 1)))
    layer, x = built(LAYERS["GatedLinearAttention"])
    gate = torch.sigmoid(layer.gk_proj(x)) ** (1 / 16)
    torch.testing.assert_close(receptive_decay(layer, x), gate.detach().unflatten(-1, (2, -1)).mean((0, 1, 3)))
    layer, x = built(LAYERS["DeltaProduct"])
    assert receptive_decay(layer, x).tolist() == [1.0, 1.0]


def test_signs_of_eigenvalues_follow_the_option():
    x = 10 * torch.randn(1, 200, 24, generator=seeded(0))
    torch.manual_seed(0)
    plain, negative = (transition_eigenvalues(DeltaNet(24, num_heads=2, allow_neg_eigval=sign), x).real for sign in (False, True))
    assert -1e-5 < plain.min() < 0.5
    assert -1.0 <= negative.min() < -0.1
    assert max(plain.max(), negative.max()) < 1 + 1e-5


def test_two_reflections_rotate():
    """A token that turns the plane by a third has the eigenvalues e^(2 pi i / 3) and its conjugate."""
    third = 2 * math.pi / 3
    turn = torch.tensor([[math.cos(third), -math.sin(third)], [math.sin(third), math.cos(third)]], dtype=torch.float64)
    k, beta = householder_factors(turn)

    def layer(x):
        return delta_product(x[:, :, None], k[None, None, :, None], x.new_zeros(1, 1, 2, 1, 3), beta[None, None, :, None])

    found = transition_eigenvalues(layer, torch.ones(1, 1, 2, dtype=torch.float64)).flatten()
    assert found.angle().sort().values.tolist() == pytest.approx([-third, third])
    assert found.abs().tolist() == pytest.approx([1.0, 1.0])


def test_a_later_rwkv_layer_gets_its_first_value_from_the_caller():
    torch.manual_seed(0)
    layer = RWKV7(24, head_dim=8, layer_idx=1, num_layers=2)
    x = torch.randn(1, 4, 24)
    assert transition_eigenvalues(partial(layer, v_first=torch.randn(1, 4, 24)), x).shape == (1, 4, 3, 8)


def test_only_a_single_recurrence_has_transitions():
    x = torch.randn(1, 4, 24)
    with pytest.raises(ValueError, match=r"layer: expected one that runs one recurrence of phyla\.linear_rnn\.functional, got 0"):
        transition_eigenvalues(nn.Linear(24, 24), x)
    model = LinearRNNLM(5, 24, 2, mixer=lambda _: DeltaNet(24), intermediate_size=8)
    with pytest.raises(ValueError, match="got 2"):
        receptive_decay(model, torch.zeros(1, 3, dtype=torch.int64))
