"""finetune: what changes and what doesn't, and refusals."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import Batches, Bright, image_batches, small_cnn, unchanged
from tp_mrs import DivergenceError, InputError, evaluate, finetune
from tp_mrs.epochlog import EpochLog
from tp_mrs.finetuning import check_training
from tp_mrs.objectives import OBJECTIVES, standard
from tp_mrs.storage import copy_tensors
from tp_mrs.training import Epoch


class Slope(nn.Module):
    """Logits (w x, 0) of a one-pixel image."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, images: Tensor) -> Tensor:
        score = self.weight * images.flatten(1)
        return torch.cat([score, torch.zeros_like(score)], dim=1)


def pixel(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


LABEL = torch.zeros(1, dtype=torch.long)


def test_one_step_is_plain_gradient_descent() -> None:
    model = Slope(3.0)
    settings: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0, "schedule": "constant"}
    settings["optimizer"] = "momentum"  # timm's "sgd" is Nesterov's
    result = finetune(model, [(pixel(0.5), LABEL)], objective="standard", lr=0.1, clip_norm=None, **settings)
    gradient = -(1 - sigmoid(1.5)) * 0.5
    assert model.weight.item() == pytest.approx(3.0 - 0.1 * gradient, rel=1e-6)
    assert result.history[0].loss == pytest.approx(-math.log(sigmoid(1.5)), rel=1e-5)
    assert result.images == 1


def test_without_a_terminal_each_epoch_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        finetune(small_cnn(), image_batches(2), objective="standard", epochs=2)
    lines = [record.getMessage() for record in caplog.records if record.name == "tp_mrs.finetuning"]
    assert [line.partition(":")[0] for line in lines] == [f"fine-tuned {done} of 4 batches" for done in (2, 4)]


