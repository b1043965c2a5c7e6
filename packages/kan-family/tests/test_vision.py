from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from phyla.kan_family import convert_vision
from phyla.kan_family.attention import KANAttention
from phyla.kan_family.bases import Rational, ReLUBump
from phyla.kan_family.rational import GRKAN, GroupRational
from phyla.kan_family.vision import DropPath, KATBlock, SoftmaxAttention, VisionTransformer, kat_base, kat_small, kat_tiny, mimetic_
from phyla.shared.testing import assert_close, check_module, load_golden

GOLDEN = Path(__file__).parent / "golden"
SMALL: dict[str, Any] = {"img_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 5, "embed_dim": 16, "depth": 2, "num_heads": 2}

# torch's fused attention has neither forward mode nor a second derivative on the CPU.
exact_attention = partial(sdpa_kernel, SDPBackend.MATH)


def small(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, **options})


def images(*batch: int) -> Tensor:
    return torch.randn(*batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["kat_small", "kat_small_wide"])
def test_golden(name: str) -> None:
    g = load_golden(GOLDEN / f"{name}.npz")
    options = {k.removeprefix("option."): int(v) for k, v in g.items() if k.startswith("option.")}
    options["in_channels"] = options.pop("in_chans")
    model = VisionTransformer(**options, mlp="grkan", attention="softmax", dtype=torch.float64)  # type: ignore[arg-type]
    model.load_state_dict(convert_vision.kat({k.removeprefix("param."): v for k, v in g.items() if k.startswith("param.")}))
    x = g["x"].requires_grad_()
    logits = model(x)
    assert_close("logits", logits, g["logits"], 1e-9)
    logits.backward(g["grad_output"])
    assert x.grad is not None
    assert_close("grad_x", x.grad, g["grad_x"], 1e-8)
    gradients = convert_vision.kat({k.removeprefix("grad."): v for k, v in g.items() if k.startswith("grad.")})
    assert len(gradients) > 10
    for key, expected in gradients.items():
        grad = model.get_parameter(key).grad
        assert grad is not None
        assert_close(key, grad, expected, 1e-8)


def test_sizes() -> None:
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    tiny = kat_tiny(device="meta")
    assert count(tiny) == 5_718_328
    assert [(m.pos_embed.shape[-1], len(m.blocks)) for m in (kat_small(device="meta"), kat_base(device="meta"))] == [(384, 12), (768, 12)]
    assert count(kat_tiny(device="meta", num_classes=10)) == 5_718_328 - 990 * 193


def test_parameter_names_are_those_of_timm() -> None:
    names = set(small(depth=1).state_dict())
    block = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias", "norm2.weight"]
    block += ["norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    timm = {f"blocks.0.{n}" for n in block} | {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    timm |= {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert set(small(depth=1, mlp="mlp").state_dict()) == timm
    assert names - timm == {f"blocks.0.mlp.act{i}.{c}" for i in (1, 2) for c in ("numerator", "denominator")}


def test_converted_vit_keeps_its_function() -> None:
    vit = small(mlp="mlp", embed_dim=64, num_heads=4)
    kat = small(mlp="grkan", embed_dim=64, num_heads=4)
    kat.load_state_dict(convert_vision.timm_vit(vit.state_dict()))
    with torch.no_grad():
        assert float((vit(images(4)) - kat(images(4))).abs().max()) <= 3e-3


def test_no_weight_decay_names_every_learned_function() -> None:
    model = small(attention="kan-blockwise", basis=ReLUBump(), rank=3)
    skipped = model.no_weight_decay()
    assert skipped <= set(dict(model.named_parameters()))
    decayed = {n.rpartition(".")[2] for n in dict(model.named_parameters()) if n not in skipped}
    assert decayed == {"weight", "coef", "proj"}
    assert {"cls_token", "pos_embed", "blocks.1.attn.operator.basis.low", "blocks.0.mlp.act2.denominator", "norm.weight"} <= skipped
    assert not any("fc1.weight" in n or "qkv.weight" in n for n in skipped)


def test_universal_attention_shares_its_operator() -> None:
    model = small(attention="kan-universal", rank=3)
    operators = {id(m.operator) for m in model.modules() if isinstance(m, KANAttention)}
    assert len(operators) == 1
    blockwise = small(attention="kan-blockwise", rank=3)
    coefficients = sum(p.numel() for p in model.blocks[0].attn.operator.parameters())
    total = [sum(p.numel() for p in m.parameters()) for m in (model, blockwise)]
    assert total[1] - total[0] == coefficients
    model(images(2)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"mlp": "mlp", "pool": "avg"}, {"attention": "kan-blockwise", "basis": Rational(num_groups=5)}])
def test_starts(options: dict[str, Any]) -> None:
    model = small(**{**options, "embed_dim": 64})
    bound = (6 / 128) ** 0.5
    assert not model.head.bias.any()
    assert bool((model.cls_token.abs() < 1e-4).all())
    for block in model.blocks:
        weight = block.attn.qkv.weight
        assert bound * 0.98 < float(weight.detach().abs().max()) <= bound
        assert not block.attn.qkv.bias.any()
        assert float(block.attn.proj.weight.detach().abs().max()) <= bound
    assert float(model.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.15)
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.15)


