"""Parity with outputs and gradients that the public reference implementations computed."""

from pathlib import Path

import pytest
import torch

from phyla.linear_rnn import functional
from phyla.shared.testing import assert_close, load_golden

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(p.stem for name in ("delta_product", "delta_rule", "linear_attention", "dplr") for p in GOLDEN.glob(f"{name}_*.npz"))
OPTIONS = {"qk_l2norm": bool, "scale": float}


@pytest.mark.parametrize("mode", ["auto", "recurrent", "chunk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("file", FILES)
def test_golden(file, dtype, mode):
    golden = load_golden(GOLDEN / f"{file}.npz")
    function = next(f for name, f in vars(functional).items() if name in functional.__all__ and file.startswith(f"{name}_"))
    options = {}
    inputs = {}
    for name, value in golden.items():
        if name.startswith("opt_"):
            key = name.removeprefix("opt_")
            options[key] = OPTIONS[key](value) if key in OPTIONS else value
        elif not name.startswith(("ct_", "grad_")) and name not in ("out", "state"):
            inputs[name] = value.to(dtype).requires_grad_(f"grad_{name}" in golden)
    out, state = function(**inputs, **options, mode=mode)
    tolerance = 1e-9 if dtype == torch.float64 else 3e-4
    assert out.dtype == dtype
    assert_close("out", out, golden["out"], tolerance)
    assert_close("state", state, golden["state"], tolerance)
    loss = (out * golden["ct_out"].to(dtype)).sum() + (state * golden["ct_state"].to(dtype)).sum()
    wanted = [name for name in inputs if f"grad_{name}" in golden]
    for name, grad in zip(wanted, torch.autograd.grad(loss, [inputs[n] for n in wanted]), strict=True):
        assert_close(f"grad_{name}", grad, golden[f"grad_{name}"], 5 * tolerance)
