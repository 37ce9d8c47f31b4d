"""Objectives: losses worked out by hand, limiting cases, borrowed teachers, perturbed weights, and refusals."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import Batches, in_two_processes, small_cnn, unchanged
from tp_mrs import InputError, finetune
from tp_mrs.attacks import bind, named_attack
from tp_mrs.objectives import Objective, adversarial, ard, awp, mart, resolve, rslad, standard, trades

STUDENT, TEACHER = (2.0, 0.5, -1.0), (1.0, 0.0, -2.0)
CLEAN, ATTACKED, LABEL = 0.9, 0.4, 1
LABELS = torch.tensor([LABEL])


def linear(slopes: tuple[float, ...]) -> nn.Sequential:
    """Logits (w_1 x, w_2 x, …) of a one-pixel image."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, len(slopes), bias=False))
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.tensor(slopes)[:, None])
    return model


def pixel(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value)


def down(images: Tensor, labels: Tensor) -> Tensor:
    return images - (CLEAN - ATTACKED)


def softmax(slopes: tuple[float, ...], x: float, temperature: float = 1.0) -> list[float]:
    powers = [math.exp(slope * x / temperature) for slope in slopes]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


P, Q = softmax(STUDENT, CLEAN), softmax(STUDENT, ATTACKED)
TAUGHT = softmax(TEACHER, CLEAN)


def loss_of(objective: Objective, model: nn.Module | None = None, attack: Any = down) -> Tensor:
    return objective(model or linear(STUDENT), pixel(CLEAN), LABELS, attack)


# --- by hand -----------------------------------------------------------------------------------------------------


def test_standard_and_adversarial() -> None:
    assert loss_of(standard).item() == pytest.approx(-math.log(P[LABEL]), rel=1e-5)
    assert loss_of(adversarial).item() == pytest.approx(-math.log(Q[LABEL]), rel=1e-5)


def test_trades() -> None:
    loss = trades(linear(STUDENT), pixel(CLEAN), LABELS, down, beta=2.0)
    assert loss.item() == pytest.approx(-math.log(P[LABEL]) + 2 * kl(P, Q), rel=1e-5)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_mart(label: int) -> None:
    rival = max(q for number, q in enumerate(Q) if number != label)
    expected = -math.log(Q[label]) - math.log(1 - rival) + 5 * kl(P, Q) * (1 - P[label])
    assert mart(linear(STUDENT), pixel(CLEAN), torch.tensor([label]), down).item() == pytest.approx(expected, rel=1e-5)


def test_mart_averages_over_images() -> None:
    images, labels = torch.tensor([0.2, 0.7]).view(2, 1, 1, 1), torch.tensor([2, 0])
    alone = [mart(linear(STUDENT), images[i : i + 1], labels[i : i + 1], bright).item() for i in range(2)]
    assert mart(linear(STUDENT), images, labels, bright).item() == pytest.approx(sum(alone) / 2, rel=1e-5)


def bright(images: Tensor, labels: Tensor) -> Tensor:
    return images + 0.1


def test_mart_of_a_certain_rival_is_finite() -> None:
    model = linear((500.0, 0.0, 0.0))
    loss = mart(model, pixel(CLEAN), LABELS, down)
    assert loss.item() == pytest.approx(200 + (200 - math.log(2)) + 5 * (500 * CLEAN - 500 * CLEAN), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 30.0), (0.7, 2.0)])
def test_ard(alpha: float, temperature: float) -> None:
    soft, softened = softmax(TEACHER, CLEAN, temperature), softmax(STUDENT, ATTACKED, temperature)
    expected = alpha * temperature**2 * kl(soft, softened) - (1 - alpha) * math.log(P[LABEL])
    loss = loss_of(ard(linear(TEACHER), alpha=alpha, temperature=temperature))
    assert loss.item() == pytest.approx(expected, rel=1e-3)


def test_rslad() -> None:
    expected = kl(TAUGHT, P) / 6 + 5 * kl(TAUGHT, Q) / 6
    assert loss_of(rslad(linear(TEACHER))).item() == pytest.approx(expected, rel=1e-5)


