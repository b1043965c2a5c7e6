import re

import pytest
import torch
from torch import Tensor, nn

from phyla.linear_rnn import (
    RWKV7,
    DeltaProduct,
    GatedDeltaNet,
    GatedDeltaProduct,
    GatedLinearAttention,
    LinearRNNLM,
    load_fla_state_dict,
)

SIZE = 16


def filled(build) -> nn.Module:
    torch.manual_seed(1)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def split(state: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """The names of the DeltaProduct paper's repository: one module a reflection."""
    result = {}
    for name, tensor in state.items():
        found = re.match(r"(.*\.)?([kvb]_(?:proj|conv1d))\.(\w+)$", name)
        pieces = tensor.chunk(n) if found else [tensor]
        result |= {f"{found[1] or ''}{found[2]}s.{j}.{found[3]}" if found else name: piece for j, piece in enumerate(pieces)}
    return result


@pytest.mark.parametrize("prefix", ["", "attn.", "model.layers.3.attn.", "module.model.layers.0.attn.", "layers.11.attn."])
def test_a_layer_takes_its_place_in_a_model_off(prefix: str) -> None:
    build = lambda: GatedDeltaNet(SIZE, num_heads=2)  # noqa: E731
    source, target = filled(build), build()
    load_fla_state_dict(target, {prefix + n: t for n, t in source.state_dict().items()})
    assert_same(target, source)


@pytest.mark.parametrize("n", [1, 2, 12])
@pytest.mark.parametrize("conv_bias", [False, True])
def test_modules_of_single_reflections_are_joined(n: int, conv_bias: bool) -> None:
    build = lambda: GatedDeltaProduct(SIZE, num_heads=2, num_householder=n, conv_bias=conv_bias)  # noqa: E731
    source, target = filled(build), build()
    load_fla_state_dict(target, dict(reversed(split(source.state_dict(), n).items())))
    assert_same(target, source)


@pytest.mark.parametrize("norm", ["g_norm_swish_gate", "g_norm", "o_norm"])
def test_names_of_the_norm(norm: str) -> None:
    build = lambda: GatedLinearAttention(SIZE, num_heads=2)  # noqa: E731
    source, target = filled(build), build()
    load_fla_state_dict(target, {n.replace("o_norm", norm): t for n, t in source.state_dict().items()})
    assert_same(target, source)


def test_a_norm_that_is_called_g_norm_keeps_its_name() -> None:
    build = lambda: RWKV7(SIZE, head_dim=8)  # noqa: E731
    source, target = filled(build), build()
    load_fla_state_dict(target, source.state_dict())
    assert_same(target, source)


def model(tie: bool = False) -> LinearRNNLM:
    mixers = (lambda: DeltaProduct(SIZE, num_heads=2, num_householder=2), lambda: GatedLinearAttention(SIZE, num_heads=2))
    return LinearRNNLM(7, SIZE, 2, mixer=lambda i: mixers[i](), intermediate_size=24, tie_embeddings=tie)


def public_names(source: LinearRNNLM) -> dict[str, Tensor]:
    """The first layer by reflections, the second with the old name of its norm, gate and up-projections in one."""
    state = source.state_dict()
    result = split({k: t for k, t in state.items() if not k.startswith("layers.1.attn.")}, 2)
    result |= {k.replace("o_norm", "g_norm_swish_gate"): t for k, t in state.items() if k.startswith("layers.1.attn.")}
    for i in range(2):
        parts = [result.pop(f"layers.{i}.mlp.{part}_proj.weight") for part in ("gate", "up")]
        result[f"layers.{i}.mlp.gate_proj.weight"] = torch.cat(parts)
    return {k if k.startswith("lm_head") else f"model.{k}": t for k, t in result.items()}


def test_a_language_model() -> None:
    source, target = filled(model), model()
    load_fla_state_dict(target, public_names(source))
    assert_same(target, source)


@pytest.mark.parametrize("left_out", [(), ("lm_head.weight",), ("model.embeddings.weight",)])
def test_tied_embeddings_come_under_either_name(left_out: tuple[str, ...]) -> None:
    source, target = filled(lambda: model(True)), model(True)
    load_fla_state_dict(target, {k: t for k, t in public_names(source).items() if k not in left_out})
    assert_same(target, source)


def test_errors_leave_the_model_as_it_was() -> None:
    source = filled(model)
    names = public_names(source)
    weight = "model.layers.0.attn.q_proj.weight"
    without = {k: t for k, t in names.items() if k != weight}
    gap = {k: t for k, t in names.items() if k != "model.layers.0.attn.k_projs.0.weight"}
    cases = [
        (without, r"missing \['layers.0.attn.q_proj.weight'\]"),
        (names | {"model.layers.0.attn.z_proj.weight": torch.zeros(1)}, r"unknown \['layers.0.attn.z_proj.weight'\]"),
        (names | {weight: torch.zeros(3, SIZE)}, r"layers.0.attn.q_proj.weight: expected shape \(16, 16\), got \(3, 16\)"),
        (gap, r"layers.0.attn.k_proj.weight: expected reflections 0 to 0, got \[1\]"),
        (names | {"model.layers.1.attn.o_norm.weight": torch.zeros(8)}, r"expected one tensor for layers.1.attn.o_norm.weight"),
    ]
    target = filled(model)
    before = {n: t.clone() for n, t in target.state_dict().items()}
    for state, message in cases:
        with pytest.raises(ValueError, match=message):
            load_fla_state_dict(target, state)
        assert all(torch.equal(before[n], t) for n, t in target.state_dict().items())


def test_two_layers_are_not_one() -> None:
    layer = GatedDeltaNet(SIZE, num_heads=2)
    state = {f"layers.{i}.attn.{n}": t for i in range(2) for n, t in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"expected one tensor for"):
        load_fla_state_dict(layer, state)
