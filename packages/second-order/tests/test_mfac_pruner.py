import pytest
import torch
from torch import nn

from phyla.second_order import MFACPruner
from phyla.second_order.functional import obs_prune

LOSS = nn.functional.mse_loss


def case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, (
        torch.randn(40, 4, dtype=torch.float64, generator=generator),
        torch.randn(40, 3, dtype=torch.float64, generator=generator),
    )


def flat(model):
    return torch.cat([model[0].weight.detach().flatten(), model[4].weight.detach().flatten()])


def test_one_step_is_obs_prune_of_the_batch_gradients():
    model, (x, y) = case()
    batches = [(x[:7], y[:7]), (x[7:20], y[7:20])]
    model.eval()
    grads = []
    for k in (0, 1, 0):
        found = torch.autograd.grad(LOSS(model(batches[k][0]), batches[k][1]), [model[0].weight, model[4].weight])
        grads.append(torch.cat([g.flatten() for g in found]))
    model.train()
    keep, new = obs_prune(flat(model), torch.stack(grads), num_prune=21, damping=0.01, block_size=10)
    delta = new - flat(model)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    result = MFACPruner(model, LOSS, batches, num_grads=3, damping=0.01, block_size=10).prune(0.5)
    assert torch.equal(flat(model), new)
    assert torch.equal(torch.cat([mask.flatten() for mask in result.masks.values()]), keep)
    assert (result.num_pruned, result.sparsity) == (21, 0.5)
    blocks = (torch.stack(grads) * delta).split(10, 1)
    quadratic = 0.01 * delta.square().sum() + sum(b.sum(1).square().sum() for b in blocks) / 3
    assert result.predicted_loss_increase == pytest.approx(float(quadratic) / 2, rel=1e-10)
    assert model.training
    assert model[1].training
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_recomputes_repeated_calls_masks_and_hooks():
    model, data = case()
    pruner = MFACPruner(model, LOSS, data, num_grads=5, batch_size=4, damping=0.01, generator=torch.Generator().manual_seed(1))
    first = pruner.prune(0.4, num_recomputes=3)
    assert first.num_pruned == round(0.4 * 42) == int((flat(model) == 0).sum())
    second = pruner.prune(0.8, num_recomputes=2)
    assert second.num_pruned == round(0.8 * 42) == int((flat(model) == 0).sum())
    assert all((first.masks[name] | ~mask).all() for name, mask in second.masks.items())
    assert pruner.prune(0.8).predicted_loss_increase == 0
    with pytest.raises(ValueError, match="sparsity: expected a number in"):
        pruner.prune(0.5)
    pruner.register_hooks()
    pruner.register_hooks()
    LOSS(model(data[0]), data[1]).backward()
    assert not model[0].weight.grad[~pruner.masks["0.weight"]].any()
    assert model[0].weight.grad.any()
    with torch.no_grad():
        model[0].weight.add_(1)
    pruner.apply_masks()
    assert torch.equal(model[0].weight != 0, pruner.masks["0.weight"])


def test_choice_of_parameters_and_weights_that_are_zero_already():
    model, data = case()
    with torch.no_grad():
        model[4].weight[0] = 0
    pruner = MFACPruner(
        model, LOSS, data, params=lambda name: name.startswith("4"), num_grads=2, generator=torch.Generator().manual_seed(0)
    )
    assert list(pruner.masks) == ["4.weight", "4.bias"]
    assert pruner.prune(6 / 21).num_pruned == 6
    assert list(MFACPruner(model, LOSS, data, params=["4.bias"]).masks) == ["4.bias"]
    assert list(MFACPruner(model, LOSS, data).masks) == ["0.weight", "4.weight"]


def test_errors_name_the_argument():
    model, data = case()
    with pytest.raises(ValueError, match=r"params: .*close: 0.weight"):
        MFACPruner(model, LOSS, data, params=["0.weigth"])
    with pytest.raises(ValueError, match="params"):
        MFACPruner(model, LOSS, data, params=lambda name: False)
    for option in ("num_grads", "batch_size", "block_size", "damping"):
        with pytest.raises(ValueError, match=option):
            MFACPruner(model, LOSS, data, **{option: 0})
    with pytest.raises(ValueError, match="compensation"):
        MFACPruner(model, LOSS, data, compensation="none")
    with pytest.raises(ValueError, match="data"):
        MFACPruner(model, LOSS, (data[0], data[1][:3]))
    with pytest.raises(ValueError, match="data"):
        MFACPruner(model, LOSS, []).prune(0.5)
    with pytest.raises(ValueError, match="data"):
        MFACPruner(model, LOSS, iter([data]), num_grads=2).prune(0.5)
    pruner = MFACPruner(model, LOSS, data)
    for bad in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="sparsity"):
            pruner.prune(bad)
    with pytest.raises(ValueError, match="num_recomputes"):
        pruner.prune(0.5, num_recomputes=0)
    with pytest.raises(ValueError, match="loss_fn"):
        MFACPruner(model, lambda a, b: a - b, data).prune(0.5)
