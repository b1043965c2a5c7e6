"""A Kolmogorov-Arnold transformer learns handwritten digits: GR-KAN layers in place of MLPs, the class token and attention as usual."""

import torch
from sklearn.datasets import load_digits

from phyla.kan_family import VisionTransformer

torch.manual_seed(0)
torch.set_num_threads(1)  # the model is too small for more
data = load_digits()
x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
order = torch.randperm(len(x))
train, test = order[:1297], order[1297:]

model = VisionTransformer(
    img_size=8, patch_size=2, in_channels=1, num_classes=10, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2.0, mlp="grkan"
)
skipped = model.no_weight_decay()  # the coefficients of the learned activations, among others
groups = [
    {"params": [p for n, p in model.named_parameters() if n not in skipped], "weight_decay": 0.05},
    {"params": [p for n, p in model.named_parameters() if n in skipped], "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=3e-3)
for epoch in range(1, 7):
    for rows in train[torch.randperm(len(train))].split(64):
        loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model.eval()(x[test]).argmax(1) == y[test]).float().mean()
    model.train()
    print(f"epoch {epoch}: training loss {loss:.3f}, test accuracy {100 * accuracy:.1f} %")
