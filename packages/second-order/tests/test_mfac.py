import copy
from pathlib import Path

import pytest
import torch
from oracles_mfac import fisher, random
from torch import nn

from phyla.second_order import MFAC
from phyla.shared.testing import assert_close, load_golden

GOLDEN = Path(__file__).parent / "golden"


def set_gradients(params, flat):
    for parameter, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
        parameter.grad = grad.view(parameter.shape).to(parameter.dtype).clone()


def flat(params):
    return torch.cat([p.detach().flatten() for p in params])


def parameters(*sizes, seed=0):
    return [nn.Parameter(random(seed + i, *size)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("name", ["plain", "momentum_wd", "sparse"])
def test_trajectory_of_the_official_optimizer(name):
    data = load_golden(GOLDEN / f"mfac_optimizer_{name}.npz")
    params = [nn.Parameter(data["param_0"]), nn.Parameter(data["param_1"])]
    options = {key: float(data[key]) for key in ("lr", "momentum", "weight_decay", "damping")}
    optimizer = MFAC(params, num_grads=int(data["num_grads"]), sparse=bool(data["sparse"]), **options)
    for grad, expected in zip(data["grads"], data["trajectory"], strict=True):
        set_gradients(params, grad)
        optimizer.step()
        assert_close("trajectory", flat(params), expected, 1e-7)


def test_groups_decay_and_ascent_follow_the_equations():
    params = parameters((2, 3), (4,))
    groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.2, "momentum": 0.5, "weight_decay": 0.1}]
    optimizer = MFAC(groups, lr=0.1, num_grads=3, damping=0.1, decoupled_weight_decay=True, maximize=True, normalization="count")
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    w, v, grads = flat(params), torch.zeros(4, dtype=torch.float64), random(7, 5, 10)
    for t, grad in enumerate(grads):
        set_gradients(params, grad)
        optimizer.step()
        schedule.step()
        held = -grads[max(0, t - 2) : t + 1]
        u = torch.linalg.solve(fisher(held, 0.1), -grad)
        v = 0.5 * v + 0.5 * u[6:]
        w = torch.cat([w[:6] - 0.1 * 0.5**t * u[:6], w[6:] * (1 - 0.2 * 0.5**t * 0.1) - 0.2 * 0.5**t * v])
        assert_close("weights", flat(params), w, 1e-10)


@pytest.mark.parametrize("sparse", [False, True])
def test_training_resumes_exactly(sparse):
    def begin():
        params = parameters((3, 4), (5,))
        with torch.no_grad():
            params[0][1] = 0
        return params, MFAC(params, num_grads=4, damping=0.01, momentum=0.9, weight_decay=0.1, sparse=sparse)

    grads = random(9, 12, 17)
    params, optimizer = begin()
    for grad in grads[:6]:
        set_gradients(params, grad)
        optimizer.step()
    saved, weights = optimizer.state_dict(), [p.detach().clone() for p in params]
    twin_params, twin = copy.deepcopy((params, optimizer))
    later_params, later = parameters((3, 4), (5,)), None
    later = MFAC(later_params, num_grads=4, damping=0.01, sparse=sparse)  # other weights at construction: other masks, and other options
    for parameter, value in zip(later_params, weights, strict=True):
        parameter.data.copy_(value)
    runs = []
    for ps, opt in ((params, optimizer), (twin_params, twin), (later_params, later)):
        if opt is later:
            opt.load_state_dict(saved)
        saved = copy.deepcopy(saved)
        for grad in grads[6:]:
            set_gradients(ps, grad)
            opt.step()
        runs.append(flat(ps))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    if sparse:
        assert not params[0][1].any()


def test_closure_and_a_quadratic_descends():
    params = parameters((6,))
    scales = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    optimizer = MFAC(params, lr=0.5, num_grads=1, damping=1.0)  # u = g / (1 + ‖g‖²)

    def closure():
        optimizer.zero_grad()
        loss = (scales * params[0].square()).sum() / 2
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(40)]
    assert losses[-1] < 0.1 * losses[0]


def test_low_precision_windows_and_parameters():
    model = nn.Linear(8, 4).to(torch.bfloat16)
    optimizer = MFAC(model.parameters(), lr=0.5, num_grads=3)
    assert optimizer.window.state_dict()["grads"].dtype == torch.float32
    half = MFAC(nn.Linear(8, 4).parameters(), num_grads=3, window_dtype=torch.bfloat16, window_device="cpu")
    assert half.window.state_dict()["grads"].dtype == torch.bfloat16
    model(torch.ones(2, 8, dtype=torch.bfloat16)).square().sum().backward()
    before = flat(model.parameters()).clone()
    optimizer.step()
    assert torch.isfinite(flat(model.parameters())).all()
    assert not torch.equal(before, flat(model.parameters()))


def test_non_contiguous_parameters():
    base = random(0, 4, 3)
    strided, plain = nn.Parameter(base.t()), nn.Parameter(base.t().contiguous())
    for parameter in (strided, plain):
        optimizer = MFAC([parameter], num_grads=2, momentum=0.5, sparse=True)
        for t in range(3):
            set_gradients([parameter], random(t, 12))
            optimizer.step()
    assert_close("weights", strided, plain, 1e-12)


def test_a_failed_step_changes_nothing():
    params = parameters((3,), (2,))
    optimizer = MFAC([("first", params[0]), ("second", params[1])], num_grads=3)
    before = flat(params).clone()
    set_gradients(params, random(3, 5))
    params[1].grad = None
    with pytest.raises(ValueError, match=r"got none for parameter second of shape \(2,\) .*requires_grad=False"):
        optimizer.step()
    set_gradients(params, random(3, 5) * float("inf"))
    with pytest.raises(ValueError, match="grad: expected finite"):
        optimizer.step()
    assert torch.equal(flat(params), before)
    assert optimizer.window.count == 0


def test_errors_name_the_argument():
    params = parameters((3,))
    for option, bad in (
        ("lr", -1.0),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("damping", 0.0),
        ("num_grads", 0),
        ("normalization", "x"),
    ):
        with pytest.raises(ValueError, match=option):
            MFAC(params, **{option: bad})
    optimizer = MFAC(params, num_grads=2)
    with pytest.raises(ValueError, match="param_group"):
        optimizer.add_param_group({"params": parameters((2,))})
    with pytest.raises(ValueError, match="state_dict"):
        optimizer.load_state_dict(torch.optim.SGD(params).state_dict())
    with pytest.raises(ValueError, match="num_grads"):
        optimizer.load_state_dict(MFAC(params, num_grads=3).state_dict())
    with pytest.raises(ValueError, match="not zero"):
        MFAC([nn.Parameter(torch.zeros(2))], sparse=True)
    with pytest.raises(RuntimeError, match="process_group"):
        MFAC(params, num_grads=2, process_group=object())
