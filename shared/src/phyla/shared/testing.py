"""The batteries that every kernel and every layer passes, and parity with golden files. Needs the extra ``phyla-shared[testing]``."""

from __future__ import annotations

import contextlib
import copy
import io
import runpy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import hypothesis
import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor, nn

from phyla.shared.kernels import Kernel

_func: Any = torch.func  # torch leaves these functions untyped

_TOLERANCE = {torch.float64: (1e-9, 1e-9), torch.float32: (5e-6, 2e-5), torch.bfloat16: (6e-2, 6e-2)}


def load_golden(path: str | Path) -> dict[str, Tensor]:
    """Read a golden ``.npz`` (inputs, parameters, options, outputs, gradients) into named tensors; strings become a tensor's bytes.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with np.load(path, allow_pickle=False) as archive:
        return {
            name: torch.from_numpy(np.frombuffer(str(a).encode(), np.uint8).copy() if a.dtype.kind in "US" else a)
            for name, a in archive.items()
        }


def golden_text(value: Tensor) -> str:
    """The string behind a golden option."""
    return bytes(value.tolist()).decode()


def run_example(path: str | Path) -> str:
    """What a script prints when it is run as ``__main__``; the number of torch threads is put back behind it."""
    threads, printed = torch.get_num_threads(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    return printed.getvalue()


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float, *, least: float = 1e-30) -> None:
    """Largest difference at most ``tolerance`` times the largest expected entry (or ``least``, if larger); NaN only where expected.

    Raises:
        AssertionError: naming ``name`` and the two differences.
    """
    assert actual.shape == expected.shape, f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN in other places than expected"
    actual, expected = actual.nan_to_num(), expected.nan_to_num()
    if expected.numel():
        worst, scale = float((actual - expected).abs().max()), max(float(expected.abs().max()), least)
        assert worst <= tolerance * scale, f"{name}: differs by {worst / scale:.3g} of the largest entry, allowed {tolerance:.3g}"


class _Case:
    """A kernel with float64 arguments, and what the checks do with them."""

    def __init__(self, kernel: Kernel, args: Sequence[Any], reference: Callable[..., Any] | None, batch: Sequence[int]) -> None:
        self.kernel, self.args, self.batch = kernel, tuple(args), tuple(batch)
        self.reference = reference or kernel.plain
        self.places = tuple(i for i in kernel._differentiable if isinstance(args[i], Tensor))

    def at(self, change: Callable[[Tensor], Tensor], only: Sequence[int] | None = None) -> tuple[Any, ...]:
        """The arguments with ``change`` applied to the floating tensors (at the places ``only``)."""
        wanted = range(len(self.args)) if only is None else only
        return tuple(change(a) if i in wanted and isinstance(a, Tensor) and a.is_floating_point() else a for i, a in enumerate(self.args))

    def of(self, function: Callable[..., Any], args: Sequence[Any]) -> Callable[..., tuple[Tensor, ...]]:
        """``function`` of the differentiable arguments alone, outputs as a tuple."""

        def restricted(*values: Tensor) -> tuple[Tensor, ...]:
            full = list(args)
            for place, value in zip(self.places, values, strict=True):
                full[place] = value
            out = function(*full)
            return tuple(out) if isinstance(out, tuple | list) else (out,)

        return restricted

    def values_and_gradients(self, function: Callable[..., Any], args: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and gradients of their product with fixed cotangents."""
        leaves = [args[i].detach().clone().requires_grad_() for i in self.places]
        outs = self.of(function, args)(*leaves)
        generator = torch.Generator().manual_seed(0)
        seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
        grads = torch.autograd.grad(outs, leaves, seeds, allow_unused=True, materialize_grads=True)
        return [o.detach() for o in outs], list(grads)

    def compare(
        self, name: str, function: Callable[..., Any], other: Callable[..., Any], args: Sequence[Any], exact: Sequence[Any]
    ) -> None:
        tolerance = _TOLERANCE[args[0].dtype]
        pairs = zip(self.values_and_gradients(function, args), self.values_and_gradients(other, exact), tolerance, strict=True)
        for kind, (mine, theirs, tol) in zip(("value", "gradient"), pairs, strict=True):
            for j, (a, b) in enumerate(zip(mine, theirs, strict=True)):
                assert_close(f"{self.kernel.name}, {name}: {kind} {j}", a, b, tol)


