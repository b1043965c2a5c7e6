"""One differentiable op with three faces: a plain torch composite, a native CPU kernel, and the reference that tests hold against both.

``Kernel`` gives a package's op everything that users of a torch op expect: eager forward and backward, double backward, forward mode,
``torch.func`` transforms, ``torch.compile(fullgraph=True)``, ``torch.export``, fake tensors and autocast. The environment variable
``PHYLA_NATIVE`` set to ``off`` runs composites only; set to ``require`` it makes a missing native library an error.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

_LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Status:
    """Whether a package runs on native kernels, and why.

    Attributes:
        native: the package's library is loaded.
        reason: one line for people.
        ops: the package's ops that have a native CPU kernel.
    """

    native: bool
    reason: str
    ops: tuple[str, ...] = ()


_libraries: dict[str, Status] = {}
_ops: list[Op] = []


def status() -> dict[str, Status]:
    """For each imported package that has kernels: native or composite, and why. Keys are import names such as ``phyla.kan_family``."""
    report = {}
    for namespace, loaded in _libraries.items():
        ops = tuple(sorted(op.name for op in _ops if op.namespace == namespace and op.native))
        report[namespace.replace("phyla_", "phyla.", 1)] = Status(loaded.native, loaded.reason, ops)
    return report


def _load(namespace: str) -> Status:
    """Load the native library of the package whose ops live in ``namespace``, once."""
    mode = os.environ.get("PHYLA_NATIVE", "")
    if mode not in ("", "off", "require"):
        raise ValueError(f"PHYLA_NATIVE: expected 'off', 'require' or nothing, got {mode!r}")
    package = namespace.replace("phyla_", "phyla.", 1)
    spec = sys.modules[package].__spec__ if package in sys.modules else importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [p for p in (Path(f) / "kernels" / "_native.so" for f in folders) if p.exists()]
    if mode == "off":
        return Status(False, "composite: PHYLA_NATIVE=off")
    if not found:
        if mode == "require" and any(Path(f, "kernels").is_dir() for f in folders):
            raise ImportError(f"{package}: PHYLA_NATIVE=require, but the package was built without its native library")
        return Status(False, "composite: built without a native library")
    try:
        cast(Any, torch.ops).load_library(str(found[0]))
    except OSError as error:
        if mode == "require":
            raise
        return Status(False, f"composite: the native library does not load: {error}")
    return Status(True, "native")


def transformed() -> bool:
    """Whether a ``torch.func`` transform or forward mode is on, which have to see each op's own rules."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