def test_the_attack_of_rslad_climbs_the_divergence_from_the_teacher() -> None:
    student, seen = linear(STUDENT), []
    fgsm = bind(named_attack("fgsm", eps=0.1), student)

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        seen.extend([labels, fgsm(images, labels)])
        return seen[-1]

    loss_of(rslad(linear(TEACHER)), student, attack)
    assert seen[0].tolist()[0] == pytest.approx(TAUGHT, rel=1e-5)
    slope = sum((p - taught) * weight for p, taught, weight in zip(P, TAUGHT, STUDENT, strict=True))
    assert seen[1].item() == pytest.approx(CLEAN + math.copysign(0.1, slope), rel=1e-5)


def test_awp() -> None:
    pull = [(q - (number == LABEL)) * ATTACKED for number, q in enumerate(Q)]
    step = 0.1 * math.hypot(*STUDENT) / math.hypot(*pull)
    moved = tuple(weight + step * gradient for weight, gradient in zip(STUDENT, pull, strict=True))
    probabilities = softmax(moved, ATTACKED)
    model = linear(STUDENT)
    weight = model.get_parameter("1.weight")
    loss = loss_of(awp(adversarial, gamma=0.1), model)
    assert loss.item() == pytest.approx(-math.log(probabilities[LABEL]), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = [(p - (number == LABEL)) * ATTACKED for number, p in enumerate(probabilities)]
    assert gradient.flatten().tolist() == pytest.approx(expected, rel=1e-4)
    assert weight.flatten().tolist() == list(STUDENT)


# --- limiting cases ----------------------------------------------------------------------------------------------


def without_penalty(objective: Callable[..., Tensor], **weight: float) -> Objective:
    return lambda model, images, labels, attack: objective(model, images, labels, attack, **weight)


def test_without_their_second_terms() -> None:
    assert loss_of(without_penalty(trades, beta=0.0)) == loss_of(standard)
    boosted = -math.log(Q[LABEL]) - math.log(1 - max(Q[0], Q[2]))
    assert loss_of(without_penalty(mart, lam=0.0)).item() == pytest.approx(boosted, rel=1e-5)
    assert loss_of(ard(linear(TEACHER), alpha=0)) == loss_of(standard)
    assert loss_of(rslad(linear(STUDENT), alpha=0)) == 0
    one, other = ard(linear(TEACHER), alpha=1, temperature=1), rslad(linear(TEACHER), alpha=1)
    assert loss_of(one).item() == pytest.approx(loss_of(other).item(), rel=1e-5)


@pytest.mark.parametrize("objective", [standard, adversarial, trades, mart])
def test_awp_of_size_zero_is_the_objective(objective: Objective, batches: Batches) -> None:
    model, (images, labels) = small_cnn().train(), batches[0]
    loss = objective(model, images, labels, lambda images, labels: images.square())
    assert awp(objective, gamma=0)(model, images, labels, lambda images, labels: images.square()) == loss


# --- adversarial weight perturbation -----------------------------------------------------------------------------


def test_awp_moves_each_layer_by_its_share_and_back(batches: Batches) -> None:
    model, (images, labels) = small_cnn().train(), batches[0]
    model[0].requires_grad_(False)  # type: ignore[index]
    before = copy.deepcopy(model)
    passes: list[dict[str, Tensor]] = []
    attacks: list[Tensor] = []

    def watched(model: nn.Module, images: Tensor, labels: Tensor, attack: Any) -> Tensor:
        attacks.append(attack(images, labels))
        passes.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        return F.cross_entropy(model(attacks[-1]), labels)

    watched_awp = awp(watched, gamma=0.02)
    loss = watched_awp(model, images, labels, bind(named_attack("pgd-2", eps=0.01), model))
    assert attacks[0] is attacks[1]
    for name, parameter in before.named_parameters():
        step = (passes[1][name] - passes[0][name]).norm() / parameter.norm()
        moves = parameter.dim() > 1 and parameter.requires_grad
        assert step.item() == pytest.approx(0.02 if moves else 0, rel=1e-3), name
        assert torch.equal(model.get_parameter(name), parameter)
    adversarial(before, images, labels, lambda images, labels: attacks[0])
    for name, buffer in before.named_buffers():  # as after one forward pass of the weights themselves
        assert torch.equal(model.get_buffer(name), buffer), name
    loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_awp_gives_the_weights_back_when_the_objective_fails(batches: Batches) -> None:
    model = small_cnn().eval()
    before, objects, calls = copy.deepcopy(model.state_dict()), list(model.parameters()), []

    def fails(model: nn.Module, images: Tensor, labels: Tensor, attack: Any) -> Tensor:
        calls.append(model(images))
        if len(calls) == 2:
            raise RuntimeError("half-way")
        return F.cross_entropy(calls[0], labels)

    with pytest.raises(RuntimeError, match="half-way"):
        awp(fails, gamma=0.1)(model, *batches[0], down)
    assert not torch.equal(calls[0], calls[1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(now is then for now, then in zip(model.parameters(), objects, strict=True))


def test_awp_with_nothing_to_move(batches: Batches) -> None:
    model = small_cnn().requires_grad_(False)
    model[1].requires_grad_(True)  # type: ignore[index]
    assert awp(standard)(model, *batches[0], down) == standard(model, *batches[0], down)


# --- in fine-tuning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["mart", "trades-awp", "ard", "rslad", "rslad-awp"])
def test_finetune_leaves_no_trace_in_model_or_teacher(name: str, precision: Any, batches: Batches) -> None:
    model, teacher = small_cnn(), small_cnn()
    made: dict[str, Any] = {"ard": ard(teacher), "rslad": rslad(teacher), "rslad-awp": awp(rslad(teacher))}
    with unchanged(model, weights=False), unchanged(teacher):
        result = finetune(model, batches, objective=made.get(name, name), epochs=6, eps=0.01, precision=precision)
    assert result.history[-1].loss < result.history[0].loss


def test_names() -> None:
    assert resolve("trades-awp").attack == resolve("trades").attack
    assert resolve("mart").objective is mart
    objective: Any = awp(rslad(linear(TEACHER), alpha=0.5), gamma=0.01)
    assert re.fullmatch(r"awp\(rslad\(teacher=[0-9a-f]{8}, alpha=0.5\), gamma=0.01\)", objective.__name__)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 4))


@pytest.mark.parametrize("parts", [(6, 6), (2, 10), (5, 4, 3)])
def test_accumulated_batches_are_one_batch(parts: tuple[int, ...], batches: Batches) -> None:
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    small = list(zip(images.split(parts), labels.split(parts), strict=True))
    settings: dict[str, Any] = {"objective": "mart", "attack": "fgsm", "epochs": 2, "warmup": 0.0}
    one, many = plain(), plain()
    expected = finetune(one, [(images, labels)], **settings)
    found = finetune(many, small, accumulate=len(parts), **settings)
    assert found.settings["steps"] == expected.settings["steps"] == 2
    assert found.images == expected.images == 24
    assert [e.loss for e in found.history] == pytest.approx([e.loss for e in expected.history], rel=1e-4)
    for name, value in one.state_dict().items():
        assert torch.allclose(many.state_dict()[name], value, atol=1e-6), name


def test_a_last_update_of_fewer_batches(batches: Batches) -> None:
    result = finetune(small_cnn(), batches, objective="standard", accumulate=3, epochs=2.5)
    assert (result.settings["steps"], result.images) == (2, 30)


SCRIPT = """
import sys
from pathlib import Path
from accelerate import PartialState

from tests.test_objectives import trained_by

state = PartialState(cpu=True)
Path(sys.argv[1], f"{state.process_index}.json").write_text(trained_by(state.num_processes))
"""


def trained_by(processes: int) -> str:
    """The weights after two updates, each with two batches of eight images per update in all processes together."""
    model, generator = plain(), torch.Generator().manual_seed(1)
    data = TensorDataset(torch.rand(32, 3, 32, 32, generator=generator), torch.arange(32) % 4)
    loader = DataLoader(data, 8 // processes)
    finetune(model, loader, objective="trades-awp", attack="fgsm", accumulate=2)
    return json.dumps([parameter.flatten()[:50].tolist() for parameter in model.parameters()])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    found, other = in_two_processes(SCRIPT, tmp_path)
    assert found == other
    for weights, expected in zip(found, json.loads(trained_by(1)), strict=True):
        assert weights == pytest.approx(expected, abs=1e-5)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ard("resnet18"), "teacher: expected a torch.nn.Module.*got 'resnet18'"),  # type: ignore[arg-type]
        (lambda: rslad(None), "teacher: expected a torch.nn.Module.*got None"),  # type: ignore[arg-type]
        (lambda: ard(small_cnn(), alpha=1.5), r"alpha: expected a number in \[0, 1\]"),
        (lambda: rslad(small_cnn(), alpha=-0.1), r"alpha: expected a number in \[0, 1\]"),
        (lambda: ard(small_cnn(), temperature=0), "temperature: expected a number > 0"),
        (lambda: awp(trades, gamma=-0.1), "gamma: expected a number >= 0"),
        (lambda: awp(trades, gamma=math.nan), "gamma: expected a number >= 0"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("distil", [ard, rslad])
def test_a_teacher_that_does_not_fit(distil: Any, batches: Batches) -> None:
    model = small_cnn()
    teachers = {
        "it is the model to train": model,
        "or shares its weights": nn.Sequential(nn.Identity(), model),
        "on meta, but the model is on cpu": copy.deepcopy(model).to("meta"),
        r"expected outputs of the model's shape \(2, 4\).*got \(2, 7\)": small_cnn().append(nn.Linear(4, 7)),  # type: ignore[operator]
    }
    for message, teacher in teachers.items():
        with pytest.raises(InputError, match=f"teacher: .*{message}"):
            finetune(model, batches, objective=distil(teacher), attack="fgsm")


@pytest.mark.parametrize("name", ["trade-awp", "trades-awpp", "-awp", "trades-awp-awp", 3])
def test_unknown_names(name: Any, batches: Batches) -> None:
    known = "standard, fgsm, pgd, trades, mart, one of these with -awp .such as trades-awp., or a function"
    with pytest.raises(InputError, match=f"objective: expected one of {known}"):
        finetune(small_cnn(), batches, objective=name)


class Loss(nn.Module):
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda model, images: None, r"got <lambda>\(model, images\) \(too many positional arguments\)"),
        (lambda a, b, c, d, e: None, r"got <lambda>\(a, b, c, d, e\) \(missing a required argument: 'e'\)"),
        (lambda a, b, c, d, *, weight: None, "missing a required .*argument: 'weight'"),
        (Loss(), r"got Loss\(logits: "),
        (Loss, "got the class Loss"),
    ],
)
def test_functions_that_take_other_arguments(objective: Any, message: str, batches: Batches) -> None:
    model, known = small_cnn(), "a function .model, images, labels, attack. -> loss"
    with unchanged(model), pytest.raises(InputError, match=f"objective: expected {known}, .*{message}"):
        finetune(model, batches, objective=objective)
    with pytest.raises(InputError, match=message):
        awp(objective)


