"""Sensitivities of single units: what goes together when one channel of a group is pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchattacks
from torch import Tensor, nn

from tests.conftest import image_batches, small_cnn, small_resnet
from tp_mrs import MRSImportance, measure_sensitivity
from tp_mrs.architectures import LAYERS
from tp_mrs.measuring import measure, relative
from tp_mrs.pruning import build_pruner, prunable_groups, rooted_groups
from tp_mrs.readers import reading


def test_units_by_hand() -> None:
    """Three linear layers: unit u of the first is read by the second, whose own units are read by the third."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Linear(3, 5), nn.Linear(5, 2))
    images, labels = torch.rand(4, 3, 2, 2), torch.randint(2, (4,))
    units = measure_sensitivity(model, [(images, labels)], torchattacks.VANILA, example_inputs=images[:1]).units
    with torch.no_grad():
        first, second = model[:2](images), model[:3](images)
        by_logit = model(images).softmax(1) - F.one_hot(labels, 2)
        by_second = by_logit @ model[3].weight
        slopes = [first * (by_second @ model[2].weight), second * by_second]  # (images, units)
        norms = torch.cat(slopes, dim=1).norm(dim=1, keepdim=True)
        expected = [(own / norms).square().mean(0).sqrt().tolist() for own in slopes]
    assert units["1"] == pytest.approx(expected[0], rel=1e-5)
    assert units["2"] == pytest.approx(expected[1], rel=1e-5)


def test_a_slope_is_what_fading_costs() -> None:
    """By finite differences, where nothing else reads a channel: its reader's weights shrink a little."""
    model, (images, labels) = small_cnn().double().eval(), image_batches(1, 6, 16)[0]
    reader = model.get_submodule("3")
    assert isinstance(reader, nn.Conv2d)
    images, little = images.double(), 1e-6

    def losses() -> Tensor:
        return F.cross_entropy(model(images), labels, reduction="none")

    with reading(model) as found:
        losses().sum().backward()
    with torch.no_grad():
        before = losses()
        for channel in range(reader.in_channels):
            kept = reader.weight.clone()
            reader.weight[:, channel] *= 1 - little
            slope = (before - losses()) / little
            reader.weight.copy_(kept)
            assert found["3"][0][:, channel].tolist() == pytest.approx(slope.tolist(), rel=1e-3, abs=1e-6)


def test_images_count_alike() -> None:
    """However high the loss of each; one that no slope belongs to counts as 0."""
    slopes = {"a": np.array([[3.0, 0.0], [0.003, 0.0], [0.0, 0.0]]), "b": np.array([[4.0], [0.004], [0.0]])}
    found = relative(slopes)
    assert found["a"].tolist() == pytest.approx(np.array([[0.6, 0.0], [0.6, 0.0], [0.0, 0.0]]))
    assert found["b"].tolist() == pytest.approx(np.array([[0.8], [0.8], [0.0]]))


class Grouped(nn.Module):
    """Grouped, depthwise and transposed convolutions between plain ones, and one whose output two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, 3, padding=1, groups=4),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 6, 2),
            nn.ReLU(),
        )
        self.left, self.right = nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.body(images)
        logits: Tensor = self.head((self.left(stem) + self.right(stem).relu()).mean((2, 3)))
        return logits


MAKERS: list[tuple[Callable[[], nn.Module], int]] = [
    (small_resnet, 32),
    (Grouped, 16),
    (lambda: timm.create_model("mobilevit_xxs", num_classes=4), 64),
    (lambda: timm.create_model("densenet121", num_classes=4, growth_rate=4, block_config=(2, 2)), 32),
    (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=2, img_size=32), 32),
]


def slow_slopes(model: nn.Module, images: Tensor, labels: Tensor) -> dict[nn.Module, Tensor]:
    """Of each image's loss, as what a layer reads fades: (images, inputs), image by image."""
    found: dict[nn.Module, list[Tensor]] = {}
    inputs: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[layer] = arguments[0]

    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        read = {layer: values for layer, values in inputs.items() if values.requires_grad}
        for layer, gradient in zip(read, torch.autograd.grad(loss, list(read.values())), strict=True):
            product = (read[layer] * gradient).detach().double()
            channels = product.movedim(-1, 0) if isinstance(layer, nn.Linear) else product.movedim(1, 0)
            found.setdefault(layer, []).append(channels.flatten(1).sum(1))
    for hook in hooks:
        hook.remove()
    return {layer: torch.stack(rows) for layer, rows in found.items()}


@pytest.mark.parametrize(("make", "side"), MAKERS)
def test_units_are_what_is_read_of_each(make: Callable[[], nn.Module], side: int) -> None:
    """By all layers from which Torch-Pruning would take an input with it."""
    torch.manual_seed(0)
    model = make().eval()
    images, labels = image_batches(1, 4, side)[0]
    found = measure(model, [(images, labels)], torchattacks.VANILA).sensitivity(prunable_groups(model, images[:1]))
    slopes = slow_slopes(model, images, labels)
    norms = torch.cat(list(slopes.values()), dim=1).norm(dim=1)
    names = {module: name for name, module in model.named_modules()}
    pruner = build_pruner(model, images[:1])
    for group in rooted_groups(pruner):
        for unit in {0, group.units // 2, group.units - 1}:
            total = torch.zeros(len(images), dtype=torch.float64)
            for dependency, channels in group.of(pruner, [unit]):
                if dependency.handler in (tp.prune_conv_in_channels, tp.prune_linear_in_channels):
                    total += slopes[dependency.target.module][:, channels].sum(1)
            expected = float((total / norms).square().mean().sqrt())
            assert found.units[names[group.root]][unit] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_units_do_not_depend_on_the_estimator_or_on_batches() -> None:
    model, (images, labels) = small_cnn().eval(), image_batches(1, 32, 16)[0]
    groups = prunable_groups(model, images[:1])

    def units(data: Iterable[tuple[Tensor, Tensor]], **settings: str) -> dict[str, tuple[float, ...]]:
        return dict(measure(model, data, torchattacks.VANILA, **settings).sensitivity(groups).units)  # type: ignore[arg-type]

    whole = units([(images, labels)])
    assert units([(images, labels)], estimator="pga") == whole
    for name, found in units(zip(images.split(5), labels.split(5), strict=True)).items():
        assert found == pytest.approx(whole[name], rel=1e-4)


def test_channels_go_by_their_units() -> None:
    model, data = small_resnet().eval(), image_batches(1, 8, 32)
    importance = MRSImportance(model, data, torchattacks.VANILA, progress=False)
    units = importance.sensitivity(data[0][0][:1]).units
    pruner = build_pruner(model, data[0][0][:1])
    for group in rooted_groups(pruner):
        name = next(name for name, module in model.named_modules() if module is group.root)
        assert importance.sensitivity_of_channels(group.raw).tolist() == pytest.approx(units[name], rel=1e-4)
        scores = importance(group.raw)
        assert scores is not None
        ordered = torch.tensor(units[name])[scores.argsort()]
        assert (ordered.diff() > -1e-6 * ordered.max()).all()
