"""Exported programs do what the model does, for any batch size, and are not written otherwise."""

from __future__ import annotations

import importlib.util
import io
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

import tp_mrs
from tests.conftest import randomised, small_cnn, small_resnet, unchanged
from tp_mrs.cli import commands
from tp_mrs.exporting import Format

FORMATS: tuple[Format, ...] = ("onnx", "pt2")
BATCHES = (1, 2, 5)
IMAGES = torch.rand(1, 3, 32, 32)


def pruned(architecture: str, size: int, **arguments: Any) -> nn.Module:
    model = randomised(tp_mrs.create_model(architecture, num_classes=4, image_size=size, **arguments))
    return prune(model, torch.rand(1, 3, size, size))


def prune(model: nn.Module, images: Tensor) -> nn.Module:
    pruner = tp.pruner.BasePruner(
        model,
        images,
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        **tp_mrs.pruner_kwargs(model),
    )
    pruner.step()
    return tp_mrs.refresh(model).eval()


def run_file(path: Path, images: Tensor) -> Tensor:
    """Read and run an exported file as somebody without this package would."""
    if path.suffix == ".pt2":
        outputs: Tensor = torch.export.load(str(path)).module()(images)
        return outputs.detach()
    import onnxruntime  # type: ignore[import-untyped,unused-ignore]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images.numpy()})
    return torch.from_numpy(found)


