"""Networks whose statistics no training would give: every kind of slope, and no structure that a shortcut could lean on."""

import torch
from torch import Tensor, nn

from phyla.quantized import BinaryConv1d, BinaryConv2d, BinaryLinear


def wild(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and factors of both signs in every normalisation and binary layer, some of them zero; eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return torch.where(torch.rand(like.shape, generator=generator) < 0.05, 0.0, values).to(like.dtype)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.copy_(draw(module.running_mean, 3.0))
                module.running_var.copy_(draw(module.running_var, 10.0).abs())
                if module.affine:
                    module.weight.copy_(draw(module.weight))
                    module.bias.copy_(draw(module.bias))
            elif isinstance(module, BinaryLinear | BinaryConv1d | BinaryConv2d):
                if module.scale is not None:
                    module.scale.copy_(draw(module.scale))
                if module.bias is not None:
                    module.bias.copy_(draw(module.bias))
    return model.eval()


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    """The output without a graph."""
    out: Tensor = model(x)
    return out