def kernel_parity(case: _Case) -> None:
    """Kernel, composite and reference agree in values and gradients in float64, float32 and bfloat16."""
    case.compare("composite against reference", case.kernel.plain, case.reference, case.args, case.args)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        args = case.at(partial(Tensor.to, dtype=dtype))
        exact = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        case.compare(f"kernel against reference in {dtype}", case.kernel, case.reference, args, exact)


def kernel_layouts(case: _Case) -> None:
    """Non-contiguous and expanded arguments give what contiguous ones give."""
    every_other: Callable[[Tensor], Tensor] = lambda t: torch.stack([t, t], -1)[..., 0]  # noqa: E731
    expand: Callable[[Tensor], Tensor] = lambda t: t[:1].expand(t.shape)  # noqa: E731
    for name, change, only in (("non-contiguous", every_other, None), ("expanded", expand, case.batch)):

        def changed(*args: Any, change: Callable[[Tensor], Tensor] = change, only: Sequence[int] | None = only, copy: bool = False) -> Any:
            moved = _Case(case.kernel, args, None, case.batch).at(change, only)
            return case.kernel(*(a.contiguous() if copy and isinstance(a, Tensor) else a for a in moved))

        case.compare(name, changed, partial(changed, copy=True), case.args, case.args)


def kernel_empty(case: _Case) -> None:
    """An empty batch and a batch of one."""
    for size in (0, 1):
        args = case.at(partial(torch.narrow, dim=0, start=0, length=size), case.batch)
        case.compare(f"batch of {size}", case.kernel, case.kernel.plain, args, args)


def kernel_nan(case: _Case) -> None:
    """A NaN or an infinity in the first argument yields NaN and finite values where the composite yields them."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        first = case.args[0].clone()
        first.view(-1)[first.numel() // 2] = bad
        args = (first, *case.args[1:])
        mine, theirs = (case.of(f, args)(*(args[i] for i in case.places)) for f in (case.kernel, case.kernel.plain))
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite()), f"{case.kernel.name}: {bad} ends elsewhere than in the composite"


def kernel_gradcheck(case: _Case, second: bool = True) -> None:
    """Finite differences: first derivatives, forward mode, and (where smooth) second derivatives."""
    function, leaves = case.of(case.kernel, case.args), [case.args[i].detach().clone().requires_grad_() for i in case.places]
    torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    if second:
        torch.autograd.gradgradcheck(function, leaves)


def kernel_transforms(case: _Case) -> None:
    """``grad``, ``jacrev``, ``jacfwd``, ``vmap`` and per-sample gradients of the kernel are those of the composite."""
    leaves = tuple(case.args[i].detach() for i in case.places)
    rows = tuple(i in case.batch for i in case.places)

    def loss(function: Callable[..., Any], *values: Tensor) -> Any:
        return sum(o.sin().sum() for o in case.of(function, case.args)(*values))

    def sample_loss(function: Callable[..., Any], *values: Tensor) -> Any:
        return loss(function, *(v.unsqueeze(0) if row else v for v, row in zip(values, rows, strict=True)))

    each = tuple(0 if row else None for row in rows)
    transforms: dict[str, Callable[[Callable[..., Any]], Any]] = {
        "grad": lambda f: _func.grad(partial(loss, f))(*leaves),
        "jacrev": lambda f: _func.jacrev(partial(loss, f))(*leaves),
        "jacfwd": lambda f: _func.jacfwd(partial(loss, f))(*leaves),
        "per-sample gradient": lambda f: _func.vmap(_func.grad(partial(sample_loss, f)), in_dims=each)(*leaves),
    }
    for name, transform in transforms.items():
        assert_close(f"{case.kernel.name}, {name}", transform(case.kernel), transform(case.kernel.plain), 1e-9)


def kernel_opcheck(case: _Case) -> None:
    """``torch.library.opcheck`` of forward and backward: schema, fake tensors, tracing."""
    args = case.at(Tensor.detach)
    torch.library.opcheck(case.kernel.op, args)
    outs = case.of(case.kernel.op, args)(*(args[i] for i in case.places))
    torch.library.opcheck(
        case.kernel.backward_op, (*(torch.ones_like(o) for o in outs), *args, (1 << len(case.kernel._differentiable)) - 1)
    )


def kernel_compile(case: _Case) -> None:
    """``torch.compile(fullgraph=True)`` agrees in values and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: case.kernel(*a), fullgraph=True, backend="aot_eager")
    case.compare("compiled", compiled, case.kernel, case.args, case.args)


