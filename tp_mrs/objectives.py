"""Adversarial training objectives: functions `(model, images, labels, attack) -> loss`.

`attack` is `(images, labels) -> adversarial images` on that model. The model arrives in training mode. Any function
of this form is an objective, such as those that `ard`, `rslad` and `awp` return; the others are known by name to
`finetune`.

Shapes: images x and attacked images x' (N, C, H, W) in [0, 1], labels y (N,), losses scalar, the mean over the batch.
f(x) are logits, p(x) the probabilities, (N, classes). Where clean and attacked images are both needed they go through
the network as one batch, so that BatchNorm sees one mixture of both.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from .attacks import Perturb
from .batches import num_classes
from .borrowing import lent, preserved_caches
from .errors import InputError, check_number
from .storage import checksum

Objective: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Perturb], Tensor]

_FORM = "a function (model, images, labels, attack) -> loss"


def standard(model: nn.Module, images: Tensor, labels: Tensor, attack: Perturb) -> Tensor:
    """Cross-entropy on the images as they are: no adversarial training."""
    return F.cross_entropy(model(images), labels)


def adversarial(model: nn.Module, images: Tensor, labels: Tensor, attack: Perturb) -> Tensor:
    """Cross-entropy on attacked images, `CE(f(x'), y)`.

    PGD-AT with PGD (Madry et al., 2018, arXiv 1706.06083); fast AT with FFGSM (Wong et al., 2020, arXiv 2001.03994).
    """
    return F.cross_entropy(model(attack(images, labels)), labels)


def trades(model: nn.Module, images: Tensor, labels: Tensor, attack: Perturb, *, beta: float = 6.0) -> Tensor:
    """`CE(f(x), y) + β KL(p(x) ‖ p(x'))` with x' maximising the second term.

    Source: Zhang et al., 2019, arXiv 1901.08573; β = 6 as there.

    Notes:
        torchattacks' TPGD makes x' in eval mode.
    """
    clean, attacked = _log_probabilities(model, images, attack(images, labels))
    return F.nll_loss(clean, labels) + beta * _divergence(clean, attacked).mean()


def mart(model: nn.Module, images: Tensor, labels: Tensor, attack: Perturb, *, lam: float = 5.0) -> Tensor:
    """`BCE(p(x'), y) + λ mean[KL(p(x) ‖ p(x')) (1 − p_y(x))]`, x' maximising the cross-entropy.

    `BCE(p(x'), y) = −log p_y(x') − log(1 − max_{k≠y} p_k(x'))` also asks for a margin to the strongest wrong class, and
    the last factor minds those images most that are misclassified before any attack.

    Source: Wang et al., ICLR 2020, "Improving Adversarial Robustness Requires Revisiting Misclassified Examples";
    λ = 5 as there.
    """
    clean, attacked = _log_probabilities(model, images, attack(images, labels))
    own = labels[:, None]
    rival = attacked.scatter(1, own, -torch.inf).argmax(1, keepdim=True)
    log_not_rival = attacked.scatter(1, rival, -torch.inf).logsumexp(1)  # finite even where p_rival rounds to 1
    boosted = F.nll_loss(attacked, labels) - log_not_rival.mean()
    doubt = -torch.expm1(clean.gather(1, own).squeeze(1))
    return boosted + lam * (_divergence(clean, attacked) * doubt).mean()


def ard(teacher: nn.Module, *, alpha: float = 1.0, temperature: float = 30.0) -> Objective:
    """Adversarially robust distillation: `α T² KL(q_T(x) ‖ p_T(x')) + (1 − α) CE(f(x), y)`.

    q are the teacher's probabilities; p_T and q_T come from logits divided by the temperature T; x' maximises
    `CE(f(x'), y)`. Source: Goldblum et al., AAAI 2020, arXiv 1905.09747; α and T are those of the authors' code.

    Args:
        teacher: a robust model with the same classes, such as the dense one: `copy.deepcopy(model)` before pruning. It
            runs in eval mode without gradients and is not changed.
        alpha: weight of the teacher against the labels, in [0, 1].
        temperature: above 0.

    Raises:
        InputError: the teacher is no module. When called: it is on another device, has other classes, or is the model.

    Notes:
        KL is summed over the classes, as the formula says; the authors' code takes their mean.
    """
    taught = _Teacher(teacher)
    check_number("alpha", alpha, low=0, high=1)
    check_number("temperature", temperature, low=0, open_low=True)

    def distilled(model: nn.Module, images: Tensor, labels: Tensor, attack: Perturb) -> Tensor:
        target = taught(model, images)
        clean, attacked = _log_probabilities(model, images, attack(images, labels))
        soft, softened = (F.log_softmax(log_p / temperature, dim=1) for log_p in (target, attacked))
        matching = temperature**2 * _divergence(soft, softened).mean()
        return alpha * matching + (1 - alpha) * F.nll_loss(clean, labels)

    distilled.__name__ = f"ard(teacher={taught.checksum()}, alpha={alpha:g}, temperature={temperature:g})"
    return distilled


def rslad(teacher: nn.Module, *, alpha: float = 5 / 6) -> Objective:
    """Robust soft label distillation: `(1 − α) KL(q(x) ‖ p(x)) + α KL(q(x) ‖ p(x'))`, x' maximising the second term.

    q are the teacher's probabilities; labels aren't used. Source: Zi et al., ICCV 2021, arXiv 2108.07969; α = 5/6 as
    there.

    Args:
        teacher: a robust model with the same classes, such as the dense one: `copy.deepcopy(model)` before pruning. It
            runs in eval mode without gradients and is not changed.
        alpha: weight of the attacked images, in [0, 1].

    Raises:
        InputError: the teacher is no module. When called: it is on another device, has other classes, or is the model.

    Notes:
        The attack gets q(x) for labels: the cross-entropy with q(x) is the KL up to a constant. So it must be one that
        climbs the cross-entropy, as PGD, FGSM, FFGSM and MIFGSM do. PGD starts at random in the whole ball, the
        authors' code close to x. KL is summed over the classes, as the formula says; their code takes the mean.
    """
    taught = _Teacher(teacher)
    check_number("alpha", alpha, low=0, high=1)

    def distilled(model: nn.Module, images: Tensor, labels: Tensor, attack: Perturb) -> Tensor:
        target = taught(model, images)
        clean, attacked = _log_probabilities(model, images, attack(images, target.exp()))
        return (1 - alpha) * _divergence(target, clean).mean() + alpha * _divergence(target, attacked).mean()

    distilled.__name__ = f"rslad(teacher={taught.checksum()}, alpha={alpha:g})"
    return distilled


def awp(objective: Objective, gamma: float = 0.005) -> Objective:
    """Adversarial weight perturbation: `objective` at the weights `w + γ ‖w‖ g / ‖g‖`, with g its gradient at w.

    Each trainable tensor w of two or more dimensions moves by itself; the attack's images are made once, at w. Source:
    Wu, Xia and Wang, NeurIPS 2020, arXiv 2004.05884; γ = 0.005 as there.

    Args:
        objective: any; its default attack is not known here, so `awp(trades)` wants `attack="tpgd-7"` where
            `"trades-awp"` doesn't.
        gamma: size of the step relative to the weights, at least 0.

    Notes:
        The model's own weights never move: its forward pass is given others, and copies of its buffers. BatchNorm's
        running statistics are thus updated once per step, at w, which is where the model will be used (in the
        authors' code at the perturbed weights).
    """
    _check_signature(objective)
    check_number("gamma", gamma, low=0)

    def perturbed(model: nn.Module, images: Tensor, labels: Tensor, attack: Perturb) -> Tensor:
        made: list[Tensor] = []

        def recorded(images: Tensor, labels: Tensor) -> Tensor:
            made.append(attack(images, labels))
            return made[-1]

        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            loss = check_loss(objective(model, images, labels, recorded))
        others = _uphill(model, loss, gamma) | {name: buffer.clone() for name, buffer in model.named_buffers()}
        replayed = iter(made)
        return functional_call(
            _Bound(objective, model),
            {f"model.{name}": tensor for name, tensor in others.items()},
            (images, labels, lambda images, labels: next(replayed)),
        )

    perturbed.__name__ = f"awp({name_of(objective)}, gamma={gamma:g})"
    return perturbed


class Recipe(NamedTuple):
    """An objective and the torchattacks attack it uses unless another is given."""

    objective: Objective
    attack: str


OBJECTIVES: dict[str, Recipe] = {
    "standard": Recipe(standard, "none"),
    "fgsm": Recipe(adversarial, "ffgsm"),
    "pgd": Recipe(adversarial, "pgd-7"),
    "trades": Recipe(trades, "tpgd-7"),
    "mart": Recipe(mart, "pgd-7"),
}


def resolve(objective: str | Objective) -> Recipe:
    """The recipe of an objective given by name, perhaps with `-awp` behind it, or as a function.

    A function gets PGD-7 as its default attack.

    Raises:
        InputError: no such name, or a function that takes other arguments.
    """
    if callable(objective):
        _check_signature(objective)
        return Recipe(objective, "pgd-7")
    name = str(objective).removesuffix("-awp")
    if name not in OBJECTIVES:
        raise InputError(
            f"objective: expected one of {', '.join(OBJECTIVES)}, one of these with -awp (such as trades-awp), or "
            f"{_FORM}, such as tp_mrs.objectives.rslad(teacher), got {objective!r}"
        )
    recipe = OBJECTIVES[name]
    return recipe if name == objective else recipe._replace(objective=awp(recipe.objective))


def name_of(objective: str | Objective) -> str:
    """How an objective is written down in settings."""
    return objective if isinstance(objective, str) else getattr(objective, "__name__", repr(objective))


def check_loss(loss: object) -> Tensor:
    """Raise `InputError` unless an objective returned a scalar that can be differentiated."""
    if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad and loss.is_floating_point():
        return loss
    got = type(loss).__name__
    if isinstance(loss, Tensor):
        got = f"{loss.dtype} of shape {tuple(loss.shape)}{'' if loss.requires_grad else ' without a gradient'}"
    raise InputError(
        f"objective: expected it to return a scalar tensor with a gradient, the mean loss of the batch; got {got}"
    )


def loss_of(objective: Objective, model: nn.Module, images: Tensor, labels: Tensor, attack: Perturb) -> Tensor:
    """What the objective returns, checked.

    Raises:
        InputError: it is no loss; or the model's BatchNorm cannot do with so few images.
    """
    try:
        return check_loss(objective(model, images, labels, attack))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"train_data: BatchNorm cannot train on a batch of {len(images)} ({error}); use larger batches, and "
            "drop_last=True where the last one is smaller"
        ) from error


def try_out(objective: Objective, model: nn.Module, images: Tensor, labels: Tensor, attack: Perturb) -> None:
    """Raise `InputError` unless the function works as an objective on these images."""
    attacked: list[Exception] = []

    def watched(images: Tensor, labels: Tensor) -> Tensor:
        try:
            return attack(images, labels)
        except Exception as error:
            attacked.append(error)
            raise

    try:
        loss_of(objective, model, images, labels, watched)
    except (TypeError, AttributeError) as error:
        if error in attacked:
            raise
        raise InputError(
            f"objective: expected {_FORM}, such as lambda model, images, labels, attack: torch.nn.functional."
            f"cross_entropy(model(attack(images, labels)), labels); {_called(objective)} cannot be called like that "
            f"({type(error).__name__}: {error})"
        ) from error


def _check_signature(objective: Objective) -> None:
    """Raise `InputError` if the objective cannot be called as one is; built-in functions may not tell."""
    if isinstance(objective, type):
        raise InputError(f"objective: expected {_FORM}, got the class {objective.__name__}")
    function = objective.forward if isinstance(objective, nn.Module) else objective
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind("model", "images", "labels", "attack")
    except TypeError as error:
        raise InputError(f"objective: expected {_FORM}, got {_called(objective)}{signature} ({error})") from error


def _called(objective: Objective) -> str:
    """Its name, or its type's."""
    return str(getattr(objective, "__name__", type(objective).__name__))


# --- parts -------------------------------------------------------------------------------------------------------


def _log_probabilities(model: nn.Module, images: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of clean and of attacked images, in float32: bfloat16 can't tell 0.999 from 1."""
    logits = model(torch.cat([images, attacked]))
    clean, disturbed = F.log_softmax(logits.float(), dim=1).split(len(images))
    return clean, disturbed


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(p ‖ q)` of each image, (N,)."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)


class _Teacher:
    """A borrowed module: `teacher(model, images)` are its log-probabilities, float32, for `model` to learn."""

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise InputError(f"teacher: expected a torch.nn.Module, such as the dense model, got {module!r:.80}")
        self.module = module
        self._checked: Callable[[], nn.Module | None] = lambda: None

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        if self._checked() is not model:
            self._check_weights(model, images.device)
        with lent(self.module), preserved_caches(self.module), torch.no_grad():
            logits: Tensor = self.module.eval()(images)
        if self._checked() is not model:
            self._check_classes(model, images, logits)
            self._checked = weakref.ref(model)
        return F.log_softmax(logits.float(), dim=1)

    def checksum(self) -> str:
        """Tells the teacher's weights from others'; those without values are refused when it is to teach."""
        weights = {name: weight for name, weight in self.module.named_parameters() if not weight.is_meta}
        return checksum(weights)[:8]

    def _check_weights(self, model: nn.Module, device: torch.device) -> None:
        parameters = set(self.module.parameters())
        if parameters & set(model.parameters()):
            raise InputError(
                "teacher: it is the model to train, or shares its weights; expected another one, "
                "such as copy.deepcopy(model) before pruning"
            )
        others = {parameter.device for parameter in parameters} - {device}
        if others:
            raise InputError(
                f"teacher: on {others.pop()}, but the model is on {device}; move it with teacher.to({str(device)!r})"
            )

    def _check_classes(self, model: nn.Module, images: Tensor, logits: Tensor) -> None:
        expected = (len(images), num_classes(model, images))
        if logits.shape != expected:
            raise InputError(
                f"teacher: expected outputs of the model's shape {expected}, (images, classes), "
                f"got {tuple(logits.shape)}; use a teacher of the same classes"
            )


class _Bound(nn.Module):
    """An objective together with its model, so that `functional_call` can give that model other weights."""

    def __init__(self, objective: Objective, model: nn.Module) -> None:
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, images: Tensor, labels: Tensor, attack: Perturb) -> Tensor:
        return self.objective(self.model, images, labels, attack)


def _uphill(model: nn.Module, loss: Tensor, gamma: float) -> dict[str, Tensor]:
    """The weights, each a relative step `gamma` up the gradient of `loss`, and differentiable in where they were."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad and weight.dim() > 1}
    if not weights:
        return {}
    gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    moved = {}
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        if isinstance(model, DistributedDataParallel):
            torch.distributed.all_reduce(gradient)  # of all processes' images; only its direction counts
        direction = gradient / gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny)
        moved[name] = weight + gamma * weight.detach().norm() * direction
    return moved
