from pathlib import Path

import pytest
import torch
from packed_oracles import answers, matmul_oracle, random_signs, words_oracle

from phyla.quantized.functional import pack, packed_matmul, unpack
from phyla.shared.testing import fuzz, load_golden

GOLDEN = Path(__file__).parent / "golden"
LENGTHS = [1, 7, 63, 64, 65, 128, 200, 1152, 8191]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("name", [f"pack_{i}" for i in range(5)])
def test_packing_is_the_published_layout(name: str) -> None:
    golden = load_golden(GOLDEN / f"{name}.npz")
    assert torch.equal(pack(golden["input"]), golden["words"])
    signs = unpack(golden["words"], int(golden["length"]), dtype=torch.float64)
    assert torch.equal(signs, golden["signs"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_packing_is_the_sign(length: int, dtype: torch.dtype) -> None:
    signs = random_signs(3, 2, length)
    magnitudes = torch.rand(signs.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    words = pack((signs * magnitudes).to(dtype))
    assert torch.equal(words, words_oracle(signs))
    assert torch.equal(unpack(words, length, dtype=dtype), signs.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_minus_zero_and_nan_are_plus_one(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), tiny, -tiny, -tiny / 2, 65504.0, -65504.0]
    x = torch.tensor(values * 13, dtype=dtype)
    negative = {5, 7, 8, 10}
    expected = torch.tensor([-1 if i % len(values) in negative else 1 for i in range(len(x))], dtype=torch.int8)
    assert torch.equal(pack(x), words_oracle(expected))
    assert torch.equal(pack(x[:100]), words_oracle(expected[:100]))


def test_layouts_and_empty_tensors() -> None:
    signs = random_signs(6, 5, 70)
    x = signs.float()
    assert torch.equal(pack(x.transpose(0, 1)), words_oracle(signs).transpose(0, 1))
    assert torch.equal(pack(x.permute(2, 1, 0)), words_oracle(signs.permute(2, 1, 0).contiguous()))
    assert torch.equal(pack(x[:, :1].expand(6, 5, 70)), words_oracle(signs[:, :1].expand(6, 5, 70).contiguous()))
    assert torch.equal(unpack(words_oracle(signs).transpose(0, 1), 70), x.transpose(0, 1))
    assert pack(torch.empty(0, 70)).shape == (0, 2)
    assert pack(torch.empty(4, 0)).shape == (4, 0)
    assert unpack(torch.empty(4, 0, dtype=torch.int64), 0).shape == (4, 0)
    assert unpack(torch.empty(0, 2, dtype=torch.int64), 70).shape == (0, 70)
    assert pack(torch.tensor(-1.0).expand(1)).item() == 1


@pytest.mark.parametrize("shape", [(2, 64, 9, 7), (1, 70, 5, 13), (2, 3, 8, 8), (1, 200, 1, 1), (1, 129, 16, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_of_a_channels_first_image_are_packed(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    signs = random_signs(*shape)
    x = (signs * 0.5).to(dtype).permute(0, 2, 3, 1)
    assert torch.equal(pack(x), words_oracle(signs.permute(0, 2, 3, 1).contiguous()))


@pytest.mark.parametrize("name", [f"gemm_{i}" for i in range(3)])
def test_products_of_the_golden_words(name: str) -> None:
    golden = load_golden(GOLDEN / f"{name}.npz")
    assert torch.equal(packed_matmul(golden["a_words"], golden["b_words"], int(golden["length"])), golden["output"])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 37), (5, 16), (19, 67), (2, 8), (40, 3)])
def test_products_are_exact(rows: int, cols: int, length: int) -> None:
    a, b = random_signs(rows, length), random_signs(cols, length, seed=1)
    assert torch.equal(packed_matmul(words_oracle(a), words_oracle(b), length), matmul_oracle(a, b))


def test_the_extreme_products() -> None:
    for length in (65, 8191, 70000):
        ones = torch.zeros(9, -(-length // 64), dtype=torch.int64)
        minus = pack(-torch.ones(9, length))
        assert packed_matmul(ones, ones, length).eq(length).all()
        assert packed_matmul(minus, ones, length).eq(-length).all()
        assert packed_matmul(minus, minus, length).eq(length).all()
        assert packed_matmul(minus[:1], ones, length).eq(-length).all()


def test_leading_dimensions_layouts_and_empty_operands() -> None:
    a, b = random_signs(3, 4, 5, 100), random_signs(6, 100, seed=1)
    assert torch.equal(packed_matmul(words_oracle(a), words_oracle(b), 100), matmul_oracle(a, b))
    words = words_oracle(a).transpose(0, 2)
    assert torch.equal(packed_matmul(words, words_oracle(b), 100), matmul_oracle(a.transpose(0, 2).contiguous(), b))
    every_other = torch.stack([words_oracle(b)] * 2, -1)[..., 0]
    assert torch.equal(packed_matmul(words_oracle(a), every_other, 100), matmul_oracle(a, b))
    assert packed_matmul(words_oracle(a)[:0], words_oracle(b), 100).shape == (0, 4, 5, 6)
    assert packed_matmul(words_oracle(a), words_oracle(b)[:0], 100).shape == (3, 4, 5, 0)
    nothing = packed_matmul(torch.empty(2, 0, dtype=torch.int64), torch.empty(3, 0, dtype=torch.int64), 0)
    assert torch.equal(nothing, torch.zeros(2, 3, dtype=torch.int32))


def test_composites_stay_within_their_block_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from phyla.quantized.functional import bits

    monkeypatch.setattr(bits, "BLOCK", 500)
    x = random_signs(9, 130).float()
    words = words_oracle(random_signs(9, 130))
    assert torch.equal(bits._pack(x), words)
    assert torch.equal(bits._unpack(words, 130, torch.float32), x)
    assert torch.equal(bits._matmul(words, words, 130), matmul_oracle(x, x))
    assert torch.equal(bits._matmul(words[:2], words, 130), matmul_oracle(x[:2], x))


@pytest.mark.parametrize(("rows", "length"), [(6, 300000), (2, 300000)])
def test_composites_and_kernels_agree_on_long_rows(rows: int, length: int) -> None:
    from phyla.quantized.functional import bits

    words = pack(torch.randn(rows, length, generator=torch.Generator().manual_seed(0)))
    expected = bits._matmul(words, words, length)
    assert expected.diagonal().eq(length).all()
    assert torch.equal(packed_matmul(words, words, length), expected)


def test_weights_larger_than_what_is_laid_out_at_once() -> None:
    from phyla.quantized.functional import bits

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-(1 << 62), 1 << 62, (rows, 1025), generator=generator) for rows in (20, 530))
    assert torch.equal(packed_matmul(a, b, 64 * 1025), bits._matmul(a, b, 64 * 1025))


def test_errors_name_the_operand() -> None:
    words = torch.zeros(2, 2, dtype=torch.int64)
    for call, kind, message in [
        (lambda: pack(torch.ones(3, dtype=torch.int64)), TypeError, "x: expected a float16"),
        (lambda: pack(torch.ones(3, dtype=torch.complex64)), TypeError, "x: expected a float16"),
        (lambda: pack(torch.tensor(1.0)), ValueError, "x: expected at least 1 dimension"),
        (lambda: pack(None), TypeError, "x: expected a Tensor"),
        (lambda: unpack(words, 129), ValueError, r"words: expected 3 words for 129 elements, got shape \(2, 2\)"),
        (lambda: unpack(words, 64), ValueError, "words: expected 1 words"),
        (lambda: unpack(words.float(), 100), TypeError, "words: expected int64 words, got float32"),
        (lambda: unpack(words, -1), ValueError, "length"),
        (lambda: unpack(words, 1.5), TypeError, "length"),
        (lambda: unpack(words, True), TypeError, "length"),
        (lambda: unpack(words, 100, dtype=torch.int32), TypeError, "dtype"),
        (lambda: packed_matmul(words, words[:, :1], 100), ValueError, "b: expected 2 words"),
        (lambda: packed_matmul(words[:, :1], words, 100), ValueError, "a: expected 2 words"),
        (lambda: packed_matmul(words[0], words, 100), ValueError, "a: expected at least 2 dimensions"),
        (lambda: packed_matmul(words, words[None], 100), ValueError, "b: expected 2 dimensions"),
        (lambda: packed_matmul(words, words.int(), 100), TypeError, "b: expected int64 words, got int32"),
        (lambda: packed_matmul(words, words, 1 << 31), ValueError, "length"),
        (lambda: packed_matmul(words, words.to("meta"), 100), ValueError, "b: expected a tensor on cpu"),
    ]:
        with pytest.raises(kind, match=message):
            call()


def test_any_argument_is_answered() -> None:
    words = words_oracle(random_signs(3, 70))
    fuzz(pack, torch.randn(3, 70))
    answers(lambda w: unpack(w, 70), words)
    answers(lambda a, b: packed_matmul(a, b, 70), words, words)


def test_gradients_are_not_asked_for() -> None:
    assert not pack(torch.randn(3, 70, requires_grad=True)).requires_grad


def test_ops_compile_and_export() -> None:
    from phyla.quantized.functional import bits

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
            words = pack(x)
            return words, unpack(words, 70), packed_matmul(words, w, 70)

    x, w = torch.randn(4, 70), words_oracle(random_signs(5, 70))
    for op, args in (
        (bits._pack_op, (x,)),
        (bits._unpack_op, (pack(x), 70, torch.bfloat16)),
        (bits._matmul_op, (pack(x), w, 70)),
    ):
        torch.library.opcheck(op.op, args)
    expected = Net()(x, w)
    torch._dynamo.reset()
    compiled = torch.compile(Net(), fullgraph=True, backend="aot_eager")
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(Net(), (x, w), dynamic_shapes=({0: batch}, None)).module()
    for other in (compiled, exported):
        for a, b in zip(other(x, w), expected, strict=True):
            assert torch.equal(a, b)
    larger = torch.cat([x, x])
    for a, b in zip(exported(larger, w), Net()(larger, w), strict=True):
        assert torch.equal(a, b)
