"""Signs and their surrogate derivatives against closed formulas and published codes; the binarizer objects, schedules and states."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from phyla.quantized import (
    ApproxSign,
    Binarizer,
    BinaryLinear,
    BiPer,
    EDESign,
    IRNet,
    ReCU,
    SignSTE,
    SwishSign,
    biper_penalty,
    set_progress,
    set_stage,
)
from phyla.quantized import functional as QF
from phyla.quantized.functional import binarizers as kernels
from phyla.quantized.functional import clip_mask
from phyla.shared import testing
from phyla.shared.kernels import Kernel
from phyla.shared.testing import assert_close, check_kernel, fuzz, load_golden

GOLDEN = load_golden(Path(__file__).parent / "golden" / "surrogates.npz")
_func: Any = torch.func

# Each sign with its surrogate derivative, from the papers' formulas.
SIGNS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "ste": (QF.sign_ste, lambda x: (x.abs() <= 1).to(x)),
    "ste 0.3": (lambda x: QF.sign_ste(x, clip=0.3), lambda x: (x.abs() <= 0.3).to(x)),
    "ste none": (lambda x: QF.sign_ste(x, clip=None), torch.ones_like),
    "approx": (QF.approx_sign, lambda x: (2 - 2 * x.abs()).clamp(min=0)),
    "swish": (lambda x: QF.swish_sign(x, beta=3.0), lambda x: 3 * (2 - 3 * x * (1.5 * x).tanh()) / (1 + (3 * x).cosh())),
    "ede": (lambda x: QF.ede_sign(x, t=0.4), lambda x: 2.5 * 0.4 * (1 - (0.4 * x).tanh() ** 2)),
    "ede k": (lambda x: QF.ede_sign(x, t=4.0, k=1.3), lambda x: 1.3 * 4 * (1 - (4 * x).tanh() ** 2)),
    "biper": (lambda x: QF.biper(x, frequency=20.0), lambda x: 20 * (20 * x).cos()),
}
each_sign = pytest.mark.parametrize("name", SIGNS)


def slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Derivative of an elementwise function, by backward."""
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


@pytest.mark.parametrize(
    ("key", "function"),
    [
        ("approx_grad", QF.approx_sign),
        ("approx_grad_biper_code", QF.approx_sign),
        ("ede_grad_t0.1_k10.0", lambda x: QF.ede_sign(x, t=0.1)),
        ("ede_grad_t3.0_k1.0", lambda x: QF.ede_sign(x, t=3.0, k=1.0)),
        ("ede_grad_t0.7_k1.4285714285714286", lambda x: QF.ede_sign(x, t=0.7)),
        ("ste_grad_clip1.0", QF.sign_ste),
        ("ste_grad_clip0.5", lambda x: QF.sign_ste(x, clip=0.5)),
        ("ste_grad_noclip", lambda x: QF.sign_ste(x, clip=None)),
        ("swish_grad_beta5.0", QF.swish_sign),
        ("swish_grad_beta2.0", lambda x: QF.swish_sign(x, beta=2.0)),
        ("biper_grad_f20.0", lambda x: QF.biper(x, frequency=20.0)),
        ("biper_grad_f3.0", lambda x: QF.biper(x, frequency=3.0)),
    ],
)
def test_published_gradients(key: str, function: Callable[[Tensor], Tensor]) -> None:
    x = GOLDEN["input"].clone().requires_grad_()
    y = function(x)
    expected = GOLDEN[key.replace("grad", "out")] if key.startswith("biper") else GOLDEN["output"]
    assert torch.equal(y, expected)
    y.backward(GOLDEN["grad_output"])
    assert_close(key, x.grad, GOLDEN[key], 1e-12)