def kernel_export(case: _Case) -> None:
    """``torch.export`` with a dynamic batch, called with another batch size."""
    batch = case.batch

    class Call(nn.Module):
        def forward(self, *moving: Tensor) -> Any:
            given = iter(moving)
            return case.kernel(*(next(given) if i in batch else a for i, a in enumerate(case.args)))

    moving = tuple(case.args[i].detach() for i in batch)
    size = torch.export.Dim("batch", min=2)
    program = torch.export.export(Call(), moving, dynamic_shapes=(tuple({0: size} for _ in moving),)).module()
    larger = tuple(torch.cat([t, t]) for t in moving)
    for a, b in zip(*(torch.utils._pytree.tree_leaves(f(*larger)) for f in (program, Call())), strict=True):
        assert_close(f"{case.kernel.name}, exported", a, b, 1e-9)


def kernel_threads(case: _Case) -> None:
    """Bitwise the same values and gradients with one and two threads, in float32 on a batch of at least 300."""
    rows = max(case.args[case.batch[0]].shape[0], 1) if case.batch else 1
    copies = -(-300 // rows)
    big = case.at(lambda t: torch.cat([t * (1 + 0.01 * j) for j in range(copies)]), case.batch)
    args = tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in big)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([t for part in case.values_and_gradients(case.kernel, args) for t in part])
    finally:
        torch.set_num_threads(before)
    for j, (one, two) in enumerate(zip(*results, strict=True)):
        same = torch.equal(one.nan_to_num(), two.nan_to_num())
        assert same, f"{case.kernel.name}: result {j} depends on the number of threads"


def check_kernel(
    kernel: Kernel, *args: Any, reference: Callable[..., Any] | None = None, batch: Sequence[int] = (0,), second: bool = True
) -> None:
    """Run the whole battery on one kernel.

    Args:
        kernel: the kernel.
        args: its arguments, floating ones in float64; a batch of at least two.
        reference: slow float64 oracle of the same arguments; the composite where None.
        batch: places of the arguments whose first dimension is the batch.
        second: whether the function is smooth at ``args``, so that second derivatives are checked by finite differences.

    Raises:
        AssertionError: naming the kernel, the check and the difference; or what torch's own checkers raise.
    """
    case = _Case(kernel, args, reference, batch)
    kernel_parity(case)
    kernel_gradcheck(case, second)
    for check in (kernel_transforms, kernel_opcheck, kernel_compile, kernel_export, kernel_nan, kernel_threads):
        check(case)
    kernel_layouts(case)
    kernel_empty(case)


