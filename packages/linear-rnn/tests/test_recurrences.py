"""Properties of the recurrences: all modes are the definition, whatever the chunks, the packing, the splits and the gates."""

import itertools

import pytest
import torch
from recurrence_cases import KINDS, MODES, make, results

from phyla.linear_rnn.functional import delta_product, delta_rule, dplr, linear_attention, transition_matrices
from phyla.shared.testing import assert_close

PACKING = torch.tensor([0, 0, 13, 14, 14, 37])


def agree(mine, theirs, tolerance):
    for j, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert_close(f"result {j}", a, b, tolerance)


@pytest.mark.parametrize("packing", [None, PACKING], ids=["batch", "packed"])
@pytest.mark.parametrize(("name", "gate"), KINDS)
def test_all_modes_are_the_definition(name, gate, packing):
    case = make(name, gate, batch=2 if packing is None else 1, sequences=None if packing is None else 5)
    expected = results(case.oracle, case.args, case.state, cu_seqlens=packing, scale=0.7)
    for mode in MODES:
        agree(results(case.function, case.args, case.state, cu_seqlens=packing, scale=0.7, mode=mode), expected, 1e-9)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_without_a_state_and_with_normalised_keys(gate, normalise):
    case = make("delta_product", gate, width=17, value_width=33, heads=2, tokens=21)
    expected = results(case.oracle, case.args, qk_l2norm=normalise)
    for mode in MODES:
        agree(results(case.function, case.args, qk_l2norm=normalise, mode=mode), expected, 1e-9)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64])
@pytest.mark.parametrize(("name", "gate"), KINDS)
def test_any_chunk_size(name, gate, chunk_size):
    case = make(name, gate, tokens=19)
    agree(
        results(case.function, case.args, case.state, mode="chunk", chunk_size=chunk_size),
        results(case.oracle, case.args, case.state),
        1e-9,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "gate"), KINDS)
def test_pieces_with_carried_state_are_the_whole(name, gate, mode):
    case = make(name, gate)
    whole, final = case.function(*case.args, initial_state=case.state, mode=mode)
    state, outs = case.state, []
    for begin, end in itertools.pairwise([0, 1, 2, 18, 19, 37]):
        out, state = case.function(*case.tokens(begin, end), initial_state=state, mode=mode)
        outs.append(out)
    assert_close("out", torch.cat(outs, 1), whole, 1e-12)
    assert_close("state", state, final, 1e-12)


@pytest.mark.parametrize("packing", [None, torch.tensor([0, 1, 1, 2])], ids=["batch", "packed"])
@pytest.mark.parametrize("value_width", [16, 24, 80])  # whole units of the native kernel, which has its own path there
@pytest.mark.parametrize(("name", "gate"), KINDS)
def test_one_token_of_each_sequence(name, gate, value_width, packing):
    sizes = {"tokens": 1} if packing is None else {"batch": 1, "tokens": 2, "sequences": 3}
    case = make(name, gate, value_width=value_width, width=11, heads=2, **sizes)
    for state in (case.state, None):
        expected = case.oracle(*case.args, initial_state=state, cu_seqlens=packing)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            given = None if state is None else state.to(dtype)
            agree(case.function(*case.to(dtype).args, initial_state=given, cu_seqlens=packing), expected, tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "gate"), KINDS)
def test_packed_sequences_are_separate(name, gate, mode):
    case = make(name, gate, batch=1, sequences=5)
    out, final = case.function(*case.args, initial_state=case.state, cu_seqlens=PACKING, mode=mode)
    for n, (begin, end) in enumerate(itertools.pairwise(PACKING.tolist())):
        if begin == end:
            assert torch.equal(final[n], case.state[n])
            continue
        alone, alone_final = case.function(*case.tokens(begin, end), initial_state=case.state[n : n + 1], mode=mode)
        assert_close("out", out[:, begin:end], alone, 1e-12)
        assert_close("state", final[n], alone_final[0], 1e-12)
    zeros = case.function(*case.args, cu_seqlens=PACKING, mode=mode)[1]
    assert not zeros[0].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "gate"), KINDS)
def test_nan_stays_in_its_packed_sequence(name, gate, mode):
    case = make(name, gate, batch=1, sequences=5)
    spoiled = [None if a is None else a.clone() for a in case.args]
    for a in spoiled:
        if a is not None:
            a[:, 13] = torch.nan  # the sequence of one token
    for clean, bad in zip(
        results(case.function, case.args, case.state, cu_seqlens=PACKING, mode=mode),
        results(case.function, spoiled, case.state, cu_seqlens=PACKING, mode=mode),
        strict=True,
    ):
        rows = 1 if clean.shape[0] == 1 else 0  # tokens, or sequences
        touched = 13 if rows else 2
        keep = [i for i in range(clean.shape[rows]) if i != touched]
        assert bad.select(rows, touched).isnan().any()
        assert torch.equal(clean.index_select(rows, torch.tensor(keep)), bad.index_select(rows, torch.tensor(keep)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "gate"), [k for k in KINDS if k[1] != "none"])
def test_extreme_gates_are_the_definition(name, gate, mode):
    case = make(name, gate, tokens=70)
    g = case.args[-1]
    g[torch.rand(g.shape, generator=torch.Generator().manual_seed(1)) < 0.1] = -1e4
    g[:, 40:50] = -25.0
    expected = results(case.oracle, case.args, case.state)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        mine = results(case.function, [None if a is None else a.to(dtype) for a in case.args], case.state.to(dtype), mode=mode)
        assert all(t.isfinite().all() for t in mine)
        agree(mine, expected, tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "gate"), KINDS)