@each_sign
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_and_derivatives(name: str, dtype: torch.dtype) -> None:
    function, derivative = SIGNS[name]
    x = (2.5 * torch.randn(3, 1, 1234, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    y = function(x)
    assert y.dtype == dtype
    if name != "biper":
        assert torch.equal(y, torch.where(x < 0, -1.0, 1.0).to(dtype))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 1e-2)
    phase = x if dtype == torch.float64 else x.float()  # the window's edges are those of the computing dtype
    assert_close("derivative", slope(function, x), derivative(phase), 2e-5 if (name, dtype) == ("biper", torch.float32) else tolerance)


@each_sign
def test_zero_nan_and_infinity(name: str) -> None:
    function, _ = SIGNS[name]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e30, -1e30], dtype=dtype)
        y = function(x)
        assert torch.equal(y.abs(), torch.ones_like(y)), "two values, no third"
        assert torch.equal(y[:3], torch.ones_like(y[:3]))
        if name != "biper":
            assert torch.equal(y[3:], torch.tensor([1, -1, 1, -1], dtype=dtype))
        assert slope(function, x).isfinite().all()
        if name not in ("ste none", "biper"):
            assert not slope(function, x)[2:].any(), "no slope far away or at NaN"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_swish_derivative_is_finite_and_relative_everywhere(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, 5.0, 10.0, 16.0, 17.0, 18.0, 1e3, 1e30], dtype=dtype)
    z = 5 * x.double()
    u = torch.exp(-z)
    expected = 5 * 2 * u / (1 + u) ** 2 * (2 - z * torch.tanh(z / 2))
    for sign in (1, -1):
        got = slope(QF.swish_sign, sign * x)
        assert ((got.double() - expected).abs() <= 1e-4 * expected.abs() + 1e-36).all()


@pytest.mark.parametrize("kernel", [kernels._surrogate_sign, kernels._normalized_sign])
@pytest.mark.parametrize("numbers", [("approx", (1.0, 1.0)), ("swish", (5.0, 1.0)), ("tanh", (0.7, 1.5))])
def test_surrogate_kernels(kernel: Kernel, numbers: tuple[str, tuple[float, float]]) -> None:
    """All checks of a kernel but finite differences, which see the flat sign."""
    torch.manual_seed(0)
    x, curve = 2 * torch.randn(6, 5, dtype=torch.float64) + 1, torch.tensor(numbers[1], dtype=torch.float64)
    case = testing._Case(kernel, (x, numbers[0], curve), None, (0,))
    for check in (
        testing.kernel_parity,
        testing.kernel_transforms,
        testing.kernel_opcheck,
        testing.kernel_compile,
        testing.kernel_export,
        testing.kernel_nan,
        testing.kernel_threads,
        testing.kernel_layouts,
        testing.kernel_empty,
    ):
        check(case)


@pytest.mark.parametrize("binarizer", [SignSTE(), ApproxSign(), SwishSign(2.0), EDESign(0.7), IRNet(), BiPer(3.0), BiPer(3.0, stage=2)])
@pytest.mark.parametrize("shape", [(3, 50, 70), (1, 2), (2, 3, 40, 30)])
def test_normalized_signs(binarizer: Binarizer, shape: tuple[int, ...]) -> None:
    """The one-op form has the gradients of the division and the binarizer one after the other."""
    torch.manual_seed(0)
    x, grad = 5 * torch.randn(shape, dtype=torch.float64) + 2, torch.randn(shape, dtype=torch.float64)
    for batched in (True, False):

        def apart(t: Tensor, batched: bool = batched) -> Tensor:
            y: Tensor = binarizer(QF.normalize_samples(t, batched=batched))
            return y

        def together(t: Tensor, batched: bool = batched) -> Tensor:
            return binarizer.normalized(t, batched=batched)

        assert torch.equal(together(x), apart(x))
        expected = slope(lambda t: apart(t) * grad, x)
        assert_close("float64", slope(lambda t: together(t) * grad, x), expected, 1e-10)
        if not isinstance(binarizer, SignSTE):  # the edges of its window are sharp
            assert_close("float32", slope(lambda t: together(t) * grad, x.float()), expected, 2e-5, least=0.1)
        last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        assert_close("other strides", slope(lambda t: together(t) * grad, last), expected, 1e-10)


