"""Packed arithmetic beside float32 torch, and beside the formulas of larq's training graph and of bitorch-engine's CPU loop.

The floor of a product is its bit arithmetic on the widest path, in units of the machine's own float32 matrix product: 256 products take
6.25 vector operations with AVX2 (164 a cycle on four ports) and 512 take 3 with VPOPCNTDQ (341 a cycle), where fused multiply-adds of
8 lanes make 16 a cycle on two ports. The floor of packing, and of a product with one row, is a copy of its bytes.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from phyla.quantized.functional import kernel_path, pack, packed_conv2d, packed_matmul
from phyla.shared.bench import Case, Step, main

WIDE = kernel_path() == "avx512"
SHARE = 16 / (341 if WIDE else 164)
CONV, GEMM = (5.0, 6.0) if WIDE else (2.0, 2.5)
ONES = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.int32)


def signs(*shape: int) -> Tensor:
    return torch.where(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) < 0, -1.0, 1.0)


def conv_operands(channels: int, size: int, batch: int) -> tuple[Tensor, Tensor]:
    return signs(batch, channels, size, size), signs(channels, channels, 3, 3)


def packed_conv(channels: int, size: int, batch: int) -> Step:
    x, weight = conv_operands(channels, size, batch)
    words, filters = pack(x.permute(0, 2, 3, 1)), pack(weight.permute(0, 2, 3, 1).flatten(1))
    step = partial(packed_conv2d, words, filters, channels=channels, kernel_size=3, padding=1)
    assert torch.equal(step(), F.conv2d(x, weight, padding=1).permute(0, 2, 3, 1).int())
    return step


def float_conv(channels: int, size: int, batch: int) -> Step:
    return partial(F.conv2d, *conv_operands(channels, size, batch), padding=1)


def larq_conv(channels: int, size: int, batch: int) -> Step:
    """larq's quantized layer at inference: the signs are taken of real numbers at each call, then multiplied as floats."""
    x, weight = conv_operands(channels, size, batch)

    def sign(v: Tensor) -> Tensor:
        return torch.sign(torch.sign(v) + 0.1)

    return lambda: F.conv2d(sign(x), sign(weight), padding=1)


def octets(x: Tensor) -> Tensor:
    """Eight signs a byte along the last dimension."""
    return ((x.unflatten(-1, (-1, 8)) < 0) * (1 << torch.arange(8))).sum(-1, dtype=torch.uint8)


def octet_product(a: Tensor, b: Tensor) -> Tensor:
    """bitorch-engine's loop without its unrolling: XOR of the bytes of all pairs of rows, ones by a table, one byte after another."""
    different = torch.zeros(len(a), len(b), dtype=torch.int32)
    for k in range(a.shape[1]):
        different += ONES[(a[:, k, None] ^ b[None, :, k]).int()]
    return 8 * a.shape[1] - 2 * different


def bitorch_conv(channels: int, size: int, batch: int) -> Step:
    x, weight = conv_operands(channels, size, batch)
    filters = octets(weight.flatten(1))

    def step() -> Tensor:
        patches = F.unfold(F.pad(x, (1, 1, 1, 1), value=1.0), 3).transpose(1, 2).flatten(0, 1)
        return octet_product(octets(patches), filters)

    return step


def packed_gemm(m: int, n: int, k: int) -> Step:
    a, b = signs(m, k), signs(n, k)
    step = partial(packed_matmul, pack(a), pack(b), k)
    assert torch.equal(step(), (a @ b.T).int())
    return step


def float_gemm(m: int, n: int, k: int) -> Step:
    a, b = signs(m, k), signs(n, k)
    return lambda: a @ b.T


def bitorch_gemm(m: int, n: int, k: int) -> Step:
    return partial(octet_product, octets(signs(m, k)), octets(signs(n, k)))


def packing(dtype: torch.dtype, *shape: int) -> Step:
    return partial(pack, torch.randn(*shape).to(dtype))


def torch_sign(dtype: torch.dtype, *shape: int) -> Step:
    return partial(torch.sign, torch.randn(*shape).to(dtype))


def channels_first(*shape: int) -> Step:
    return partial(pack, torch.randn(*shape).permute(0, 2, 3, 1))


def convolution(channels: int, size: int, batch: int) -> Case:
    builders = {"packed": packed_conv, "torch float32": float_conv, "larq's formula": larq_conv}
    if batch == 1:  # some 250 times slower
        builders["bitorch's formula"] = bitorch_conv
    return Case(
        f"convolution 3x3, {channels} channels, {batch} x {size} x {size}",
        {name: partial(builder, channels, size, batch) for name, builder in builders.items()},
        flops=2 * 9 * channels**2 * size**2 * batch * SHARE,
        bytes=channels * size**2 * batch * (1 / 8 + 4) + 9 * channels**2 / 8,
        target=CONV,
    )


def product(m: int, n: int, k: int) -> Case:
    builders = {"packed": packed_gemm, "torch float32": float_gemm, "bitorch's formula": bitorch_gemm}
    return Case(
        f"product {m} x {n} x {k}",
        {name: partial(builder, m, n, k) for name, builder in builders.items()},
        flops=2 * m * n * k * SHARE,
        bytes=(m * k + n * k) / 8 + 4 * m * n,
        target=8.0 if m == 1 else GEMM,
    )


def packing_case(dtype: torch.dtype, elements: int) -> Case:
    builders = {"packed": packing, "torch.sign": torch_sign}
    name = str(dtype).removeprefix("torch.")
    return Case(
        f"packing {elements} numbers, {name}",
        {key: partial(builder, dtype, elements) for key, builder in builders.items()},
        bytes=elements * (dtype.itemsize + 1 / 8),
        target=0.5,
    )


IMAGE = (16, 128, 32, 32)
CASES = [
    *(
        convolution(channels, size, batch)
        for channels, size, batch in ((128, 32, 1), (256, 16, 1), (512, 8, 1), (512, 4, 1), (256, 16, 16))
    ),
    *(product(*sizes) for sizes in ((512, 512, 512), (1024, 1024, 1024), (1, 4096, 4096), (16, 4096, 4096))),
    *(packing_case(dtype, 1 << 20) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
    Case(
        "packing the channels of a channels-first image 16 x 128 x 32 x 32",
        {"packed": partial(channels_first, *IMAGE), "torch.sign": partial(torch_sign, torch.float32, *IMAGE)},
        bytes=16 * 128 * 32 * 32 * (4 + 1 / 8),
        target=0.5,
    ),
]

if __name__ == "__main__":
    main(CASES)
