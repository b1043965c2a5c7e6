"""The recurrences beside the torch fallback of Hugging Face transformers and beside their own torch paths."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from phyla.linear_rnn.functional import delta_product, dplr, linear_attention
from phyla.linear_rnn.functional.delta import _delta_product
from phyla.shared.bench import Case, Step, main

T, H, W = 4096, 8, 64  # tokens, heads, width of keys and values


def inputs(kind: str, gate: str = "none", n: int = 1, tokens: int = T, heads: int = H, batch: int = 1) -> list[Tensor | None]:
    torch.manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(batch, tokens, *sizes)

    gates = {"none": (), "scalar": (heads,), "channel": (heads, W)}
    g = None if gate == "none" else (-0.1 * normal(*gates[gate]).abs()).requires_grad_()
    if kind == "delta_product":
        tensors = [normal(heads, W), normal(n, heads, W), normal(n, heads, W), torch.rand(batch, tokens, n, heads)]
    elif kind == "dplr":
        a = F.normalize(normal(heads, W), dim=-1)
        tensors = [normal(heads, W), normal(heads, W), normal(heads, W), -a, a / 2]
    else:
        tensors = [normal(heads, W), normal(heads, W), normal(heads, W)]
    return [*(t.requires_grad_() for t in tensors), g]


def step_of(function, args: list[Tensor | None], backward: bool) -> Step:
    def forward() -> object:
        with torch.no_grad():
            return function(*args)

    def train() -> object:
        out, state = function(*args)
        out.backward(torch.ones_like(out))
        return state

    return train if backward else forward


def phyla(kind: str, backward: bool, mode: str = "auto", **sizes) -> Step:
    function = {"delta_product": partial(delta_product, qk_l2norm=True), "dplr": dplr, "linear_attention": linear_attention}[kind]
    return step_of(partial(function, mode=mode), inputs(kind, **sizes), backward)


def transformers(backward: bool, n: int = 1) -> Step:
    """n reflections are n virtual tokens: the decay on the first of a token, its query on the last."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    def function(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
        k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
        if n > 1:
            q = F.pad(q.unsqueeze(2), (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
            g = F.pad(g.unsqueeze(2), (0, 0, 0, n - 1)).flatten(1, 2)
        out, state = torch_chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=True
        )
        return out[:, n - 1 :: n], state

    return step_of(function, inputs("delta_product", gate="scalar", n=n), backward)


def decoding(mode: str, batch: int) -> Step:
    args = inputs("delta_product", gate="scalar", tokens=1, batch=batch)
    state = torch.randn(batch, H, W, W)
    return step_of(partial(delta_product, mode=mode, initial_state=state, qk_l2norm=True), args, backward=False)


def decoding_op(batch: int) -> Step:
    args = inputs("delta_product", gate="scalar", tokens=1, batch=batch)
    state = torch.randn(batch, H, W, W)
    return step_of(lambda *args: _delta_product.op(*args, state, None, W**-0.5, True, 64), args, backward=False)


def cost(kind: str, n: int, backward: bool) -> float:
    """Multiply-adds, twice: those of the recurrence itself, and of its transpose after one more run of the state."""
    forward = {"delta_product": 2 * n + 1, "dplr": 4, "linear_attention": 2}[kind]
    pulled = {"delta_product": 4 * n + 2 + 2 * n, "dplr": 11, "linear_attention": 5}[kind]
    return 2.0 * T * H * W * W * (forward + (pulled if backward else 0))


def both(name: str, kind: str, peers: dict[str, partial[Step]], targets: tuple[float | None, float | None], **sizes) -> list[Case]:
    cases = []
    for backward, target in zip((False, True), targets, strict=True):
        build = {"phyla": partial(phyla, kind, backward, **sizes)}
        build |= {peer: partial(make, backward) for peer, make in peers.items()}
        build["torch path"] = partial(phyla, kind, backward, mode="chunk", **sizes)
        work = cost(kind, sizes.get("n", 1), backward)
        cases.append(Case(f"{name}, forward{' + backward' if backward else ''}", build, flops=work, target=target))
    return cases


CASES = [
    *both("gated delta rule", "delta_product", {"transformers": partial(transformers)}, (4.0, 5.0), gate="scalar"),
    *both("gated delta product, n = 2", "delta_product", {"transformers": partial(transformers, n=2)}, (8.0, 8.0), gate="scalar", n=2),
    *both("delta rule, a gate a channel", "delta_product", {}, (None, None), gate="channel"),
    *both("dplr", "dplr", {}, (None, None), gate="channel"),
    *both("linear attention, a gate a head", "linear_attention", {}, (None, None), gate="scalar"),
    Case(
        "plain recurrence of the gated delta rule, forward",
        {
            "phyla": partial(phyla, "delta_product", False, gate="scalar"),
            "token by token": partial(phyla, "delta_product", False, mode="recurrent", gate="scalar"),
        },
    ),
    *(
        Case(
            f"decoding, B {batch}",
            {
                "phyla": partial(decoding, "auto", batch),
                "torch path": partial(decoding, "chunk", batch),
                "the op alone": partial(decoding_op, batch),
            },
            bytes=2.0 * 4 * batch * H * W * W,
            target=3.0,
        )
        for batch in (16, 64)
    ),
    Case(
        "memory, T 8192, 4 heads, forward + backward",
        {
            "phyla": partial(phyla, "delta_product", True, gate="scalar", tokens=8192, heads=4),
            "torch path": partial(phyla, "delta_product", True, mode="chunk", gate="scalar", tokens=8192, heads=4),
        },
    ),
]

if __name__ == "__main__":
    main(CASES)
