"""save and load: the same outputs from a pruned model, also in another process; types, names, factories."""

from __future__ import annotations

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
from tp_mrs.pruning import prune_by_ratio
from tp_mrs.tensorfile import read

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


PRUNE = """
import sys, torch, torch_pruning as tp, tp_mrs, safetensors.torch
model = tp_mrs.normalize(tp_mrs.create_model(sys.argv[2], num_classes=3, image_size=64), [0.2] * 3, [0.3] * 3)
x = torch.rand(2, 3, 64, 64)
tp.pruner.BasePruner(model, x, importance=tp.importance.MagnitudeImportance(), **tp_mrs.pruner_kwargs(model)).step()
tp_mrs.refresh(model).eval()
tp_mrs.save(model, sys.argv[1] + "/model.safetensors", class_names=["cat", "dog", "żaba"])
safetensors.torch.save_file({"x": x, "y": model(x).detach()}, sys.argv[1] + "/images.safetensors")
"""
LOAD = """
import sys, torch, tp_mrs, safetensors.torch
sys.modules["pickle"].Unpickler = None  # nothing may be unpickled
images = safetensors.torch.load_file(sys.argv[1] + "/images.safetensors")
model = tp_mrs.load(sys.argv[1] + "/model.safetensors")
assert torch.equal(model(images["x"]), images["y"])
assert model.class_names == ["cat", "dog", "żaba"]
assert not any("prun" in name for module in model.modules() for name in vars(module))
"""


@pytest.mark.parametrize("name", ["resnet18", "mobilevit_xxs"])
def test_pruned_in_one_process_and_loaded_in_another(name: str, tmp_path: Path) -> None:
    for code in (PRUNE, LOAD):
        subprocess.run([sys.executable, "-c", code, str(tmp_path), name], check=True, timeout=120)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_the_tensors_own(dtype: torch.dtype, tmp_path: Path) -> None:
    model = normalize(create_model("resnet18", num_classes=3, channels=(4, 4, 4, 4)), [0.1] * 3, [0.2] * 3).eval()
    model.to(dtype).layer1.float()
    again = load(save(model, tmp_path / "m.safetensors"))
    assert dtypes(again) == dtypes(model)
    assert len(set(dtypes(again).values())) == 3  # with the counters of BatchNorm
    assert set(dtypes(load(tmp_path / "m.safetensors", dtype=torch.float32)).values()) == {torch.float32, torch.int64}


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("dtype", [torch.int32, "float32", torch.complex64])
def test_types_that_weights_cannot_have(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dtype: expected None or a floating-point type"):
        load(save(small_cnn(), tmp_path / "m.safetensors"), factory=small_cnn, dtype=dtype)


def test_onto_a_device(tmp_path: Path) -> None:
    path = save(normalize(create_model("resnet18", num_classes=3), [0.1] * 3, [0.2] * 3), tmp_path / "m.safetensors")
    devices = {str(tensor.device) for tensor in [*load(path, device="meta").parameters(), *load(path).buffers()]}
    assert devices == {"meta", "cpu"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}),
        ("vit_relpos_small_patch16_224", {"depth": 1}),
        ("eva02_tiny_patch14_224", {"depth": 1}),
    ],
)
def test_buffers_outside_the_state_dict(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    model = create_model(name, num_classes=3, **arguments)
    outside = [buffer for key, buffer in model.named_buffers() if key not in model.state_dict()]
    next(buffer for buffer in outside if buffer.is_floating_point() or buffer.numel()).add_(1)
    again = load(save(model, tmp_path / "m.safetensors"))
    for (key, buffer), (other, expected) in zip(again.named_buffers(), model.named_buffers(), strict=True):
        assert key == other
        assert torch.equal(buffer, expected)
    assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])


