"""Random inputs of the recurrences, and what the tests of all of them do with outputs and gradients."""

from dataclasses import dataclass

import oracles
import torch
import torch.nn.functional as F
from torch import Tensor

from phyla.linear_rnn import functional

MODES = ("auto", "recurrent", "chunk")
# A function with its gate: every combination that exists.
KINDS = tuple((name, gate) for name in ("delta_product", "delta_rule", "linear_attention") for gate in ("none", "scalar", "channel"))
KINDS = (*KINDS, ("dplr", "channel"))


@dataclass
class Case:
    name: str
    args: list[Tensor | None]
    state: Tensor

    def __post_init__(self):
        self.function = getattr(functional, self.name)
        self.oracle = getattr(oracles, self.name)

    def to(self, dtype):
        return Case(self.name, [None if a is None else a.to(dtype) for a in self.args], self.state.to(dtype))

    def tokens(self, begin, end):
        """Tokens begin .. end - 1 of every argument."""
        return [None if a is None else a[:, begin:end] for a in self.args]


def make(name, gate, *, batch=2, tokens=37, heads=1, group=2, width=8, value_width=12, reflections=3, sequences=None, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(batch, tokens, *sizes, dtype=torch.float64, generator=generator)

    value_heads = heads if name == "dplr" else heads * group
    q, n = normal(heads, width), () if name != "delta_product" else (reflections,)
    k, v = normal(*n, heads, width), normal(*n, value_heads, value_width)
    sizes = {"none": None, "scalar": (value_heads,), "channel": (value_heads, width)}[gate]
    g = None if sizes is None else -0.5 * normal(*sizes).abs()
    state = torch.randn(sequences or batch, value_heads, width, value_width, dtype=torch.float64, generator=generator)
    if name == "linear_attention":
        return Case(name, [q, k, v, g], state)
    if name == "dplr":
        a = F.normalize(normal(heads, width), dim=-1)
        return Case(name, [q, k, v, -a, a * normal(heads, 1).sigmoid(), g], state)
    return Case(name, [q, F.normalize(k, dim=-1), v, 2 * normal(*n, value_heads).sigmoid(), g], state)


def results(function, args, state=None, **options) -> list[Tensor]:
    """Output, final state, and the gradients of their product with fixed cotangents by all arguments."""
    leaves = [None if a is None else a.detach().clone().requires_grad_() for a in (*args, state)]
    if leaves[-1] is not None:
        options["initial_state"] = leaves[-1]
    out, final = function(*leaves[:-1], **options)
    generator = torch.Generator().manual_seed(7)
    seeds = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (out, final)]
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), final.detach(), *torch.autograd.grad((out, final), wanted, seeds)]
