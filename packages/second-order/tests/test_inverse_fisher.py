from pathlib import Path

import pytest
import torch
from oracles_mfac import fisher, joint_compensation, random, recursion

from phyla.second_order import InverseFisher
from phyla.second_order.functional import mfac_factor, mfac_ihvp, obs_prune
from phyla.second_order.functional.mfac import fisher_quadratic
from phyla.shared.testing import assert_close, load_golden

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["full", "wide", "block"])
def test_static_parity_with_the_official_code(name):
    data = load_golden(GOLDEN / f"mfac_static_{name}.npz")
    block = int(data["block_size"]) if "block_size" in data else None
    inverse = InverseFisher(data["grads"], damping=float(data["damping"]), block_size=block)
    assert_close("ihvp", inverse.ihvp(data["x"]), data["ihvp"], 1e-9)
    assert_close("diagonal", inverse.diagonal(), data["diagonal"], 1e-9)
    if block is None:
        i, j = data["element_index"].T
        assert_close("element", inverse.element(i, j), data["element_value"], 1e-9)
        assert_close("factor", mfac_factor(data["grads"], float(data["damping"])), data["rows"], 1e-9)
        assert_close("mfac_ihvp", mfac_ihvp(data["grads"], float(data["damping"]), data["x"]), data["ihvp"], 1e-7)


@pytest.mark.parametrize(
    ("m", "d", "block"), [(3, 20, None), (9, 5, None), (4, 23, 6), (6, 23, 4), (5, 23, 8), (1, 1, None), (2, 7, 1), (4, 10, 99)]
)
def test_every_form_is_the_dense_inverse(m, d, block):
    grads, x = random(0, m, d), random(1, 2, 3, d)
    before = grads.clone()
    inverse = InverseFisher(grads, damping=0.01, block_size=block)
    matrix = fisher(grads, 0.01, block)
    dense = matrix.inverse()
    index = torch.arange(d)
    assert torch.equal(grads, before)
    assert_close("ihvp", inverse.ihvp(x), x @ dense, 1e-10)
    assert_close("one vector", inverse.ihvp(x[0, 0]), x[0, 0] @ dense, 1e-10)
    assert_close("diagonal", inverse.diagonal(), dense.diagonal(), 1e-10)
    assert_close("elements", inverse.element(index[:, None], index), dense, 1e-10)
    assert_close("column", inverse.column(d - 1), dense[:, d - 1], 1e-10)
    assert_close("logdet", inverse.logdet(), torch.logdet(matrix), 1e-10, least=1.0)
    assert_close("operator", inverse.as_operator().to_dense(), dense, 1e-10)
    assert_close("copy", inverse.to("cpu").ihvp(x), x @ dense, 1e-10)
    assert_close("quadratic", fisher_quadratic(grads, x[0, 0], damping=0.01, block_size=block), x[0, 0] @ matrix @ x[0, 0] / 2, 1e-12)


def test_panels_and_groups_of_blocks_change_nothing(monkeypatch):
    grads, x = random(0, 4, 50).float(), random(1, 50)
    plain = [InverseFisher(grads, block_size=b, damping=0.1).ihvp(x) for b in (None, 3, 7)]
    monkeypatch.setattr("phyla.second_order.gram._CPU_PANEL", 12)
    monkeypatch.setattr("phyla.second_order.inverse_fisher._GROUP", 60)
    for b, expected in zip((None, 3, 7), plain, strict=True):
        assert_close(f"block_size {b}", InverseFisher(grads, block_size=b, damping=0.1).ihvp(x), expected, 1e-6)


def test_the_factor_is_the_papers_recursion():
    grads = random(0, 6, 11)
    assert_close("rows", mfac_factor(grads, 0.05), recursion(grads, 0.05), 1e-12)
    stacked = random(1, 2, 3, 4, 7)
    assert_close("stacks", mfac_factor(stacked, 0.1)[1, 2], mfac_factor(stacked[1, 2], 0.1), 1e-12)
    x = random(2, 2, 3, 7)
    assert_close("stacks", mfac_ihvp(stacked, 0.1, x)[1, 2], mfac_ihvp(stacked[1, 2], 0.1, x[1, 2]), 1e-12)