def test_a_buffer_that_appears_in_use(tmp_path: Path) -> None:
    def make() -> Any:
        model: Any = small_cnn()
        model.register_buffer("cache", None, persistent=False)
        return model

    model = make()
    model.cache = torch.arange(3)
    again: Any = load(save(model, tmp_path / "m.safetensors"), factory=make)
    assert torch.equal(again.cache, torch.arange(3))
    assert load(save(make(), tmp_path / "m.safetensors"), factory=make).cache is None


def test_shared_parameters_stay_shared(tmp_path: Path) -> None:
    def make() -> nn.Module:
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        return nn.Sequential(first, second)

    again: Any = load(save(make(), tmp_path / "m.safetensors"), factory=make)
    assert again[0].weight is again[1].weight
    assert again[0].bias is not again[1].bias


class BareNorm(nn.Module):
    """A norm without weights: no tensor tells its width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(images.mean((2, 3)))))


def test_norms_without_weights_keep_their_width(tmp_path: Path) -> None:
    model, images = BareNorm(), torch.rand(2, 4, 3, 3)
    prune_by_ratio(model, images, {model.first: 0.5})
    assert model.norm.normalized_shape == (4,)
    again = load(save(model, tmp_path / "m.safetensors"), factory=BareNorm)
    assert torch.equal(again(images), model.eval()(images))
    model.norm.normalized_shape = (9,)
    with pytest.raises(InputError, match="widths: the architecture has no norm of 9 channels in 'norm'"):
        load(save(model, tmp_path / "m.safetensors"), factory=BareNorm)


def test_class_names(tmp_path: Path) -> None:
    model = create_model("resnet18", num_classes=3, channels=(4, 4, 4, 4))
    again = load(save(model, tmp_path / "a.safetensors", class_names=("a", "b", "c")))
    assert again.class_names == ["a", "b", "c"]
    assert not hasattr(model, "class_names")
    assert load(save(again, tmp_path / "b.safetensors")).class_names == ["a", "b", "c"]
    assert not hasattr(load(save(model, tmp_path / "c.safetensors")), "class_names")
    for names in (["a"], "abc", ["a", "b", 3], {"a": 1}):
        with pytest.raises(InputError, match="class_names: expected a list of 3 strings"):
            save(model, tmp_path / "d.safetensors", class_names=names)  # type: ignore[arg-type]
    assert not (tmp_path / "d.safetensors").exists()


def test_names_like_a_blank_checksum(tmp_path: Path) -> None:
    names = ["0" * 64, f'"tp_mrs.sha256":"{"0" * 64}"', "\\\0"]
    path = save(
        create_model("resnet18", num_classes=3, channels=(4, 4, 4, 4)), tmp_path / "m.safetensors", class_names=names
    )
    assert load(path).class_names == names


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = create_model("resnet10t", num_classes=3)
    files = [save(model, tmp_path / f"{number}.safetensors", class_names=["é", "\u2028", '"']) for number in range(8)]
    assert len({file.read_bytes() for file in files}) == 1


def test_the_metadata_says_what_it_is(tmp_path: Path) -> None:
    model, _ = pruned("mobilevit_xxs")
    metadata, tensors = read(save(model, tmp_path / "m.safetensors"))
    assert metadata is not None
    assert metadata["recipe"]["architecture"] == "mobilevit_xxs"
    assert {"torch", "timm", "tp_mrs", "torch-pruning"} <= set(metadata["versions"])
    assert metadata["normalize"]["mean"] == pytest.approx([0.1, 0.2, 0.3])
    assert metadata["groups"] == {n: m.groups for n, m in model.named_modules() if getattr(m, "groups", 1) > 1}
    assert set(tensors) == set(model.state_dict())


@pytest.mark.parametrize("changes", [{}, {"metadata": {"format": "pt"}}])
def test_a_plain_state_dict_of_the_unpruned_architecture(changes: dict[str, Any], tmp_path: Path) -> None:
    model = randomised(timm.create_model("mobilenetv2_050", num_classes=3)).eval()
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(model.state_dict(), path, **changes)
    images = torch.rand(1, 3, 64, 64)
    again = load(path, factory=lambda: create_model("mobilenetv2_050", num_classes=3))
    assert torch.equal(again(images), model(images))
    with pytest.raises(InputError, match=r"factory: .* does not say how to make its model; pass factory="):
        load(path)
    with pytest.raises(InputError, match=r"classifier.bias has shape \(3,\), the architecture's is \(2,\)"):
        load(path, factory=lambda: create_model("mobilenetv2_050", num_classes=2))
    with pytest.raises(InputError, match=r"path: .*doesn't fit the architecture"):
        load(path, factory=small_cnn)


def test_a_factory_that_makes_no_model(tmp_path: Path) -> None:
    path = save(small_cnn(), tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"factory: expected a function that returns .* got int"):
        load(path, factory=lambda: 3)  # type: ignore[arg-type,return-value]


def test_a_file_that_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    path = save(nn.Sequential(nn.Linear(3, 3)), tmp_path / "m.safetensors")
    model = small_cnn()
    with unchanged(model), pytest.raises(InputError, match="doesn't fit"):
        load(path, factory=lambda: model)


def test_saving_and_loading_leave_the_random_state_alone(tmp_path: Path) -> None:
    model = create_model("mobilevit_xxs", num_classes=3)
    with unchanged(model):
        load(save(model, tmp_path / "m.safetensors"))


def test_where_weights_came_from_is_not_remembered() -> None:
    model: Any = create_model("resnet18", num_classes=3, cache_dir="/nowhere")
    assert "cache_dir" not in model.tp_mrs_recipe


class WithState(nn.Linear):
    """A layer whose state is more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet18", "model: expected a torch.nn.Module, got str"),
        (nn.Linear(3, 3, device="meta"), "model: its tensor weight is on the meta device"),
        (nn.Linear(3, 3, dtype=torch.complex64), "model: its tensor weight is torch.strided torch.complex64"),
        (
            normalize(small_cnn(), [0.1] * 3, [float("inf")] * 3),
            "model: its normalisation or arguments cannot be written",
        ),
        (WithState(3, 3), "model: _extra_state of its state is no parameter or buffer"),
    ],
)
def test_models_that_cannot_be_saved(model: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"path: cannot write .* choose a writable folder"):
        save(small_cnn(), tmp_path / "no" / "m.safetensors")
    number: Any = 3
    with pytest.raises(InputError, match=r"path: expected a path, as text or pathlib\.Path, got 3"):
        save(small_cnn(), number)


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


