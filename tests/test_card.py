"""A model as a folder for the Hugging Face hub: what is in it, and that it comes back from there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks
from huggingface_hub import ModelCard
from torch import nn

from tests.conftest import Batches, small_cnn
from tests.test_hub import hub as hub
from tp_mrs import InputError, Report, create_model, evaluate, load, mrpf, normalize, save
from tp_mrs.card import model_card, save_folder

SIDE = 16
IMAGES = torch.rand(2, 3, SIDE, SIDE)


def network() -> nn.Module:
    model = create_model("resnet18", num_classes=4, image_size=SIDE, channels=(8, 12, 16, 20))
    return normalize(model, [0.5, 0.4, 0.3], [0.25] * 3).eval()


@pytest.fixture(scope="module")
def pruned() -> tuple[nn.Module, Report]:
    torch.manual_seed(0)
    model = network()
    data: Batches = [(torch.rand(8, 3, SIDE, SIDE), torch.arange(8) % 4)]
    attacks = ["fgsm", torchattacks.PGD]
    return model, mrpf(model, IMAGES, data, torchattacks.FGSM, macs=0.5, test_data=data, attacks=attacks, eps=0.02)


def test_the_folder_comes_back_from_the_hub(pruned: tuple[nn.Module, Report], hub: Path) -> None:
    model, report = pruned
    folder = save(model, hub / "me" / "small", report=report, class_names=list("abcd"))
    assert folder == hub / "me" / "small"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for source in (folder, str(folder), "hf-hub:me/small", "hf-hub:me/small@main"):
        again: Any = load(source)
        assert torch.equal(again(IMAGES), model(IMAGES))
        assert again.class_names == list("abcd")
    with pytest.raises(InputError, match=r"path: cannot download model.safetensors of hf-hub:me/large \(there is no"):
        load("hf-hub:me/large")
    with pytest.raises(InputError, match=r"was saved by tp_mrs, .*read it with tp_mrs\.load\('hf-hub:me/small'\)"):
        create_model("hf-hub:me/small", num_classes=4)


def test_config_is_of_timms_form(pruned: tuple[nn.Module, Report], tmp_path: Path) -> None:
    folder = save(pruned[0], tmp_path / "small", report=pruned[1], class_names=list("abcd"))
    content = json.loads((folder / "config.json").read_text())
    assert content.pop("tp_mrs") == {"format": "tp_mrs.model/2"}
    assert content.pop("pretrained_cfg") == {
        "input_size": [3, SIDE, SIDE],
        "mean": pytest.approx([0.5, 0.4, 0.3]),
        "std": [0.25] * 3,
    }
    assert content == {
        "architecture": "resnet18",
        "num_classes": 4,
        "label_names": list("abcd"),
        "model_args": {"channels": [8, 12, 16, 20], "in_chans": 3},
    }


def test_the_card_says_what_the_report_does(pruned: tuple[nn.Module, Report], tmp_path: Path) -> None:
    report = pruned[1]
    dense, last = report.stages["dense"], report.stages["fine-tuned"]
    card = ModelCard.load(save(pruned[0], tmp_path / "small", report=report, dataset="noise") / "README.md")
    told = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert told == {
        "clean accuracy": round(last.clean, 4),
        "robust accuracy (fgsm)": round(last.robust["fgsm"], 4),
        "robust accuracy (PGD)": round(last.robust["PGD"], 4),
        "robust accuracy (worst)": round(last.worst, 4),
    }
    assert card.data.library_name == "tp_mrs"
    assert card.data.datasets == ["noise"]
    assert card.data.get("license") is None
    assert "base_model" not in card.data.to_dict()
    text = card.text
    assert re.search(r"^# resnet18 on noise, pruned to \d+\.\d% of its multiply-accumulates$", text, re.MULTILINE)
    assert f"| clean (%) | {100 * dense.clean:.1f} ({dense.interval_text('clean')}) |" in text
    assert f"| MACs (M) | {dense.macs / 1e6:.1f} | " in text
    assert f"keeps {last.macs / dense.macs:.1%} of the multiply-accumulates" in text
    assert "named L∞ ones of size 0.02 and L2 ones of 0.502" in text
    assert "ms, one image" not in text
    assert "was measured with FGSM" in text
    assert "eps: 0.02\n" in text


def test_the_card_loads_the_model_as_it_says(pruned: tuple[nn.Module, Report], hub: Path) -> None:
    text = (save(pruned[0], hub / "OWNER" / "NAME", report=pruned[1]) / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"images": IMAGES}
    exec(compile(blocks[0], "README.md", "exec"), names)  # noqa: S102 (our own card)
    assert torch.equal(names["logits"], pruned[0](IMAGES))
    assert f"# (N, 3, {SIDE}, {SIDE}) in [0, 1]" in blocks[0]


def test_of_an_evaluation_alone(batches: Batches, tmp_path: Path) -> None:
    model = small_cnn()
    evaluation = evaluate(model, batches, ["fgsm"])
    folder = save(model, tmp_path / "cnn", report=replace(evaluation, warnings=("too | good",)))
    assert json.loads((folder / "config.json").read_text()) == {"tp_mrs": {"format": "tp_mrs.model/2"}}
    text = (folder / "README.md").read_text()
    assert "# Model\n\nWarning: too | good\n\n## Results\n\n|  | model |\n| --- | ---: |\n| clean (%) |" in text
    assert "model-index" not in text  # it takes the name of the data set
    assert 'load("hf-hub:OWNER/NAME", factory=make_unpruned)' in text
    assert torch.equal(load(folder, factory=small_cnn)(IMAGES), model.eval()(IMAGES))


def test_without_test_data_there_are_no_results(pruned: tuple[nn.Module, Report], tmp_path: Path) -> None:
    untested = replace(pruned[1], before=None, after=None, rounds=(replace(pruned[1].rounds[0], pruned=None),))
    text = (save(pruned[0], tmp_path / "small", report=untested, dataset="noise") / "README.md").read_text()
    assert "## Results" not in text
    assert "## How to load it" in text


def test_paths_stay_at_home(pruned: tuple[nn.Module, Report], tmp_path: Path) -> None:
    paths = {name: f"/home/me/{name}" for name in ("checkpoint", "teacher", "data_dir", "out")}
    run = {"command": "prune", "macs": 0.5, **paths, "pretrained": False, "model": "hf-hub:a/b"}
    folder = save_folder(pruned[0], tmp_path / "small", pruned[1], run=run, pictures=["widths"])
    text = (folder / "README.md").read_text()
    assert "macs: 0.5" in text
    assert "/home/me" not in text
    assert "](widths.png)" in text
    assert "base_model" not in text


@pytest.mark.parametrize(
    "run", [{"checkpoint": "hf-hub:a/b@c"}, {"model": "hf-hub:a/b", "pretrained": True}, {"checkpoint": "hf-hub:a/b"}]
)
def test_the_model_that_it_was_made_from(run: dict[str, Any], pruned: tuple[nn.Module, Report]) -> None:
    known = {"recipe": None, "class_names": None, "normalize": None, "format": ""}
    assert "\nbase_model: a/b\n" in model_card(known, pruned[1], run=run)


def test_what_is_refused_is_not_written(pruned: tuple[nn.Module, Report], batches: Batches, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    with pytest.raises(InputError, match=r"report: expected what mrpf or evaluate returned, got dict"):
        save(pruned[0], folder, report={})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"report: .* model that takes \d+ bytes, this one takes \d+; evaluate"):
        save(network(), folder, report=pruned[1])
    with pytest.raises(InputError, match=r"class_names: expected a list of 4 strings"):
        save(pruned[0], folder, report=pruned[1], class_names=["a"])
    assert not list(tmp_path.glob("small/*"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"path: cannot write to .*file \(File exists\)"):
        save(pruned[0], tmp_path / "file", report=pruned[1])
    (folder / "README.md").mkdir(parents=True)
    with pytest.raises(InputError, match=r"path: cannot write .*README.md, it is a folder"):
        save(pruned[0], folder, report=pruned[1])
    assert [path.name for path in folder.iterdir()] == ["README.md"]