class Op:
    """One op that nothing differentiates, such as arithmetic on packed bits: a composite, and a native kernel where the library has one.

    The op ``ns::name`` is registered with torch; it runs under ``torch.compile(fullgraph=True)``, ``torch.export`` and fake tensors.

    Args:
        schema: torch schema, such as ``"phyla_quantized::pack(Tensor x) -> Tensor"``. The namespace names the package.
        composite: plain torch function of the same positional arguments.
        fake: function of the same arguments that returns empty contiguous outputs; it must not branch on sizes.

    Source: torch's custom-operator manual.
    """

    def __init__(self, schema: str, composite: Callable[..., Any], *, fake: Callable[..., Any]) -> None:
        parsed = torch._C.parse_schema(schema)
        self.namespace, self.name = parsed.name.split("::")
        self.composite = composite
        self._names = [a.name for a in parsed.arguments]
        if self.namespace not in _libraries:
            _libraries[self.namespace] = _load(self.namespace)
        self._library = cast(Any, torch.library.Library)(self.namespace, "FRAGMENT")
        self.op: Any = self._register(schema[schema.index("::") + 2 :], composite, fake)
        _ops.append(self)

    def _register(self, schema: str, composite: Callable[..., Any], fake: Callable[..., Any]) -> Any:
        name = schema[: schema.index("(")]
        self._library.define(schema)
        self._library.impl(name, composite, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{self.namespace}::{name}", fake, lib=self._library)
        return getattr(getattr(torch.ops, self.namespace), name).default

    @property
    def native(self) -> bool:
        """Whether CPU tensors run on a native kernel."""
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{self.namespace}::{self.name}", "CPU"))

    def _expect_one_device(self, args: Sequence[Any]) -> None:
        device = args[0].device
        for place, a in enumerate(args):
            if isinstance(a, Tensor) and a.device != device:
                raise ValueError(f"{self._names[place]}: expected a tensor on {device}, got one on {a.device}")

    def __call__(self, *args: Any) -> Any:
        """Run the op; positional arguments in the order of the schema.

        Raises:
            ValueError: a tensor is not on the device of the first.
        """
        self._expect_one_device(args)
        return self.op(*args)


class Kernel(Op):
    """One differentiable op: a composite that is right everywhere, and native forward and backward where the package's library has them.

    The op ``ns::name`` and its backward ``ns::name_backward(Tensor grad.., <arguments>, int needs) -> (Tensor, ...)`` are registered with
    torch; the backward returns one tensor per differentiable argument, an empty one where bit ``j`` of ``needs`` is not set. Native kernels
    see contiguous-or-strided float32 or float64 tensors of one dtype: lower precisions are computed in float32 and rounded once.
    Only the arguments are saved for backward, which recomputes.

    Args:
        schema: torch schema with ``Tensor``, ``Tensor?``, ``int``, ``float``, ``bool``, ``str`` and list-of-number arguments, such as
            ``"phyla_kan_family::rational(Tensor x, Tensor numerator, str form) -> Tensor"``. The namespace names the package.
        composite: plain differentiable torch function of the same positional arguments; returns a Tensor, or a tuple of them.
        differentiable: names of the arguments that receive gradients.
        fake: function of the same arguments that returns empty contiguous outputs; it must not branch on sizes.
        autocast: names of the arguments that are cast to the autocast dtype under ``torch.autocast``.

    Source: torch's custom-operator manual; the autograd.Function route is needed since ``register_autograd`` has no double backward.
    """

    def __init__(
        self,
        schema: str,
        composite: Callable[..., Any],
        *,
        differentiable: Sequence[str],
        fake: Callable[..., Any],
        autocast: Sequence[str] = (),
    ) -> None:
        super().__init__(schema, composite, fake=fake)
        names = self._names
        unknown = [n for n in (*differentiable, *autocast) if n not in names]
        if unknown:
            raise ValueError(f"differentiable, autocast: expected names among {names}, got {unknown}")
        self._differentiable = tuple(names.index(n) for n in differentiable)
        self._autocast = tuple(names.index(n) for n in autocast)
        self._outputs = len(torch._C.parse_schema(schema).returns)
        grads = ", ".join(f"Tensor grad{i}" for i in range(self._outputs))
        arguments = schema[schema.index("(") + 1 : schema.rindex("->")].rstrip().removesuffix(")")
        results = ", ".join(["Tensor"] * len(self._differentiable))
        backward = f"{self.name}_backward({grads}, {arguments}, int needs) -> ({results})"
        self.backward_op: Any = self._register(backward, self._backward_composite, self._backward_fake)
        self._traced, self._eager = _functions(self)

    def __call__(self, *args: Any) -> Any:
        """Run the op; positional arguments in the order of the schema.

        Raises:
            TypeError, ValueError: a differentiable argument is not floating-point, or not on the device of the first.
        """
        first: Tensor = args[0]
        kind = first.device.type
        self._expect_one_device(args)
        for place in self._differentiable:
            a = args[place]
            if a is not None and not a.is_floating_point():
                raise TypeError(f"{self._names[place]}: expected a floating-point tensor, got {a.dtype}")
        if self._autocast and torch.is_autocast_enabled(kind):
            to = torch.get_autocast_dtype(kind)
            args = tuple(a.to(to) if i in self._autocast and a is not None and a.is_floating_point() else a for i, a in enumerate(args))
        if torch.compiler.is_compiling():
            # Off the CPU the compiler fuses the composite better than an opaque op; Dynamo refuses a custom jvp and one tensor given twice.
            args = tuple(a.view_as(a) if isinstance(a, Tensor) and any(a is b for b in args[:i]) else a for i, a in enumerate(args))
            return self._traced.apply(*args) if kind == "cpu" else self.plain(*args)
        if self._watched(args):
            return self._eager.apply(*args)
        return _cast(self.op(*_compute(args)), args[0].dtype)

    def _watched(self, args: Sequence[Any]) -> bool:
        """Whether autograd, forward mode or a ``torch.func`` transform has to see the call; the bare op is some 80 microseconds faster."""
        if transformed():
            return True
        return torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in self._differentiable)

    def plain(self, *args: Any) -> Any:
        """The composite under the op's rules on dtypes: differentiable to any order, on any device."""
        return _cast(self.composite(*_compute(args)), args[0].dtype)

    def vjp(self, args: Sequence[Any], wanted: Sequence[int], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Vector-Jacobian product of the composite by the arguments at ``wanted``; itself differentiable."""
        pullback = torch.func.vjp(_of(self.plain, args, wanted), *(args[i] for i in wanted))[1]
        result: tuple[Tensor, ...] = pullback(tuple(grads) if self._outputs > 1 else grads[0])
        return result

    def _backward_composite(self, *arguments: Any) -> Any:
        grads, args, needs = arguments[: self._outputs], arguments[self._outputs : -1], arguments[-1]
        wanted = [i for j, i in enumerate(self._differentiable) if needs >> j & 1 and args[i] is not None]
        with _autograd_inside_an_op():
            leaves = [args[i].detach().requires_grad_() for i in wanted]
            out = _of(self.plain, args, wanted)(*leaves)
            outs = out if self._outputs > 1 else (out,)
            given = dict(zip(wanted, torch.autograd.grad(outs, leaves, grads, materialize_grads=True), strict=True)) if wanted else {}
        results = tuple(given[i].contiguous() if i in given else args[0].new_empty(0) for i in self._differentiable)
        return results if len(results) > 1 else results[0]

    def _backward_fake(self, *arguments: Any) -> Any:
        args, needs = arguments[self._outputs : -1], arguments[-1]
        results = tuple(
            torch.empty_like(args[i], memory_format=torch.contiguous_format)
            if needs >> j & 1 and args[i] is not None
            else args[0].new_empty(0)
            for j, i in enumerate(self._differentiable)
        )
        return results if len(results) > 1 else results[0]


@contextmanager
def _autograd_inside_an_op() -> Iterator[None]:
    """Where the body of an op runs, torch has switched autograd off; switch it on."""
    key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
    autograd = keys(key.AutogradCPU) | keys(key.AutogradOther) | keys(key.ADInplaceOrView)
    exclude = torch._C._dispatch_tls_local_exclude_set() - autograd
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude), torch.enable_grad():
        yield


def _of(function: Callable[..., Any], args: Sequence[Any], places: Sequence[int]) -> Callable[..., Any]:
    """``function`` of the arguments at ``places`` alone, the others fixed."""

    def restricted(*values: Any) -> Any:
        full = list(args)
        for place, value in zip(places, values, strict=True):
            full[place] = value
        return function(*full)

    return restricted


def _compute(args: Sequence[Any]) -> tuple[Any, ...]:
    """All floating tensors in one compute dtype: float64 if the first argument is, else float32."""
    dtype = torch.float64 if args[0].dtype == torch.float64 else torch.float32
    return tuple([a.to(dtype) if isinstance(a, Tensor) and a.dtype != dtype and a.is_floating_point() else a for a in args])


def _cast(out: Any, dtype: torch.dtype) -> Any:
    if isinstance(out, tuple | list):
        return tuple([o if o.dtype == dtype else o.to(dtype) for o in out])
    return out if out.dtype == dtype else out.to(dtype)


def _first_order(
    backward_op: Any, differentiable: tuple[int, ...], args: tuple[Any, ...], wanted: Sequence[bool], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """First-order backward by the op: one gradient per argument, None where none is wanted."""
    needs = 0
    for j, i in enumerate(differentiable):
        needs |= int(wanted[i]) << j
    ready = _compute((*args, *grads))
    out = backward_op(*ready[len(args) :], *ready[: len(args)], needs)
    out = out if isinstance(out, tuple | list) else (out,)
    result: list[Tensor | None] = [None] * len(args)
    for j, i in enumerate(differentiable):
        if wanted[i]:
            result[i] = out[j].to(args[i].dtype)
    return tuple(result)


def _functions(kernel: Kernel) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """The autograd function that Dynamo traces (it reads nothing but ops and constants), and the full one for eager mode."""
    op, backward_op, differentiable, outputs = kernel.op, kernel.backward_op, kernel._differentiable, kernel._outputs

    class Traced(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return _cast(op(*_compute(args)), args[0].dtype)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
            ctx.arguments = tuple(None if isinstance(a, Tensor) else a for a in inputs)
            ctx.places = tuple(i for i, a in enumerate(inputs) if isinstance(a, Tensor))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return _first_order(backward_op, differentiable, _arguments(ctx), ctx.needs_input_grad, grads)

    class Eager(Traced):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            Traced.setup_context(ctx, inputs, output)
            ctx.save_for_forward(*(a for a in inputs if isinstance(a, Tensor)))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            args = _arguments(ctx)
            if not torch.is_grad_enabled():
                return _first_order(backward_op, differentiable, args, ctx.needs_input_grad, grads)
            # A further derivative may be asked for: the composite has derivatives of every order.
            wanted = [i for i in differentiable if ctx.needs_input_grad[i]]
            given = dict(zip(wanted, kernel.vjp(args, wanted, grads), strict=True))
            return tuple(given.get(i) for i in range(len(args)))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            out = torch.vmap(kernel.plain, in_dims=in_dims, randomness=info.randomness)(*args)
            return out, (0,) * outputs if outputs > 1 else 0

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            args = _arguments(ctx)
            moved = [i for i in differentiable if tangents[i] is not None]
            # The pullback is linear in its argument; its own transpose is the push-forward (torch cannot nest dual levels).
            out, pullback = cast(Any, torch.func.vjp(_of(kernel.plain, args, moved), *(args[i] for i in moved)))
            seed = tuple(torch.zeros_like(o) for o in out) if outputs > 1 else torch.zeros_like(out)
            return torch.func.vjp(pullback, seed)[1](tuple(tangents[i] for i in moved))[0]

    # torch asks for the signature at every call; this spares the parsing (some 40 microseconds).
    cast(Any, Traced.forward).__signature__ = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])
    return Traced, Eager


def _arguments(ctx: Any) -> tuple[Any, ...]:
    """All arguments of the forward call, in order."""
    args = list(ctx.arguments)
    for place, value in zip(ctx.places, ctx.saved_tensors, strict=True):
        args[place] = value
    return tuple(args)
