"""The batteries of kernels on the three operations, and compilation of the public functions."""

import pytest
import torch
from recurrence_cases import KINDS, make

from phyla.linear_rnn.functional.delta import _delta_product
from phyla.linear_rnn.functional.dplr import _dplr
from phyla.linear_rnn.functional.linear_attention import _linear_attention
from phyla.shared.testing import assert_close, check_kernel, fuzz


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_delta_product_kernel(gate):
    q, k, v, beta, g = make("delta_product", gate, tokens=3, width=3, value_width=2, reflections=2).args
    state = make("delta_product", gate, width=3, value_width=2).state
    check_kernel(
        _delta_product, q, k, v, beta, g, state, None, 0.5, gate == "scalar", 2, batch=(0, 1, 2, 3, *([4] if g is not None else []), 5)
    )


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_linear_attention_kernel(gate):
    case = make("linear_attention", gate, tokens=3, width=3, value_width=2)
    check_kernel(_linear_attention, *case.args, case.state, None, 0.5, 2, batch=(0, 1, 2, *([3] if gate != "none" else []), 4))


def test_dplr_kernel():
    case = make("dplr", "channel", tokens=3, width=3, value_width=2)
    check_kernel(_dplr, *case.args, case.state, None, 0.5, 2, batch=(0, 1, 2, 3, 4, 5, 6))


def test_packed_ops_pass_opcheck():
    packing = torch.tensor([0, 2, 2, 5])
    case = make("delta_product", "scalar", batch=1, tokens=5, sequences=3)
    args = (*case.args, case.state, packing, 0.5, True, 4)
    torch.library.opcheck(_delta_product.op, args)
    out, state = _delta_product.op(*args)
    torch.library.opcheck(_delta_product.backward_op, (out, state, *args, 63))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "gate"), KINDS)
def test_public_functions_compile_to_one_graph(name, gate, packed):
    case = make(name, gate, batch=1, tokens=9, sequences=2 if packed else None)
    packing = torch.tensor([0, 4, 9]) if packed else None
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        compiled(*case.args, initial_state=case.state, cu_seqlens=packing),
        case.function(*case.args, initial_state=case.state, cu_seqlens=packing),
        strict=True,
    ):
        assert_close(name, a, b, 1e-12)


@pytest.mark.parametrize(("name", "gate"), KINDS)
def test_fuzz(name, gate):
    case = make(name, gate, batch=1, tokens=3, width=4, value_width=4, reflections=2)
    packing = torch.tensor([0, 1, 3])
    state = torch.cat([case.state, case.state])
    fuzz(lambda *values: case.function(*values[:-1], initial_state=values[-1], cu_seqlens=packing)[0], *case.args, state)