@pytest.mark.parametrize(
    "objective",
    [
        F.cross_entropy,
        F.mse_loss,
        torch.relu,
        max,
        lambda *given: F.cross_entropy(*given[:2]),
        lambda images, labels, model, attack: F.cross_entropy(model(images), labels),
    ],
)
def test_functions_that_take_other_things(objective: Any, batches: Batches) -> None:
    model, form = small_cnn(), "expected a function .model, images, labels, attack. -> loss, such as lambda"
    for each in (objective, awp(objective)):
        with unchanged(model), pytest.raises(InputError, match=f"objective: {form}.* cannot be called like that"):
            finetune(model, batches, objective=each)


def test_an_attack_that_fails_is_not_the_objective(batches: Batches) -> None:
    class Broken(torchattacks.FGSM):
        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            raise TypeError("broken")

    with pytest.raises(TypeError, match=r"^broken$"):
        finetune(small_cnn(), batches, attack=Broken)


def test_an_objective_that_does_not_tell_its_arguments(batches: Batches) -> None:
    class Silent:
        __signature__ = "none"

        def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, attack: Any) -> Tensor:
            return standard(model, images, labels, attack)

    assert finetune(small_cnn(), batches, objective=Silent()).images == 12


def test_awp_of_an_objective_that_returns_no_scalar(batches: Batches) -> None:
    with pytest.raises(InputError, match="objective: expected it to return a scalar"):
        finetune(small_cnn(), batches, objective=awp(lambda model, images, labels, attack: model(images)))
