"""Classify two interleaved spirals with AF-KAN, and see that a point's prediction does not depend on its batch."""

import torch
from torch.nn import functional as F

from phyla.kan_family import AFKAN

torch.manual_seed(0)
label = torch.randint(2, (600,))
radius = torch.rand(600).sqrt()
angle = 3 * torch.pi * radius + torch.pi * label
x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1) + 0.02 * torch.randn(600, 2)

model = AFKAN([2, 32, 32, 2], reduction="multistep", norm="batch")
optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=200)  # ends slowly: the running extremes catch up
for _ in range(200):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), label)
    loss.backward()
    optimizer.step()
    schedule.step()

model.eval()  # running extremes of the features take the place of those of the batch
with torch.no_grad():
    scores = model(x)
    print(f"accuracy {(scores.argmax(1) == label).float().mean():.3f}")
    print(f"alone and in the batch: {(model(x[:1]) - scores[:1]).abs().max():.0e} apart")