def fuzz(function: Callable[..., Any], *valid: Any, examples: int = 60) -> None:
    """Hypothesis: with any shape, dtype, stride, device or NaN in one argument, ``function`` returns or raises ValueError or TypeError.

    Args:
        function: a public function of tensors.
        valid: positional arguments that it accepts; the tensors among them are changed one at a time.
        examples: number of cases.
    """
    places = [i for i, a in enumerate(valid) if isinstance(a, Tensor)]
    shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
    kinds = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64])
    changes = st.one_of(
        st.tuples(shapes, kinds).map(lambda s: lambda t: torch.zeros(s[0], dtype=s[1])),
        kinds.map(lambda kind: lambda t: t.to(kind)),
        st.sampled_from([float("nan"), float("inf"), -1e30]).map(lambda bad: lambda t: torch.full_like(t, bad)),
        st.integers(0, 3).map(lambda d: lambda t: t.transpose(0, min(d, t.dim() - 1)) if t.dim() else t),
        st.just(lambda t: t.to("meta")),
        st.just(lambda t: t[..., :0] if t.dim() else t),
        st.sampled_from([None, 3, "text", [1.0]]).map(lambda other: lambda t: other),
    )

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.sampled_from(places), changes)
    def run(place: int, change: Callable[[Any], Any]) -> None:
        args = [change(a) if i == place else a for i, a in enumerate(valid)]
        try:
            out = function(*args)
        except (ValueError, TypeError) as error:
            assert str(error), "an error without a message"
        else:
            assert isinstance(out, Tensor | tuple)

    cast(Callable[[], None], run)()


def module_state(make: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> None:
    """State dict saves, loads with ``weights_only=True`` into a fresh module and restores the function; ``deepcopy`` too; seeded start."""
    module, other = make().eval(), make().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01)
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    for name, twin in (("state dict", other), ("deepcopy", copy.deepcopy(module))):
        assert_close(f"{type(module).__name__}, {name}", twin(*inputs), module(*inputs), 0.0)
    starts = []
    for _ in range(2):
        torch.manual_seed(0)
        starts.append(make().state_dict())
    for name, value in starts[0].items():
        assert torch.equal(value, starts[1][name]), f"{type(module).__name__}: {name} does not follow the seed"