def test_gradients_of_the_functions():
    grads, x = random(0, 3, 5).requires_grad_(), random(1, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda g, v: mfac_ihvp(g, 0.1, v), (grads, x))
    assert torch.autograd.gradgradcheck(lambda g, v: mfac_ihvp(g, 0.1, v), (grads, x))
    assert torch.autograd.gradcheck(lambda g: mfac_factor(g, 0.1), (grads,))


@pytest.mark.parametrize("name", ["full", "block"])
def test_pruning_parity(name):
    data = load_golden(GOLDEN / f"obs_prune_{name}.npz")
    block = None if int(data["block_size"]) < 0 else int(data["block_size"])
    options = {"damping": float(data["damping"]), "block_size": block}
    for compensation in ("joint", "independent"):
        keep, weights = obs_prune(data["weights"], data["grads"], num_prune=int(data["num_prune"]), compensation=compensation, **options)
        assert torch.equal(keep, data["keep_mask"].bool())
        assert_close(compensation, weights, data[f"weights_{compensation}"], 1e-7)
        assert_close(
            "loss", fisher_quadratic(data["grads"], weights - data["weights"], **options), data[f"quad_{compensation}"].reshape(()), 1e-7
        )


@pytest.mark.parametrize(("m", "block"), [(4, None), (30, None), (4, 5), (7, 5)])
def test_joint_compensation_is_the_constrained_minimum(m, block):
    w, grads = random(0, 17), random(1, m, 17)
    keep, new = obs_prune(w, grads, num_prune=9, damping=0.02, block_size=block)
    matrix = fisher(grads, 0.02, block)
    assert int(keep.sum()) == 8
    saliency = w.square() / matrix.inverse().diagonal()
    assert saliency[~keep].max() <= saliency[keep].min()
    assert_close("weights", new, joint_compensation(w, matrix, keep), 1e-9)


def test_pruning_nothing_everything_and_ties():
    w, grads = random(0, 6), random(1, 3, 6)
    keep, new = obs_prune(w, grads, num_prune=0)
    assert keep.all()
    assert_close("unchanged", new, w, 1e-12)
    keep, new = obs_prune(w, grads, num_prune=6)
    assert not keep.any()
    assert not new.any()
    keep, _ = obs_prune(torch.ones(6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64), num_prune=2, damping=1.0)
    assert keep.tolist() == [False, False, True, True, True, True]


def test_errors_name_the_argument():
    grads = random(0, 3, 5)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping"):
            InverseFisher(grads, damping=bad)
        with pytest.raises(ValueError, match="damping"):
            mfac_ihvp(grads, bad, grads[0])
    for bad in (grads[0], grads[:0], grads[:, :0], grads * float("nan")):
        with pytest.raises(ValueError, match="grads"):
            InverseFisher(bad)
    with pytest.raises(TypeError, match="grads"):
        InverseFisher(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="block_size"):
        InverseFisher(grads, block_size=0)
    inverse = InverseFisher(grads)
    with pytest.raises(ValueError, match=r"x: expected last dimension 5, got shape \(4,\)"):
        inverse.ihvp(torch.ones(4))
    with pytest.raises(ValueError, match=r"j: expected indices in \[0, 5\)"):
        inverse.element(0, 5)
    with pytest.raises(TypeError, match="i: expected an int"):
        inverse.element(torch.ones(1), 0)
    for bad in (-1, 6):
        with pytest.raises(ValueError, match="num_prune"):
            obs_prune(grads[0], grads, num_prune=bad)
    with pytest.raises(ValueError, match="compensation"):
        obs_prune(grads[0], grads, num_prune=1, compensation="jiont")
    with pytest.raises(ValueError, match="damping"):
        InverseFisher(torch.ones(4, 9, dtype=torch.float64) * 1e9, damping=1e-12)
