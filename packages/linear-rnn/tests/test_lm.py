import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from phyla.linear_rnn import MLSTM, RWKV7, DeltaNet, DeltaProduct, GatedDeltaNet, GatedLinearAttention, LinearRNNLM, Mamba2
from phyla.shared.testing import assert_close, check_module

SIZE, VOCAB = 16, 11


class Attention(nn.Module):
    """Causal attention with the (y, state) contract: its state is everything before."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(SIZE, 3 * SIZE)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, *, cu_seqlens: Tensor | None = None):
        q, k, v = self.qkv(x).chunk(3, -1)
        if state is not None:
            k, v = torch.cat([state[0], k], 1), torch.cat([state[1], v], 1)
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        return nn.functional.scaled_dot_product_attention(q, k, v, seen), (k, v)


MIXERS = {
    "delta_product": lambda i: DeltaProduct(SIZE, num_heads=2),
    "gated_delta_net": lambda i: GatedDeltaNet(SIZE, num_heads=2),
    "gla": lambda i: GatedLinearAttention(SIZE, num_heads=2),
    "mamba2": lambda i: Mamba2(SIZE, head_dim=8, state_size=4),
    "rwkv7": lambda i: RWKV7(SIZE, head_dim=8, layer_idx=i, num_layers=3),
    "mlstm": lambda i: MLSTM(SIZE, num_heads=2),
    "hybrid": lambda i: Attention() if i == 1 else DeltaNet(SIZE, num_heads=2),
}
every_mixer = pytest.mark.parametrize("name", MIXERS)


def make(name: str, **options) -> LinearRNNLM:
    """A float64 model whose tokens are not all alike."""
    torch.manual_seed(0)
    model = LinearRNNLM(VOCAB, SIZE, 3, mixer=MIXERS[name], intermediate_size=24, initializer_range=0.3, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@every_mixer
def test_greedy_decoding_with_the_cache_is_recomputation(name: str) -> None:
    model, ids = make(name), draw(3, 7)
    tokens = model.generate(ids, 20)
    again = ids
    for _ in range(20):
        again = torch.cat([again, model(again)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens, again)
    assert len(set(tokens[:, 7:].flatten().tolist())) > 1


@every_mixer
def test_pieces_give_the_whole(name: str) -> None:
    model, ids = make(name), draw(2, 12)
    whole, final = model(ids)
    outs, states = [], None
    for piece in ids.split((5, 1, 6), 1):
        logits, states = model(piece, states)
        outs.append(logits)
    assert_close("logits", torch.cat(outs, 1), whole, 1e-8 if name != "mlstm" else 1e-5)
    for a, b in zip(pytree.tree_leaves(states), pytree.tree_leaves(final), strict=True):
        assert_close("state", a, b, 1e-8 if name != "mlstm" else 1e-5)


@pytest.mark.parametrize("name", [n for n in MIXERS if n != "hybrid"])
def test_packed_is_separate(name: str) -> None:
    model, ids = make(name), draw(1, 12)
    packed, _ = model(ids, cu_seqlens=torch.tensor([0, 5, 6, 12]))
    assert_close("logits", packed, torch.cat([model(p)[0] for p in ids.split((5, 1, 6), 1)], 1), 1e-8 if name != "mlstm" else 1e-5)


def test_the_blocks_add_up() -> None:
    model, ids = make("delta_product"), draw(2, 5)
    x = model.embeddings(ids)
    for layer in model.layers:
        x = x + layer.attn(layer.attn_norm(x))[0]
        h = layer.mlp_norm(x)
        x = x + layer.mlp.down_proj(nn.functional.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * model.norm.weight
    assert_close("logits", model(ids)[0], x @ model.lm_head.weight.T, 1e-12)


def test_sampling() -> None:
    model, ids = make("delta_product"), draw(2, 3)

    def run(seed: int, **options) -> Tensor:
        return model.generate(ids, 12, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(run(0, temperature=1.0), run(0, temperature=1.0))
    assert not torch.equal(run(0, temperature=2.0), run(1, temperature=2.0))
    assert torch.equal(run(0, temperature=3.0, top_k=1), model.generate(ids, 12))
    assert torch.equal(run(0, temperature=1e-3), model.generate(ids, 12))


def test_sampling_follows_the_probabilities() -> None:
    model = make("delta_product")
    ids = draw(1, 3).expand(4000, 3)
    logits = model(ids[:1])[0][0, -1]
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 3)):
        tokens = model.generate(ids, 1, temperature=temperature, top_k=top_k, generator=torch.Generator().manual_seed(0))[:, -1]
        expected = (logits / temperature).softmax(-1)
        if top_k is not None:
            best = logits.topk(top_k).indices
            expected = torch.zeros_like(expected).scatter(0, best, (logits[best] / temperature).softmax(-1))
        assert (tokens.bincount(minlength=VOCAB) / 4000 - expected).abs().max() < 0.04


def test_sequences_end_at_their_token() -> None:
    model, ids = make("gated_delta_net"), draw(4, 3)
    free = model.generate(ids, 15)
    eos = int(free[0, 6])
    tokens = model.generate(ids, 15, eos_id=eos)
    for row, other in zip(tokens[:, 3:], free[:, 3:], strict=True):
        end = next((j for j, t in enumerate(other.tolist()) if t == eos), len(other))
        assert torch.equal(row[: end + 1], other[: len(row)][: end + 1])
        assert (row[end:] == eos).all()
    alone = model.generate(ids[:1], 15, eos_id=eos)
    assert alone.shape[1] <= 7
    assert alone[0, -1] == eos


def test_starts() -> None:
    torch.manual_seed(0)
    model = LinearRNNLM(300, 64, 2, mixer=lambda i: DeltaProduct(64), initializer_range=0.006)
    assert model.layers[0].mlp.gate_proj.weight.shape == (256, 64)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and "norm" not in name and "conv" not in name:
            assert 0.005 < parameter.std() < 0.007, name
    assert LinearRNNLM(8, 128, 1, mixer=lambda i: DeltaNet(128)).layers[0].mlp.up_proj.out_features == 512
    own = LinearRNNLM(8, 64, 1, mixer=lambda i: MLSTM(64))
    assert own.layers[0].attn.fgate.bias.tolist() == [3.0, 4.0, 5.0, 6.0]
    assert not LinearRNNLM(8, 64, 1, mixer=lambda i: RWKV7(64)).layers[0].attn.o_proj.weight.any()
    gla = LinearRNNLM(8, 64, 1, mixer=lambda i: GatedLinearAttention(64))
    assert not gla.layers[0].attn.gk_proj[1].bias.any()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.fill_(9.0)
    own.reset_parameters()
    assert all((p != 9.0).any() for p in own.parameters())


def test_tied_embeddings() -> None:
    model = make("delta_product", tie_embeddings=True)
    assert model.lm_head.weight is model.embeddings.weight
    assert len(list(model.parameters())) == len(list(make("delta_product").parameters())) - 1


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = LinearRNNLM(VOCAB, SIZE, 1, mixer=MIXERS["delta_product"], intermediate_size=8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)[0]


def test_module() -> None:
    check_module(Logits, draw(2, 6), without={"module_transforms": "tokens have no derivatives"})


def test_it_learns_by_heart() -> None:
    torch.manual_seed(0)
    model, ids = LinearRNNLM(VOCAB, SIZE, 1, mixer=MIXERS["gated_delta_net"], intermediate_size=32), draw(2, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    assert torch.equal(model.generate(ids[:, :2], 10)[:, 2:], ids[:, 2:])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.zeros(1, 3)), TypeError, r"^ids: expected an int32 or int64 Tensor"),
        (lambda m: m([1, 2]), TypeError, r"^ids: expected an int32 or int64 Tensor, got list"),
        (lambda m: m(draw(3)), ValueError, r"^ids: expected shape \(B, T\)"),
        (lambda m: m(draw(1, 3)[:, :0]), ValueError, r"^ids: expected shape"),
        (lambda m: m(draw(1, 3), [None]), ValueError, r"^states: expected 3 of them"),
        (lambda m: m(draw(2, 3), cu_seqlens=torch.tensor([0, 3])), ValueError, r"^cu_seqlens: expected a batch of 1"),
        (lambda m: m.generate(draw(1, 3), 0), ValueError, r"^max_new_tokens: expected a positive int"),
        (lambda m: m.generate(draw(1, 3), 2, temperature=-1.0), ValueError, r"^temperature: expected"),
        (lambda m: m.generate(draw(1, 3), 2, top_k=0), ValueError, r"^top_k: expected"),
        (lambda m: m.generate(draw(1, 3), 2, top_k=VOCAB + 1), ValueError, r"^top_k: expected at most"),
        (lambda m: m.generate(draw(1, 3), 2, eos_id=VOCAB), ValueError, r"^eos_id: expected"),
        (lambda m: LinearRNNLM(VOCAB, SIZE, 1, mixer=lambda i: None), TypeError, r"^mixer: expected"),
        (lambda m: LinearRNNLM(VOCAB, SIZE, 0, mixer=MIXERS["gla"]), ValueError, r"^num_layers: expected a positive int"),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(make("delta_product"))
