"""Whole networks on bits beside their float32 eval form: ResNet-18 and VGG-small for 32 x 32 images, one image and sixteen.

Peers: the binary model itself in eval mode, which binarizes its weights at each call; and the float network of the same shape with weights
that are +-1 already, whose activations still go through a sign: nothing but torch's convolutions, normalisations and signs.

    python bench_models.py --threads 1
"""

import copy
import functools

import torch
from torch import Tensor, nn

from phyla.quantized import BinaryConv2d, SignSTE, pack, resnet18, summarize, vgg_small
from phyla.shared.bench import Case, Step, main

MODELS = {"resnet18": resnet18, "vgg_small": vgg_small}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](weight_binarizer=SignSTE).eval()


def step(model: nn.Module, batch: int) -> Step:
    x = torch.randn(batch, 3, 32, 32)

    def run() -> object:
        with torch.inference_mode():
            return model(x)

    return run


def on_bits(name: str, batch: int) -> Step:
    return step(pack(network(name)), batch)


def unfolded(name: str, batch: int) -> Step:
    return step(pack(network(name), fold=False), batch)


def float_eval(name: str, batch: int) -> Step:
    return step(network(name), batch)


class SignedConv(nn.Module):
    """The float convolution of signs, its weights signed and scaled beforehand."""

    def __init__(self, layer: BinaryConv2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, bias=False)
        assert layer.scale is not None
        self.conv.weight.data = torch.where(layer.weight < 0, -1.0, 1.0) * layer.scale.detach().view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.sign(x))


def prepared(name: str, batch: int) -> Step:
    model = copy.deepcopy(network(name))
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, BinaryConv2d):
                setattr(parent, key, SignedConv(child))
    return step(model, batch)


def case(name: str, batch: int) -> Case:
    summary = summarize(network(name), (batch, 3, 32, 32))
    peers = {"packed": on_bits, "float32 eval": float_eval, "float32, weights signed before": prepared, "packed, unfolded": unfolded}
    title = (
        f"{name}, batch {batch}; parameters {summary.bytes_float / 2**20:.1f} MiB in float32, {summary.bytes_packed / 2**20:.2f} MiB packed"
    )
    build = {key: functools.partial(peer, name, batch) for key, peer in peers.items()}
    macs = summary.binary_macs + summary.float_macs
    return Case(title, build, flops=2.0 * macs, target=4.0 if name == "resnet18" else None)


CASES = [case(name, batch) for name in MODELS for batch in (1, 16)]

if __name__ == "__main__":
    main(CASES)