def test_the_bar_shows_robust_accuracy_on_the_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 0.5 ± 0.2 the first pixel decides: whether it is attacked below one half."""
    images, labels = torch.tensor([0.55, 0.6, 0.9, 0.2]).reshape(4, 1, 1, 1), torch.tensor([1, 1, 1, 0])
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("tp_mrs.finetuning.tqdm", lambda **_: Bar(shown))
    settings: dict[str, Any] = {"attack": "fgsm", "eps": 0.2, "lr": 1e-6}
    finetune(Bright(), [(images, labels)], objective="fgsm", **settings)
    finetune(Bright(), [(images, labels)], objective="standard", **settings)
    assert [bar.get("batch robust") for bar in shown] == ["50%", None]
    assert shown[0].keys() == {"epoch", "loss", "batch robust"}


class Bar:
    """A progress bar that shows something at each update."""

    disable = False

    def __init__(self, shown: list[dict[str, Any]]) -> None:
        self.set_postfix = shown.append

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> bool:
        return True


@pytest.mark.parametrize("objective", [*OBJECTIVES, standard])
def test_training_lowers_the_loss_and_leaves_no_other_trace(objective: Any, batches: Batches) -> None:
    model = small_cnn()
    before = copy.deepcopy(model.state_dict())
    with unchanged(model, weights=False):
        result = finetune(model, batches, objective=objective, epochs=8, lr=0.05, eps=0.01)
    assert result.history[-1].loss < result.history[0].loss
    after = model.state_dict()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen
    for name in after:
        assert torch.equal(before[name], after[name]) == (name in frozen), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_precision_and_layout(precision: Any, channels_last: bool, batches: Batches) -> None:
    model = small_cnn()
    finetune(model, batches, precision=precision, channels_last=channels_last, eps=0.01)
    assert all(parameter.dtype == torch.float32 and parameter.is_contiguous() for parameter in model.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_same_seed_same_weights(batches: Batches) -> None:
    start = small_cnn()
    models = [copy.deepcopy(start) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        finetune(model, batches, seed=seed)
    first, again, other = (model.state_dict()["0.weight"] for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("epochs", "images"), [(0.5, 6), (1, 12), (1.5, 18), (3, 36)])
def test_fractions_of_epochs_count_in_batches(epochs: float, images: int, batches: Batches) -> None:
    assert finetune(small_cnn(), batches, objective="standard", epochs=epochs).images == images


def test_a_loader_is_shuffled_by_its_own_generator() -> None:
    images, labels = torch.rand(8, 3, 32, 32), torch.randint(4, (8,))
    loader = DataLoader(TensorDataset(images, labels), 4, shuffle=True)
    model = small_cnn()
    with unchanged(model, weights=False):
        finetune(model, loader, objective="standard")


def test_an_attack_of_ones_own(batches: Batches) -> None:
    result = finetune(small_cnn(), batches, attack=lambda m: torchattacks.MIFGSM(m, eps=0.02))
    assert result.settings["attack"].startswith("MIFGSM")
    assert "eps=0.02" in result.settings["attack"]


def test_an_objective_of_ones_own(batches: Batches) -> None:
    def smoothed(model: nn.Module, images: Tensor, labels: Tensor, attack: Any) -> Tensor:
        return F.cross_entropy(model(attack(images, labels)), labels, label_smoothing=0.1)

    assert finetune(small_cnn(), batches, objective=smoothed).settings["objective"] == "smoothed"


def test_frozen_norms_keep_their_statistics(batches: Batches) -> None:
    model = small_cnn()
    norm = model[1]  # type: ignore[index]
    norm.requires_grad_(False)
    before = norm.running_mean.clone()
    finetune(model, batches, objective="standard")
    assert torch.equal(norm.running_mean, before)


class ThroughNumPy(torchattacks.FGSM):
    """As APGD does on its way, where NumPy knows no bfloat16."""

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.get_logits(images).detach().numpy()
        return images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "pdg"}, "objective: expected one of standard, fgsm, pgd, trades, mart"),
        ({"epochs": 0}, "epochs: expected a number > 0"),
        ({"lr": 0.0}, r"lr: expected a number in \(0, 10\]"),
        ({"lr": 1e9}, "lr"),
        ({"eps": 8}, "eps: expected a value in .0, 1.*did you mean 8/255"),
        ({"optimizer": "adahessian"}, "optimizer: expected one of"),
        ({"checkpoint": "same", "log": "same"}, "log: same is the checkpoint, too; choose another file"),
        ({"optimizer": "sgdd"}, "optimizer: expected one of"),
        ({"schedule": "linear"}, "schedule: expected one of cosine, constant"),
        ({"warmup": 2}, "warmup"),
        ({"momentum": 0.0}, "optimizer: timm cannot make 'sgd'.*Nesterov"),
        ({"clip_norm": 0}, "clip_norm"),
        ({"accumulate": 0}, "accumulate: expected an integer >= 1"),
        ({"channels_last": "yes"}, "channels_last: expected True or False, got 'yes'"),
        ({"precision": "fp16"}, "precision: expected one of fp32, bf16"),
        ({"attack": lambda model: torchattacks.PGD(model, eps="8/255")}, "attack: this PGD's eps: expected a number"),
        ({"attack": lambda model: torchattacks.PGD(model, eps=8)}, "attack: this PGD's eps: expected .*mean 8/255"),
        (
            {"attack": ThroughNumPy, "precision": "bf16"},
            "precision: FGSM cannot work in bfloat16; take precision='fp32'",
        ),
        ({"attack": "apgdt-1"}, "attack: this APGDT was made for 10 classes, but the model has 4; make it with"),
        ({"attack": "autoattack-1"}, "attack: this APGDT was made for 10 classes"),
        ({"attack": torchattacks.FGSM(small_cnn())}, "attack: this FGSM is bound to another model"),
        ({"train_data": [{"image": 1, "label": 2}]}, "data: expected batches of"),
        ({"train_data": [(torch.rand(2, 3, 32, 32).numpy(), torch.tensor([0, 1]))]}, "images: expected a floating"),
        ({"train_data": []}, "train_data: it has no batch; expected at least one"),
        ({"train_data": iter([])}, "train_data: expected a DataLoader or a list"),
        ({"train_data": [(torch.rand(2, 3, 32, 32), torch.tensor([0, 9]))]}, "labels: expected classes 0 to 3"),
        ({"train_data": [(torch.rand(2, 3, 32, 32) + 1, torch.tensor([0, 1]))]}, "images: expected values in"),
        (
            {"objective": lambda model, images, labels, attack: model(images)},
            "objective: expected it to return a scalar",
        ),
        (
            {"objective": lambda model, images, labels, attack: model(images).mean().detach()},
            r"objective: .* got torch.float32 of shape \(\) without a gradient",
        ),
        ({"objective": lambda model, images, labels, attack: 3.0}, "objective: .* got float"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, Any], message: str, batches: Batches) -> None:
    model = small_cnn()
    data = arguments.pop("train_data", batches)
    with unchanged(model), pytest.raises(InputError, match=message):
        finetune(model, data, **arguments)


def test_trying_the_objective_leaves_no_trace(batches: Batches) -> None:
    model, data = small_cnn(), DataLoader(TensorDataset(*batches[0]), 4, shuffle=True, generator=torch.Generator())
    tried: list[Any] = []

    def watched(model: nn.Module, images: Tensor, labels: Tensor, attack: Any) -> Tensor:
        tried.append((model.training, len(images), torch.is_autocast_enabled("cpu")))
        return F.cross_entropy(model(attack(images, labels)), labels)

    state = data.generator.get_state()
    with unchanged(model):
        check_training(model, data, objective=watched, precision="bf16")
    assert tried == [(True, 2, True)]
    assert torch.equal(data.generator.get_state(), state)


def test_a_frozen_model(batches: Batches) -> None:
    with pytest.raises(InputError, match="model: none of its parameters requires a gradient"):
        finetune(small_cnn().requires_grad_(False), batches)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nn.Module.half, r"expected weights of torch.float32, scale has torch.float16.*model.float\(\)"),
        (lambda model: nn.init.constant_(model.scale, math.inf), "scale holds NaN or infinity.*load other weights"),
    ],
)
def test_weights_that_cannot_be_trained(spoil: Any, message: str, batches: Batches) -> None:
    model = Bright()
    spoil(model)
    with pytest.raises(InputError, match=f"model: {message}"):
        finetune(model, batches)


def test_int32_labels(batches: Batches) -> None:
    assert finetune(small_cnn(), [(images, labels.int()) for images, labels in batches]).images == 12


def test_a_batch_that_is_too_small_for_its_norms(batches: Batches) -> None:
    model = small_cnn().append(nn.BatchNorm1d(4))  # type: ignore[operator]
    images, labels = batches[0]
    message = "train_data: BatchNorm cannot train on a batch of 1 .*; use larger batches, and drop_last=True"
    for data, weights in (([(images[:1], labels[:1])], True), ([batches[0], (images[:1], labels[:1])], False)):
        with unchanged(model, weights=weights), pytest.raises(InputError, match=message):
            finetune(model, data, objective="standard")


def test_a_loss_that_is_not_finite_stops_training_with_the_weights_of_before(batches: Batches) -> None:
    model, seen = small_cnn(), list[dict[str, Tensor]]()

    def explodes(model: nn.Module, images: Tensor, labels: Tensor, attack: Any) -> Tensor:
        seen.append(copy_tensors(model))
        loss = F.cross_entropy(model(images), labels)
        return loss * (math.nan if len(seen) == 3 else 1)  # the first call is the rehearsal

    with unchanged(model, weights=False), pytest.raises(DivergenceError, match=r"batch 2 of 2.*lower lr"):
        finetune(model, batches, objective=explodes)
    assert not torch.equal(seen[2]["0.weight"], seen[1]["0.weight"])
    assert all(torch.equal(tensor, seen[2][name]) for name, tensor in copy_tensors(model).items())
    assert any("running_mean" in name for name in seen[2])


def test_a_bad_batch_is_told_by_its_number(batches: Batches) -> None:
    images, labels = batches[1]
    message = r"train_data: images: expected values in \[0, 1\], .* \(batch 1\)$"
    with pytest.raises(InputError, match=message):
        finetune(small_cnn(), [batches[0], (images * 255, labels)], objective="standard", epochs=2)


# --- validation, moving average, log -----------------------------------------------------------------------------


def bright_batches(count: int = 2) -> Batches:
    """The class is whether the first pixel is bright, for `Bright`."""
    batches = image_batches(count, size=8, side=4)
    return [(images, (images[:, 0, 0, 0] > 0.5).long()) for images, _ in batches]


def test_validation_leaves_training_as_it_is(batches: Batches) -> None:
    start, data = small_cnn().insert(3, nn.Dropout(0.3)), image_batches(2)  # type: ignore[operator]
    found = []
    for held_out in (None, DataLoader(TensorDataset(*data[0]), 4, shuffle=True)):
        model = copy.deepcopy(start)
        result = finetune(model, batches, epochs=2, attack="pgd-2", validation_data=held_out, validation_attack="fgsm")
        found.append((result, model))
    plain, validated = (result for result, _ in found)
    assert [epoch.loss for epoch in plain.history] == [epoch.loss for epoch in validated.history]
    assert all(epoch.clean is None and epoch.robust is None for epoch in plain.history)
    if validated.best == validated.history[-1]:
        assert all(torch.equal(*pair) for pair in zip(*(m.state_dict().values() for _, m in found), strict=True))


def test_the_accuracy_after_each_epoch_is_that_of_evaluate() -> None:
    model, data = Bright(), bright_batches()
    result = finetune(model, data, objective="standard", validation_data=data, validation_attack="pgd-3", eps=0.2)
    expected = evaluate(model, data, ["pgd-3"], eps=0.2, latency=False)
    assert (result.history[0].clean, result.history[0].robust) == (expected.clean, expected.robust["pgd-3"])
    assert expected.clean == 1 > expected.robust["pgd-3"] > 0
    assert json.dumps(result.to_dict())


def spoiling(rates: list[float]) -> Any:
    """An objective that moves the weight of `Slope` by these rates, one an update; the first call is to try it."""
    calls = iter([0.0, *rates])
    return lambda model, images, labels, attack: -next(calls) * model.weight


def slope_data() -> Batches:
    """Class 0, so that the model is right while its weight is positive."""
    return [(pixel(0.5), LABEL)]


PLAIN: dict[str, Any] = {
    "optimizer": "momentum",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "warmup": 0.0,
    "schedule": "constant",
    "lr": 1.0,
    "clip_norm": None,
    "validation_attack": "fgsm",
}


def test_the_model_ends_with_the_weights_of_the_best_epoch() -> None:
    model = Slope(-1.5)
    moves = [1.0, 1.0, 1.0, -4.0, 5.0]  # weights -0.5, 0.5, 1.5, -2.5, 2.5
    result = finetune(model, slope_data(), objective=spoiling(moves), epochs=5, validation_data=slope_data(), **PLAIN)
    assert [epoch.robust for epoch in result.history] == [0, 1, 1, 0, 1]
    assert result.best == result.history[1]
    assert model.weight.item() == 0.5


def test_patience_stops_after_epochs_without_improvement() -> None:
    model = Slope(-1.5)
    arguments: dict[str, Any] = {"epochs": 9, "patience": 2, "validation_data": slope_data(), **PLAIN}
    result = finetune(model, slope_data(), objective=spoiling([1.0, 1.0, 1.0, 1.0]), **arguments)
    assert [epoch.robust for epoch in result.history] == [0, 1, 1, 1]
    assert model.weight.item() == 0.5


def test_the_moving_average_is_validated_and_kept() -> None:
    model = Slope(0.0)
    arguments: dict[str, Any] = {"epochs": 3, "ema": 0.75, **PLAIN}
    finetune(model, slope_data(), objective=spoiling([4.0, 4.0, -32.0]), **arguments)
    expected = 0.75 * (0.75 * 1 + 0.25 * 8) + 0.25 * -24  # weights 4, 8, -24; averages 1, 2.75, …
    assert model.weight.item() == pytest.approx(expected)
    model = Slope(0.0)
    arguments["validation_data"] = slope_data()
    result = finetune(model, slope_data(), objective=spoiling([4.0, -4.0, -32.0]), **arguments)
    assert [epoch.robust for epoch in result.history] == [1, 1, 0]  # averages 1, 0.75, -7.4
    assert model.weight.item() == 1


def test_an_attack_bound_to_the_model_validates_the_average(batches: Batches) -> None:
    model = small_cnn()
    attack = torchattacks.FGSM(model)
    result = finetune(model, batches, objective="standard", ema=0.5, validation_data=batches, validation_attack=attack)
    assert result.settings["validation_attack"].startswith("FGSM")
    assert result.best is not None


def test_the_log_has_a_line_for_each_epoch_of_each_run(batches: Batches, tmp_path: Path) -> None:
    log = tmp_path / "epochs.jsonl"
    log.write_text('{"epoch": 1}')  # torn off before the end of the line
    runs = [finetune(small_cnn(), batches, objective="standard", epochs=epochs, log=log) for epochs in (2, 1.5)]
    _, *lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [Epoch(**line) for line in lines] == [epoch for run in runs for epoch in run.history]
    assert [(line["epoch"], line["images"], line["clean"]) for line in lines] == [
        (1, 12, None),
        (2, 12, None),
        (1, 12, None),
        (2, 6, None),
    ]
    assert all(line["seconds"] > 0 and line["learning_rate"] > 0 for line in lines)


@pytest.mark.parametrize(
    "left", ["", '{"epoch": 1}\n', '{"epo', '{"epoch": 1}', '{"epoch": 1}\n{"epoch"', '{"epoch": 1}\n{"epoch": 2}\n']
)
def test_a_log_that_a_crash_left_behind_is_mended(left: str, tmp_path: Path) -> None:
    path = tmp_path / "epochs.jsonl"
    path.write_text("earlier\n" + left)
    EpochLog(path).update([{"epoch": 1}, {"epoch": 2}])
    assert path.read_text() == 'earlier\n{"epoch": 1}\n{"epoch": 2}\n'


def test_lines_that_another_run_added_to_the_log_stay(tmp_path: Path) -> None:
    path = tmp_path / "epochs.jsonl"
    path.write_text('{"epoch": 1}\nanother\'s\n')
    EpochLog(path).update([{"epoch": 1}, {"epoch": 2}])
    assert path.read_text() == '{"epoch": 1}\nanother\'s\n{"epoch": 2}\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": 2}, "patience: it needs validation_data"),
        ({"patience": 0, "validation_data": slope_data()}, "patience: expected an integer >= 1"),
        ({"ema": 1.5}, r"ema: expected a number in \[0, 1\]"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected an integer >= 1"),
        ({"validation_data": iter([])}, "validation_data: expected .* that can be read again"),
        ({"validation_data": []}, "validation_data: .*it yielded no batch"),
        ({"validation_data": [(torch.rand(2, 3, 32, 32) + 1, LABEL)]}, "validation_data: images: expected values"),
        (
            {"validation_data": image_batches(1), "validation_attack": "pdg"},
            "validation_attack: no torchattacks",
        ),
        ({"log": "/dev/null/log"}, "log: cannot write to /dev/null"),
        ({"log": "/"}, "log: / is a folder or a device; choose another file"),
        ({"log": "/dev/full"}, "log: /dev/full is a folder or a device"),
        ({"log": 3}, "log: expected a path, as text or pathlib.Path, got 3"),
        ({"log": "epochs\0.jsonl"}, "log: expected a path"),
        ({"checkpoint": 3}, "checkpoint: expected a path"),
        ({"checkpoint": 3, "log": "log"}, "checkpoint: expected a path"),
    ],
)
def test_bad_arguments_for_validation_and_log(arguments: dict[str, Any], message: str, batches: Batches) -> None:
    model = small_cnn()
    with unchanged(model), pytest.raises(InputError, match=message):
        finetune(model, batches, **arguments)


def test_data_that_is_shorter_than_it_says() -> None:
    class Short(list[Any]):
        def __len__(self) -> int:
            return 3

    with pytest.raises(InputError, match=r"train_data: it has a len\(\) of 3, but yielded only 2 batches"):
        finetune(small_cnn(), Short(image_batches(2)), objective="standard")
