import copy
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from phyla.linear_rnn import (
    MLSTM,
    RWKV7,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    GatedDeltaProduct,
    GatedLinearAttention,
    KimiDeltaAttention,
    LayerState,
    Mamba2,
)
from phyla.shared.testing import assert_close, check_module, load_golden

GOLDEN = Path(__file__).parent / "golden"
FROM_GOLDEN = {
    "layer_deltanet": DeltaNet,
    "layer_deltaproduct_n2": DeltaProduct,
    "layer_gateddeltanet": GatedDeltaNet,
    "layer_gateddeltaproduct_n3": DeltaProduct,
    "layer_gateddeltaproduct_packed": GatedDeltaProduct,
    "layer_gla": GatedLinearAttention,
    "layer_kda": KimiDeltaAttention,
    "layer_mamba2": Mamba2,
    "layer_mlstm": MLSTM,
    "layer_rwkv7_first": RWKV7,
}
SIZE = 16
LAYERS = {
    "delta_product": lambda **f: DeltaProduct(SIZE, num_heads=2, **f),
    "delta_product_shared_keys": lambda **f: DeltaProduct(
        SIZE, num_heads=2, head_dim=5, num_v_heads=4, expand_v=0.6, num_householder=3, use_short_conv=False, **f
    ),
    "gated_delta_product": lambda **f: GatedDeltaProduct(SIZE, num_heads=2, conv_bias=True, conv_size=3, **f),
    "delta_net": lambda **f: DeltaNet(SIZE, num_heads=2, **f),
    "gated_delta_net": lambda **f: GatedDeltaNet(SIZE, num_heads=2, conv_size=1, **f),
    "kimi": lambda **f: KimiDeltaAttention(SIZE, num_heads=2, num_v_heads=4, **f),
    "gla": lambda **f: GatedLinearAttention(SIZE, num_heads=2, **f),
    "gla_conv": lambda **f: GatedLinearAttention(SIZE, num_heads=2, use_short_conv=True, use_output_gate=False, **f),
    "mamba2": lambda **f: Mamba2(SIZE, state_size=6, head_dim=8, num_groups=2, **f),
    "rwkv7": lambda **f: RWKV7(SIZE, head_dim=8, **f),
    "mlstm": lambda **f: MLSTM(SIZE, num_heads=4, **f),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def make(name: str, **factory) -> nn.Module:
    """A float64 layer away from its start, where some projections are zero."""
    torch.manual_seed(0)
    layer = LAYERS[name](**{"dtype": torch.float64, **factory})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(state: LayerState) -> list[Tensor]:
    return pytree.tree_leaves(state)


class Outputs(nn.Module):
    """A layer without its state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@pytest.mark.parametrize("name", FROM_GOLDEN)
def test_golden(name: str) -> None:
    g = load_golden(GOLDEN / f"{name}.npz")
    options = {k.removeprefix("opt_"): v.item() for k, v in g.items() if k.startswith("opt_") and v.dim() == 0}
    layer = FROM_GOLDEN[name](**options, dtype=torch.float64)
    layer.load_state_dict({k.removeprefix("param_"): v for k, v in g.items() if k.startswith("param_")})
    x = g["x"].requires_grad_()
    y, _ = layer(x, cu_seqlens=g.get("opt_cu_seqlens"))
    tolerance = 2e-6 if name == "layer_mlstm" else 1e-9
    assert_close("out", y, g["out"], tolerance)
    (y * g["ct_out"]).sum().backward()
    assert_close("grad_x", x.grad, g["grad_x"], 5 * tolerance)
    for key, parameter in layer.named_parameters():
        assert_close(f"gradient of {key}", parameter.grad, g[f"pgrad_{key}"], 5 * tolerance)


@every_layer
def test_module(name: str) -> None:
    x = torch.randn(2, 6, SIZE, generator=torch.Generator().manual_seed(3))
    check_module(lambda: Outputs(LAYERS[name]()), x)


@every_layer
@pytest.mark.parametrize("pieces", [(7, 12), (1, 3, 15), (1,) * 19])
def test_pieces_give_the_whole(name: str, pieces: tuple[int, ...]) -> None:
    layer, x = make(name), draw(2, 19, SIZE)
    whole, final = layer(x)
    outs, state = [], None
    for part in x.split(pieces, 1):
        kept = [t.clone() for t in leaves(state)] if state else []
        y, after = layer(part, state)
        assert not state or all(torch.equal(a, b) for a, b in zip(kept, leaves(state), strict=True))
        outs, state = [*outs, y], after
    assert_close("outputs", torch.cat(outs, 1), whole, 1e-9 if name != "mlstm" else 2e-6)
    for a, b in zip(leaves(state), leaves(final), strict=True):
        assert_close("state", a, b, 1e-9)


@every_layer
def test_step_is_a_sequence_of_one(name: str) -> None:
    layer, x = make(name), draw(2, 5, SIZE)
    whole, final = layer(x)
    y, state = layer.step(x[:, 0])
    outs = [y]
    for t in range(1, 5):
        y, state = layer.step(x[:, t], state)
        outs.append(y)
    assert_close("outputs", torch.stack(outs, 1), whole, 1e-9 if name != "mlstm" else 2e-6)
    for a, b in zip(leaves(state), leaves(final), strict=True):
        assert_close("state", a, b, 1e-9)


@every_layer
def test_packed_is_separate_and_goes_on_as_a_batch(name: str) -> None:
    layer, x, more = make(name), draw(1, 19, SIZE), draw(4, 3, SIZE, seed=2)
    lengths = (5, 1, 9, 4)
    packed, state = layer(x, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    tolerance = 1e-9 if name != "mlstm" else 2e-6
    alone = [layer(piece) for piece in x.split(lengths, 1)]
    assert_close("outputs", packed, torch.cat([y for y, _ in alone], 1), tolerance)
    for parts in zip(leaves(state), *(leaves(s) for _, s in alone), strict=True):
        assert_close("state", parts[0], torch.cat(parts[1:]), 1e-9)
    together = layer(more, state)[0]
    assert_close("continued", together, torch.cat([layer(m[None], s)[0] for m, (_, s) in zip(more, alone, strict=True)]), tolerance)
    again, _ = layer(more.reshape(1, 12, SIZE), state, cu_seqlens=torch.tensor([0, 3, 6, 9, 12]))
    assert_close("continued, packed", again.view(4, 3, SIZE), together, tolerance)


@every_layer
def test_an_empty_sequence_keeps_its_state(name: str) -> None:
    layer, x = make(name), draw(1, 7, SIZE)
    offsets = torch.tensor([0, 4, 4, 7])
    _, state = layer(draw(1, 7, SIZE, seed=5), cu_seqlens=torch.tensor([0, 2, 5, 7]))
    _, after = layer(x, state, cu_seqlens=offsets)
    for a, b in zip(leaves(after), leaves(state), strict=True):
        assert torch.equal(a[1], b[1])


@every_layer
def test_the_future_has_no_influence(name: str) -> None:
    layer, x = make(name), draw(1, 12, SIZE)
    changed = x.clone()
    changed[:, 7:] = 3.0
    assert_close("outputs", layer(changed)[0][:, :7], layer(x)[0][:, :7], 1e-12)


@every_layer
def test_gradients_flow_through_states(name: str) -> None:
    layer, x = make(name), draw(2, 9, SIZE).requires_grad_()
    whole = torch.autograd.grad(layer(x)[0][:, 6:].square().sum(), x)[0]
    _, state = layer(x[:, :6])
    pieces = torch.autograd.grad(layer(x[:, 6:], state)[0].square().sum(), x)[0]
    assert_close("gradient", pieces, whole, 1e-8 if name != "mlstm" else 1e-5)


@every_layer
def test_states_are_pytrees_in_float32_or_better(name: str) -> None:
    layer = make(name, dtype=torch.float32).bfloat16()
    y, state = layer(draw(2, 4, SIZE).bfloat16())
    assert isinstance(state, LayerState)
    assert y.dtype == torch.bfloat16
    assert {t.dtype for t in leaves(state)} == {torch.float32}
    doubled = pytree.tree_map(lambda t: torch.cat([t, t]), state)
    assert layer(draw(4, 1, SIZE).bfloat16(), doubled)[0].shape == (4, 1, SIZE)


@every_layer
def test_factory_arguments(name: str) -> None:
    assert {p.dtype for p in LAYERS[name](dtype=torch.float64).parameters()} == {torch.float64}
    assert {p.device.type for p in LAYERS[name](device="meta").parameters()} == {"meta"}
    layer = LAYERS[name]()
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(7.0)
    layer.reset_parameters()
    for n, p in layer.named_parameters():
        assert (p != 7.0).all(), f"{n} is not reset"
        assert p.isfinite().all()
    assert str(SIZE) in repr(layer)


@every_layer
def test_marks_against_weight_decay(name: str) -> None:
    marked = {n.split(".")[-1] for n, p in LAYERS[name]().named_parameters() if getattr(p, "_no_weight_decay", False)}
    expected = {n for n in ("A_log", "dt_bias", "D") if n in dict(LAYERS[name]().named_parameters())}
    assert marked == expected


def test_starts() -> None:
    torch.manual_seed(0)
    layer = GatedDeltaProduct(256, num_heads=64, head_dim=4)
    assert layer.A_log.min() > -6.91
    assert layer.A_log.max() < 2.78
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert dt.min() > 0.9e-3
    assert dt.max() < 0.11
    bound = 2**-2.5 * (6 / (256 + 256)) ** 0.5
    assert 0.95 * bound < layer.q_proj.weight.abs().max() <= bound
    assert layer.q_conv1d.weight.abs().max() <= 0.5
    assert (layer.o_norm.weight == 1).all()
    assert KimiDeltaAttention(64).A_log.min() >= 0
    mamba = Mamba2(64)
    assert (mamba.D == 1).all()
    assert mamba.A_log.min() >= 0
    m = MLSTM(64, num_heads=4)
    assert m.fgate.bias.tolist() == [3.0, 4.0, 5.0, 6.0]
    assert not m.fgate.weight.any()


@pytest.mark.parametrize("layer_idx", [0, 2])
def test_rwkv7_starts_by_its_place(layer_idx: int) -> None:
    layer = RWKV7(128, head_dim=64, layer_idx=layer_idx, num_layers=4)
    j = torch.arange(128.0)
    rest = 1 - layer_idx / 4
    assert_close("x_r", layer.x_r.flatten(), 1 - (j / 128) ** (0.2 * rest), 1e-6)
    assert_close("x_w", layer.x_w.flatten(), 1 - (j / 128) ** (0.9 * rest), 1e-6)
    assert_close("x_v", layer.x_v.flatten(), 1 - (j / 128) ** (0.7 * rest), 1e-6)
    z = (j % 64 - 31.5) / 31.5
    decay = -6 + 6 * (j / 127) ** (1 + (layer_idx / 3) ** 0.3) + 0.5 + 2.5 * z * z.abs()
    assert_close("w bias", layer.w_lora.lora[2].bias, decay, 1e-6)
    assert_close("g_norm", layer.g_norm.weight, torch.full((128,), ((layer_idx + 1) / 4) ** 0.7), 1e-6)
    assert not layer.o_proj.weight.any()
    assert not layer.w_lora.lora[0].weight.any()
    assert_close("orthogonal", layer.w_lora.lora[2].weight.T @ layer.w_lora.lora[2].weight, 0.01 * torch.eye(32), 1e-4)
    assert hasattr(layer, "v_lora") == (layer_idx > 0)
    assert layer.g_lora.lora[0].weight.shape[0] == 64


@pytest.mark.parametrize(("size", "head_dim"), [(1, 1), (4, 1), (2, 2)])
def test_rwkv7_of_the_smallest_sizes(size: int, head_dim: int) -> None:
    layer = RWKV7(size, head_dim=head_dim)
    assert all(p.isfinite().all() for p in layer.parameters())
    assert layer(torch.randn(1, 3, size))[0].isfinite().all()


def rwkv7_stack() -> tuple[RWKV7, RWKV7]:
    torch.manual_seed(0)
    layers = tuple(RWKV7(SIZE, head_dim=8, layer_idx=j, num_layers=2, dtype=torch.float64) for j in range(2))
    with torch.no_grad():
        for p in (p for layer in layers for p in layer.parameters()):
            p.add_(0.2 * torch.randn_like(p))
    return layers


def test_rwkv7_blends_the_value_of_the_first_layer() -> None:
    first, second = rwkv7_stack()
    x = draw(2, 7, SIZE)
    y, _, v_first = first(x, return_v_first=True)
    assert_close("y", y, first(x)[0], 0.0)
    whole, _, same = second(x, v_first=v_first, return_v_first=True)
    assert same is v_first
    assert (whole - second(x, v_first=v_first + 1)[0]).abs().max() > 1e-3
    outs, state = [], None
    for t in range(7):
        y, state = second.step(x[:, t], state, v_first=v_first[:, t])
        outs.append(y)
    assert_close("steps", torch.stack(outs, 1), whole, 1e-9)
    _, _, v_t = first.step(x[:, 0], return_v_first=True)
    assert_close("v_first", v_t, v_first[:, 0], 1e-12)
    # where the blend is wide open, only the first layer's value counts
    with torch.no_grad():
        second.v_lora.lora[2].bias.fill_(1e4)
        opened = second(x, v_first=v_first)[0]
        second.v_proj.weight.zero_()
        assert_close("opened", second(x, v_first=v_first)[0], opened, 1e-12)


def test_rwkv7_needs_v_first() -> None:
    _, second = rwkv7_stack()
    with pytest.raises(ValueError, match=r"^v_first: expected the value of layer 0, which layer 1 needs, got None"):
        second(draw(1, 3, SIZE))
    with pytest.raises(ValueError, match=r"^v_first: expected shape \(1, 3, 16\)"):
        second(draw(1, 3, SIZE), v_first=draw(1, 2, SIZE))


def test_options_without_an_effect_on_shapes_have_one_on_results() -> None:
    x = draw(1, 8, SIZE)

    def out(**options):
        torch.manual_seed(0)
        return DeltaProduct(SIZE, num_heads=2, dtype=torch.float64, **options)(x)[0]

    base = out()
    for option in ({"allow_neg_eigval": False}, {"use_forget_gate": True}, {"norm_eps": 1e-2}, {"use_output_gate": False}):
        assert (out(**option) - base).abs().max() > 1e-6, option


def test_mlstm_is_deep_copied_with_its_function() -> None:
    layer = make("mlstm")
    assert_close("copy", copy.deepcopy(layer)(draw(1, 4, SIZE))[0], layer(draw(1, 4, SIZE))[0], 0.0)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: DeltaProduct(15), ValueError, r"^num_heads: must divide hidden_size, got num_heads=4, hidden_size=15"),
        (lambda: DeltaProduct(16, num_heads=3, head_dim=4, num_v_heads=4), ValueError, r"^num_heads: must divide num_v_heads"),
        (lambda: DeltaProduct(16, num_householder=0), ValueError, r"^num_householder: expected a positive int"),
        (lambda: DeltaProduct(16, num_heads=0), ValueError, r"^num_heads: expected a positive int"),
        (lambda: DeltaProduct(16, expand_v=0.1), ValueError, r"^expand_v: expected a number"),
        (lambda: DeltaProduct(16.0), TypeError, r"^hidden_size: expected a positive int"),
        (lambda: DeltaNet(16, conv_size=0), ValueError, r"^conv_size: expected a positive int"),
        (lambda: DeltaNet(16, norm_eps=-1.0), ValueError, r"^norm_eps: expected a number"),
        (lambda: DeltaNet(16, num_householder=2), TypeError, r"num_householder"),
        (lambda: GatedLinearAttention(16, num_heads=3), ValueError, r"^num_heads: must divide the key channels"),
        (lambda: GatedLinearAttention(16, gate_low_rank_dim=0), ValueError, r"^gate_low_rank_dim: expected a positive int"),
        (lambda: GatedLinearAttention(16, gate_logit_normalizer=0.0), ValueError, r"^gate_logit_normalizer: expected"),
        (lambda: Mamba2(16, head_dim=5), ValueError, r"^head_dim: must divide expand \* hidden_size"),
        (lambda: Mamba2(16, head_dim=8, num_groups=3), ValueError, r"^num_groups: must divide"),
        (lambda: RWKV7(16, head_dim=5), ValueError, r"^head_dim: must divide hidden_size"),
        (lambda: RWKV7(16, head_dim=8, layer_idx=2, num_layers=2), ValueError, r"^layer_idx: expected a number in \[0, 2\)"),
        (lambda: RWKV7(16, head_dim=8, a_low_rank_dim=0), ValueError, r"^a_low_rank_dim: expected a positive int"),
        (lambda: MLSTM(16, num_heads=5), ValueError, r"^num_heads: must divide the inner size"),
        (lambda: MLSTM(16, qkv_block_size=7), ValueError, r"^qkv_block_size: must divide"),
        (lambda: MLSTM(16, expand=0.0), ValueError, r"^expand: expected a number"),
    ],
)
def test_errors_of_constructors(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@every_layer
def test_errors_of_calls(name: str) -> None:
    layer = make(name)
    state = layer(draw(2, 3, SIZE))[1]
    cases = [
        ((draw(2, 3, SIZE + 1),), {}, ValueError, r"^x: expected shape"),
        ((draw(3, SIZE),), {}, ValueError, r"^x: expected shape"),
        ((draw(2, 0, SIZE),), {}, ValueError, r"^x: expected shape .* T at least 1"),
        ((torch.zeros(2, 3, SIZE, dtype=torch.int64),), {}, TypeError, r"^x: expected a float"),
        (("text",), {}, TypeError, r"^x: expected a Tensor"),
        ((draw(3, 3, SIZE), state), {}, ValueError, r"initial_state.*: expected shape"),
        ((draw(2, 3, SIZE), state.recurrent), {}, TypeError, r"^state: expected a LayerState"),
        ((draw(2, 3, SIZE), state._replace(conv=(*state.conv, draw(2, 3, SIZE)))), {}, ValueError, r"^state.conv: expected a tuple of"),
        ((draw(2, 3, SIZE),), {"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"^cu_seqlens: expected a batch of 1"),
        ((draw(1, 3, SIZE),), {"cu_seqlens": torch.tensor([0, 2])}, ValueError, r"^cu_seqlens: expected offsets"),
        ((draw(1, 3, SIZE),), {"cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, r"^cu_seqlens: expected an int32 or int64"),
    ]
    for args, options, error, message in cases:
        with pytest.raises(error, match=message):
            layer(*args, **options)
    with pytest.raises(ValueError, match=r"^x_t: expected shape \(\*, 16\)"):
        layer.step(draw(2, 1, SIZE))
