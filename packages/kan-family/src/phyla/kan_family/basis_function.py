"""The modules that bases build: knots, ends or centres for a number of inputs, and the two things that a layer asks of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.kan_family.functional.basis import activate
from phyla.kan_family.functional.linear import basis_expand, basis_linear
from phyla.kan_family.functional.rational import rational
from phyla.shared import checks

if TYPE_CHECKING:
    from phyla.kan_family.bases import Basis, Rational

Device = torch.device | str | None


class BasisFunction(nn.Module):
    """A basis with its knots, ends or centres for a number of inputs; what a layer stores as `layer.basis`.

    The stored tensors carry the names of `spec.initial_values`: parameters where they learn, buffers elsewhere.

    Args:
        spec: the basis.
        in_features: number of inputs I.
    """

    spec: Basis

    def __init__(self, spec: Basis, in_features: int, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.in_features = checks.positive_int("in_features", in_features)
        self.num_basis = spec.num_basis
        for name, value in spec.initial_values(in_features).items():
            empty = torch.empty(value.shape, device=device, dtype=dtype)
            if spec.learned:
                self.register_parameter(name, nn.Parameter(empty))
            else:
                self.register_buffer(name, empty)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the stored tensors to the initial values of the basis."""
        for name, value in self.spec.initial_values(self.in_features).items():
            getattr(self, name).copy_(value)

    def tensors(self) -> list[Tensor]:
        """The stored tensors, in the order of the op's arguments."""
        return [*self.parameters(recurse=False), *self.buffers(recurse=False)]

    def operands(self) -> dict[str, Any]:
        """Keyword arguments of `functional.linear.basis_linear` and `basis_expand` that stand for this basis."""
        first, second = ([*self.tensors(), None, None])[:2]
        ints, floats = self.spec.constants()
        return {"kind": self.spec.family, "first": first, "second": second, "ints": ints, "floats": floats}

    def forward(self, x: Tensor) -> Tensor:
        """Values of all basis functions, `(..., I) -> (..., I, K)`; for plots, tests and small inputs."""
        checks.last_dim("x", x, self.in_features)
        return basis_expand(x, **self.operands())

    def linear(
        self, x: Tensor, coef: Tensor, *, base_weight: Tensor | None = None, base: str = "silu", bias: Tensor | None = None
    ) -> Tensor:
        """`sum_ik coef_oik B_k(x_i) + sum_i base_weight_oi b(x_i) + bias_o`, without the basis values in memory.

        Args:
            x: `(..., I)`.
            coef: `(O, I, K)`.
            base_weight: `(O, I)`, or None for no base branch.
            base: `"silu"`, `"gelu"`, `"relu"`, `"tanh"` or `"identity"`.
            bias: `(O,)`.

        Returns:
            `(..., O)`.
        """
        checks.shape("coef", coef, (None, self.in_features, self.num_basis))
        return basis_linear(x, coef, **self.operands(), base_weight=base_weight, base=base, bias=bias)

    def extra_repr(self) -> str:
        """The basis and the number of inputs."""
        return f"{self.spec}, in_features={self.in_features}"


class RationalFunction(BasisFunction):
    """The group-rational function as a basis with K = 1."""

    def __init__(self, spec: Rational, in_features: int, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        if checks.positive_int("in_features", in_features) % spec.num_groups:
            raise ValueError(f"num_groups: must divide in_features, got num_groups={spec.num_groups}, in_features={in_features}")
        super().__init__(spec, in_features, device=device, dtype=dtype)
        self.form = spec.form

    def _values(self, x: Tensor) -> Tensor:
        checks.last_dim("x", x, self.in_features)
        numerator, denominator = self.tensors()
        return rational(x, numerator, denominator, form=self.form)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., I) -> (..., I, 1)`."""
        return self._values(x).unsqueeze(-1)

    def linear(
        self, x: Tensor, coef: Tensor, *, base_weight: Tensor | None = None, base: str = "silu", bias: Tensor | None = None
    ) -> Tensor:
        """As in `BasisFunction`: here a linear map of the activated inputs."""
        checks.shape("coef", coef, (None, self.in_features, 1))
        y = F.linear(self._values(x), coef.squeeze(-1), bias)
        return y if base_weight is None else y + F.linear(activate(x, base), base_weight)
