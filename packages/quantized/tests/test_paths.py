"""Every path that this machine runs gives the exact integers; every other one is refused by name."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packed_oracles import conv_oracle, matmul_oracle, random_signs, words_oracle
from test_packed_conv import GEOMETRIES, case

from phyla.quantized.functional import (
    kernel_path,
    pack,
    packed_conv2d,
    packed_conv2d_residual,
    packed_conv2d_threshold,
    packed_matmul,
    packed_matmul_threshold,
    unpack,
)
from phyla.quantized.functional.epilogues import _conv2d_residual_op as residual_op
from phyla.quantized.functional.packed_conv import check_conv
from phyla.quantized.functional.paths import PATHS, use_path
from phyla.shared.kernels import status

NATIVE = status()["phyla.quantized"].native


NEEDS = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vpopcntdq", "bmi2"},
    "avx2": {"avx2", "fma", "popcnt", "bmi2"},
    "portable": set(),
}


def runs(name: str) -> bool:
    """Whether the processor, by its own account, has what the path needs."""
    account = Path("/proc/cpuinfo")
    flags = (
        {word for line in account.read_text().splitlines() if line.startswith("flags") for word in line.split()}
        if account.exists()
        else set()
    )
    return NATIVE and NEEDS[name] <= flags


@pytest.fixture
def before() -> Iterator[str]:
    """The path in use, taken again after the test."""
    name = kernel_path()
    yield name
    if name != "composite":
        use_path(name)


def products_are_exact() -> None:
    for length in (1, 31, 32, 33, 64, 257, 1152, 8191, 70000):
        rows = 3 if length > 9000 else 19
        a, b = random_signs(rows, length), random_signs(37, length, seed=1)
        words = words_oracle(a), words_oracle(b)
        sums = matmul_oracle(a, b)
        for m in (1, 3, rows):
            assert torch.equal(packed_matmul(words[0][:m], words[1], length), sums[:m])
        threshold, flip = torch.arange(37, dtype=torch.int32) - 18, torch.arange(37) % 3 == 0
        positive = ((sums >= threshold) != flip).float() - 0.5
        assert torch.equal(packed_matmul_threshold(*words, length, threshold, flip), pack(positive))


def convolutions_are_exact() -> None:
    for index in range(len(GEOMETRIES)):
        for padding_value in (0, 1, -1):
            x, weight, options, expected = case(index, padding_value)
            assert torch.equal(packed_conv2d(x, weight, **options), expected)
            threshold = torch.arange(len(weight), dtype=torch.int32) % 7 - 3
            flip = torch.arange(len(weight)) % 2 == 0
            positive = ((expected >= threshold) != flip).float() - 0.5
            assert torch.equal(packed_conv2d_threshold(x, weight, threshold, flip, **options), pack(positive))
            scale, shift = torch.rand(len(weight)) - 0.5, torch.rand(len(weight)) - 0.5
            y, signs = packed_conv2d_residual(x, weight, scale, shift, expected.float(), low=-3.0, high=3.0, **options)
            assert torch.equal(y, (expected.float() * scale + shift + expected.float()).clamp(-3.0, 3.0))
            assert torch.equal(signs, pack(y))
            gain, geometry = torch.rand(len(weight)) - 0.5, check_conv(x, weight, **options)[2]
            factors = scale, gain, shift, expected.float(), -1.0, 1.0
            for ours, composite in zip(*(op(x, weight, *factors, *geometry) for op in (residual_op, residual_op.composite)), strict=True):
                assert torch.equal(ours, composite)


def many_rows_are_exact() -> None:
    """More rows than are gathered at once, in several tiles, next to a border."""
    x, weight = random_signs(1, 70, 66, 64), random_signs(70, 3, 3, 64, seed=1)
    out = packed_conv2d(words_oracle(x), words_oracle(weight.flatten(1)), channels=64, kernel_size=3, padding=1)
    assert torch.equal(out, conv_oracle(x, weight, (1, 1), (1, 1), (1, 1), 1, 0))


def packing_is_exact() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for length in (1, 15, 16, 17, 63, 64, 65, 200):
            signs = random_signs(5, length)
            assert torch.equal(pack(signs.to(dtype)), words_oracle(signs))
            assert torch.equal(unpack(words_oracle(signs), length, dtype=dtype), signs.to(dtype))
        image = random_signs(2, 70, 9, 11)
        assert torch.equal(pack(image.to(dtype).permute(0, 2, 3, 1)), words_oracle(image.permute(0, 2, 3, 1).contiguous()))


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_exact_or_refused(name: str, before: str) -> None:
    if not runs(name):
        with pytest.raises(ValueError, match=f"path: expected .*{name}"):
            use_path(name)
        assert kernel_path() == before, "a refusal changes nothing"
        return
    use_path(name)
    assert kernel_path() == name
    products_are_exact()
    convolutions_are_exact()
    many_rows_are_exact()
    packing_is_exact()


def test_the_widest_path_is_chosen() -> None:
    assert kernel_path() == os.environ.get("PHYLA_QUANTIZED_PATH", next((name for name in PATHS if runs(name)), "composite"))


@pytest.mark.parametrize("name", [*PATHS, "sse2", ""])
def test_the_environment_forces_a_path(name: str) -> None:
    environment = os.environ | {"PHYLA_QUANTIZED_PATH": name}
    program = "from phyla.quantized.functional import kernel_path; print(kernel_path())"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    if name in PATHS and runs(name):
        assert done.stdout.strip() == name, done.stderr
    else:
        assert done.returncode == 1
        assert "ValueError: PHYLA_QUANTIZED_PATH: path: expected" in done.stderr


def test_without_the_library_composites_run() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PHYLA_QUANTIZED_PATH"} | {"PHYLA_NATIVE": "off"}
    program = "from phyla.quantized.functional import kernel_path; print(kernel_path())"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "composite"


def test_a_path_has_a_known_name() -> None:
    with pytest.raises(ValueError, match=r"path: expected one of 'avx512', 'avx2', 'portable', got 'avx' \(did you mean"):
        use_path("avx")
    with pytest.raises(TypeError, match="path"):
        use_path(None)  # type: ignore[arg-type]
