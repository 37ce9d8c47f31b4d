"""Data sets: the embedded one, the real ones where they are at hand, and small ones in the published formats."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from http.client import IncompleteRead
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision import datasets

from tp_mrs import InputError, finetune
from tp_mrs.data import LOADERS, ImageData, files_of, hold_out, load_data, make_loader, random_subset


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
    grey = data.calibration[3][0]  # the first of n02's
    assert torch.equal(grey[0], grey[1])
    assert not torch.equal(data.calibration[4][0][0], data.calibration[4][0][1])


def test_svhn_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

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
    folder: Any = 3
    with pytest.raises(InputError, match="data_dir: expected a path"):
        load_data("cifar10", folder)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_no_size_of_images(size: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"image_size: expected an integer >= 1, got {size}"):
        load_data("image-folder", tmp_path, image_size=size)


def test_other_images_keep_their_size() -> None:
    with pytest.raises(InputError, match="image_size: the images of digits keep their size; leave it out"):
        load_data("digits", image_size=64)


def test_files_tell_folders_of_images_apart(tmp_path: Path) -> None:
    found = []
    for folder, size in (("a", 8), ("moved", 8), ("other", 9)):
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                picture(tmp_path / folder / split / name / "0.png", size=size)
        found.append(files_of(load_data("image-folder", tmp_path / folder, image_size=8).train))
    assert found[0] == found[1] != found[2]
    assert files_of(load_data("digits").train) == {}


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


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 as published, but of ten images a file; returns the folder of its files."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (10, 3072), np.uint8)
    names = [f"class {label}" for label in range(10)]
    contents = {
        "data_batch_1": {"data": pixels, "labels": list(range(10))},
        "test_batch": {"data": pixels, "labels": list(range(10))},
        "batches.meta": {"label_names": names},
    }
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()  # noqa: S324 (CIFAR's own check)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return folder


def test_cifar_as_published(cifar: Path) -> None:
    data: Any = load_data("cifar10", cifar.parent)
    check(data)
    assert data.class_names == tuple(f"class {label}" for label in range(10))


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_an_interrupted_download_is_named(name: str, cifar: Path) -> None:
    content = (cifar / name).read_bytes()
    (cifar / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"{name} is damaged, perhaps by an interrupted download; delete it and"):
        load_data("cifar10", cifar.parent)


def test_an_interrupted_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"half")
    with pytest.raises(InputError, match=r"cifar-100-python\.tar\.gz is damaged"):
        load_data("cifar100", tmp_path)
    (tmp_path / "train_32x32.mat").write_bytes(b"half")
    with pytest.raises(InputError, match=r"train_32x32\.mat is damaged"):
        load_data("svhn", tmp_path)


def test_a_missing_file_is_named(cifar: Path) -> None:
    (cifar / "test_batch").unlink()
    with pytest.raises(InputError, match=r"found no cifar10: .*test_batch is missing; give the folder"):
        load_data("cifar10", cifar.parent)


def test_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for reason in (URLError("no network"), IncompleteRead(b"half")):

        def stops(*_: Any, reason: Exception = reason, **__: Any) -> None:
            raise reason

        monkeypatch.setattr(datasets.CIFAR10, "download", stops)
        with pytest.raises(InputError, match=r"could not fetch or read cifar10 .*(no network|Incomplete).*; try again"):
            load_data("cifar10", tmp_path, download=True)
    for name in ("tiny-imagenet", "image-folder"):
        with pytest.raises(InputError, match=f"download: torchvision offers no {name}"):
            load_data(name, tmp_path, download=True)


def tiny_imagenet(root: Path, count: int = 4) -> Path:
    for name in ("n01", "n02"):
        for i in range(count):
            picture(root / "train" / name / "images" / f"{name}_{i}.JPEG")
    picture(root / "val" / "images" / "val_0.JPEG")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t62\t62\n")
    return root / "train" / "n01" / "images" / "n01_1.JPEG"


def workers_end() -> bool:
    """Whether all do so by themselves, which takes older versions of PyTorch a while."""
    for _ in range(100):
        if not multiprocessing.active_children():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["truncated", "text", "missing"])
def test_an_unreadable_image_is_named(how: str, workers: int, tmp_path: Path) -> None:
    path = tiny_imagenet(tmp_path)
    if how == "missing":
        data = load_data("tiny-imagenet", tmp_path)
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:700] if how == "truncated" else b"no image")
        data = load_data("tiny-imagenet", tmp_path)
    with pytest.raises(InputError) as caught:
        list(make_loader(data.calibration, batch_size=2, workers=workers))
    assert str(caught.value).startswith(f"data: cannot read the image {path} (")
    assert str(caught.value).endswith("); put a good copy in its place, as published, or delete it")
    del caught  # its traceback holds the loader's iterator
    gc.collect()
    assert workers_end()


def test_an_unreadable_image_in_a_folder_of_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(tmp_path / split / "cat" / "a.jpg")
    (tmp_path / "train" / "cat" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    data: Any = load_data("image-folder", tmp_path, image_size=16)
    data.train[0]
    with pytest.raises(InputError, match=r"data: cannot read the image .*b\.png"):
        data.train[1]


def test_workers_augment_as_the_seed_says(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    data = load_data("tiny-imagenet", tmp_path).train

    def drawn(seed: int, workers: int) -> torch.Tensor:
        torch.rand(1)  # the global generator is elsewhere each time
        return torch.cat([images for images, _ in make_loader(data, batch_size=2, seed=seed, workers=workers)])

    assert torch.equal(drawn(1, workers=2), drawn(1, workers=2))
    assert not torch.equal(drawn(1, workers=2), drawn(2, workers=2))
    assert workers_end()


class Threads(torch.utils.data.Dataset[Any]):
    """As its only image, how many threads it may use."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 1, 1), float(torch.get_num_threads())), 0


