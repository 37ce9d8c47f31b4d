"""Data sets: the embedded one, the real ones where they are at hand, and small ones in the published formats."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tp_mrs import InputError
from tp_mrs.data import LOADERS, load_data, make_loader, random_subset


def check(data: Any) -> None:
    for split in (data.train, data.calibration, data.test):
        image, label = split[0]
        assert image.shape == data.shape
        assert image.dtype == torch.float32
        assert 0 <= image.min() <= image.max() <= 1
        assert 0 <= int(label) < data.num_classes
    assert len(data.train) == len(data.calibration)
    assert len(data.mean) == len(data.std) == data.shape[0]


def test_digits() -> None:
    data: Any = load_data("digits")
    check(data)
    assert (len(data.train), len(data.test), data.num_classes) == (1297, 500, 10)
    again = load_data("digits")
    assert all(torch.equal(data.test[i][0], again.test[i][0]) for i in (0, 100, 499))
    train = {image.numpy().tobytes() for image, _ in (data.calibration[i] for i in range(1297))}
    assert not any(data.test[i][0].numpy().tobytes() in train for i in range(500))


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published data: what TP_MRS_DATA names, or unpacked from a folder beside the checkout."""
    if os.environ.get("TP_MRS_DATA"):
        return Path(os.environ["TP_MRS_DATA"])
    script = Path(__file__).parents[2] / "shared" / "data" / "unpack.py"
    if not script.is_file():
        pytest.skip("no real data: set TP_MRS_DATA to a folder with cifar-10-batches-py/ and tiny-imagenet-200/")
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(script), str(folder), "cifar10", "tiny-imagenet-10"], check=True)
    return folder


def test_real_cifar10(real_data: Path) -> None:
    data: Any = load_data("cifar10", real_data)
    check(data)
    assert (len(data.train), len(data.test), data.num_classes) == (50_000, 10_000, 10)
    sample = torch.stack([data.calibration[i][0] for i in range(0, 50_000, 100)])
    assert sample.mean(dim=(0, 2, 3)).tolist() == pytest.approx(data.mean, abs=0.02)
    assert sample.std(dim=(0, 2, 3)).tolist() == pytest.approx(data.std, abs=0.02)


def test_real_tiny_imagenet(real_data: Path) -> None:
    data: Any = load_data("tiny-imagenet", real_data)
    check(data)
    assert (len(data.train), len(data.test), data.num_classes) == (5000, 500, 10)


def picture(path: Path, mode: str = "RGB", size: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size, size) if mode == "L" else (size, size, 3)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, np.uint8)).convert(mode).save(path, "JPEG")


def test_tiny_imagenet_as_published(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for name in ("n02", "n01"):
        for i in range(3):
            picture(root / "train" / name / "images" / f"{name}_{i}.JPEG", "L" if i == 0 else "RGB")
    for i in range(4):
        picture(root / "val" / "images" / f"val_{i}.JPEG")
    rows = [f"val_{i}.JPEG\t{'n01' if i < 3 else 'n02'}\t0\t0\t62\t62" for i in range(4)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    data = load_data("tiny-imagenet", tmp_path)
    check(data)
    assert [label for _, label in (data.test[i] for i in range(4))] == [0, 0, 0, 1]  # classes in sorted order
    assert data.num_classes == 2
    assert data.class_names == ("n01", "n02")


def test_svhn_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
    from torchvision import datasets

    for split in ("train", "test"):
        images = np.random.default_rng(0).integers(0, 255, (32, 32, 3, 5), np.uint8)
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": np.array([[1], [2], [10], [4], [5]])})
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)  # ours are not the official bytes
    data: Any = load_data("svhn", tmp_path)
    check(data)
    assert [label for _, label in data.test] == [1, 2, 0, 4, 5]  # the digit 0 is written as 10
    assert data.class_names == tuple("0123456789")


def test_folders_of_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            picture(tmp_path / split / name / "a.jpg", size=80)
    data = load_data("image-folder", tmp_path, image_size=48)
    check(data)
    assert (data.num_classes, data.shape) == (2, (3, 48, 48))
    assert data.class_names == ("cat", "dog")


@pytest.mark.parametrize("name", [name for name in LOADERS if name != "digits"])
def test_missing_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data_dir: .* needs the folder"):
        load_data(name)
    with pytest.raises(InputError, match=r"data_dir: .* is not a folder"):
        load_data(name, tmp_path / "nowhere")
    with pytest.raises(InputError, match="data_dir: "):
        load_data(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="data: expected one of digits, cifar10"):
        load_data("mnist")


def test_different_classes_in_the_splits(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "cat" / "a.jpg")
    picture(tmp_path / "val" / "dog" / "a.jpg")
    with pytest.raises(InputError, match="different class folders"):
        load_data("image-folder", tmp_path)


def test_order_and_subsets_depend_on_the_seed_alone() -> None:
    data = load_data("digits").calibration

    def labels(seed: int) -> list[int]:
        return [
            int(label) for _, batch in make_loader(data, batch_size=500, shuffle=True, seed=seed) for label in batch
        ]

    assert labels(1) == labels(1) != labels(2)
    subsets = [[int(label) for _, label in random_subset(data, 50, seed=seed)] for seed in (1, 1, 2)]  # type: ignore[attr-defined]
    assert subsets[0] == subsets[1] != subsets[2]
    assert len(random_subset(data, 10**6)) == 1297  # type: ignore[arg-type]
