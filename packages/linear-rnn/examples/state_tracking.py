"""A delta product with two reflections a token learns to multiply permutations, and goes on doing so beyond its training length."""

import torch
from torch import nn

from phyla.linear_rnn import DeltaProduct, LinearRNNLM
from phyla.linear_rnn.analysis import householder_factors
from phyla.linear_rnn.tasks import group_elements, group_word_problem, length_extrapolation

torch.set_num_threads(1)  # the model is too small for more

# Why two: the three rotations of a triangle are products of two reflections, its three mirror images single ones.
matrices = nn.functional.one_hot(group_elements("S3")).float()
print("reflections of each element of S3:", (householder_factors(matrices)[1] > 0).sum(-1).tolist())


def mixer(layer: int) -> nn.Module:
    return DeltaProduct(64, num_heads=4, num_householder=2, use_output_gate=False, use_short_conv=False)


steps, generator = 260, torch.Generator().manual_seed(0)
torch.manual_seed(0)
model = LinearRNNLM(6, 64, 1, mixer=mixer, intermediate_size=64)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False)
for step in range(1, steps + 1):
    words, products = group_word_problem(128, 32, group="S3", generator=generator)
    logits, _ = model(words)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), products.flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 65 == 0:
        print(f"step {step}: loss {loss:.3f}", flush=True)

result = length_extrapolation(model, group_word_problem, [32, 64, 128, 256], group="S3")
for length, accuracy in zip(result.lengths.tolist(), result.token_accuracy.tolist(), strict=True):
    print(f"length {length}: {100 * accuracy:.1f} % right")