def test_workers_are_single_threaded() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        [(images, _)] = make_loader(Threads(), batch_size=1, workers=1)
    finally:
        torch.set_num_threads(before)
    assert images.item() == 1


def test_workers_end_with_training_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    loader = make_loader(load_data("tiny-imagenet", tmp_path).train, batch_size=2, workers=2)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 2))
    finetune(model, loader, objective="standard", lr=1e-3, epochs=0.5, progress=False)
    assert workers_end()


def test_held_out_images() -> None:
    data: Any = load_data("digits")
    rest, held = hold_out(data, 100, seed=1)
    images = [held[i] for i in range(100)]
    assert (len(rest.train), len(rest.calibration)) == (1197, 1197)  # type: ignore[arg-type]
    assert rest.test is data.test
    assert len(data.train) == 1297

    def keys(pairs: Any) -> set[bytes]:
        return {image.numpy().tobytes() for image, _ in pairs}

    everything = keys(data.calibration)
    kept = keys(rest.calibration[i] for i in range(1197))
    assert keys(images) <= everything  # without augmentation
    assert not keys(images) & kept
    assert keys(images) | kept == everything
    assert [int(rest.train[i][1]) for i in (0, 700)] == [int(rest.calibration[i][1]) for i in (0, 700)]
    counts = Counter(int(label) for _, label in images)
    whole = Counter(int(label) for _, label in data.calibration)
    assert all(abs(counts[label] - 100 * whole[label] / 1297) < 1 for label in range(10))
    again, other = hold_out(data, 100, seed=1)[1], hold_out(data, 100, seed=2)[1]
    assert keys(again[i] for i in range(100)) == keys(images) != keys(other[i] for i in range(100))


def test_images_held_out_of_the_rest_are_in_proportion_too() -> None:
    rest: Any = hold_out(load_data("digits"), 297)[0]
    held: Any = hold_out(rest, 100)[1]
    counts, whole = (Counter(int(part[i][1]) for i in range(len(part))) for part in (held, rest.calibration))
    assert all(abs(counts[label] - whole[label] / 10) < 1 for label in range(10))


def test_held_out_images_read_no_image_for_their_labels(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path).write_bytes(b"no image")
    rest, held = hold_out(load_data("tiny-imagenet", tmp_path), 2)
    assert sorted(rest.calibration.dataset.targets[i] for i in held.indices) == [0, 1]  # type: ignore[attr-defined]


def test_held_out_images_without_labels_at_hand() -> None:
    class Plain(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.full((1, 1, 1), float(index)), 0

    none = TensorDataset(torch.zeros(0))
    rest, held = hold_out(ImageData("plain", 2, (1, 1, 1), (0.5,), (0.5,), Plain(), Plain(), none), 3)
    found = [float(part[i][0]) for part, count in ((rest.calibration, 7), (held, 3)) for i in range(count)]
    assert sorted(found) == list(range(10))


@pytest.mark.parametrize("count", [0, 1297])
def test_too_few_or_too_many_held_out(count: int) -> None:
    with pytest.raises(InputError, match="validation_images: expected"):
        hold_out(load_data("digits"), count)
