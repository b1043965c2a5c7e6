import bases_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from test_basis import built, curves
from test_linear import check_with_constant_knots
from torch import Tensor, nn

from phyla.kan_family import (
    ActivationPair,
    Basis,
    BSpline,
    Chebyshev,
    Fourier,
    KANConv1d,
    KANConv2d,
    KANConv3d,
    Rational,
    ReLUBump,
    Wavelet,
)
from phyla.kan_family.functional.conv import _basis_conv
from phyla.shared.testing import _Case as Battery
from phyla.shared.testing import assert_close, check_module, kernel_parity, kernel_threads


def arguments(spec: Basis, base: str | None, pad_input: bool, size: tuple[int, ...] = (4, 3), samples: int = 2) -> tuple[object, ...]:
    basis, d = built(spec, 2), len(size)
    o = basis.operands()
    first, second = (None if o[name] is None else o[name].detach().clone() for name in ("first", "second"))
    coef = torch.randn(4, 1, spec.num_basis, *[2] * d, dtype=torch.float64)
    weight = None if base is None else torch.randn(4, 1, *[2] * d, dtype=torch.float64)
    x = torch.randn(samples, 2, *size, dtype=torch.float64)
    geometry = ([1, 2, 1][:d], [1, 0, 1][:d], [2, 1, 1][:d], 2, pad_input)
    return x, coef, weight, first, second, o["kind"], base or "silu", o["ints"], o["floats"], *geometry


@pytest.mark.parametrize("pad_input", [True, False])
def test_kernel(pad_input: bool) -> None:
    check_with_constant_knots(_basis_conv, arguments(BSpline(4, 4), "silu", pad_input))


@pytest.mark.parametrize(
    "spec", [ReLUBump(), Fourier(3), Chebyshev(), Wavelet(), ActivationPair(), BSpline(20, 3, outside="linear")], ids=str
)
@pytest.mark.parametrize("size", [(9,), (33, 32), (4, 5, 6)], ids=str)
def test_kernel_of_bases_and_dimensions(spec: Basis, size: tuple[int, ...]) -> None:
    for base, pad_input in (("gelu", True), (None, False)):
        case = Battery(_basis_conv, arguments(spec, base, pad_input, size, 3), None, (0,))
        kernel_parity(case)
        kernel_threads(case)


@pytest.mark.parametrize("pad", ["input", "features"])
@pytest.mark.parametrize("stride", [1, 2])
def test_layer_is_the_equation_at_every_tap(pad: str, stride: int) -> None:
    layer = KANConv2d(2, 3, (3, 2), stride=stride, padding=1, pad=pad, dtype=torch.float64)
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    expected = oracle.convolution(x, layer.coef, layer.base_weight, stride, 1, pad, curves(layer.basis.spec, layer.basis))
    assert_close("convolution", layer(x), expected, 1e-9)


@pytest.mark.parametrize("pad", ["input", "features"])
def test_rational_and_callable_base(pad: str) -> None:
    for basis, base in ((Rational(num_groups=2), "silu"), (Rational(num_groups=2), None), (BSpline(), torch.sin)):
        layer = KANConv2d(2, 3, 3, padding=1, basis=basis, base=base, pad=pad, dtype=torch.float64)
        x = torch.randn(2, 2, 5, 4, dtype=torch.float64)
        image, padding = (F.pad(x, [1] * 4), 0) if pad == "input" else (x, 1)
        phi = layer.basis(image.movedim(1, -1)).flatten(-2).movedim(-1, 1)
        expected = F.conv2d(phi, layer.coef.flatten(1, 2), layer.bias, padding=padding)
        if base is not None:
            expected = expected + F.conv2d(F.silu(image) if base == "silu" else torch.sin(image), layer.base_weight, padding=padding)
        assert_close("convolution", layer(x), expected, 1e-12)


@pytest.mark.parametrize(("layer", "size"), [(KANConv1d, (5,)), (KANConv2d, (5, 4)), (KANConv3d, (4, 3, 5))], ids=str)
def test_module(layer: type[nn.Module], size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check_module(lambda: layer(2, 4, 3, padding=1, groups=2), torch.randn(3, 2, *size))


def test_groups_are_separate_layers() -> None:
    whole = KANConv2d(4, 6, 3, groups=2, dtype=torch.float64)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    halves = []
    for g in range(2):
        part = KANConv2d(2, 3, 3, dtype=torch.float64)
        with torch.no_grad():
            part.coef.copy_(whole.coef[3 * g : 3 * g + 3])
            part.base_weight.copy_(whole.base_weight[3 * g : 3 * g + 3])
        halves.append(part(x[:, 2 * g : 2 * g + 2]))
    assert_close("groups", whole(x), torch.cat(halves, 1), 1e-12)


def test_unbatched_and_empty_inputs() -> None:
    layer = KANConv2d(2, 3, 3, padding=1)
    x = torch.randn(4, 2, 5, 5)
    assert_close("one image", layer(x[1]), layer(x)[1], 1e-5)
    empty = torch.randn(0, 2, 5, 5, requires_grad=True)
    assert layer(empty).shape == (0, 3, 5, 5)
    layer(empty).sum().backward()
    assert empty.grad.shape == empty.shape


def test_memory_kept_for_backward_is_the_image() -> None:
    layer = KANConv2d(16, 32, 3, padding=1)
    x = torch.randn(8, 16, 16, 16, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert sum(kept.values()) <= 1.1 * x.nbytes


def test_variance_preserving_start() -> None:
    torch.manual_seed(0)
    layer = KANConv2d(32, 64, 3, basis="fourier", base=None)
    assert layer(torch.randn(4, 32, 10, 10)).square().mean().item() == pytest.approx(1, rel=0.15)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="groups: must divide in_channels, got groups=3, in_channels=4"):
        KANConv2d(4, 6, 3, groups=3)
    with pytest.raises(ValueError, match="kernel_size: expected an int or 2 ints of at least 1, got 0"):
        KANConv2d(4, 6, 0)
    with pytest.raises(ValueError, match="padding: expected an int or 2 ints of at least 0"):
        KANConv2d(4, 6, 3, padding=(1, 1, 1))
    with pytest.raises(ValueError, match="pad: expected one of 'input', 'features'"):
        KANConv2d(4, 6, 3, pad="same")
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 4, \*, \*\), got shape \(2, 3, 5, 5\)"):
        KANConv2d(4, 6, 3)(torch.zeros(2, 3, 5, 5))
    with pytest.raises(ValueError, match="x: expected spatial sizes that the kernel"):
        KANConv2d(4, 6, 3)(torch.zeros(2, 4, 2, 5))
