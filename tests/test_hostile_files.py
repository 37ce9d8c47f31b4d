"""Files that nobody should have written: `load` says what is wrong, and neither runs, opens nor fills anything else."""

from __future__ import annotations

import copy
import json
import pickle
import resource
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.conftest import randomised, small_cnn
from tp_mrs import InputError, create_model, load, normalize, save, tensorfile

ARGUMENTS: dict[str, Any] = {"num_classes": 3, "image_size": 32, "channels": [4, 4, 4, 4]}
IMAGES = torch.rand(1, 3, 32, 32)


def make() -> nn.Module:
    return create_model("resnet18", **ARGUMENTS)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    model = normalize(randomised(make()), [0.1] * 3, [0.2] * 3)
    names = ["a", "b", "c"]
    return save(model, tmp_path_factory.mktemp("good") / "m.safetensors", class_names=names).read_bytes()


def parts(content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a good file."""
    size = struct.unpack("<Q", content[:8])[0]
    metadata = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["tp_mrs"])
    return metadata, safetensors.torch.load(content)


def forge(path: Path, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A file whose checksum is right, whatever else is wrong."""
    return forge_text(path, json.dumps({"format": tensorfile.FORMAT, **metadata}), tensors)


def forge_text(path: Path, text: str, tensors: dict[str, Tensor]) -> Path:
    blank = b'"tp_mrs.sha256":"%s"' % (b"0" * 64)
    content = safetensors.torch.save(tensors, {"tp_mrs": text, "tp_mrs.sha256": "0" * 64})
    path.write_bytes(content.replace(blank, blank.replace(b"0" * 64, tensorfile.checksum(content).encode())))
    return path


@contextmanager
def refused(path: Path, message: str, *, seconds: float = 20) -> Iterator[None]:
    """An `InputError` that names the file, soon, for little memory, and with the folder as before."""
    before = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        yield
    assert str(path) in str(caught.value)
    assert time.monotonic() - start < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20  # kB: one GB
    assert {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()} == before


def test_truncated_anywhere(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for size in (0, 1, 7, 8, 9, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with refused(path, "path: cannot read"):
            load(path)


def test_a_flipped_bit_anywhere(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for position in range(0, len(good), len(good) // 50):
        content = bytearray(good)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        with refused(path, "path: .*(cannot read|is damaged|not valid JSON|has format)|factory: "):
            load(path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8\xff\xe0\x00\x10JFIF" + b"\0" * 99, b"tensors, honestly", b"\xff" * 64, b"\0" * 64]
)
def test_other_content(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with refused(path, "path: cannot read .* as safetensors"):
        load(path)


def test_a_tensor_larger_than_memory_is_not_read(tmp_path: Path) -> None:
    path, count = tmp_path / "m.safetensors", 10**11
    entry = {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}
    header = json.dumps({"0.weight": entry}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * count)  # 400 GB of nothing: a sparse file
    start = time.monotonic()
    with pytest.raises(InputError, match=r"path: .*(doesn't fit|cannot read)"):
        load(path, factory=small_cnn)
    assert time.monotonic() - start < 5


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"path: cannot read .*there is no such file"):
        load(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match=r"path: cannot read .*/model\.safetensors, there is no such file"):
        load(tmp_path)
    with pytest.raises(InputError, match="path: cannot read /dev/zero"):
        load("/dev/zero")
    with pytest.raises(InputError, match=r"path: expected a path, as text or pathlib\.Path, got None"):
        load(None)  # type: ignore[arg-type]


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
@pytest.mark.parametrize("kind", ["zip", "legacy", *range(2, 6)])
def test_a_pickle_is_never_opened(name: str, kind: str | int, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / name
    if isinstance(kind, int):
        path.write_bytes(pickle.dumps(Bomb(mark), protocol=kind))
    else:
        torch.save(Bomb(mark), path, _use_new_zipfile_serialization=kind == "zip")
    with refused(path, "path: .* is a pickle .* never opened here; .* convert it: safetensors.torch.save_file"):
        load(path)
    with refused(path, "is a pickle"):
        load(path, factory=small_cnn)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"format": "tp_mrs.model/2", "format": "tp_mrs.model/2"}', "a key appears twice"),
        ('{"format": "tp_mrs.model/2", "normalize": {"mean": [NaN], "std": [1]}}', "NaN is not JSON"),
        ('{"format": "tp_mrs.model/2", "normalize": {"mean": [0], "std": [Infinity]}}', "Infinity is not JSON"),
        ('{"format": "tp_mrs.model/9"}', r"has format 'tp_mrs.model/9', this version reads 'tp_mrs.model/2'.*later"),
        ('{"format": 3}', "has format '3'"),
        ("{}", "has format 'None'"),
        (f'{{"a": {"9" * 10_000}}}', "not valid JSON|has format"),
        (json.dumps({"a": "b" * 2**22}), "at most 4194304 are read"),
    ],
    ids=lambda value: value[:30],
)
def test_metadata_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    path = forge_text(tmp_path / "m.safetensors", text, {"x": torch.ones(1)})
    with refused(path, message):
        load(path)


def test_names_too_long_to_keep(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"class_names: .* at most 4194304 can be kept"):
        save(small_cnn(), tmp_path / "m.safetensors", class_names=["x" * 2**22])
    assert not list(tmp_path.iterdir())


SOURCES: list[tuple[dict[str, Any], str]] = [
    ({"architecture": name}, "is not the plain name of a timm architecture")
    for name in ("../x", "/etc/passwd", "hf-hub:timm/resnet18", "hf_hub:timm/resnet18", "local-dir:/tmp", "")
] + [
    ({"architecture": 7}, "is not the plain name"),
    ({"architecture": ["resnet18"]}, "is not the plain name"),
    ({"architecture": "resnet18.hf-hub:timm/resnet18"}, "is not the plain name"),
    ({"pretrained": True}, "pretrained says where to get weights from"),
    ({"pretrained": False}, "pretrained says where to get weights from"),
    ({"checkpoint_path": "weights.pth"}, "checkpoint_path says where"),
    ({"pretrained_cfg": {"file": "weights.pth"}}, "pretrained_cfg says where"),
    ({"pretrained_cfg_overlay": {"url": "x"}}, "pretrained_cfg_overlay says where"),
    ({"cache_dir": "x"}, "cache_dir says where"),
    ({"model_name": "resnet50"}, "model_name says where"),
    ({"weights": "https://example.org/x"}, "is not a timm option"),
    ({"act_layer": "../../x"}, "is not a timm option"),
    ({"../x": 1}, "is not the name of an argument"),
    ({"channels": [4] * 10**6}, "has 1000000 values"),
    ({"channels": [[[[[[[4]]]]]]]}, "nested deeper"),
    ({"num_classes": 10**12}, "sizes are beyond"),
    ({"num_classes": 10**400}, "sizes are beyond"),
    ({"channels": [1e300] * 4}, "sizes are beyond"),
    ({"channels": [-(10**12)] * 4}, "sizes are beyond"),
    ({"img_size": 5000}, "sizes are beyond"),
    ({"img_size": [4, [5000]]}, "sizes are beyond"),
]


@pytest.mark.parametrize(("changes", "message"), SOURCES, ids=lambda value: str(value)[:40])
def test_recipes_that_are_not_tried(
    changes: dict[str, Any], message: str, good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("timm was asked")

    monkeypatch.setattr(timm, "create_model", never)
    metadata, tensors = parts(good)
    path = forge(tmp_path / "m.safetensors", {**metadata, "recipe": {**metadata["recipe"], **changes}}, tensors)
    with refused(path, f"path: .*{message}"):
        load(path)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({**ARGUMENTS, "architecture": "resnet81"}, "timm has no architecture 'resnet81'"),
        ({**ARGUMENTS, "architecture": "resnet18", "num_classes": -1}, "num_classes: expected an integer >= 1"),
        ({**ARGUMENTS, "architecture": "resnet18", "num_classes": "3"}, "num_classes: expected an integer >= 1"),
        ({**ARGUMENTS, "architecture": "resnet18", "channels": [-4] * 4}, "timm cannot make"),
        ({**ARGUMENTS, "architecture": "resnet18", "channels": [4]}, "timm cannot make|doesn't fit"),
        ({**ARGUMENTS, "architecture": "resnet18", "channels": {"a": 1}}, "timm cannot make"),
        ({**ARGUMENTS, "architecture": "resnet18", "colour": "red"}, "timm cannot make"),
        ({**ARGUMENTS, "architecture": "resnet18", "act_layer": "no"}, "timm cannot make"),
        ({"architecture": "eva_giant_patch14_224", "num_classes": 3}, "more layers|doesn't fit"),
        ({"architecture": "test_vit", "num_classes": 3, "depth": 100_000}, "far more layers than the file has"),
        ({"architecture": "test_vit", "num_classes": 3, "embed_dim": 199_000}, "doesn't fit"),
        ({"architecture": "test_vit", "num_classes": 3, "mlp_ratio": 190_000}, "doesn't fit"),
        ({"architecture": "levit_128s", "num_classes": 3, "img_size": 1024}, "doesn't fit|cannot make"),
        ({"architecture": "resnet18"}, "expected a dictionary with architecture, num_classes"),
        ([], "expected a dictionary"),
        ("resnet18", "expected a dictionary"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_recipes_that_make_something_else(recipe: object, message: str, good: bytes, tmp_path: Path) -> None:
    metadata, tensors = parts(good)
    path = forge(tmp_path / "m.safetensors", {**metadata, "recipe": recipe}, tensors)
    with refused(path, f"path: .*({message})"):
        load(path)


def test_a_huge_architecture_takes_the_memory_of_its_file(good: bytes, tmp_path: Path) -> None:
    metadata, tensors = parts(good)
    recipe = {**metadata["recipe"], "channels": [40_000] * 4}  # 400 GB, were it not pruned to 4 channels a layer
    model = load_or_refuse(forge(tmp_path / "m.safetensors", {**metadata, "recipe": recipe}, tensors))
    assert model is not None
    assert model(IMAGES).shape == (1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": []}, "heads: expected a positive integer"),
        ({"heads": {"layer1": 0}}, "heads: expected a positive integer"),
        ({"heads": {"layer1": 2}}, "no 2 attention heads in 'layer1'"),
        ({"heads": {"no.such": 2}}, "no 2 attention heads in 'no.such'"),
        ({"groups": {"layer1": 2}}, "no convolution 'layer1'"),
        ({"groups": {"conv1": True}}, "groups: expected a positive integer"),
        ({"groups": {"conv1": 2}}, "2 groups do not divide"),
        ({"normalize": {"mean": [0.1]}}, "normalize: expected mean and std"),
        ({"normalize": {"mean": "abc", "std": [1]}}, "normalize: expected lists of numbers"),
        ({"normalize": {"mean": [0.1], "std": [10**400]}}, "normalize: expected lists of numbers"),
        ({"normalize": {"mean": [0.1], "std": [0]}}, "std > 0"),
        ({"normalize": {"mean": [0.1] * 2, "std": [1] * 2}}, "takes 3 channels"),
        ({"normalize": {"mean": [], "std": []}}, "one of each per channel"),
        ({"class_names": [1, 2, 3]}, "class_names: expected a list of strings"),
        ({"class_names": "abc"}, "class_names: expected a list of strings"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_metadata(changes: dict[str, Any], message: str, good: bytes, tmp_path: Path) -> None:
    metadata, tensors = parts(good)
    path = forge(tmp_path / "m.safetensors", {**metadata, **changes}, tensors)
    with refused(path, f"path: .*{message}"):
        load(path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("conv1.weight", torch.zeros(4, 3, 3)),
        ("conv1.weight", torch.zeros(65, 3, 3, 3)),
        ("conv1.weight", torch.zeros(0, 3, 3, 3)),
        ("conv1.weight", torch.zeros(4, 3, 3, 3, dtype=torch.bool)),
        ("conv1.weight", torch.zeros(4, 3, 3, 3, dtype=torch.int64)),
        ("conv1.weight", torch.zeros(4, 3, 3, 3, dtype=torch.complex64)),
        ("conv1.weight", torch.zeros(4, 3, 3, 3, dtype=torch.float8_e5m2)),
        ("bn1.bias", torch.zeros(3)),
        ("bn1.bias", torch.zeros(())),
        ("bn1.num_batches_tracked", torch.zeros(())),
        ("extra", torch.zeros(3)),
        ("", torch.zeros(3)),
        ("tp_mrs_mean", torch.zeros(3)),
        ("bn1.num_batches_tracked", None),
        ("fc.bias", None),
    ],
)
def test_other_tensors(name: str, tensor: Tensor | None, good: bytes, tmp_path: Path) -> None:
    metadata, tensors = parts(good)
    tensors[name] = torch.zeros(0) if tensor is None else tensor
    if tensor is None:
        del tensors[name]
    path = forge(tmp_path / "m.safetensors", metadata, tensors)
    with refused(path, f"path: .*(doesn't fit.*'{name}'|{name} .*has|tensors of bn1 have different lengths)"):
        load(path)


# --- fuzzing -----------------------------------------------------------------------------------------------------


def load_or_refuse(path: Path, factory: Callable[[], nn.Module] | None = None) -> nn.Module | None:
    """The model, or None if it was refused; the file and a GB of memory stay. Any other exception is a failure."""
    before = path.read_bytes()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        return load(path, factory=factory)
    except InputError:
        return None
    finally:
        assert path.read_bytes() == before
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One to three of: bytes changed, cut out or put in; as often in the header as in the rest."""
    edits = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["change", "cut", "insert", "end"]),
                st.booleans(),
                st.floats(0, 1),
                st.binary(min_size=1, max_size=12),
            ),
            min_size=1,
            max_size=3,
        )
    )

    def apply(content: bytes) -> bytes:
        for kind, in_header, where, new in edits:
            header = 8 + min(int.from_bytes(content[:8], "little"), len(content))
            position = int(where * (header if in_header else len(content)))
            rest = {"change": len(new), "cut": len(new), "insert": 0, "end": len(content)}[kind]
            middle = new if kind in ("change", "insert") else b""
            content = content[:position] + middle + content[position + rest :]
        return content

    return apply


def check_mutated_bytes(good: bytes, mutate: Callable[[bytes], bytes], plain: bool) -> None:
    content = safetensors.torch.save(parts(good)[1]) if plain else good
    changed = mutate(content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        path.write_bytes(changed)
        model = load_or_refuse(path, make if plain else None)
    assert model is None or plain or changed == good  # the checksum finds every change
    if model is not None:
        assert model(IMAGES).shape == (1, 3)


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([10**6, 10**12, -(10**12), 2**63, 10**400]),
    st.floats(-1e6, 1e6),
    st.sampled_from(["", "resnet18", "resnet50", "vit_giant_patch14_224", "hf-hub:a/b", "../x", "max", "silu", "\0"]),
    st.lists(st.integers(-5, 70), max_size=6),
    st.just([[[[[[[[0]]]]]]]]),
    st.just({"a": {"b": 1}}),
)
RECIPE_KEYS = ["architecture", "channels", "in_chans", "img_size", "pretrained", "checkpoint_path", "output_stride"]
RECIPE_KEYS += ["act_layer", "norm_layer", "aa_layer", "block_args", "stem_width", "base_width", "features_only"]
OTHER_KEYS = ["recipe", "heads", "groups", "class_names", "normalize", "format", "mean", "std", "conv1"]
KEYS = st.sampled_from(RECIPE_KEYS + OTHER_KEYS)


def branches(content: Any) -> list[Any]:
    """All dictionaries and lists in a JSON value."""
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    found = [content] if isinstance(content, (dict, list)) else []
    return found + [branch for value in inner for branch in branches(value)]


def check_mutated_metadata(good: bytes, data: st.DataObject) -> None:
    metadata, tensors = copy.deepcopy(parts(good))
    for _ in range(data.draw(st.integers(1, 3))):
        branch = data.draw(st.sampled_from(branches(metadata)))
        places: list[Any] = list(branch) if isinstance(branch, dict) else list(range(len(branch)))
        action = data.draw(st.sampled_from(["set", "add", "delete"]))
        if action == "add" and isinstance(branch, dict):
            branch[data.draw(KEYS)] = copy.deepcopy(data.draw(HOSTILE))
        elif action == "add":
            branch.append(copy.deepcopy(data.draw(HOSTILE)))
        elif places and action == "set":
            branch[data.draw(st.sampled_from(places))] = copy.deepcopy(data.draw(HOSTILE))
        elif places:
            del branch[data.draw(st.sampled_from(places))]
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(tensors)))
        shape = data.draw(st.lists(st.integers(0, 6), max_size=5))
        tensors[name] = torch.zeros(shape, dtype=data.draw(st.sampled_from([torch.float32, torch.int64, torch.bool])))
    with tempfile.TemporaryDirectory() as folder:
        model = load_or_refuse(forge_text(Path(folder) / "m.safetensors", json.dumps(metadata), tensors))
    assert model is None or not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


fuzz = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@settings(fuzz, max_examples=60)
@given(mutate=mutations(), plain=st.booleans())
def test_mutated_files(good: bytes, mutate: Callable[[bytes], bytes], plain: bool) -> None:
    check_mutated_bytes(good, mutate, plain)


@settings(fuzz, max_examples=60)
@given(data=st.data())
def test_mutated_metadata(good: bytes, data: st.DataObject) -> None:
    check_mutated_metadata(good, data)


@pytest.mark.slow
@settings(fuzz, max_examples=1500)
@given(mutate=mutations(), plain=st.booleans())
def test_many_mutated_files(good: bytes, mutate: Callable[[bytes], bytes], plain: bool) -> None:
    check_mutated_bytes(good, mutate, plain)


@pytest.mark.slow
@settings(fuzz, max_examples=1500)
@given(data=st.data())
def test_many_files_of_mutated_metadata(good: bytes, data: st.DataObject) -> None:
    check_mutated_metadata(good, data)
