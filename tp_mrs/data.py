"""Image classification data sets, in [0, 1], with a training and a test split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2 as transforms

from .errors import InputError, check_choice, check_count, check_path

Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class ImageData:
    """A data set: `train` is augmented, `calibration` is the same images without augmentation, `test` is held out.

    Each yields `(image, label)`: a float32 tensor (C, H, W) in [0, 1] and an int. `mean` and `std` are the training
    split's, per channel. `class_names` are in the order of the labels; None where the data set doesn't give any.
    """

    name: str
    num_classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Dataset[Any]
    calibration: Dataset[Any]
    test: Dataset[Any]
    class_names: tuple[str, ...] | None = None


def load_data(
    name: str, data_dir: str | Path | None = None, *, download: bool = False, image_size: int | None = None
) -> ImageData:
    """Load a data set by name.

    Args:
        name: `digits` (needs no files), `cifar10`, `cifar100`, `svhn`, `tiny-imagenet` (its published layout), or
            `image-folder` (`train/` and `val/` or `test/`, a folder per class).
        data_dir: folder that holds the data set as published.
        download: let torchvision fetch CIFAR or SVHN into `data_dir` if it is not there; it offers no others.
        image_size: side to which the images of an `image-folder` are resized and cropped, in pixels; 224 unless given.
            The other data sets' images keep their size.

    Raises:
        InputError: unknown name, missing `data_dir`, images that keep their size, the files are not there or damaged,
            or the download failed. From the data sets themselves, when the image is drawn: it cannot be read.
    """
    check_choice("data", name, LOADERS)
    if image_size is not None:
        check_count("image_size", image_size)
        if name != "image-folder":
            raise InputError(f"image_size: the images of {name} keep their size; leave it out, or give image-folder")
    if download and name in ("tiny-imagenet", "image-folder"):
        raise InputError(f"download: torchvision offers no {name}; unpack it yourself and give the folder (--data-dir)")
    if name == "digits":
        return _digits()
    if data_dir is None:
        raise InputError(f"data_dir: {name} needs the folder that holds it; give data_dir (--data-dir)")
    root = check_path("data_dir", data_dir)
    if not root.is_dir() and not download:
        raise InputError(
            f"data_dir: {root} is not a folder; give the one that holds {name}, or allow the download (--download)"
        )
    if name == "image-folder":
        return _image_folder(root, image_size or 224)
    return LOADERS[name](root, download)


def make_loader(
    dataset: Dataset[Any], *, batch_size: int, shuffle: bool = False, seed: int = 0, workers: int = 0
) -> DataLoader[Any]:
    """A `DataLoader` whose order depends on `seed` alone.

    So does augmentation for a given number of `workers`, which start from seeds that the loader's generator draws. With
    none it happens in the process itself and draws from torch's global generator, which `finetune` seeds.

    Args:
        dataset: yields `(image, label)`.
        batch_size: the last batch may be smaller.
        shuffle: in another order each epoch.
        seed: of order and workers.
        workers: processes that load images, each on a single thread; they end with the epoch, or with the iterator.
    """
    check_count("batch_size", batch_size)
    check_count("workers", workers, low=0)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=shuffle, generator=generator, num_workers=workers)


def random_subset(dataset: Dataset[Any], count: int, *, seed: int = 0) -> Dataset[Any]:
    """`count` images drawn without replacement; the whole set if it has no more."""
    total = len(dataset)  # type: ignore[arg-type]
    if count >= total:
        return dataset
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, order[:count].tolist())


def hold_out(data: ImageData, validation_images: int, *, seed: int = 0) -> tuple[ImageData, Dataset[Any]]:
    """Split images off the training split, to validate on: `(the rest, the held-out images)`.

    Args:
        data: stays as it is. In the rest, `train` and `calibration` lack the same images; all else is the same.
        validation_images: how many, drawn at random; each class in proportion, where labels are known without reading
            the images.
        seed: of the draw.

    Returns:
        The data set without these images, and the images without augmentation.

    Raises:
        InputError: fewer than one image, or none left to train on.
    """
    check_count("validation_images", validation_images)
    total = len(data.calibration)  # type: ignore[arg-type]
    if validation_images >= total:
        raise InputError(
            f"validation_images: expected fewer than the {total} training images of {data.name}, "
            f"got {validation_images}"
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    labels = _labels(data.calibration)
    if labels is not None:
        order = order[_spread(labels[order])]
    held, kept = order[:validation_images].tolist(), order[validation_images:].sort().values.tolist()
    rest = replace(data, train=Subset(data.train, kept), calibration=Subset(data.calibration, kept))
    return rest, Subset(data.calibration, held)


def _labels(dataset: Dataset[Any]) -> Tensor | None:
    """All labels, (images,), if the data set has them at hand."""
    if isinstance(dataset, Subset):
        whole = _labels(dataset.dataset)
        return None if whole is None else whole[list(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1]
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    return None if labels is None else torch.as_tensor(labels)


def _spread(labels: Tensor) -> Tensor:
    """An order in which every beginning holds the classes in proportion, and each class in the order it had."""
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        own = (labels == label).nonzero().squeeze(1)
        position[own] = (torch.arange(len(own), dtype=torch.float64) + 0.5) / len(own)
    return position.argsort(stable=True)


# --- the data sets -----------------------------------------------------------------------------------------------


def _digits() -> ImageData:
    """scikit-learn's 1,797 handwritten digits (8×8, 16 grey levels), enlarged to 32×32; 1,297 train, 500 test."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError("data: digits needs scikit-learn; install tp_mrs[cli]") from error
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).div(16).unsqueeze(1)
    images = torch.nn.functional.interpolate(images, size=32, mode="bilinear", align_corners=False)
    labels = torch.tensor(bunch.target, dtype=torch.long)
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=500, random_state=0, stratify=bunch.target
    )
    plain = TensorDataset(images[train], labels[train])
    mean, std = images[train].mean().item(), images[train].std().item()
    return ImageData(
        "digits",
        10,
        (1, 32, 32),
        (mean,),
        (std,),
        _Augmented(plain, transforms.RandomCrop(32, padding=2)),
        plain,
        TensorDataset(images[test], labels[test]),
        tuple(str(digit) for digit in range(10)),
    )