def check_file(path: Path, model: nn.Module, size: int = 32) -> None:
    """The file's outputs are the model's, and tell images apart, which all-equal outputs would not show."""
    for batch in BATCHES:
        images = torch.rand(batch, 3, size, size)
        with torch.no_grad():
            expected = model(images)
        torch.testing.assert_close(run_file(path, images), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert batch == 1 or float((expected[0] - expected[1]).abs().max()) > 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("format", FORMATS)
def test_a_pruned_resnet_with_and_without_normalisation(format: Format, tmp_path: Path) -> None:
    model = prune(small_resnet(), torch.rand(1, 3, 32, 32))
    plain = tp_mrs.export(model, tmp_path / f"plain.{format}", torch.rand(1, 3, 32, 32))
    check_file(plain, model)
    tp_mrs.normalize(model, [0.5, 0.4, 0.3], [0.2, 0.3, 0.25])
    normalised = tp_mrs.export(model, str(tmp_path / f"normalised.{format}"), torch.rand(3, 3, 32, 32))
    check_file(normalised, model)
    images = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(run_file(plain, images), run_file(normalised, images), rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("architecture", ["resnet18", "vgg11_bn", "mobilevit_xxs"])
def test_the_three_families(architecture: str, size: int, format: Format, tmp_path: Path) -> None:
    model = tp_mrs.normalize(pruned(architecture, size), [0.5, 0.4, 0.3], [0.2, 0.3, 0.25])
    check_file(tp_mrs.export(model, tmp_path / f"model.{format}", torch.rand(1, 3, size, size)), model, size)


@pytest.mark.parametrize("format", FORMATS)
def test_the_model_stays_as_it_is(format: Format, tmp_path: Path) -> None:
    model = tp_mrs.normalize(small_cnn(), [0.5], [0.2])
    with unchanged(model):
        tp_mrs.export(model, tmp_path / f"model.{format}", IMAGES)


def test_training_flags_do_not_matter_to_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(small_cnn(), nn.Dropout(0.5)).train()
    path = tp_mrs.export(model, tmp_path / "model.pt2", torch.rand(1, 3, 32, 32))
    check_file(path, model.eval())


def test_a_pt2_file_holds_no_pickle_and_no_images(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    path = tp_mrs.export(tp_mrs.normalize(small_cnn(), [0.5], [0.2]), tmp_path / "model.pt2", images)
    with zipfile.ZipFile(path) as archive:
        parts = [archive.read(name) for name in archive.namelist()]
    assert not any(zipfile.is_zipfile(io.BytesIO(part)) or part.startswith(b"\x80\x02") for part in parts)
    assert not any(images[0, 0, 0].numpy().tobytes() in part for part in parts)


def test_format_and_opset_are_as_asked_for(tmp_path: Path) -> None:
    import onnx  # type: ignore[import-untyped,unused-ignore]

    images, model = torch.rand(1, 3, 32, 32), small_cnn()
    path = tp_mrs.export(model, tmp_path / "model.bin", images, format="onnx", opset=20)
    program = onnx.load(str(path))
    assert [(entry.domain, entry.version) for entry in program.opset_import] == [("", 20)]
    (batch, *rest) = program.graph.input[0].type.tensor_type.shape.dim
    assert (batch.dim_param, [size.dim_value for size in rest]) == ("batch", [3, 32, 32])


class Fails(nn.Module):
    """A small network, and then what a test wants to go wrong."""

    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.then = small_cnn(), then

    def forward(self, images: Tensor) -> Any:
        return self.then(self.body(images))


def fixed_batch(logits: Tensor) -> Tensor:
    return logits.reshape(2, -1) if len(logits) == 2 else logits * 2


BAD: dict[str, tuple[nn.Module, str, Any, dict[str, Any], str]] = {
    "suffix": (small_cnn(), "model.bin", IMAGES, {}, "path: expected a name that ends in .onnx or .pt2"),
    "format": (small_cnn(), "m.onnx", IMAGES, {"format": "tflite"}, "format: expected one of onnx, pt2, got 'tflite'"),
    "old opset": (small_cnn(), "m.onnx", IMAGES, {"opset": 9}, r"opset: expected an integer in \[18, \d+\], got 9"),
    "opset in words": (small_cnn(), "m.onnx", IMAGES, {"opset": "20"}, "opset: expected an integer"),
    "opset of pt2": (small_cnn(), "m.pt2", IMAGES, {"opset": 20}, "opset: a pt2 file has none"),
    "another suffix": (small_cnn(), "m.pt2", IMAGES, {"format": "onnx"}, "format: 'onnx' does not go with the name"),
    "no tensor": (small_cnn(), "m.onnx", (3, 32, 32), {}, r"example_inputs: expected a tensor of shape \(N, C, H, W\)"),
    "one image": (small_cnn(), "m.onnx", IMAGES[0], {}, r"example_inputs: expected a tensor of shape \(N, C, H, W\)"),
    "channels": (small_cnn(), "m.pt2", IMAGES[:, :2], {}, "example_inputs: the model cannot run on"),
    "half precision": (small_cnn().half(), "m.onnx", IMAGES.half(), {}, "ONNX takes float32, got torch.float16"),
    "integers": (small_cnn(), "m.pt2", IMAGES.int(), {}, "example_inputs: the model cannot run on"),
    "two outputs": (Fails(lambda out: (out, out)), "m.pt2", IMAGES, {}, "expected it to return one .* got tuple"),
    "classes": (Fails(lambda out: out.argmax(1)), "m.pt2", IMAGES, {}, "got torch.int64; wrap it in a module"),
    "not finite": (Fails(lambda out: out / 0), "m.onnx", IMAGES, {}, "outputs on images in .* are not finite"),
    "fixed batch": (Fails(fixed_batch), "m.pt2", IMAGES, {}, "cannot export it for batches of any size"),
    "random": (Fails(lambda out: out + torch.randn_like(out)), "m.pt2", IMAGES, {}, "outputs off by .* or at random"),
    "no folder": (small_cnn(), "nowhere/m.pt2", IMAGES, {}, "path: cannot write .*nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    model, name, images, options, message = BAD[case]
    kept = tmp_path / name
    if case != "no folder":
        kept.write_bytes(b"before")
    with unchanged(model), pytest.raises(tp_mrs.InputError, match=message) as caught:
        tp_mrs.export(model, kept, images, **options)
    assert "\n" not in str(caught.value)
    assert [path.read_bytes() for path in tmp_path.rglob("*")] == ([] if case == "no folder" else [b"before"])


def test_missing_packages_are_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(tp_mrs.InputError, match=r'ONNX needs onnxscript; pip install "tp_mrs\[export\]"'):
        tp_mrs.export(small_cnn(), tmp_path / "model.onnx", IMAGES)
    tp_mrs.export(small_cnn(), tmp_path / "model.pt2", IMAGES)


def test_versions_that_pickle_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pickling(program: Any, file: io.BytesIO) -> None:
        with zipfile.ZipFile(file, "w") as archive, archive.open("weights.pt", "w") as part:
            torch.save(program.state_dict, part)

    monkeypatch.setattr(torch.export, "save", pickling)
    with pytest.raises(tp_mrs.InputError, match="puts pickles in pt2 files; upgrade it"):
        tp_mrs.export(small_cnn(), tmp_path / "model.pt2", IMAGES)
    assert list(tmp_path.iterdir()) == []


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet18", "vgg11_bn", "mobilevit_xxs"])
def test_compiled_models_give_the_same_outputs(architecture: str) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    check_compiled(architecture, "inductor")


def test_compiled_graphs_give_the_same_outputs() -> None:
    """What the compiler traces, run without a C++ compiler."""
    check_compiled("mobilevit_xxs", "aot_eager")


def check_compiled(architecture: str, backend: str) -> None:
    model = tp_mrs.normalize(pruned(architecture, 32), [0.5, 0.4, 0.3], [0.2, 0.3, 0.25])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for batch in BATCHES:
            images = torch.rand(batch, 3, 32, 32)
            expected = model(images)
            torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = tp_mrs.normalize(pruned("resnet18", 32, channels=(8, 12, 16, 20)), [0.5, 0.4, 0.3], [0.2, 0.3, 0.25])
    return tp_mrs.save(model, tmp_path_factory.mktemp("saved") / "model.safetensors")


def test_saved_here_exported_there(saved: Path, tmp_path: Path) -> None:
    source = tmp_path / "small.safetensors"
    shutil.copy(saved, source)
    command = [sys.executable, "-m", "tp_mrs", "export", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"Written to {tmp_path / 'small.onnx'}: takes images (N, 3, 32, 32) in [0, 1]\n"
    check_file(tmp_path / "small.onnx", tp_mrs.load(source))


def test_options_of_the_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "model.pt2"
    assert commands.main(["export", str(saved), "--out", str(out), "--image-size", "48", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    check_file(out, tp_mrs.load(saved), 48)
    assert [path.name for path in out.parent.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tflite"], "format: expected one of onnx, pt2, got 'tflite'"),
        (["--out", "a/model.bin"], "out: expected a name that ends in .onnx or .pt2"),
        (["--out", "/dev/null/model.onnx"], "out: cannot write to /dev/null"),
        (["--out", "{saved}", "--format", "onnx"], "is the model itself; choose another name"),
        (["--image-size", "0"], "image_size: expected an integer >= 1, got 0"),
        (["--image-size", "many"], "--image-size: invalid int value: 'many'"),
        (["--opset", "3"], "opset: expected an integer in [18, "),
        (["--opset", "20", "--format", "pt2"], "opset: a pt2 file has none"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str],
    message: str,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = saved.read_bytes()
    try:
        status = commands.main(["export", str(saved), *(argument.format(saved=saved) for argument in arguments)])
    except SystemExit as stop:  # argparse's own refusals
        status = int(stop.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == []
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_folder_in_the_place_of_the_file_is_seen_at_once(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "export", lambda *_, **__: pytest.fail("exported before checking"))
    (tmp_path / "model.onnx").mkdir()
    assert commands.main(["export", str(saved), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "model.onnx, it is a folder; remove it" in capsys.readouterr().err


def test_the_command_needs_a_model_that_says_its_image_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert commands.main(["export", str(tmp_path / "nowhere.safetensors")]) == 2
    assert "model: cannot read" in capsys.readouterr().err
    monkeypatch.setattr(commands, "load", lambda _: small_cnn())
    assert commands.main(["export", str(tmp_path / "model.safetensors")]) == 2
    assert "image_size: the file does not say" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
