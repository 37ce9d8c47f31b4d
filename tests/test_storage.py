"""save and load: the same outputs from a pruned model, also in another process, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch_pruning as tp
from torch import nn

from tests.conftest import randomised, small_cnn, unchanged
from tp_mrs import InputError, create_model, load, normalize, pruner_kwargs, refresh, save

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, {"channels": (8, 8, 16, 16)}),
    "resnet50": (64, {}),
    "vgg11_bn": (32, {}),
    "mobilevit_xxs": (64, {}),
    "mobilenetv2_050": (64, {}),
    "convnext_atto": (64, {}),
}


def pruned(name: str) -> tuple[nn.Module, torch.Tensor]:
    side, arguments = CASES[name]
    model = randomised(create_model(name, num_classes=5, image_size=side, **arguments))
    normalize(model, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    example = torch.rand(2, 3, side, side)
    tp.pruner.BasePruner(
        model, example, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.4, **pruner_kwargs(model)
    ).step()
    return refresh(model).eval(), example


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_bit_identical(name: str, tmp_path: Path) -> None:
    model, example = pruned(name)
    with unchanged(model):
        path = save(model, tmp_path / "model.safetensors")
    again = load(path)
    assert torch.equal(again(example), model.eval()(example))
    assert not again.training
    assert repr(again) == repr(model)  # sizes written on the layers follow, too
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_in_another_process(tmp_path: Path) -> None:
    model, _ = pruned("resnet18")
    save(model, tmp_path / "model.safetensors")
    code = "import sys, torch, tp_mrs; print(tp_mrs.load(sys.argv[1])(torch.full((1, 3, 32, 32), 0.3)).tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.safetensors")], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == model(torch.full((1, 3, 32, 32), 0.3)).tolist()


def test_a_plain_timm_model(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=3, in_chans=1).eval()
    again = load(save(model, tmp_path / "m.safetensors"))
    images = torch.rand(1, 1, 64, 64)
    assert torch.equal(again(images), model(images))


def test_a_model_that_timm_did_not_make(tmp_path: Path) -> None:
    model = small_cnn().eval()
    tp.pruner.BasePruner(
        model,
        torch.rand(1, 3, 32, 32),
        importance=tp.importance.MagnitudeImportance(),
        **pruner_kwargs(model),
    ).step()
    path = save(model, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"factory: .* pass factory"):
        load(path)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(load(path, factory=small_cnn)(images), model(images))


@pytest.mark.parametrize("case", ["activation", "pooling", "stem", "channels", "dilation"])
def test_what_timm_would_not_make_again_needs_a_factory(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> nn.Module:
        if case == "activation":
            return create_model("resnet18", num_classes=3, act_layer=nn.SiLU)
        if case == "stem":
            model: Any = timm.create_model("resnet18", num_classes=3)
            model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
            return model
        arguments: dict[str, dict[str, Any]] = {
            "pooling": {"global_pool": "max"},
            "channels": {"channels": (8, 8, 8, 8)},
            "dilation": {"output_stride": 8},
        }
        made: nn.Module = timm.create_model("resnet18", num_classes=3, **arguments[case])
        return made

    model = make().eval()
    path = save(model, tmp_path / "m.safetensors")
    assert "load() will need factory=" in caplog.text
    with pytest.raises(InputError, match="factory: "):
        load(path)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(load(path, factory=make)(images), model(images))


def test_arguments_of_create_model_are_remembered(tmp_path: Path) -> None:
    model = create_model("resnet18", num_classes=3, global_pool="max", act_layer="silu", output_stride=8).eval()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(load(save(model, tmp_path / "m.safetensors"))(images), model(images))


def test_an_unknown_device(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device: cannot use 'foo' here"):
        load(save(small_cnn(), tmp_path / "m.safetensors"), factory=small_cnn, device="foo")


def metadata(**changes: Any) -> dict[str, str]:
    content = {"format": "tp_mrs.model/1", "recipe": {"architecture": "resnet18", "num_classes": 3}, "heads": {}}
    return {"tp_mrs": json.dumps(content | changes)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read .* as safetensors"),
        (b"\x80\x04K\x01.", "cannot read .* as safetensors"),
        (safetensors.torch.save({}), "has no tp_mrs metadata"),
        (safetensors.torch.save({}, {"tp_mrs": "{"}), "not valid JSON"),
        (safetensors.torch.save({}, metadata(format="tp_mrs.model/9")), "has format 'tp_mrs.model/9'.*upgrade"),
        (safetensors.torch.save({}, metadata(recipe={"architecture": "nope", "num_classes": 3})), "no architecture"),
        (safetensors.torch.save({}, metadata()), "doesn't fit the architecture"),
        (safetensors.torch.save({"x": torch.ones(1)}, metadata()), "doesn't fit the architecture"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("shape", [(64, 3, 7), (65, 3, 7, 7), (0, 3, 7, 7), (64, 3, 3, 3)])
def test_shapes_the_architecture_cannot_have(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = timm.create_model("resnet18", num_classes=3).state_dict() | {"conv1.weight": torch.zeros(shape)}
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors.torch.save(tensors, metadata()))
    with pytest.raises(InputError, match=r"conv1.weight .* has shape"):
        load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="path: cannot read"):
        load(tmp_path / "nothing.safetensors")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"path: cannot write .* choose a writable folder"):
        save(small_cnn(), tmp_path / "no" / "m.safetensors")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(small_cnn(), tmp_path / "m.safetensors")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        save(small_cnn(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
