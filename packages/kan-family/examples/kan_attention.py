"""Learnable attention: one operator shared by two layers, padded sequences, and what the weights look like."""

import torch

from phyla.kan_family import AttentionOperator, Fourier, KANAttention

torch.manual_seed(0)
operator = AttentionOperator(num_heads=4, num_tokens=50, rank=12, basis=Fourier(3))
layers = torch.nn.ModuleList(KANAttention(64, num_heads=4, operator=operator) for _ in range(2))

x = torch.randn(8, 50, 64)
padding = torch.arange(50) >= torch.randint(20, 51, (8, 1))  # True beyond the end of each sequence
for layer in layers:
    x = x + layer(x, key_padding_mask=padding)
x[~padding].square().mean().backward()
print(f"output {tuple(x.shape)}, gradient of the shared coefficients {tuple(operator.coef.grad.shape)}")

weights = layers[0].attention_weights(x)
print(
    f"weights {tuple(weights.shape)}: share of negative ones {(weights < 0).float().mean():.2f}, they sum to {weights.sum(-1).mean():.2f}"
)