class _Augmented(Dataset[Any]):
    """A tensor data set whose images go through `transform` each time they are drawn."""

    def __init__(self, dataset: Dataset[Any], transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.dataset[index]
        return self.transform(image), label


def _augmentation(size: int, *, flip: bool) -> Transform:
    steps: list[Any] = [transforms.RandomCrop(size, padding=size // 8)]
    if flip:
        steps.append(transforms.RandomHorizontalFlip())
    return transforms.Compose([*steps, _TO_TENSOR])


_TO_TENSOR = transforms.Compose([transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True)])


def _torchvision(
    name: str,
    make: Callable[[bool, Transform], Dataset[Any]],
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    flip: bool,
    files: Iterable[tuple[Path, str]],
) -> ImageData:
    """A data set of torchvision's: `make(train, transform)`, which stands in `files`, each with its MD5 sum."""
    try:
        train = make(True, _augmentation(32, flip=flip))
        names = getattr(train, "classes", [str(digit) for digit in range(num_classes)])  # SVHN's are digits
        return ImageData(
            name,
            num_classes,
            (3, 32, 32),
            tuple(mean),
            tuple(std),
            train,
            make(True, _TO_TENSOR),
            make(False, _TO_TENSOR),
            tuple(names),
        )
    except (RuntimeError, OSError, HTTPException) as error:
        raise InputError(f"data_dir: {_what_is_wrong(name, list(files), error)}") from error


def _what_is_wrong(name: str, files: Sequence[tuple[Path, str]], error: Exception) -> str:
    """Why torchvision could not read or fetch these files, and what to do."""
    if not isinstance(error, RuntimeError):
        return f"could not fetch or read {name} ({error}); try again, or put the published files there yourself"
    damaged = next((path for path, checksum in files if path.is_file() and not check_integrity(path, checksum)), None)
    if damaged is not None:
        return f"{damaged} is damaged, perhaps by an interrupted download; delete it and fetch it again (--download)"
    missing = next((path for path, _ in files if not path.is_file()), None)
    return f"found no {name}: {missing} is missing; give the folder that holds it, or fetch it (--download)"


def _cifar(
    name: str, kind: type[datasets.CIFAR10], root: Path, download: bool, mean: Sequence[float], std: Sequence[float]
) -> ImageData:
    def make(train: bool, transform: Transform) -> Dataset[Any]:
        return kind(root, train=train, transform=transform, download=download)

    folder = root / kind.base_folder
    listed = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    files = [*((folder / name, checksum) for name, checksum in listed), (root / kind.filename, kind.tgz_md5)]
    return _torchvision(name, make, int(name.removeprefix("cifar")), mean, std, flip=True, files=files)


def _cifar10(root: Path, download: bool) -> ImageData:
    return _cifar("cifar10", datasets.CIFAR10, root, download, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def _cifar100(root: Path, download: bool) -> ImageData:
    return _cifar("cifar100", datasets.CIFAR100, root, download, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def _svhn(root: Path, download: bool) -> ImageData:
    def make(train: bool, transform: Transform) -> Dataset[Any]:
        split = "train" if train else "test"
        return datasets.SVHN(str(root), split=split, transform=transform, download=download)

    files = [(root / name, checksum) for _, name, checksum in map(datasets.SVHN.split_list.get, ("train", "test"))]
    mean, std = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    return _torchvision("svhn", make, 10, mean, std, flip=False, files=files)


def files_of(dataset: Dataset[Any]) -> dict[str, str]:
    """What tells a data set of image files from others: a checksum of their places and sizes; nothing of other data."""
    whole: Any = dataset
    while hasattr(whole, "dataset"):  # a part of it
        whole = whole.dataset
    listed: list[tuple[Any, Any]] = getattr(whole, "samples", None) or getattr(whole, "files", [])
    files = [Path(path) for path, _ in listed]
    if not files:
        return {}
    root = os.path.commonpath(files)
    sizes = sorted((os.path.relpath(path, root), path.stat().st_size) for path in files)
    return {"files": hashlib.sha256(repr(sizes).encode()).hexdigest()}


class UnreadableImageError(InputError):
    """An image file is damaged or missing.

    From a worker process torch sends the traceback as text, with the message at its end, and makes the error anew from
    that: only the message is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def _read_image(path: str | Path) -> Image.Image:
    """An image file as RGB, whatever its own mode."""
    try:
        return datasets.folder.pil_loader(str(path))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(
            f"data: cannot read the image {path} ({error}); put a good copy in its place, as published, or delete it"
        ) from error


class _ImageFiles(Dataset[Any]):
    """Image files with labels, read as RGB."""

    def __init__(self, files: Sequence[tuple[Path, int]], transform: Transform) -> None:
        self.files, self.transform = list(files), transform
        self.targets = [label for _, label in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return self.transform(_read_image(path)), label


def _tiny_imagenet(root: Path, download: bool) -> ImageData:
    root = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    annotations = root / "val" / "val_annotations.txt"
    if not (root / "train").is_dir() or not annotations.is_file():
        raise InputError(
            f"data_dir: expected tiny-imagenet as published in {root} (train/<class>/images/, val/val_annotations.txt)"
        )
    classes = sorted(folder.name for folder in (root / "train").iterdir() if folder.is_dir())
    label_of = {name: label for label, name in enumerate(classes)}
    train = [
        (path, label)
        for name, label in label_of.items()
        for path in sorted((root / "train" / name / "images").glob("*.JPEG"))
    ]
    rows = (line.split("\t") for line in annotations.read_text().splitlines() if line.strip())
    test = [(root / "val" / "images" / row[0], label_of[row[1]]) for row in rows if row[1] in label_of]
    if not train or not test:
        raise InputError(f"data_dir: found {len(train)} training and {len(test)} validation images in {root}")
    return ImageData(
        "tiny-imagenet",
        len(classes),
        (3, 64, 64),
        (0.4802, 0.4481, 0.3975),
        (0.2770, 0.2691, 0.2821),
        _ImageFiles(train, _augmentation(64, flip=True)),
        _ImageFiles(train, _TO_TENSOR),
        _ImageFiles(test, _TO_TENSOR),
        tuple(classes),
    )


def _image_folder(root: Path, size: int) -> ImageData:
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or held_out is None:
        raise InputError(f"data_dir: expected train/ and val/ (or test/) in {root}, each with a folder per class")
    centre = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), _TO_TENSOR])
    random = transforms.Compose(
        [transforms.RandomResizedCrop(size, scale=(0.5, 1)), transforms.RandomHorizontalFlip(), _TO_TENSOR]
    )
    try:
        train, calibration, test = (
            datasets.ImageFolder(str(folder), transform, loader=_read_image)
            for folder, transform in ((root / "train", random), (root / "train", centre), (held_out, centre))
        )
    except FileNotFoundError as error:
        why = str(error).rstrip(".")
        raise InputError(f"data_dir: {why}; put images there, or remove the empty folders") from error
    if train.classes != test.classes:
        odd = ", ".join(sorted({*train.classes} ^ {*test.classes}))
        raise InputError(
            f"data_dir: {root / 'train'} and {held_out} have different class folders; only one of them has {odd}"
        )
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    names = tuple(train.classes)
    return ImageData("image-folder", len(names), (3, size, size), *imagenet, train, calibration, test, names)


LOADERS: dict[str, Callable[..., ImageData]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "svhn": _svhn,
    "tiny-imagenet": _tiny_imagenet,
    "image-folder": _image_folder,
}
