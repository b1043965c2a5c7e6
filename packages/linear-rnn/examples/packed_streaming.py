"""Sequences of different lengths in one packed batch, then each of them goes on, token by token, from the state that it left."""

import torch

from phyla.linear_rnn import GatedDeltaNet, LinearRNNLM

torch.manual_seed(0)
model = LinearRNNLM(100, 64, 2, mixer=lambda layer: GatedDeltaNet(64, num_heads=2), intermediate_size=128).eval()
prompts = [torch.randint(100, (length,)) for length in (5, 40, 1, 17)]

with torch.no_grad():
    # One call for all: no padding, and no sequence sees another.
    packed = torch.cat(prompts)[None]
    cu_seqlens = torch.tensor([0, *(len(prompt) for prompt in prompts)]).cumsum(0)
    logits, states = model(packed, cu_seqlens=cu_seqlens)
    ids = logits[0, cu_seqlens[1:] - 1].argmax(-1, keepdim=True)

    # Streaming: the states of the packed sequences are those of a batch of four. They never grow, and a step never changes an old one.
    continued = [ids]
    for _ in range(30):
        logits, states = model(ids, states)
        ids = logits[:, -1].argmax(-1, keepdim=True)
        continued.append(ids)
    continued = torch.cat(continued, 1)

for prompt, tokens in zip(prompts, continued, strict=True):
    alone = model.generate(prompt[None], 31)[0, -31:]
    print(f"prompt of {len(prompt):2d} tokens: the same as alone: {bool((tokens == alone).all())}")
