"""Curvature of models against dense float64 matrices and golden files."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracles_curvature import GOLDEN, dense_curvature, golden_model
from torch import Tensor, nn

from phyla.second_order import EmpiricalFisherOperator, FisherOperator, GGNOperator, HessianOperator, per_sample_gradients
from phyla.second_order.model_operator import ModelOperator
from phyla.shared.testing import assert_close, load_golden

LOSSES: dict[str, Any] = {"ce": F.cross_entropy, "mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits}
KINDS: dict[str, Callable[..., ModelOperator]] = {
    "hessian": HessianOperator,
    "ggn": GGNOperator,
    "empirical_fisher": EmpiricalFisherOperator,
}


def problem(loss: str = "ce", seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    y = torch.randint(3, (7,)) if loss == "ce" else torch.rand(7, 3, dtype=torch.float64)
    return model, x, y


def cosh_loss(f: Tensor, y: Tensor) -> Tensor:
    return ((f - y).cosh().log() + 0.1 * f.square().sum(1, keepdim=True) ** 2).mean()


@pytest.mark.parametrize("loss", ["ce", "mse", "bce"])
def test_golden(loss: str) -> None:
    data = load_golden(GOLDEN / f"curvature_{loss}.npz")
    model, x, y = golden_model(data), data["inputs"], data["targets"]
    cuts = [int(c) for c in data["cuts"].flatten()]
    batches = list(zip(x.tensor_split(cuts), y.tensor_split(cuts), strict=True))
    assert_close("per-sample gradients", per_sample_gradients(model, LOSSES[loss], x, y), data["per_sample_gradients"], 1e-9)
    for key, make in KINDS.items():
        operator = make(model, LOSSES[loss], batches)
        assert operator.num_data == len(x)
        assert_close(key, operator.to_dense(), data[key], 1e-9)
    assert_close("Fisher", FisherOperator(model, LOSSES[loss], batches).to_dense(), data["ggn"], 1e-9)


@pytest.mark.parametrize(
    "loss_fn", [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.2), F.mse_loss, nn.BCEWithLogitsLoss(), cosh_loss]
)
def test_dense_equality(loss_fn: Any) -> None:
    model, x, y = problem("ce" if loss_fn is F.cross_entropy or isinstance(loss_fn, nn.CrossEntropyLoss) else "mse")
    exact = dense_curvature(model, loss_fn, x, y)
    v = torch.randn(exact["hessian"].shape[0], 2, dtype=torch.float64)
    ways: list[tuple[Any, dict[str, Any]]] = [
        ((x, y), {}),
        ((x, y), {"chunk_size": 3}),
        ((x, y), {"cache_graph": True}),
        ([(x[:2], y[:2]), (x[2:], y[2:])], {"cache_graph": True}),
        (iter([(x[:5], y[:5]), (x[5:], y[5:])]), {}),
    ]
    for data, options in ways:
        data = list(data) if isinstance(data, Iterator) else data
        for key, make in KINDS.items():
            operator = make(model, loss_fn, data, **options)
            assert_close(key, operator.to_dense(), exact[key], 1e-9)
            assert_close(f"{key}, one vector, twice", operator @ v[:, 0] + operator @ v[:, 0], 2 * exact[key] @ v[:, 0], 1e-9)
    one_shot = HessianOperator(model, loss_fn, iter([(x[:5], y[:5]), (x[5:], y[5:])]))
    assert_close("an iterator is kept", one_shot @ v, exact["hessian"] @ v, 1e-9)
    difference = HessianOperator(model, loss_fn, (x, y), method="finite_difference")
    assert_close("finite difference", difference @ v, exact["hessian"] @ v, 1e-7)
    assert not (difference @ torch.zeros_like(v[:, 0])).any()
    mean = exact["gradient"]
    centered = EmpiricalFisherOperator(model, loss_fn, (x, y), centered=True)
    assert_close("centered", centered.to_dense(), exact["empirical_fisher"] - torch.outer(mean, mean), 1e-9)
    assert_close("chunks", per_sample_gradients(model, loss_fn, x, y, chunk_size=3), exact["per_sample_gradients"], 1e-9)


def test_ignored_weighted_and_spatial_targets() -> None:
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 2).double()
    x, y = torch.randn(4, 2, 5, dtype=torch.float64), torch.randint(3, (4, 4))
    for loss_fn, targets in (
        (F.cross_entropy, y),
        (F.cross_entropy, y.where(y > 0, -100)),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3], dtype=torch.float64)), y),
    ):
        assert_close("ggn", GGNOperator(model, loss_fn, (x, targets)).to_dense(), dense_curvature(model, loss_fn, x, targets)["ggn"], 1e-9)
    fisher = FisherOperator(model, F.cross_entropy, (x, y), num_samples=4000, generator=torch.Generator().manual_seed(0))
    assert_close("sampled", fisher.to_dense(), GGNOperator(model, F.cross_entropy, (x, y)).to_dense(), 0.05)


@pytest.mark.parametrize("loss", ["ce", "mse", "bce"])
def test_sampled_fisher(loss: str) -> None:
    model, x, y = problem(loss)
    exact = GGNOperator(model, LOSSES[loss], (x, y)).to_dense()
    make = lambda s, k=4000: FisherOperator(model, LOSSES[loss], (x, y), num_samples=k, generator=torch.Generator().manual_seed(s))  # noqa: E731
    operator = make(0)
    dense = operator.to_dense()
    assert_close("near", dense, exact, 0.08)
    assert torch.equal(dense, operator.to_dense())
    assert torch.equal(dense, make(0).to_dense())
    assert not torch.equal(dense, make(1).to_dense())
    assert int(torch.linalg.matrix_rank(make(0, 1).to_dense())) <= 7


def test_subsets_and_flat_vectors() -> None:
    model, x, y = problem()
    for params, names in ((["2.bias", "0.weight"], ("0.weight", "2.bias")), (lambda n: n.startswith("2"), ("2.weight", "2.bias"))):
        exact = dense_curvature(model, F.cross_entropy, x, y, names)
        for key, make in KINDS.items():
            operator = make(model, F.cross_entropy, (x, y), params=params)
            assert operator.parameter_names == names
            assert_close(key, operator.to_dense(), exact[key], 1e-9)
        assert_close("gradients", per_sample_gradients(model, F.cross_entropy, x, y, params=params), exact["per_sample_gradients"], 1e-9)
        flat = torch.arange(operator.shape[0], dtype=torch.float64)
        tree = operator.unflatten(flat)
        assert all(tree[n].shape == dict(model.named_parameters())[n].shape for n in names)
        assert torch.equal(operator.flatten(tree), flat)
    model[0].requires_grad_(False)
    assert HessianOperator(model, F.cross_entropy, (x, y)).parameter_names == ("2.weight", "2.bias")


def test_linear_parts_are_zero() -> None:
    model = nn.Linear(2, 1).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    operator = HessianOperator(model, lambda f, y: f.mean(), (x, x))
    assert not operator.to_dense().any()
    assert not GGNOperator(model, lambda f, y: f.mean(), (x, x)).to_dense().any()


def test_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double().train()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(3, (8,))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model)
    for make in KINDS.values():
        make(model, F.cross_entropy, (x, y), cache_graph=True).matmat(torch.randn(39, 2))
    assert model.training
    for (name, now), then in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(now, then), name
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")
    with torch.no_grad():
        exact = dense_curvature(model.eval(), F.cross_entropy, x, y)
        assert_close("inside no_grad", HessianOperator(model, F.cross_entropy, (x, y)).to_dense(), exact["hessian"], 1e-9)


def test_structured_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2).double()

        def forward(self, parts: dict[str, Tensor]) -> Tensor:
            out: Tensor = self.inner(parts["a"]).tanh() * parts["b"]
            return out

    x = {"a": torch.randn(5, 3, dtype=torch.float64), "b": torch.randn(5, 1, dtype=torch.float64)}
    y, model = torch.randn(5, 2, dtype=torch.float64), Two()
    whole = HessianOperator(model, F.mse_loss, (x, y))
    assert_close("chunks", HessianOperator(model, F.mse_loss, (x, y), chunk_size=2).to_dense(), whole.to_dense(), 1e-9)
    grads = per_sample_gradients(model, F.mse_loss, x, y)
    assert_close("Fisher", EmpiricalFisherOperator(model, F.mse_loss, (x, y)).to_dense(), grads.T @ grads / 5, 1e-9)


def test_process_group_of_one() -> None:
    model, x, y = problem()
    exact = HessianOperator(model, F.cross_entropy, (x, y)).to_dense()
    group: Any = dist
    group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
    try:
        operator = HessianOperator(model, F.cross_entropy, [(x[:2], y[:2]), (x[2:], y[2:])], process_group=group.group.WORLD)
        assert_close("one rank", operator.to_dense(), exact, 1e-9)
    finally:
        group.destroy_process_group()


def test_errors() -> None:
    model, x, y = problem()
    with pytest.raises(ValueError, match=r"params: expected names .* got '0.wieght' \(close: '0.weight'"):
        HessianOperator(model, F.cross_entropy, (x, y), params=["0.wieght"])
    with pytest.raises(ValueError, match="params: expected at least one parameter"):
        HessianOperator(model, F.cross_entropy, (x, y), params=lambda n: False)
    with pytest.raises(ValueError, match="data: expected at least one example"):
        HessianOperator(model, F.cross_entropy, [])
    with pytest.raises(TypeError, match="data: expected pairs"):
        HessianOperator(model, F.cross_entropy, [x, x])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"loss_fn's value.*expected shape \(\)"):
        HessianOperator(model, lambda f, t: F.cross_entropy(f, t, reduction="none"), (x, y))
    with pytest.raises(ValueError, match=r"check_deterministic: .*dropout, BatchNorm.*shuffled"):
        HessianOperator(nn.Sequential(nn.Dropout(), model), F.cross_entropy, (x, y))
    with pytest.raises(ValueError, match="method: expected one of"):
        HessianOperator(model, F.cross_entropy, (x, y), method="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vector: expected shape"):
        HessianOperator(model, F.cross_entropy, (x, y)) @ torch.zeros(5)
    with pytest.raises(ValueError, match="loss_fn: expected plain cross_entropy"):
        FisherOperator(model, cosh_loss, (x, y))
    with pytest.raises(ValueError, match="tree: expected the names"):
        GGNOperator(model, F.cross_entropy, (x, y)).flatten({})
    with pytest.raises(ValueError, match="inputs: expected at least one example"):
        per_sample_gradients(model, F.cross_entropy, x[:0], y[:0])
    cached = GGNOperator(model, F.cross_entropy, (x, y), cache_graph=True)
    cached @ torch.zeros(cached.shape[0])
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cached @ torch.zeros(cached.shape[0])