def test_a_plain_state_dict_of_a_pruned_model_is_refused(tmp_path: Path) -> None:
    """It says neither how many heads are left nor how many groups."""
    model = small_cnn()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["0.weight"], tensors["0.bias"] = tensors["0.weight"][:4].clone(), tensors["0.bias"][:4].clone()
    safetensors.torch.save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match=r"tp_mrs\.save"):
        load(tmp_path / "plain.safetensors", factory=small_cnn)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x))
        return y


@pytest.mark.parametrize("parted", [True, False])
def test_shared_weights(tmp_path: Path, parted: bool) -> None:
    model, images = Tied(), torch.rand(2, 4)
    if parted:
        model.second.weight = nn.Parameter(torch.rand(4, 4))
    again: Any = load(save(model, tmp_path / "tied.safetensors"), factory=Tied)
    assert torch.equal(model(images), again(images))
    assert (again.first.weight is again.second.weight) != parted


def test_a_model_is_no_factory(tmp_path: Path) -> None:
    path = save(small_cnn(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="factory: expected a function"):
        load(path, factory=small_cnn())


def test_a_model_of_the_first_release() -> None:
    """Written by 0.1.0 and kept as it is: later versions read it."""
    model: Any = load(Path(__file__).parent / "files" / "model-0.1.0.safetensors")
    assert model.class_names == ["a", "b", "c"]
    logits = model(torch.linspace(0, 1, 256).view(1, 1, 16, 16))
    torch.testing.assert_close(logits, torch.tensor([[2.921901, 2.643299, 2.628636]]), rtol=1e-4, atol=1e-4)