def test_mimetic_start() -> None:
    torch.manual_seed(0)
    attn = SoftmaxAttention(96, 3)
    with torch.no_grad():
        mimetic_(attn.qkv.weight, attn.proj.weight, 3)
        q, k, v = attn.qkv.weight.chunk(3)
        mixed = attn.proj.weight @ v
        assert float(mixed.diagonal().mean()) == pytest.approx(-0.4, abs=0.03)
        # 0.4 Z - 0.4 I with Var Z = 1 / D: off the diagonal a standard deviation of 0.4 / sqrt(D)
        off = mixed - torch.diag(mixed.diagonal())
        assert float(off.square().mean().sqrt()) == pytest.approx(0.4 / 96**0.5, rel=0.1)
        for head in range(3):
            rows = slice(32 * head, 32 * (head + 1))
            assert float((q[rows].T @ k[rows]).diagonal().mean()) > 0.2
    model = small(weight_init="mimetic")
    first = model.blocks[0].attn
    assert float((first.proj.weight @ first.qkv.weight.chunk(3)[2]).diagonal().mean()) < -0.25


def test_attention_is_the_formula() -> None:
    torch.manual_seed(0)
    attn = SoftmaxAttention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (attn.qkv(x)[..., 12 * i : 12 * (i + 1)] for i in range(3))
    heads = []
    for h in range(3):
        at = slice(4 * h, 4 * (h + 1))
        heads.append((q[..., at] @ k[..., at].transpose(1, 2) / 2).softmax(-1) @ v[..., at])
    torch.testing.assert_close(attn(x), attn.proj(torch.cat(heads, -1)))


def test_features_and_pooling() -> None:
    token, avg = small(pool="token"), small(pool="avg")
    x = images(3)
    features = token.forward_features(x)
    assert features.shape == (3, 5, 16)
    torch.testing.assert_close(token(x), token.head(features[:, 0]))
    torch.testing.assert_close(avg(x), avg.head(features[:, 1:].mean(1)))
    assert token(x[:0]).shape == (0, 5)


def test_drop_path_drops_samples_and_keeps_the_mean() -> None:
    drop = DropPath(0.25)
    torch.manual_seed(0)
    y = drop(torch.ones(4000, 2, 3))
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert float(y.mean()) == pytest.approx(1.0, abs=0.03)
    assert torch.equal(drop.eval()(y), y)
    assert [b.drop_path.p for b in small(depth=3, drop_path=0.1).blocks] == [0.0, 0.05, 0.1]


@pytest.mark.parametrize("dropout", ["dropout", "attn_dropout", "drop_path"])
def test_dropout_acts_in_training_only(dropout: str) -> None:
    model = small(**{dropout: 0.5})
    x = images(4)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("options", [{}, {"attention": "kan-universal", "rank": 3, "mlp": "mlp"}])
def test_module(options: dict[str, Any]) -> None:
    with exact_attention():
        check_module(lambda: small(**options, depth=1), images(2))


def test_block_module() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return KATBlock(16, 2)

    with exact_attention():
        check_module(make, torch.randn(2, 3, 16))
    assert isinstance(KATBlock(8, 2, attention=KANAttention(8, 2, 3)).attn, KANAttention)
    assert isinstance(KATBlock(8, 2).mlp, GRKAN)


def test_seeded_start() -> None:
    one, two = small(), small()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(patch_size=3), "patch_size: must divide img_size, got patch_size=3, img_size=8"),
        (lambda: small(num_heads=3), "num_heads: must divide dim, got num_heads=3, dim=16"),
        (lambda: small(attention="kan"), "attention: expected one of"),
        (lambda: small(mlp="grkanx"), "mlp: expected one of .*did you mean 'grkan'"),
        (lambda: small(pool="max"), "pool: expected one of"),
        (lambda: small(weight_init="xaviar"), "weight_init: expected one of"),
        (lambda: small(depth=0), "depth: expected a positive int"),
        (lambda: small(drop_path=1.0), r"drop_path: expected a number in \[0.0, 1.0\)"),
        (lambda: small()(images(2)[..., :4]), r"x: expected shape"),
        (lambda: convert_vision.kat({"a": torch.zeros(1)}), "state_dict: expected parameters named weight_numerator"),
        (lambda: convert_vision.timm_vit({"a": torch.zeros(1)}), "state_dict: expected parameters named blocks"),
        (lambda: convert_vision.timm_vit(small(mlp="mlp").state_dict(), num_groups=3), "num_groups: must divide the sizes of"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_kat_conversion_renames_only() -> None:
    model = small()
    released = {
        n.replace("numerator", "weight_numerator").replace("denominator", "weight_denominator"): p for n, p in model.state_dict().items()
    }
    back = convert_vision.kat(released)
    assert back.keys() == model.state_dict().keys()
    assert all(back[n].data_ptr() == p.data_ptr() for n, p in model.state_dict().items())
    assert any(isinstance(m, GroupRational) for m in model.modules())
