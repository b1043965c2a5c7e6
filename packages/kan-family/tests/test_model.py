import matplotlib
import pytest
import torch
from torch import nn

from phyla.kan_family import KAN, ActivationPair, Attribution, BSpline, KANLinear, Rational
from phyla.shared.testing import assert_close, check_module


def test_module() -> None:
    torch.manual_seed(0)
    check_module(lambda: KAN([3, 4, 2]), torch.randn(5, 3))


def test_update_grid_feeds_each_layer_the_updated_ones() -> None:
    torch.manual_seed(0)
    model = KAN([2, 3, 1], dtype=torch.float64)
    x = torch.rand(300, 2, dtype=torch.float64) - 0.5
    model.update_grid(x)
    hidden = model.layers[0](x)
    knots = model.layers[1].basis.knots
    assert_close("first knot", knots[:, 3], hidden.min(0).values, 1e-12)
    assert_close("last knot", knots[:, -4], hidden.max(0).values, 1e-12)


def test_refine_reaches_every_layer_and_states_load_into_a_fresh_model() -> None:
    model, fresh = KAN([2, 3, 1]), KAN([2, 3, 1])
    model.refine(10)
    assert [layer.basis.spec for layer in model.layers] == [BSpline(10), BSpline(10)]
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(6, 2)
    assert torch.equal(fresh(x), model(x))


def test_states_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"state_dict: expected a KAN with widths \(2, 3, 1\), got \(2, 4, 1\)"):
        KAN([2, 3, 1]).load_state_dict(KAN([2, 4, 1]).state_dict())
    with pytest.raises(ValueError, match=r"state_dict: expected a KAN with widths \(2, 3, 1\), got \(2, 3, 1\) and more"):
        KAN([2, 3, 1]).load_state_dict(KAN([2, 3, 1, 1]).state_dict())


@pytest.mark.parametrize("basis", ["bspline", "rbf", "relu", "wavelet", ActivationPair(grid_size=1), Rational(num_groups=1)], ids=str)
def test_pruning_with_thresholds_zero_changes_nothing(basis: object) -> None:
    torch.manual_seed(0)
    model = KAN([3, 4, 2], basis=basis, norm="layer", dtype=torch.float64)
    x = torch.randn(50, 3, dtype=torch.float64)
    pruned = model.prune(x, node_threshold=0, edge_threshold=0)
    assert pruned.widths == model.widths
    assert all(layer.edge_mask is None for layer in pruned.layers)
    assert_close("pruned", pruned(x), model(x), 1e-12)


@pytest.mark.parametrize("basis", ["bspline", "wavelet", "rbf", ActivationPair()], ids=str)
def test_pruning_drops_exactly_the_dead_node(basis: object) -> None:
    torch.manual_seed(0)
    model = KAN([3, 6, 2], basis=basis)
    with torch.no_grad():
        model.layers[1].coef[:, 2] = 0
        model.layers[1].base_weight[:, 2] = 0
    x = torch.randn(200, 3)
    pruned = model.prune(x, node_threshold=1e-6, edge_threshold=0)
    assert pruned.widths == (3, 5, 2)
    assert_close("pruned", pruned(x), model(x), 1e-6)
    fresh = KAN(pruned.widths, basis=basis)
    fresh.load_state_dict(pruned.state_dict())
    assert torch.equal(fresh(x), pruned(x))


def test_pruning_masks_small_edges_and_keeps_the_outer_widths() -> None:
    torch.manual_seed(0)
    model = KAN([3, 4, 2])
    x = torch.randn(200, 3)
    pruned = model.prune(x, node_threshold=10.0, edge_threshold=0)
    assert pruned.widths == (3, 1, 2)
    with torch.no_grad():
        model.layers[0].coef[1, 2] = 0
        model.layers[0].base_weight[1, 2] = 0
    masked = model.prune(x, node_threshold=0, edge_threshold=1e-6)
    mask = masked.layers[0].edge_mask
    assert mask is not None
    assert mask[1, 2] == 0
    assert mask.sum() == mask.numel() - 1
    assert_close("masked", masked(x), model(x), 1e-6)
    again = KAN([3, 4, 2])
    again.load_state_dict(masked.state_dict())
    assert torch.equal(again(x), masked(x))


def test_penalty_drives_edges_to_sparsity() -> None:
    torch.manual_seed(0)
    model, x = KAN([4, 3, 1]), torch.randn(100, 4)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    before = model.regularization(x).item()
    for _ in range(30):
        optimizer.zero_grad()
        model.regularization(x).backward()
        optimizer.step()
    assert model.regularization(x).item() < 0.5 * before


def test_attribution_finds_the_input_that_matters() -> None:
    model = KAN([3, 1], dtype=torch.float64)
    layer = model.layers[0]
    assert isinstance(layer, KANLinear)
    nn.init.zeros_(layer.coef)
    with torch.no_grad():
        layer.base_weight.copy_(torch.tensor([[0.0, 2.0, 0.0]]))
    scores = model.attribute(torch.randn(100, 3, dtype=torch.float64)).nodes[0]
    assert_close("scores", scores, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), 1e-3)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"widths: expected at least 2 sizes, got \[3\]"):
        KAN([3])
    with pytest.raises(ValueError, match=r"widths\[1\]: expected a positive int, got 0"):
        KAN([3, 0, 1])


def test_attribution_draws_the_network() -> None:
    matplotlib.use("Agg")
    edges = (torch.tensor([[1.0, 0.5], [0.0, 0.25], [0.5, 0.5]]), torch.tensor([[2.0, 0.0, 1.0]]))
    ax = Attribution((torch.ones(2), torch.ones(3), torch.ones(1)), edges).plot()
    lines = ax.get_lines()
    assert [line.get_alpha() for line in lines] == [1.0, 0.5, 0.0, 0.25, 0.5, 0.5, 1.0, 0.0, 0.5]
    assert list(lines[1].get_xdata()) == pytest.approx([0.75, 1 / 6])  # from the second input to the first node
    assert [label.get_text() for label in ax.get_xticklabels()] == ["x1", "x2"]