def test_biper_kernel() -> None:
    """Stage 1 is smooth: every check, finite differences of both orders among them."""
    check_kernel(kernels._biper, torch.randn(4, 5, dtype=torch.float64), 20.0, False)


def test_masked_sign_ops() -> None:
    for size in (0, 1, 63, 64, 65, 1000):
        x = 2 * torch.randn(size)
        torch.library.opcheck(clip_mask._masked_sign.op, (x, 1.0))
        (y, mask), (y2, mask2) = clip_mask._masked_sign(x, 1.0), clip_mask._masked_sign.composite(x, 1.0)
        assert torch.equal(y, y2)
        assert torch.equal(mask, mask2)
        torch.library.opcheck(clip_mask._inside.op, (x, mask))
        assert torch.equal(clip_mask._inside(x, mask), torch.where(x.abs() <= 1, x, torch.zeros_like(x)))
        torch.library.opcheck(clip_mask._sign.op, (x,))


@each_sign
def test_transforms_and_second_derivatives(name: str) -> None:
    """Everything that torch differentiates sees the surrogate: second order, forward mode, per-sample gradients, compiled graphs."""
    function, derivative = SIGNS[name]
    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = torch.linspace(0.5, 2, 70, dtype=torch.float64)

    def loss(row: Tensor) -> Tensor:
        return (function(row) * weight).sum()

    s = derivative(x)
    assert_close("grad", _func.grad(loss)(x), s * weight, 1e-12)
    assert_close("per-sample grad", _func.vmap(_func.grad(loss))(x), s * weight, 1e-12)
    assert_close("vmap", _func.vmap(function)(x), function(x), 0.0)
    assert_close("jvp", _func.jvp(function, (x,), (x,))[1], s * x, 1e-12)
    assert_close("jacobian", _func.jacrev(function)(x[0]), s[0].diag(), 1e-12)
    assert_close("jacobian, forward", _func.jacfwd(function)(x[0]), s[0].diag(), 1e-12)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    expected = slope(lambda t: derivative(t) * weight, x) if name not in ("ste", "ste 0.3", "ste none") else torch.zeros_like(x)
    second = torch.autograd.grad(first.sum(), leaf, allow_unused=True, materialize_grads=True)[0] if first.requires_grad else 0 * x
    assert_close("second derivative", second, expected, 1e-9)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), function(x))
    assert_close("compiled", slope(compiled, x), s, 1e-12)


@each_sign
def test_channels_last_images_stay_so(name: str) -> None:
    function, _ = SIGNS[name]
    x = torch.randn(2, 5, 4, 3)
    last = x.to(memory_format=torch.channels_last)
    y = function(last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, function(x))
    assert torch.equal(slope(function, last), slope(function, x))
    assert torch.equal(slope(function, x[:, ::2]), slope(function, x[:, ::2].contiguous()))


def test_a_clipped_sign_keeps_one_bit_an_element() -> None:
    sizes: list[int] = []

    def keep(t: Tensor) -> Tensor:
        sizes.append(t.numel() * t.element_size())
        return t

    x = torch.randn(64, 100).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        QF.sign_ste(x)
    assert sum(sizes) == x.numel() // 8
    sizes.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        QF.sign_ste(x, clip=None)
    assert sum(sizes) == 0


