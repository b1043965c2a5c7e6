import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from phyla.kan_family.bases import RBF, BSpline, Chebyshev, Fourier, Wavelet
from phyla.kan_family.conv import KANConv2d
from phyla.kan_family.linear import KANLinear
from phyla.kan_family.select import SelectKAN, SelectKANConv2d, SelectKANLinear
from phyla.shared.testing import check_module

GOLDEN = Path(__file__).parent / "golden"
POOL = (BSpline(4, 2), RBF(4), Chebyshev(3), Fourier(2))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Fixed(nn.Module):
    """A branch with a stored output."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def linear(nodes: int = 7, **options: Any) -> SelectKANLinear:
    """Every basis of the pool but the third is chosen by some node."""
    torch.manual_seed(0)
    layer = SelectKANLinear(3, nodes, bases=POOL, dtype=torch.float64, **options)
    choose(layer, [(0, 1, 3)[node % 3] for node in range(nodes)])
    return layer


def conv(groups: int = 1, **options: Any) -> SelectKANConv2d:
    torch.manual_seed(0)
    layer = SelectKANConv2d(4, 6, 3, bases=POOL, padding=1, groups=groups, dtype=torch.float64, **options)
    choose(layer, [3, 1, 1, 0, 3, 3])
    return layer


def choose(layer: SelectKANLinear | SelectKANConv2d, selection: list[int]) -> None:
    with torch.no_grad():
        layer.select_logits.copy_(torch.rand_like(layer.select_logits))
        layer.select_logits[range(len(selection)), selection] += 1


def cases() -> Iterator[Any]:
    yield pytest.param(linear, torch.Size([5, 3]), id="linear")
    yield pytest.param(lambda: linear(norm="layer", base=None, bias=False), torch.Size([2, 5, 3]), id="linear-norm")
    yield pytest.param(conv, torch.Size([2, 4, 5, 6]), id="conv")
    yield pytest.param(lambda: conv(base=None, bias=False), torch.Size([2, 4, 5, 6]), id="conv-plain")
    yield pytest.param(lambda: conv(groups=2), torch.Size([2, 4, 5, 6]), id="conv-groups")
    yield pytest.param(lambda: conv(groups=2), torch.Size([4, 5, 6]), id="conv-unbatched")


CASES = list(cases())


@pytest.mark.parametrize("name", ["skan_mixing", "skan_mixing_p2"])
@pytest.mark.parametrize("stage", ["full", "select"])
def test_mixing_is_the_reference(name: str, stage: str) -> None:
    stored = np.load(GOLDEN / f"{name}.npz")
    data = {key: torch.from_numpy(np.asarray(stored[key])) for key in stored.files}
    pool, _, nodes = data["branches"].shape
    layer = SelectKANLinear(2, nodes, bases=["fourier"] * pool, dtype=torch.float64)
    layer.branches = nn.ModuleList(Fixed(value) for value in data["branches"])
    layer.temperature = float(data["temperature"])
    with torch.no_grad():
        layer.select_logits.copy_(data["logits"])
    layer.set_stage(stage)
    y = layer(torch.zeros(1, 2, dtype=torch.float64))
    close(y, data[f"{stage}_output"])
    y.backward(data["grad_output"])
    close(layer.select_logits.grad, data[f"{stage}_grad_logits"])
    close(torch.stack([branch.value.grad for branch in layer.branches]), data[f"{stage}_grad_branches"])
    assert torch.equal(layer.selection, data["selection"])
    close(torch.einsum("pbo,op->bo", data["branches"], layer.mixing_weights()), data[f"{stage}_output"])


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_select_and_pruned_give_the_chosen_rows(make: Any, shape: torch.Size) -> None:
    layer = make()
    x = torch.randn(shape, dtype=torch.float64)
    outputs = torch.stack([branch(x) for branch in layer.branches])
    axis = -1 - layer.trailing
    selection = layer.selection
    expected = torch.stack([outputs[p].select(axis, node) for node, p in enumerate(selection.tolist())], axis)
    layer.set_stage("select")
    close(layer(x), expected)
    with torch.no_grad():
        close(layer(x), expected)
    before = sum(p.numel() for p in layer.branches[0].parameters())
    layer.prune_bases()
    close(layer(x), expected)
    assert torch.equal(layer.selection, selection)
    assert layer.stage == "pruned"
    assert layer.select_logits is None
    assert len(layer.branches) == 3
    close(layer.mixing_weights(), nn.functional.one_hot(selection, 4).double())
    if layer.groups == 1:
        used = [p for p in range(4) if p in selection.tolist()]
        rows = [branch.coef.shape[0] for branch in layer.branches]
        assert rows == [selection.tolist().count(p) for p in used]
        assert sum(branch.coef[0].numel() * n for branch, n in zip(layer.branches, rows, strict=True)) <= before * 2
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.prune_bases()
    assert state.keys() == layer.state_dict().keys()
    with pytest.raises(ValueError, match="stage: layer is pruned"):
        layer.set_stage("full")


def test_pruned_parameters_are_one_branch_a_node() -> None:
    layer = linear()
    each = {p: sum(q[0].numel() for n, q in layer.branches[p].named_parameters() if "basis" not in n) for p in range(4)}
    expected = sum(each[p] for p in layer.selection.tolist())
    layer.prune_bases()
    assert sum(q.numel() for q in layer.parameters()) == expected


def test_select_computes_used_branches_only_without_gradients() -> None:
    layer = linear()
    layer.set_stage("select")
    calls = []
    for index, branch in enumerate(layer.branches):
        branch.register_forward_hook(lambda *_, index=index: calls.append(index))
    x = torch.randn(2, 3, dtype=torch.float64)
    with torch.no_grad():
        layer(x)
    assert calls == [0, 1, 3]
    calls.clear()
    layer(x)
    assert calls == [0, 1, 2, 3]


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_state_dicts_of_pruned_layers(make: Any, shape: torch.Size) -> None:
    layer = make()
    layer.prune_bases()
    for branch in layer.branches:
        nn.init.normal_(branch.coef)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    alike, whole, other = make(), make(), make()
    choose(whole, [2] * whole.nodes)
    alike.prune_bases()
    x = torch.randn(shape, dtype=torch.float64)
    for target in (alike, whole, copy.deepcopy(layer)):
        target.load_state_dict(state)
        close(target(x), layer(x))
        assert target.stage == "pruned"
    unpruned = other.state_dict()
    with pytest.raises(ValueError, match="expected that of a pruned layer"):
        layer.load_state_dict(unpruned)
    choose(other, [2] * other.nodes)
    other.prune_bases()
    with pytest.raises(ValueError, match="pruned_selection: expected that of this layer"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="pruned_selection: expected indices below 4"):
        make().load_state_dict({**state, "pruned_selection": state["pruned_selection"] + 4})


def test_edge_masks_are_pruned_too() -> None:
    layer = linear()
    for branch in layer.branches:
        branch.edge_mask = (torch.rand(7, 3) > 0.3).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    layer.set_stage("select")
    expected = layer(x)
    layer.prune_bases()
    close(layer(x), expected)


def test_model_goes_through_the_stages() -> None:
    torch.manual_seed(0)
    model = SelectKAN([2, 5, 1], bases=POOL)
    x = torch.rand(64, 2) * 2 - 1
    y = torch.sin(3 * x[:, :1]) * x[:, 1:]
    losses = []
    for stage in ("full", "select", "pruned"):
        model.prune_bases() if stage == "pruned" else model.set_stage(stage)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert all(layer.stage == "pruned" for layer in model.layers)
    assert losses[2] < 0.02 < y.square().mean().item() / 4


def test_second_derivatives_reach_the_logits() -> None:
    for stage in ("full", "select"):
        torch.manual_seed(0)
        layer = SelectKANLinear(2, 2, bases=(Fourier(1), Chebyshev(2)), dtype=torch.float64)
        choose(layer, [0, 1])
        layer.set_stage(stage)
        x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        assert float(layer.select_logits.grad.abs().max()) > 0


@pytest.mark.parametrize("stage", ["full", "select", "pruned"])
def test_linear_layer_battery(stage: str) -> None:
    def make() -> SelectKANLinear:
        layer = SelectKANLinear(3, 4, bases=(Chebyshev(3), Wavelet(3)))
        choose(layer, [0, 1, 1, 0])
        layer.prune_bases() if stage == "pruned" else layer.set_stage(stage)
        return layer

    check_module(make, torch.randn(5, 3))


def test_conv_layer_battery() -> None:
    def make() -> SelectKANConv2d:
        layer = SelectKANConv2d(2, 3, 3, bases=(Fourier(2), RBF(3)))
        choose(layer, [0, 1, 0])
        layer.prune_bases()
        return layer

    check_module(make, torch.randn(3, 2, 5, 5))


def test_construction_and_errors() -> None:
    layer = SelectKANLinear(3, 2)
    assert [type(branch) for branch in layer.branches] == [KANLinear] * 5
    assert float(layer.select_logits.detach().abs().max()) == 0
    close(layer.mixing_weights(), torch.full((2, 5), 0.2), 1e-6)
    assert isinstance(SelectKANConv2d(2, 2, 3, bases=["relu"]).branches[0], KANConv2d)
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert before.keys() == layer.state_dict().keys()
    with pytest.raises(ValueError, match="stage: expected one of 'full', 'select', got 'pruned'"):
        layer.set_stage("pruned")
    with pytest.raises(ValueError, match="bases: expected a sequence of at least one basis"):
        SelectKANLinear(3, 2, bases=())
    with pytest.raises(ValueError, match="bases: expected a sequence of at least one basis"):
        SelectKANLinear(3, 2, bases="fourier")
    with pytest.raises(ValueError, match="basis"):
        SelectKANLinear(3, 2, bases=["nope"])
    with pytest.raises(ValueError, match="out_features: expected a positive int, got 0"):
        SelectKANLinear(3, 0)
    with pytest.raises(ValueError, match=r"x: expected last dimension 3, got shape \(2, 4\)"):
        layer(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="widths: expected at least two sizes"):
        SelectKAN([2])
