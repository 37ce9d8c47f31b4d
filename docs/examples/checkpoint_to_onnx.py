# %% [markdown]
# # From a checkpoint to ONNX
#
# You have a robust model in a file, and want a smaller one that runs without PyTorch. This page makes such a file on
# handwritten digits, prunes and fine-tunes what is in it, exports the result, and attacks what was exported. Nothing
# is downloaded; it takes about a minute on two cores. It needs `pip install "tp_mrs[export]"`.

# %%
from pathlib import Path

import onnxruntime
import safetensors.torch
import torch
import torchattacks
from torch import Tensor, nn

import tp_mrs
from tp_mrs.data import load_data, make_loader

EPS = 0.1  # size of the perturbations, for images in [0, 1]

folder = Path("runs/checkpoint-to-onnx")
folder.mkdir(parents=True, exist_ok=True)

data = load_data("digits")
train = make_loader(data.train, batch_size=32, shuffle=True)
calibration = make_loader(data.calibration, batch_size=128)  # the training images, not augmented
test = make_loader(data.test, batch_size=250)
example_inputs = torch.zeros(1, *data.shape)

# %% [markdown]
# ## A checkpoint
#
# Yours is there already. This one is a plain state dict in safetensors, as timm's models come. Such a file holds
# weights but does not say what model they are of, so a function has to: the *factory*.


# %%
def factory() -> nn.Module:
    model = tp_mrs.create_model(
        "resnet10t", num_classes=10, in_chans=1, image_size=32, channels=[8, 16, 32, 64], stem_width=8
    )
    return tp_mrs.normalize(model, data.mean, data.std)


torch.manual_seed(0)
robust = factory()
tp_mrs.finetune(robust, train, objective="pgd", attack="pgd-3", eps=EPS, epochs=8, optimizer="adamw", lr=0.005)
safetensors.torch.save_file(robust.state_dict(), folder / "robust.safetensors")

# %% [markdown]
# Reading it again checks names and shapes, and unpickles nothing.

# %%
model = tp_mrs.load(folder / "robust.safetensors", factory=factory)

# %% [markdown]
# ## Half the size
#
# `mrpf` measures which groups of coupled layers robustness hangs on, sets their pruning ratios by that, prunes, and
# fine-tunes with attacks. The budget is a fraction of the multiply-accumulates, and it is met within 1% or refused.

# %%
attack = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=10)
report = tp_mrs.mrpf(
    model,
    example_inputs,
    train,
    attack,
    macs=0.5,
    calibration_data=calibration,
    test_data=test,
    attacks=["pgd-20"],
    objective="pgd",
    train_attack="pgd-3",
    eps=EPS,
    epochs=3,
    optimizer="adamw",
    lr=0.005,
)
print(report)

# %% [markdown]
# ## Keep it
#
# What `save` writes tells its shapes, its normalisation and its classes itself. It needs no factory, and is a
# checkpoint like the first: for `mrpf`, for `tp-mrs prune --checkpoint`, in any process.

# %%
tp_mrs.save(model, folder / "small.safetensors", class_names=data.class_names)
small = tp_mrs.load(folder / "small.safetensors")
for name in ("robust.safetensors", "small.safetensors"):
    print(f"{name}: {(folder / name).stat().st_size:,} bytes")

# %% [markdown]
# ## Take it elsewhere
#
# The exported program takes images in [0, 1] in batches of any size. `export` compares it with the model before the
# file is written. Then ONNX Runtime is all it needs.

# %%
tp_mrs.export(small, folder / "small.onnx", example_inputs)
session = onnxruntime.InferenceSession(folder / "small.onnx")
(taken,) = session.get_inputs()


def exported(images: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {taken.name: images.numpy()})[0])


# %% [markdown]
# ## Is it as robust?
#
# An attack needs gradients, which the exported program does not have. But it is the same function as the model in
# PyTorch: images that were attacked on the one show the robustness of the other.

# %%
attack = torchattacks.PGD(small, eps=EPS, alpha=EPS / 4, steps=20)
right = {"PyTorch": 0, "ONNX": 0}
attacked_images, apart = 0, 0.0
for images, labels in test:
    attacked = attack(images, labels)
    with torch.no_grad():
        logits = {"PyTorch": small(attacked), "ONNX": exported(attacked)}
    for name, each in logits.items():
        right[name] += int((each.argmax(dim=1) == labels).sum())
    attacked_images += len(images)
    apart = max(apart, float((logits["PyTorch"] - logits["ONNX"]).abs().max()))

for name, count in right.items():
    print(f"{name:<8} {count / attacked_images:.1%} of {attacked_images} attacked images are classified correctly")
print(f"The logits differ by {apart:.1g} at most.")

# %% [markdown]
# ## In two commands
#
# The same from the command line, for a state dict of a timm model:
#
# ```sh
# tp-mrs prune --checkpoint robust.safetensors --model resnet10t --model-kwargs channels=8,16,32,64 stem_width=8
# tp-mrs export tp-mrs-run/model.safetensors --out small.onnx
# ```
