"""Packed files: what was saved comes back, and whatever else a file holds is told, not executed."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import run, wild
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phyla.quantized import BinaryConv2d, BinaryLinear, BiPer, EDESign, RSign, SignSTE, load_packed, pack, resnet20, save_packed, vgg_small


def small(seed: int = 0) -> nn.Module:
    """Conv, pool, threshold, flattened linear layer: all that a file can hold, in few bytes."""
    torch.manual_seed(seed)
    model = vgg_small(3, width=2, image_size=8, weight_binarizer=SignSTE)
    model.fc = nn.Sequential(BinaryLinear(8, 5, bias=True), nn.BatchNorm1d(5), nn.Linear(5, 3))
    return wild(model, seed)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save_packed(pack(small()), path)
    return path.read_bytes()


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("make", [small, lambda seed=0: wild(resnet20(width=4, weight_binarizer=lambda: BiPer(stage=2)), seed)])
def test_what_was_saved_comes_back(make: Callable[..., nn.Module], fold: bool, tmp_path: Path) -> None:
    model, path = make(), tmp_path / "model.safetensors"
    size = 8 if isinstance(model, nn.Sequential) else 32
    x = torch.randn(4, 3, size, size)
    save_packed(pack(model, fold=fold), path)
    skeleton = make(seed=5)
    before = {name: value.clone() for name, value in skeleton.state_dict().items()}
    assert not torch.equal(run(skeleton, x), run(model, x))
    for given_model in (skeleton, str(path) and pack(skeleton, fold=fold)):
        loaded = load_packed(given_model, str(path))
        assert torch.equal(run(loaded, x), run(model, x))
        assert not loaded.training
    assert all(torch.equal(value, before[name]) for name, value in skeleton.state_dict().items())


def test_the_skeleton_of_a_biper_model_may_stand_in_stage_1(tmp_path: Path) -> None:
    trained, fresh = wild(resnet20(width=4, weight_binarizer=lambda: BiPer(stage=2))), resnet20(width=4)
    save_packed(pack(trained), tmp_path / "m")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(run(load_packed(fresh, tmp_path / "m"), x), run(trained, x))
    assert all(module.stage == 1 for module in fresh.modules() if isinstance(module, BiPer))


@pytest.mark.parametrize("binarizer", [lambda: RSign(6), lambda: BiPer(2.0, stage=2), lambda: EDESign(3.0), nn.Identity])
def test_binarizers_of_inputs_come_back_with_their_state(binarizer: Callable[[], nn.Module], tmp_path: Path) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = [BinaryConv2d(i, 6, 3, input_binarizer=b) for i, b in ((3, SignSTE()), (6, binarizer()))]
        model = nn.Sequential(layers[0], nn.BatchNorm2d(6), layers[1])
        for module in model.modules():
            if isinstance(module, RSign):
                module.shift.data.normal_()
        return wild(model, seed)

    model, x = make(0), torch.randn(4, 3, 9, 9)
    for fold in (True, False):
        save_packed(pack(model, fold=fold), tmp_path / "m")
        assert torch.equal(run(load_packed(make(1), tmp_path / "m"), x), run(model, x))


def test_the_layout_of_the_file(file: bytes, tmp_path: Path) -> None:
    (length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    assert header["__metadata__"]["format"] == "phyla-quantized-1"
    layers = json.loads(header["__metadata__"]["layers"])
    assert layers["conv1"]["type"] == "PackedConv2d"
    assert layers["conv1"]["output"] == "bits"
    assert header["conv1.weight_packed"]["dtype"] == "I64"
    assert header["conv1.threshold"]["dtype"] == "I32"
    assert header["conv1.flip"]["dtype"] == "BOOL"
    assert header["conv1.scale"]["dtype"] == "F32"
    path = tmp_path / "m"
    path.write_bytes(file)
    assert load_file(path)["conv1.weight_packed"].dtype == torch.int64, "any safetensors reader reads it"


def change(file: bytes, path: Path, edit: Callable[[dict[str, Tensor], dict[str, str]], object]) -> None:
    """A sound safetensors file with other contents."""
    path.write_bytes(file)
    (length,) = struct.unpack("<Q", file[:8])
    tensors, metadata = load_file(path), json.loads(file[8 : 8 + length])["__metadata__"]
    edit(tensors, metadata)
    save_file(tensors, path, metadata)


def layers(metadata: dict[str, str], **changes: Any) -> None:
    settings_ = json.loads(metadata["layers"])
    settings_["conv2"].update(changes)
    metadata["layers"] = json.dumps(settings_)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda t, m: m.update(format="phyla-quantized-2"), "expected format 'phyla-quantized-1', got 'phyla-quantized-2'"),
        (lambda t, m: m.pop("format"), "expected format 'phyla-quantized-1', got None"),
        (lambda t, m: m.clear(), "expected format 'phyla-quantized-1', got None"),
        (lambda t, m: m.pop("layers"), "layers: expected a JSON object, got NoneType"),
        (lambda t, m: m.update(layers="{"), "layers: expected JSON"),
        (lambda t, m: m.update(layers="[" * 100_000), "layers: expected JSON"),
        (lambda t, m: m.update(layers="[]"), "layers: expected a JSON object, got list"),
        (lambda t, m: m.update(layers="{}"), "layer conv1: expected {'type': 'PackedConv2d'"),
        (lambda t, m: layers(m, stride=[2, 2]), "layer conv2: expected {'type': 'PackedConv2d'"),
        (lambda t, m: layers(m, output="float"), "layer conv2"),
        (lambda t, m: t.pop("conv1.scale"), "without ['conv1.scale'] and with unknown []"),
        (lambda t, m: t.update(more=torch.ones(1)), "without [] and with unknown ['more']"),
        (lambda t, m: t.update({"conv1.scale": torch.ones(3)}), "conv1.scale: expected float32 of shape (2,), got float32 of shape (3,)"),
        (lambda t, m: t.update({"conv1.scale": torch.ones(2).double()}), "conv1.scale: expected float32 of shape (2,), got float64"),
        (lambda t, m: t.update({"conv1.scale": torch.ones(2).to(torch.float8_e5m2)}), "conv1.scale: expected one of"),
        (lambda t, m: t["conv1.weight_packed"].fill_(-1), "conv1.weight_packed: expected zeros behind the 18 bits of a row"),
        (lambda t, m: t["conv1.threshold"].fill_(20), "conv1.threshold: expected values in [-18, 19], got 20 to 20"),
        (lambda t, m: t["conv1.threshold"].fill_(-19), "conv1.threshold: expected values in [-18, 19], got -19 to -19"),
        (lambda t, m: t["conv1.flip"].view(torch.uint8).fill_(2), "conv1.flip: expected bytes 0 and 1"),
    ],
)
def test_a_sound_file_with_foreign_contents(edit: Callable[..., object], text: str, file: bytes, tmp_path: Path) -> None:
    change(file, tmp_path / "m", edit)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_packed(small(), tmp_path / "m")
    assert text in str(caught.value)
    assert len(str(caught.value)) < 2000


def with_header(file: bytes, edit: Callable[[dict[str, Any]], object]) -> bytes:
    """The same data under another header."""
    (length,) = struct.unpack("<Q", file[:8])
    header, data = json.loads(file[8 : 8 + length]), file[8 + length :]
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def offsets(name: str, begin: int, end: int) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[name].update(data_offsets=[begin, end])


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: b"",
        lambda f: f[:7],
        lambda f: f[:8],
        lambda f: f[:100],
        lambda f: f[:-1],
        lambda f: f + b"\0",
        lambda f: b"\xff" * 8 + f[8:],
        lambda f: struct.pack("<Q", 1 << 62) + f[8:],
        lambda f: struct.pack("<Q", 2) + b"{}",
        lambda f: struct.pack("<Q", 2) + b"[]",
        lambda f: with_header(f, offsets("conv1.scale", 0, 8)),
        lambda f: with_header(f, offsets("conv1.scale", 8, 0)),
        lambda f: with_header(f, offsets("conv1.scale", 0, 1 << 63)),
        lambda f: with_header(f, offsets("conv1.scale", 1 << 40, (1 << 40) + 8)),
        lambda f: with_header(f, lambda h: h["conv1.scale"].update(data_offsets=[-8, 0])),
        lambda f: with_header(f, lambda h: h["conv1.scale"].update(shape=[1 << 62, 1 << 62])),
        lambda f: with_header(f, lambda h: h["conv1.scale"].update(shape=[-2])),
        lambda f: with_header(f, lambda h: h["conv1.scale"].update(dtype="F31")),
        lambda f: with_header(f, lambda h: h["conv1.scale"].update(dtype="F64")),
        lambda f: with_header(f, lambda h: h.pop("conv1.scale")),
        lambda f: with_header(f, lambda h: h.update(__metadata__={"format": 1})),
    ],
)
def test_a_damaged_file(damage: Callable[[bytes], bytes], file: bytes, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(damage(file))
    with pytest.raises(ValueError, match=r"^path: "):
        load_packed(small(), tmp_path / "m")


@st.composite
def edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A file cut off, with bytes changed, or with pieces doubled or moved; most of them near its header."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "swap"]))
    places = st.one_of(st.floats(0, 1), st.floats(0, 0.05))
    first, second = sorted((draw(places), draw(places)))
    new = draw(st.binary(min_size=1, max_size=9))
    bits = draw(st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=4))

    def edit(file: bytes) -> bytes:
        i, j = int(first * len(file)), int(second * len(file))
        if kind == "cut":
            return file[:j]
        if kind == "insert":
            return file[:i] + new + file[i:]
        if kind == "swap":
            return file[:i] + file[j:] + file[i:j]
        changed = bytearray(file)
        for place, bit in bits:
            changed[min(int(place * len(file)), len(file) - 1)] ^= 1 << bit
        return bytes(changed)

    return edit


@given(edit=edits())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_file_breaks_the_reader(edit: Callable[[bytes], bytes], file: bytes, tmp_path: Path) -> None:
    """Either an error that speaks of the file, or a model that runs: flipped bits of a factor are a factor."""
    (tmp_path / "m").write_bytes(edit(file))
    try:
        loaded = load_packed(small(), tmp_path / "m")
    except ValueError as error:
        assert str(error).startswith("path: ")
    else:
        assert run(loaded, torch.ones(2, 3, 8, 8)).shape == (2, 3)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=9), v, max_size=3),
    max_leaves=8,
)


@given(
    name=st.sampled_from(["conv1.scale", "conv1.weight_packed", "fc.0.bias", "__metadata__"]),
    key=st.sampled_from(["dtype", "shape", "data_offsets", "format", "layers"]),
    value=st.one_of(
        json_values, st.lists(st.integers(0, 1 << 64), max_size=3), st.sampled_from(["F32", "I64", "BOOL", "F8_E4M3", "C64", "U64", "F4"])
    ),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_header_breaks_the_reader(name: str, key: str, value: Any, file: bytes, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(with_header(file, lambda header: header[name].update({key: value})))
    try:
        loaded = load_packed(small(), tmp_path / "m")
    except ValueError as error:
        assert str(error).startswith("path: ")
    else:
        assert run(loaded, torch.ones(2, 3, 8, 8)).shape == (2, 3)


def test_another_architecture(file: bytes, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(file)
    with pytest.raises(ValueError, match=r"path: layer conv1: expected \{.*, got \{"):
        load_packed(vgg_small(3, width=4, image_size=8, weight_binarizer=SignSTE), tmp_path / "m")
    with pytest.raises(ValueError, match="path: layer conv1: expected None"):
        load_packed(nn.Linear(3, 4), tmp_path / "m")


def test_a_missing_file_a_folder_and_an_unpacked_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_packed(small(), tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        load_packed(small(), tmp_path)
    with pytest.raises(ValueError, match="model: expected a packed model"):
        save_packed(small(), tmp_path / "m")
    with pytest.raises(OSError, match="path"):
        save_packed(pack(small()), tmp_path / "no" / "such" / "folder")


def test_a_state_that_is_no_tensor(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(TypeError, match=r"model: 1\._extra_state: expected a Tensor, got dict"):
        save_packed(pack(nn.Sequential(BinaryLinear(3, 4), Odd())), tmp_path / "m")


def test_tied_parts_are_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    model = pack(nn.Sequential(BinaryLinear(6, 4), layer, layer))
    save_packed(model, tmp_path / "m")
    x = torch.randn(3, 6)
    fresh = nn.Linear(4, 4)
    assert torch.equal(run(load_packed(nn.Sequential(BinaryLinear(6, 4), fresh, fresh), tmp_path / "m"), x), run(model, x))