def module_transforms(make: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> None:
    """``functional_call`` with ``grad``, ``vmap``, ``jvp`` and double backward agree with ordinary autograd."""
    module = make().double().eval()
    values = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    x, rest = values[0], values[1:]
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return cast(Tensor, _func.functional_call(module, parameters, (x, *rest)).sin().sum())

    functional = _func.grad(loss)(parameters, x)
    ordinary = torch.autograd.grad(module(x, *rest).sin().sum(), list(module.parameters()), allow_unused=True, materialize_grads=True)
    rounding = 1e-4 * max(
        (float(g.abs().max()) for g in ordinary if g.numel()), default=0.0
    )  # a gradient may cancel to the others' rounding
    for (name, mine), theirs in zip(functional.items(), ordinary, strict=True):
        assert_close(f"{type(module).__name__}, functional gradient of {name}", mine, theirs, 1e-8, least=max(rounding, 1e-30))
    direction = torch.ones_like(x)
    forward = _func.jvp(partial(loss, parameters), (x,), (direction,))[1]
    leaf = x.clone().requires_grad_()
    (reverse,) = torch.autograd.grad(loss(parameters, leaf), leaf, create_graph=True)
    assert_close(f"{type(module).__name__}, jvp", forward, (reverse * direction).sum(), 1e-8)
    (second,) = torch.autograd.grad(reverse.sum(), leaf, allow_unused=True, materialize_grads=True)
    step = 1e-5
    moved = [_func.grad(partial(loss, parameters))(x + s * step) for s in (1, -1)]
    assert_close(f"{type(module).__name__}, double backward", second.sum(), ((moved[0] - moved[1]) / (2 * step)).sum(), 1e-4)
    if not rest:
        batched = _func.vmap(lambda row: _func.functional_call(module, parameters, (row.unsqueeze(0),)).squeeze(0))(x)
        assert_close(f"{type(module).__name__}, vmap", batched, module(x), 1e-8)


def module_compile(make: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> None:
    """``torch.compile(fullgraph=True)`` and ``torch.export`` (static and dynamic batch) agree with eager."""
    module = make().eval()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(f"{type(module).__name__}, compiled", compiled(*inputs), module(*inputs), 1e-5)
    compiled(*inputs).sum().backward()
    static = torch.export.export(module, inputs).module()
    assert_close(f"{type(module).__name__}, exported", static(*inputs), module(*inputs), 1e-5)
    size = torch.export.Dim("batch", min=2)
    dynamic = torch.export.export(module, inputs, dynamic_shapes=tuple({0: size} for _ in inputs)).module()
    larger = tuple(torch.cat([t, t]) for t in inputs)
    assert_close(f"{type(module).__name__}, exported with a dynamic batch", dynamic(*larger), module(*larger), 1e-5)


def module_precision(make: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> None:
    """float64, bfloat16 and autocast work, with gradients of the parameters' dtype; factory arguments were honoured."""
    exact = make().double().eval()
    for dtype in (torch.float32, torch.bfloat16):
        module = copy.deepcopy(exact).to(dtype)
        values = tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)
        out = module(*values)
        assert out.dtype == dtype, f"{type(module).__name__}: {dtype} in, {out.dtype} out"
        assert_close(
            f"{type(module).__name__} in {dtype}",
            out,
            exact(*(v.double() if v.is_floating_point() else v for v in values)),
            2e-1 if dtype == torch.bfloat16 else 1e-4,
        )
        out.sum().backward()
    module = make().eval()
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(*inputs).float().square().mean()
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, f"{type(module).__name__}: gradient dtype of {name}"


def module_distributed(make: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> None:
    """DistributedDataParallel and FSDP2 on one process of the gloo back end give the plain module's output and gradients."""
    import torch.distributed
    from torch.distributed.fsdp import fully_shard

    dist: Any = torch.distributed

    plain = make().eval()
    expected = plain(*inputs)
    expected.sum().backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = copy.deepcopy(plain)
        scalars = {p for p in sharded.parameters() if p.dim() == 0}  # FSDP2 refuses them
        fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (1,)), ignored_params=scalars)
        for name, wrapped in (("DDP", nn.parallel.DistributedDataParallel(copy.deepcopy(plain))), ("FSDP2", sharded)):
            wrapped.zero_grad()
            out = wrapped(*inputs)
            out.sum().backward()
            assert_close(f"{type(plain).__name__}, {name}", out, expected, 1e-6)
            for parameter, twin in zip(plain.parameters(), wrapped.parameters(), strict=True):
                if parameter.grad is not None:
                    assert twin.grad is not None, f"{type(plain).__name__}, {name}: a parameter without a gradient"
                    grad: Any = twin.grad
                    full = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                    assert_close(f"{type(plain).__name__}, {name}: gradient", full, parameter.grad, 1e-5)
    finally:
        dist.destroy_process_group()


def check_module(make: Callable[[], nn.Module], *inputs: Tensor, without: Mapping[str, str] | None = None) -> None:
    """Run the whole battery on one layer.

    Args:
        make: builds a fresh float32 module; called several times.
        inputs: float32 inputs whose first dimension is a batch of at least two.
        without: checks that cannot hold for this layer by its definition, each with the reason: ``{"module_transforms": "why"}``.

    Raises:
        AssertionError: naming the layer and the check; or what torch raises.
    """
    checks = (module_state, module_transforms, module_compile, module_precision, module_distributed)
    unknown = set(without or ()) - {c.__name__ for c in checks}
    if unknown:
        raise ValueError(f"without: expected names among {[c.__name__ for c in checks]}, got {sorted(unknown)}")
    for check in checks:
        if check.__name__ not in (without or {}):
            check(make, inputs)
