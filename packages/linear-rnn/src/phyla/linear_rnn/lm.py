"""A language model over any layer with the (y, state) contract: embedding, mixers and SwiGLU, norm, head; and its decoding."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phyla.linear_rnn import _layers as parts
from phyla.linear_rnn.rwkv7 import RWKV7
from phyla.shared import checks


class SwiGLU(nn.Module):
    """`down_proj(silu(gate_proj x) * up_proj x)`."""

    def __init__(self, size: int, width: int, *, device: parts.Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(size, width, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(width, size, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to (..., size)."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    """`x += attn(attn_norm x)`, then `x += mlp(mlp_norm x)`."""

    def __init__(
        self, attn: nn.Module, size: int, width: int, norm_eps: float, *, device: parts.Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(size, eps=norm_eps, device=device, dtype=dtype)
        self.attn = attn
        self.mlp_norm = nn.RMSNorm(size, eps=norm_eps, device=device, dtype=dtype)
        self.mlp = SwiGLU(size, width, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Any, v_first: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Any, Tensor | None]:
        """Activations (B, T, size), the mixer's state and RWKV-7's value of layer 0; the same after the block."""
        normed = self.attn_norm(x)
        if isinstance(self.attn, RWKV7):
            y, state, v_first = self.attn(normed, state, cu_seqlens=cu_seqlens, v_first=v_first, return_v_first=True)
        else:
            y, state = self.attn(normed, state, cu_seqlens=cu_seqlens)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state, v_first


class LinearRNNLM(nn.Module):
    """Causal language model of linear recurrent layers.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Width of the activations.
        num_layers: Number of blocks.
        mixer: Builds the sequence layer of block i: any module with `y, state = layer(x, state, cu_seqlens=...)`, so that attention can be
            mixed in. `RWKV7` layers get the value of the first one passed through.
        intermediate_size: Width of the SwiGLU; 256 ceil(int(8/3 hidden_size) / 256) by default.
        norm_eps: Added to the mean squares in the norms.
        tie_embeddings: The head shares the weight of the embedding.
        initializer_range: Standard deviation of all linear and embedding weights at the start, also those of the mixers; `RWKV7` and
            `MLSTM` keep their own start. The DeltaProduct language models use 0.006.

    Shape:
        `logits, states = lm(ids, states)` with ids `(B, T)` and logits `(B, T, vocab_size)`.

    Raises:
        TypeError, ValueError: If a size is no positive int or a mixer is no module.

    Source: "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", section 5, and the papers of the mixers.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        mixer: Callable[[int], nn.Module],
        intermediate_size: int | None = None,
        norm_eps: float = 1e-6,
        tie_embeddings: bool = False,
        initializer_range: float = 0.02,
        device: parts.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = checks.positive_int("vocab_size", vocab_size)
        self.hidden_size = checks.positive_int("hidden_size", hidden_size)
        default = 256 * -(-int(8 * hidden_size / 3) // 256)
        width = default if intermediate_size is None else checks.positive_int("intermediate_size", intermediate_size)
        self.initializer_range = checks.in_range("initializer_range", initializer_range, 0.0)
        self.embeddings = nn.Embedding(vocab_size, hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList()
        for i in range(checks.positive_int("num_layers", num_layers)):
            attn = mixer(i)
            if not isinstance(attn, nn.Module):
                raise TypeError(f"mixer: expected a function that returns a Module, got {type(attn).__name__} for layer {i}")
            self.layers.append(Block(attn, hidden_size, width, checks.in_range("norm_eps", norm_eps, 0.0), device=device, dtype=dtype))
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps, device=device, dtype=dtype)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False, device=device, dtype=dtype)
        if tie_embeddings:
            self.lm_head.weight = self.embeddings.weight
        self._draw_weights(self)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None and module is not self:
                reset()
        self._draw_weights(self)

    def _draw_weights(self, module: nn.Module) -> None:
        if getattr(module, "keeps_init", False):
            return
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for child in module.children():
            self._draw_weights(child)

    def forward(
        self, ids: Tensor, states: Sequence[Any] | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Logits of the next tokens.

        Args:
            ids: Tokens `(B, T)`.
            states: One state a layer, after what came before; None at the start.
            cu_seqlens: `(N + 1,)` offsets of N sequences packed in a batch of 1.

        Returns:
            Logits `(B, T, vocab_size)`, and the state of each layer after the last token.

        Raises:
            TypeError, ValueError: If ids are no integers of two dimensions, or the states or offsets have the wrong form.
        """
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids: expected an int32 or int64 Tensor, got {ids.dtype if isinstance(ids, Tensor) else type(ids).__name__}")
        if ids.dim() != 2 or ids.shape[1] < 1:
            raise ValueError(f"ids: expected shape (B, T) with T at least 1, got {tuple(ids.shape)}")
        if states is not None and len(states) != len(self.layers):
            raise ValueError(f"states: expected {len(self.layers)} of them, one a layer, got {len(states)}")
        x, v_first, after = self.embeddings(ids), None, []
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            x, last, v_first = layer(x, state, v_first, cu_seqlens)
            after.append(last)
        return self.lm_head(self.norm(x)), tuple(after)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        eos_id: int | None = None,
    ) -> Tensor:
        """Continue sequences token by token, from the states after the prompt.

        Args:
            ids: Prompts `(B, T)`.
            max_new_tokens: Tokens to add at most.
            temperature: Divides the logits before a token is drawn; 0 takes the likeliest.
            top_k: Draw from the k likeliest tokens only.
            generator: Source of randomness.
            eos_id: Token that ends a sequence: it is repeated after its first occurrence, and decoding stops once all have ended.

        Returns:
            Prompts and their continuations, `(B, T + new)`.

        Raises:
            TypeError, ValueError: If an argument is out of its range.
        """
        checks.positive_int("max_new_tokens", max_new_tokens)
        checks.in_range("temperature", temperature, 0.0)
        if top_k is not None and checks.positive_int("top_k", top_k) > self.vocab_size:
            raise ValueError(f"top_k: expected at most the {self.vocab_size} tokens there are, got {top_k}")
        if eos_id is not None:
            checks.in_range("eos_id", eos_id, 0, self.vocab_size, high_open=True)
        logits, states = self(ids)
        pieces, ended = [ids], torch.zeros_like(ids[:, -1:], dtype=torch.bool)
        for left in reversed(range(max_new_tokens)):
            token = _chosen(logits[:, -1], temperature, top_k, generator).to(ids.dtype)
            if eos_id is not None:
                token = token.masked_fill(ended, eos_id)
                ended = ended | (token == eos_id)
            pieces.append(token)
            if left == 0 or (eos_id is not None and bool(ended.all())):
                break
            logits, states = self(token, states)
        return torch.cat(pieces, 1)

    def extra_repr(self) -> str:
        """Options, for printing."""
        return f"initializer_range={self.initializer_range}"


def _chosen(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token (B, 1) for each row of logits (B, vocab)."""
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    if top_k is None:
        return torch.multinomial((parts.precise(logits) / temperature).softmax(-1), 1, generator=generator)
    values, tokens = logits.topk(top_k)
    drawn = torch.multinomial((parts.precise(values) / temperature).softmax(-1), 1, generator=generator)
    return tokens.gather(-1, drawn)
