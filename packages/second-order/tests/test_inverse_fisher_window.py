import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracles_mfac import fisher, random

from phyla.second_order import InverseFisherWindow
from phyla.shared.testing import assert_close, load_golden

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["mfac_dynamic", "mfac_dynamic_small_damping"])
def test_parity_with_the_official_code(name):
    data = load_golden(GOLDEN / f"{name}.npz")
    window = InverseFisherWindow(data["x"].numel(), int(data["num_grads"]), damping=float(data["damping"]), dtype=torch.float64)
    for grad, push_ihvp, ihvp in zip(data["grads"], data["push_ihvp"], data["ihvp_x"], strict=True):
        assert_close("push_ihvp", window.push_ihvp(grad), push_ihvp, 1e-7)
        assert_close("ihvp", window.ihvp(data["x"]), ihvp, 1e-7)


@pytest.mark.parametrize("normalization", ["capacity", "count"])
@pytest.mark.parametrize("m", [1, 4])
def test_every_step_is_the_dense_inverse(normalization, m):
    window = InverseFisherWindow(9, m, damping=0.03, normalization=normalization, dtype=torch.float64)
    grads, x = random(0, 11, 9), random(1, 2, 9)
    assert_close("empty", window.ihvp(x), x / 0.03, 1e-12)
    for t, grad in enumerate(grads):
        held = grads[max(0, t + 1 - m) : t + 1]
        dense = fisher(held, 0.03, count=m if normalization == "capacity" else len(held)).inverse()
        assert_close("push_ihvp", window.push_ihvp(grad), dense @ grad, 1e-10)
        assert_close("ihvp", window.ihvp(x), x @ dense, 1e-10)
        assert_close("diagonal", window.diagonal(), dense.diagonal(), 1e-10)
        assert window.count == len(held)


@pytest.mark.parametrize("damping", [1e-3, 1e-5, 1e-7])
def test_push_through_is_right_in_float32_at_any_damping(damping):
    grads = (random(0, 80, 300) * 4).float()
    window = InverseFisherWindow(300, 64, damping=damping)
    exact = InverseFisherWindow(300, 64, damping=damping, dtype=torch.float64)
    for grad in grads:
        ours, expected = window.push_ihvp(grad), exact.push_ihvp(grad.double())
        assert ours.dtype == torch.float32
        assert float((ours - expected).norm()) <= 3e-6 * float(expected.norm())
    ones = torch.ones(300)
    held = fisher(torch.cat([grads[-63:], ones[None]]), damping)
    assert_close("float32 beside the dense solution", window.push_ihvp(ones), torch.linalg.solve(held, ones.double()), 3e-6)


def test_drift_over_many_pushes():
    grads = random(0, 600, 40) * 10 ** (3 * torch.rand(600, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    window, fresh = (InverseFisherWindow(40, 8, damping=1e-3, dtype=torch.float64) for _ in range(2))
    for grad in grads[:-1]:
        window.push(grad)
    for grad in grads[-8:-1]:
        fresh.push(grad)
    assert_close("push_ihvp", window.push_ihvp(grads[-1]), fresh.push_ihvp(grads[-1]), 5e-9)


def test_repeated_gradients_and_zero_gradients():
    grad, damping = random(0, 12) * 100, 1e-6
    window = InverseFisherWindow(12, 3, damping=damping, dtype=torch.float64)
    for k in (1, 2, 3, 3, 3, 3, 3):  # F = damping I + k g gᵀ / 3, with damping eleven digits below ‖g‖²
        assert_close("repeated", window.push_ihvp(grad), grad / (damping + k * (grad @ grad) / 3), 1e-4)
    assert not window.push_ihvp(torch.zeros(12)).any()


def test_bfloat16_window_is_exact_for_what_it_stores():
    grads = random(0, 9, 30)
    half, whole = (InverseFisherWindow(30, 4, damping=1e-4, dtype=t) for t in (torch.bfloat16, torch.float64))
    for grad in grads:
        assert_close("push_ihvp", half.push_ihvp(grad), whole.push_ihvp(grad.bfloat16().double()), 1e-10)


def test_state_resumes_bit_for_bit():
    grads = random(0, 30, 10)
    first = InverseFisherWindow(10, 4, damping=0.1, dtype=torch.float64)
    for grad in grads[:15]:
        first.push(grad)
    state = first.state_dict()
    kept = copy.deepcopy(state)
    rest = [first.push_ihvp(grad) for grad in grads[15:]]
    assert all(torch.equal(state[name], kept[name]) for name in ("grads", "gram", "inverse"))
    second = InverseFisherWindow(10, 4, damping=0.1, dtype=torch.float64)
    second.load_state_dict(state)
    assert all(torch.equal(second.push_ihvp(grad), expected) for grad, expected in zip(grads[15:], rest, strict=True))
    with pytest.raises(ValueError, match="state: expected num_grads=5, got 4"):
        InverseFisherWindow(10, 5, damping=0.1).load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected the entries"):
        second.load_state_dict({})


def test_a_push_that_fails_leaves_the_window_as_it_was(monkeypatch):
    grads = random(0, 9, 6)
    window, other = (InverseFisherWindow(6, 3, damping=0.1, dtype=torch.float64) for _ in range(2))
    for grad in grads[:5]:
        window.push(grad)
        other.push(grad)
    with pytest.raises(ValueError, match="grad: expected finite"):
        window.push(grads[5] * float("nan"))
    with monkeypatch.context() as patch:
        patch.setattr("phyla.second_order.inverse_fisher_window.expand", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            window.push_ihvp(grads[5])
    assert torch.equal(window.push_ihvp(grads[5]), other.push_ihvp(grads[5]))


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_push_that_is_cut_off_drops_the_oldest_gradient():
    grads = random(0, 9, 6)
    window = InverseFisherWindow(6, 3, damping=0.1, dtype=torch.float64)
    for grad in grads[:5]:
        window.push(grad)
    update = window._prepare(grads[5])
    with pytest.raises(AttributeError):
        window._commit(SimpleNamespace(row=update.row))  # ends after the row of G was written
    dense = fisher(grads[3:5], 0.1, count=3).inverse()
    assert_close("ihvp", window.ihvp(grads[0]), dense @ grads[0], 1e-10)
    window.push(grads[5])
    assert_close("next push", window.ihvp(grads[0]), fisher(grads[3:6], 0.1).inverse() @ grads[0], 1e-10)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="num_grads"):
        InverseFisherWindow(3, 0)
    with pytest.raises(ValueError, match="damping"):
        InverseFisherWindow(3, 2, damping=0.0)
    with pytest.raises(ValueError, match="normalization"):
        InverseFisherWindow(3, 2, normalization="counts")
    with pytest.raises(TypeError, match="dtype"):
        InverseFisherWindow(3, 2, dtype=torch.int32)
    window = InverseFisherWindow(3, 2)
    with pytest.raises(ValueError, match=r"grad: expected shape \(3,\), got shape \(4,\)"):
        window.push(torch.ones(4))
    with pytest.raises(TypeError, match="grad"):
        window.push(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="x: expected last dimension 3"):
        window.ihvp(torch.ones(4))
    with pytest.raises(RuntimeError, match="process_group"):
        InverseFisherWindow(3, 2, process_group=object())