def test_gradcheck(name, gate, mode):
    case = make(name, gate, batch=1, tokens=4, group=2, width=3, value_width=2, reflections=2)
    leaves = [a.requires_grad_() for a in (*case.args, case.state) if a is not None]

    def function(*values):
        given = iter(values)
        args = [None if a is None else next(given) for a in case.args]
        return case.function(*args, initial_state=next(given), mode=mode, chunk_size=3)

    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "gate"), KINDS)
def test_float32_over_two_thousand_tokens(name, gate, mode):
    case = make(name, gate, batch=1, tokens=500 if mode == "recurrent" else 2000, group=1, width=16, value_width=16, reflections=2)
    if name == "linear_attention":
        case.args[1] = case.args[1] / 4
    exact = results(case.function, case.args, case.state, mode="chunk")
    single = case.to(torch.float32)
    mine = results(single.function, single.args, single.state, mode=mode)
    agree(mine[:2], exact[:2], 2e-4)
    agree(mine[2:], exact[2:], 1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "gate"), KINDS)
def test_bfloat16_inputs(name, gate, mode):
    case = make(name, gate, tokens=50)
    low = case.to(torch.bfloat16)
    out, state = low.function(*low.args, mode=mode)
    expected, expected_state = case.oracle(*low.args)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert_close("out", out, expected, 1e-2)
    assert_close("state", state, expected_state, 1e-2)


def test_mixed_dtypes_are_promoted():
    q, k, v, beta, g = make("delta_product", "scalar").args
    out, state = delta_product(q.bfloat16(), k.bfloat16(), v.bfloat16(), beta.bfloat16(), g.float())
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    out, state = delta_product(q.float(), k.float(), v.float(), beta.float(), g)
    assert (out.dtype, state.dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize("sequences", [1, 7])
@pytest.mark.parametrize(("name", "gate"), KINDS)
def test_results_do_not_depend_on_threads(name, gate, sequences):
    case = make(name, gate, batch=sequences, tokens=33, group=1, width=24, value_width=100).to(torch.float32)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results(case.function, case.args, case.state))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_delta_rule_is_dplr():
    q, k, v, beta, g = make("delta_rule", "channel", group=1).args
    rate = beta.unsqueeze(-1)
    mine = dplr(q, k, rate * v, g.exp() * k, -rate * k, g)
    for a, b in zip(mine, delta_rule(q, k, v, beta, g), strict=True):
        assert_close("dplr", a, b, 1e-11)


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_transition_matrices_move_the_state(gate):
    case = make("delta_product", gate, batch=1, tokens=6, heads=2, group=1)
    q, k, v, beta, g = case.args
    state = case.state
    for step in transition_matrices(k, beta, g).unbind(1):
        state = step @ state
    assert_close("state", delta_product(q, k, torch.zeros_like(v), beta, g, initial_state=case.state)[1], state, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_word_problem_of_five_elements_is_tracked_exactly(dtype):
    tokens, generator = 20_000, torch.Generator().manual_seed(0)
    pairs = torch.rand(tokens, 4, 5, generator=generator).argsort(-1)[..., :2]
    used = torch.rand(tokens, 4, generator=generator) < 0.8
    k = (torch.eye(5)[pairs[..., 0]] - torch.eye(5)[pairs[..., 1]]) / 2**0.5
    q = torch.arange(5.0).expand(1, tokens, 1, 5)
    options = {"initial_state": torch.eye(5).view(1, 1, 5, 5), "scale": 1.0, "qk_l2norm": dtype == torch.bfloat16}
    arrangement, expected = list(range(5)), []  # which column has its 1 in each row
    for swaps, keep in zip(pairs.tolist(), used.tolist(), strict=True):
        for (i, j), swap in zip(swaps, keep, strict=True):
            if swap:
                arrangement[i], arrangement[j] = arrangement[j], arrangement[i]
        expected.append(list(arrangement))
    rows = torch.tensor(expected)
    out, state = delta_product(
        q.to(dtype),
        k.view(1, tokens, 4, 1, 5).to(dtype),
        torch.zeros(1, tokens, 4, 1, 5, dtype=dtype),
        2.0 * used.view(1, tokens, 4, 1).to(dtype),
        **options,
    )
    assert (state[0, 0] - torch.eye(5)[rows[-1]]).abs().max() < (5e-3 if dtype == torch.float32 else 5e-2)
    if dtype == torch.float32:
        assert torch.equal(out[0, :, 0].round().long(), rows.argsort(-1))


def test_counting_modulo_seven_with_two_reflections():
    tokens = 20_000
    steps = torch.randint(7, (tokens,), generator=torch.Generator().manual_seed(0))
    half = torch.pi * steps.double() / 7  # two reflections turn by twice the angle between their keys
    second = torch.stack([half.cos(), half.sin()], -1)
    k = torch.stack([torch.tensor([1.0, 0.0], dtype=torch.float64).expand(tokens, 2), second], 1).view(1, tokens, 2, 1, 2).float()
    zeros, twos = torch.zeros(1, tokens, 2, 1, 2), torch.full((1, tokens, 2, 1), 2.0)
    state = delta_product(torch.ones(1, tokens, 1, 2), k, zeros, twos, initial_state=torch.eye(2).view(1, 1, 2, 2))[1][0, 0]
    angle = 2 * torch.pi * (steps.sum() % 7).double() / 7
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    assert (state - turn).abs().max() < 2e-2


def test_decoding_token_by_token():
    case = make("linear_attention", "scalar", tokens=5)
    outs, state = [], None
    for t in range(5):
        out, state = linear_attention(*case.tokens(t, t + 1), initial_state=state)
        outs.append(out)
    assert_close("out", torch.cat(outs, 1), linear_attention(*case.args)[0], 1e-12)