@each_sign
def test_any_number_of_threads_gives_the_same(name: str) -> None:
    function, _ = SIGNS[name]
    x, before, results = torch.randn(100_003), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append((function(x), slope(function, x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_latents_against_the_formulas() -> None:
    w = torch.randn(6, 5, 3, 3, dtype=torch.float64) + 0.3
    rows = w.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    standard = centred / centred.std(1, keepdim=True)
    assert_close("IR-Net", QF.irnet_latent(w), standard.view_as(w), 1e-12)
    scaled = centred * 2 * math.sqrt(2) / torch.sqrt(centred.var(1, keepdim=True) + 1e-5)
    bound = -scaled.abs().mean() * math.log(2 - 2 * 0.9)
    latent = QF.recu_latent(w, tau=0.9)
    assert_close("ReCU", latent, scaled.clamp(-bound, bound).view_as(w), 1e-12)
    assert float(latent.abs().max()) == pytest.approx(float(bound))
    torch.autograd.gradcheck(QF.irnet_latent, w[:2, :2, 0].clone().requires_grad_())


def test_dead_weights_of_recu_get_no_gradient_of_their_own() -> None:
    w = torch.randn(3, 400, dtype=torch.float64)
    latent = QF.recu_latent(w, tau=0.7)
    dead = latent.abs() == latent.abs().max()
    jacobian = _func.jacrev(lambda row: QF.recu_latent(torch.cat([row[None], w[1:]]), tau=0.7)[0])(w[0])
    assert dead[0].any()
    assert not jacobian[dead[0]].any()
    assert jacobian[~dead[0]].diagonal().any()


def test_bad_arguments() -> None:
    x = torch.randn(3, 4)
    for call, message in (
        (lambda: QF.sign_ste(x, clip=0.0), "clip"),
        (lambda: QF.swish_sign(x, beta=-1.0), "beta"),
        (lambda: QF.ede_sign(x, t=0.0), "t: "),
        (lambda: QF.ede_sign(x, t=1.0, k=-1.0), "k: "),
        (lambda: QF.biper(x, frequency=-3.0), "frequency"),
        (lambda: QF.recu_latent(x, tau=1.0), "tau"),
        (lambda: QF.recu_latent(x[:, :1], tau=0.9), "weight"),
        (lambda: QF.irnet_latent(x[0]), "weight"),
        (lambda: SignSTE(-1.0), "clip"),
        (lambda: SwishSign(0.0), "beta"),
        (lambda: BiPer(0.0), "frequency"),
        (lambda: BiPer(stage=3), "stage"),  # type: ignore[arg-type]
        (lambda: ReCU(0.3), "tau"),
        (lambda: ReCU(tau_max=1.0), "tau_max"),
        (lambda: EDESign(-1.0), "t: "),
        (lambda: set_stage(nn.Identity(), 0), "stage"),  # type: ignore[arg-type]
        (lambda: set_progress(nn.Identity(), 1.0), "progress"),
        (lambda: ApproxSign().set_progress(-0.1), "progress"),
        (lambda: biper_penalty(nn.Identity(), weight=math.nan), "weight"),
        (lambda: setattr(BiPer(), "stage", 3), "stage"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="x: "):
        QF.approx_sign(torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("function", [QF.sign_ste, QF.approx_sign, QF.swish_sign, QF.irnet_latent])
def test_any_input_is_answered_or_refused(function: Callable[[Tensor], Tensor]) -> None:
    fuzz(function, torch.randn(3, 4, 2))


MAKERS: dict[str, Callable[[], Binarizer]] = {
    "SignSTE": lambda: SignSTE(0.7),
    "SignSTE none": lambda: SignSTE(None),
    "ApproxSign": ApproxSign,
    "SwishSign": lambda: SwishSign(3.0),
    "EDESign": lambda: EDESign(0.3),
    "EDESign k": lambda: EDESign(0.3, 1.5),
    "BiPer": lambda: BiPer(7.0),
    "BiPer 2": lambda: BiPer(7.0, stage=2),
    "ReCU": lambda: ReCU(0.91),
    "IRNet": lambda: IRNet(0.2),
}


@pytest.mark.parametrize("name", MAKERS)
def test_binarizers_keep_shape_and_travel_in_the_state_dict(name: str) -> None:
    binarizer = MAKERS[name]()
    binarizer.set_progress(0.37)
    x = torch.randn(5, 9)
    y = binarizer(x)
    assert y.shape == x.shape
    assert bool((y.abs() == 1).all()) == binarizer.is_binary
    assert not list(binarizer.parameters())
    stream = io.BytesIO()
    torch.save(binarizer.state_dict(), stream)
    stream.seek(0)
    twin = type(binarizer)()
    twin.load_state_dict(torch.load(stream, weights_only=True))
    assert repr(twin) == repr(binarizer)
    assert torch.equal(twin(x), y)
    assert torch.equal(slope(twin, x), slope(binarizer, x))
    with torch.device("meta"):
        assert torch.equal(MAKERS[name]()(x), MAKERS[name]()(x)), "the numbers are no storage of a device"


def test_a_state_of_another_binarizer_is_refused() -> None:
    with pytest.raises(ValueError, match="ReCU"):
        ReCU().load_state_dict(BiPer().state_dict())


def test_schedules() -> None:
    model = nn.Sequential(
        BinaryLinear(4, 4, weight_binarizer=ReCU(), input_binarizer=EDESign(t_min=1e-3)), BinaryLinear(4, 4, weight_binarizer=IRNet())
    )
    recu, ede, irnet = model[0].weight_binarizer, model[0].input_binarizer, model[1].weight_binarizer
    taus = []
    for progress in (0.0, 0.25, 0.5, 0.999999):
        set_progress(model, progress)
        assert ede.t == pytest.approx(1e-3 * 1e4**progress)
        assert ede.k == pytest.approx(max(1 / ede.t, 1))
        assert irnet.t == pytest.approx(0.1 * 100**progress)
        taus.append(recu.tau)
    a = 0.14 / (math.e - 1)
    assert taus[:2] == pytest.approx([0.85, a * math.exp(0.25) + 0.85 - a])
    assert taus[-1] == pytest.approx(0.99, abs=1e-6)


def test_a_schedule_compiles_once() -> None:
    """The numbers are data of the graph: a run of many epochs meets no limit of recompilation."""
    x = torch.randn(5, 16)

    def weighted(function: Callable[[Tensor], Tensor]) -> Tensor:
        return slope(lambda t: function(t) * x, x)

    for binarizer in (EDESign(), ReCU(tau_min=0.55), IRNet()):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")  # type: ignore[no-untyped-call]
        compiled = torch.compile(binarizer, fullgraph=True, backend=counter)
        counts = []
        for epoch in range(12):
            binarizer.set_progress(epoch / 12)
            assert_close("slope", weighted(compiled), weighted(binarizer), 1e-5)
            counts.append(counter.frame_count)
        assert counts[0] == counts[-1] > 0


def test_scale_of_irnet_is_a_power_of_two() -> None:
    w = torch.randn(6, 40).pow(3)
    scale = IRNet().scale(w)
    mean = QF.irnet_latent(w).abs().mean(1)
    assert torch.equal(scale, 2 ** mean.log2().round())
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((6,), 0.5))
    assert ReCU().scale(w) is None


def test_stages_and_penalty() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        BinaryLinear(8, 5, weight_binarizer=BiPer(20.0)), nn.ReLU(), BinaryLinear(5, 3, weight_binarizer=BiPer(3.0)), BinaryLinear(3, 3)
    ).double()
    expected = sum((20.0 if i == 0 else 3.0) and ((20.0 if i == 0 else 3.0) * model[i].weight).sin().square().mean() for i in (0, 2))
    penalty = biper_penalty(model, weight=-0.3)
    assert_close("penalty", penalty, -0.3 * expected, 1e-12)
    penalty.backward()
    w = model[0].weight
    assert_close("gradient", w.grad, -0.3 * 20 * (40 * w).sin() / w.numel(), 1e-12)
    assert model[3].weight.grad is None
    assert not model[0].weight_binarizer.is_binary
    set_stage(model, 2)
    assert model[0].weight_binarizer.is_binary
    assert biper_penalty(nn.Linear(2, 2), weight=1.0) == 0
