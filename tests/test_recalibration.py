"""recalibrate: BatchNorm's statistics become those of the data, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import Batches, small_cnn, unchanged
from tp_mrs import DivergenceError, InputError, recalibrate


def test_statistics_by_hand(batches: Batches) -> None:
    network = small_cnn()
    with unchanged(network, weights=False):
        assert recalibrate(network, batches) is network
    model: Any = network
    outputs = [model[0](images) for images, _ in batches]  # what the only BatchNorm layer sees
    means = torch.stack([output.mean(dim=(0, 2, 3)) for output in outputs])
    variances = torch.stack([output.var(dim=(0, 2, 3)) for output in outputs])
    torch.testing.assert_close(model[1].running_mean, means.mean(dim=0))
    torch.testing.assert_close(model[1].running_var, variances.mean(dim=0))
    assert model[1].momentum == 0.1


def test_only_statistics_change(batches: Batches) -> None:
    model = small_cnn()
    before = copy.deepcopy(model.state_dict())
    recalibrate(model, batches, max_batches=1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def _two_norms() -> nn.Module:
    """Convolutions of 8 and 6 channels with a BatchNorm behind each that has learned something else."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
    )
    for norm in (model[1], model[5]):
        norm.running_mean.normal_()  # type: ignore[operator]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[operator]
    return nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).train()


def test_means_alone_are_those_of_what_each_layer_reads_of_the_layers_before(batches: Batches) -> None:
    model = _two_norms()
    before = copy.deepcopy(model.state_dict())
    with unchanged(model, weights=False):
        recalibrate(model, batches[:1], variances=False)
    after = model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        "0.1.running_mean",
        "0.5.running_mean",
    }
    read: list[torch.Tensor] = []
    norms: Any = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].mean(dim=(0, 2, 3))))
    model.eval()(batches[0][0])
    for norm, mean in zip(norms, read, strict=True):
        torch.testing.assert_close(norm.running_mean, mean)


def test_means_of_several_batches_by_hand(batches: Batches) -> None:
    model: Any = small_cnn()
    recalibrate(model, batches, variances=False)
    means = torch.stack([model[0](images).mean(dim=(0, 2, 3)) for images, _ in batches])
    torch.testing.assert_close(model[1].running_mean, means.mean(dim=0))


class _Fragile(nn.Module):
    """Fails on its second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = _two_norms(), 0

    def forward(self, images: torch.Tensor) -> Any:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("out of memory")
        return self.body(images)


@pytest.mark.parametrize("variances", [True, False])
def test_where_a_pass_fails_statistics_are_as_they_were(variances: bool, batches: Batches) -> None:
    model = _Fragile()
    assert len(batches) > 1
    with unchanged(model), pytest.raises(RuntimeError, match="out of memory"):
        recalibrate(model, batches, variances=variances)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("variances", [True, False])
@pytest.mark.parametrize("value", [float("inf"), 1e38])
def test_what_is_not_finite_is_no_statistic(variances: bool, value: float, batches: Batches) -> None:
    model = _two_norms()
    model.get_parameter("0.4.weight").data.fill_(value)
    with unchanged(model), pytest.raises(DivergenceError, match="what BatchNorm reads is not finite: 0"):
        recalibrate(model, batches, variances=variances)


@pytest.mark.parametrize("variances", [True, False])
def test_buffers_of_others_stay(variances: bool, batches: Batches) -> None:
    class Counting(nn.Sequential):
        calls: torch.Tensor

        def forward(self, images: torch.Tensor) -> Any:
            self.calls += 1
            return super().forward(images)

    model = Counting(_two_norms())
    model.register_buffer("calls", torch.tensor(3))
    recalibrate(model, batches, variances=variances)
    assert model.calls == 3


def test_variances_is_a_flag(batches: Batches) -> None:
    model = small_cnn()
    with unchanged(model), pytest.raises(InputError, match="variances: expected True or False"):
        recalibrate(model, batches, variances="no")  # type: ignore[arg-type]


def test_a_model_without_batchnorm_is_left_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    assert recalibrate(model, []) is model


def _pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize("sizes", [(1, 5), (5, 1), (5, 1, 1)])
def test_single_images_go_with_their_neighbours(sizes: tuple[int, ...]) -> None:
    images, models = torch.rand(7, 3, 8, 8)[: sum(sizes)], (_pooled(), _pooled())
    models[1].load_state_dict(models[0].state_dict())
    recalibrate(models[0], [(part, torch.zeros(len(part)).long()) for part in images.split(sizes)])
    recalibrate(models[1], [(images, torch.zeros(len(images)).long())])
    for ours, theirs in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_single_image_says_nothing_of_a_single_value() -> None:
    model: Any = _pooled()
    images = torch.rand(1, 3, 8, 8)
    with unchanged(model), pytest.raises(InputError, match="data: BatchNorm has no statistics of a single value"):
        recalibrate(model, [(images, torch.tensor([0]))])
    assert model[2].momentum == 0.1


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "data: it yielded no batch"), ([(torch.full((2, 3, 32, 32), 2.0), torch.tensor([0, 1]))], "images")],
)
def test_bad_data_changes_nothing(data: Any, message: str) -> None:
    model = small_cnn()
    with unchanged(model), pytest.raises(InputError, match=message):
        recalibrate(model, data)


class WithUnused(nn.Module):
    """A network with a norm that images do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = small_cnn(), nn.BatchNorm2d(2)

    def forward(self, images: torch.Tensor) -> Any:
        return self.used(images)


@pytest.mark.parametrize("variances", [True, False])
def test_norms_that_nothing_reaches_keep_their_statistics(variances: bool, batches: Batches) -> None:
    model = WithUnused()
    statistics = [buffer.fill_(value) for value, buffer in enumerate(model.unused.buffers(), start=3)]
    recalibrate(model, batches, variances=variances, progress=False)
    assert [buffer.unique().tolist() for buffer in statistics] == [[3], [4], [5]]
