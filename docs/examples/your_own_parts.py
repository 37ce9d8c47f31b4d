# %% [markdown]
# # Parts of your own
#
# An objective, an attack and a base importance of your own take a few lines each. This page writes one of each,
# prunes with all three, and then holds the new criterion against others in the benchmark's harness. It works on
# handwritten digits; nothing is downloaded, and it takes a few minutes on two cores. The benchmarks are not part
# of the package, so start it in a checkout: `python -m docs.examples.your_own_parts`.

# %%
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchattacks
from torch import Tensor, nn

import tp_mrs
from benchmarks import report
from benchmarks.contenders import (
    CONTENDERS,
    MAIN,
    Budget,
    Contender,
    Once,
    allocated,
    by_ratio,
    sensitivity,
    with_gradients,
)
from benchmarks.run import do
from benchmarks.tiers import Work
from tp_mrs.data import load_data, make_loader
from tp_mrs.objectives import Perturb

EPS = 0.1  # size of the perturbations, for images in [0, 1]

# %% [markdown]
# ## An objective
#
# A function that returns the mean loss of a batch. `attack` is bound to the model already and takes images and
# labels. This one is adversarial logit pairing (Kannan and others, 2018): an attacked image is to get the logits of
# the clean one.


# %%
def pairing(model: nn.Module, images: Tensor, labels: Tensor, attack: Perturb) -> Tensor:
    attacked = attack(images, labels)
    clean, robust = model(torch.cat([images, attacked])).chunk(2)  # in one batch, for BatchNorm's sake
    return F.cross_entropy(robust, labels) + 0.5 * F.mse_loss(robust, clean)


# %% [markdown]
# ## An attack
#
# Any subclass of torchattacks' `Attack`. This one goes uphill not on the loss but on the margin by which a wrong
# class leads, as Carlini and Wagner have it. It projects back into the ball, and into [0, 1].


# %%
class Margin(torchattacks.attack.Attack):
    def __init__(self, model: nn.Module, eps: float, steps: int) -> None:
        super().__init__("Margin", model)
        self.eps, self.steps = eps, steps

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        attacked = (images + torch.empty_like(images).uniform_(-self.eps, self.eps)).clamp(0, 1)
        for _ in range(self.steps):
            attacked.requires_grad_()
            logits = self.get_logits(attacked)
            right = logits.gather(1, labels[:, None]).squeeze(1)
            wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
            (gradient,) = torch.autograd.grad((wrong - right).sum(), attacked)
            moved = attacked.detach() + self.eps / 4 * gradient.sign()
            attacked = torch.clamp(moved, images - self.eps, images + self.eps).clamp(0, 1)
        return attacked


def margin(model: nn.Module) -> Margin:
    return Margin(model, eps=EPS, steps=5)


# %% [markdown]
# ## A base importance
#
# The base decides which channels of a group go; how many go is decided by sensitivities. It is a Torch-Pruning
# importance: a function of a group that returns a score for each of its channels. A group lists layers with the
# channels that go together.
#
# While it scores, each parameter's `.grad` holds the gradient of the loss on attacked images. So a channel can have a
# worst case of its own: to first order, the worst change of its filter that is small relative to it costs ‖w‖
# ‖∂R/∂w‖. Only the layers that make the channel count here.


# %%
class WorstChange(tp.importance.Importance):
    def __call__(self, group: Any) -> Tensor | None:
        scores = []
        for dependency, channels in group:
            if dependency.handler in (tp.prune_conv_out_channels, tp.prune_linear_out_channels):
                weight = dependency.target.module.weight
                filters, gradients = weight[channels].flatten(1), weight.grad[channels].flatten(1)
                scores.append(filters.norm(dim=1) * gradients.norm(dim=1))
        return torch.stack(scores).sum(dim=0) if scores else None


# %% [markdown]
# ## All three at work
#
# They go where names of built-in parts go. Factories such as `margin` serve everywhere; attacks that are bound to a
# model serve for that model alone.

# %%
data = load_data("digits")
train = make_loader(data.train, batch_size=32, shuffle=True)
calibration = make_loader(data.calibration, batch_size=128)  # the training images, not augmented
test = make_loader(data.test, batch_size=250)
example_inputs = torch.zeros(1, *data.shape)

torch.manual_seed(0)
model = tp_mrs.create_model("resnet10t", num_classes=10, in_chans=1, channels=[16, 32, 64, 128], stem_width=8)
tp_mrs.normalize(model, data.mean, data.std)
training: dict[str, Any] = {"objective": pairing, "optimizer": "adamw", "lr": 0.005}
tp_mrs.finetune(model, train, attack="pgd-3", eps=EPS, epochs=8, **training)

pruned = tp_mrs.mrpf(
    model,
    example_inputs,
    train,
    margin,
    macs=0.5,
    base=WorstChange(),
    calibration_data=calibration,
    test_data=test,
    attacks=["pgd-20", margin],
    train_attack=margin,
    eps=EPS,
    epochs=2,
    **training,
)
print(pruned)

# %% [markdown]
# ## Is the criterion any good?
#
# One run says little. The harness prunes the same adversarially trained networks by each *contender* to the same
# measured budget, sets BatchNorm's statistics, fine-tunes all alike, and evaluates on the same images. Here are two of
# its own beside two with the new criterion: with one ratio for all groups (`by_ratio`), and with ratios by sensitivity
# (`allocated`), where layers make up for the channels that they lose, as in `mrpf`.

# %%
worst_change = with_gradients(WorstChange)
contenders: dict[str, Contender] = {
    "L2, uniform": CONTENDERS["L2, uniform"],
    "worst change, uniform": Once(by_ratio(worst_change, "uniform")),
    MAIN: CONTENDERS[MAIN],
    f"{MAIN} + worst change": Once(allocated(worst_change, sensitivity, compensate=True)),
}
folder = Path("runs/your-own-parts")
work = Work("digits", "narrowest resnet18", Budget("macs", 0.5), seed=0)
do(work, [0], contenders, folder, test_images=100)

# %% [markdown]
# Each result is a file in the folder. What is there is not done again, so that more seeds, budgets and contenders can
# be added at any time. The tables come from the files. Differences stand beside their 95% intervals; with a single
# seed, and few images, expect these to be wide.

# %%
print(report.tables(report.comparisons(folder)))
