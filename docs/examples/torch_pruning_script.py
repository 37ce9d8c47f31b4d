# %% [markdown]
# # From a Torch-Pruning script
#
# You have a script that prunes a timm model with Torch-Pruning. One changed line makes it spare what robustness hangs
# on. Here such a script runs on handwritten digits, before and after the change. Nothing is downloaded, and it takes
# about a minute on two cores.

# %%
import copy

import timm
import torch
import torch_pruning as tp
import torchattacks
from torch import nn

import tp_mrs
from tp_mrs.data import load_data, make_loader

EPS = 0.1  # size of the perturbations, for images in [0, 1]

data = load_data("digits")
train = make_loader(data.train, batch_size=32, shuffle=True)
calibration = make_loader(data.calibration, batch_size=128)  # the training images, not augmented
test = make_loader(data.test, batch_size=250)
example_inputs = torch.zeros(1, *data.shape)

# %% [markdown]
# ## A robust model
#
# Yours is trained already; this one learns in half a minute. `normalize` puts mean and standard deviation into the
# model, so that images stay in [0, 1] outside, where attacks need them.

# %%
torch.manual_seed(0)
model = timm.create_model("resnet10t", num_classes=10, in_chans=1, channels=(16, 32, 64, 128), stem_width=8)
tp_mrs.normalize(model, data.mean, data.std)
tp_mrs.finetune(model, train, objective="pgd", attack="pgd-3", eps=EPS, epochs=10, optimizer="adamw", lr=0.005)

# %% [markdown]
# ## The script as it was
#
# Torch-Pruning ranks the channels of all layers by their magnitude, and the weakest go.

# %%
before = copy.deepcopy(model)
pruner = tp.pruner.BasePruner(
    before,
    example_inputs,
    importance=tp.importance.MagnitudeImportance(),
    global_pruning=True,
    pruning_ratio=0.3,
    ignored_layers=[before.get_classifier()],
)
pruner.step()

# %% [markdown]
# ## One line changed
#
# The importance is another one. It attacks the training images, measures how much robustness hangs on each channel of
# each group of coupled layers, and lets those go first that matter little for what they cost.
#
# Two calls are good for any timm model. `pruner_kwargs`, in place of `ignored_layers`, knows what must keep its width
# and how to follow the rest; `refresh` puts the sizes right that attention layers keep as numbers.

# %%
after = copy.deepcopy(model)
attack = torchattacks.PGD(after, eps=EPS, alpha=EPS / 4, steps=10)
pruner = tp.pruner.BasePruner(
    after,
    example_inputs,
    importance=tp_mrs.MRSImportance(after, calibration, attack),
    global_pruning=True,
    pruning_ratio=0.3,
    **tp_mrs.pruner_kwargs(after),
)
pruner.step()
tp_mrs.refresh(after)

# %% [markdown]
# ## What it buys
#
# Both models lost the same fraction of their channels. They are compared before any fine-tuning, on test images that
# an attack has changed for each of them. Pruning leaves BatchNorm with wrong statistics, which `recalibrate` sets
# anew.


# %%
def assess(model: nn.Module) -> tp_mrs.Evaluation:
    tp_mrs.recalibrate(model, calibration)
    return tp_mrs.evaluate(model, test, attacks=["pgd-20"], eps=EPS)


found = {"dense": assess(model), "magnitude": assess(before), "MRS": assess(after)}
for name, evaluation in found.items():
    print(f"{name:<10} {evaluation}")

# %% [markdown]
# Look at the multiply-accumulates, too: the same number of channels does not cost the same everywhere. For a fair
# comparison `allocate` finds ratios that meet the budget of the script as it was. They go by the sensitivity of
# single channels.
#
# The last line is the difference on the same images, with its 95% interval. If that holds 0, so many images cannot
# tell the two apart.

# %%
allocated = copy.deepcopy(model)
attack = torchattacks.PGD(allocated, eps=EPS, alpha=EPS / 4, steps=10)
sensitivity = tp_mrs.measure_sensitivity(allocated, calibration, attack, example_inputs=example_inputs)
budget = found["magnitude"].macs / found["dense"].macs
pruner = tp.pruner.BasePruner(
    allocated,
    example_inputs,
    importance=tp.importance.MagnitudeImportance(),
    pruning_ratio_dict=tp_mrs.allocate(allocated, example_inputs, sensitivity, macs=budget),
    **tp_mrs.pruner_kwargs(allocated),
)
pruner.step()
tp_mrs.refresh(allocated)

found["allocated"] = assess(allocated)
print(sensitivity)
print(f"allocated  {found['allocated']}")
print(f"less magnitude, at equal cost: {found['allocated'].difference(found['magnitude'], 'pgd-20')}")

# %% [markdown]
# From here the script goes on as before: fine-tune, with `tp_mrs.finetune` or your own loop, and save.
#
# ## With attention
#
# The same lines prune MobileViT. Here it is untrained, to be quick: only its shapes count.

# %%
vit = timm.create_model("mobilevit_xxs", num_classes=10, in_chans=1).eval()
few = [next(iter(calibration))]
importance = tp_mrs.MRSImportance(vit, few, torchattacks.FGSM)
pruner = tp.pruner.BasePruner(
    vit,
    example_inputs,
    importance=importance,
    global_pruning=True,
    pruning_ratio=0.3,
    **tp_mrs.pruner_kwargs(vit),
)
params = sum(parameter.numel() for parameter in vit.parameters())
pruner.step()
tp_mrs.refresh(vit)
print(f"{params:,} → {sum(parameter.numel() for parameter in vit.parameters()):,} parameters")
print(vit(example_inputs).shape)
