"""Models by name on the Hugging Face hub: here a server on this machine, which answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch

from tests.conftest import randomised
from tp_mrs import InputError, cli, create_model, load, normalize, save
from tp_mrs.data import load_data
from tp_mrs.dense import dense_file, new_model
from tp_mrs.models import left_untrained, normalization

Capture = pytest.CaptureFixture[str]
NARROW: dict[str, Any] = {"channels": (8, 8, 8, 8)}
IMAGES = torch.rand(2, 3, 80, 80)


class Handler(BaseHTTPRequestHandler):
    """Serves `root/owner/name/file` as `/owner/name/resolve/main/file`."""

    root: Path

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        problem, content = self.find()
        self.send_response(404 if problem else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if problem:
            self.send_header("X-Error-Code", problem)
        self.end_headers()
        return content

    def find(self) -> tuple[str, bytes]:
        """The hub's code for what is missing, if something is, and the file's content."""
        asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if asked is None or not (self.root / asked[1]).is_dir():
            return "RepoNotFound", b""
        if asked[2] != "main":
            return "RevisionNotFound", b""
        file = self.root / asked[1] / asked[3]
        return ("", file.read_bytes()) if file.is_file() else ("EntryNotFound", b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What is put into this folder as `owner/name/file` is on the hub."""
    root = tmp_path / "hub"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Handler", (Handler,), {"root": root}))
    address = f"http://127.0.0.1:{server.server_port}"
    settings = huggingface_hub.constants
    monkeypatch.setattr(settings, "ENDPOINT", address)
    monkeypatch.setattr(settings, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(settings, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("TP_MRS_CACHE", str(tmp_path / "cache"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield root
    server.shutdown()
    thread.join()
    server.server_close()


def publish(folder: Path, architecture: str = "resnet18", **arguments: Any) -> Any:
    """Put a model into the folder as timm does; returns it."""
    model = randomised(timm.create_model(architecture, **arguments)).eval()
    noted = {name: value for name, value in arguments.items() if name != "num_classes"}
    timm.models.save_for_hf(model, str(folder), safe_serialization=True, model_config={"model_args": noted})
    return model


def test_a_model_of_the_hub_with_its_weights(hub: Path, tmp_path: Path) -> None:
    theirs = publish(hub / "someone/net", num_classes=5, **NARROW)
    ours: Any = create_model("hf-hub:someone/net", num_classes=5, pretrained=True).eval()
    assert torch.equal(ours(IMAGES), theirs(IMAGES))
    path = save(normalize(ours, [0.5] * 3, [0.5] * 3), tmp_path / "kept.safetensors")
    (hub / "someone/net/config.json").unlink()
    assert torch.equal(load(path)(IMAGES), ours(IMAGES))  # by timm's plain name and the arguments noted on the hub
    assert ours.tp_mrs_recipe["architecture"] == "resnet18"


def test_without_pretrained_it_is_the_architecture_alone(hub: Path) -> None:
    theirs = publish(hub / "someone/net", num_classes=5, **NARROW)
    ours: Any = create_model("hf-hub:someone/net", num_classes=3)
    assert ours.conv1.weight.shape == theirs.conv1.weight.shape
    assert not torch.equal(ours.conv1.weight, theirs.conv1.weight)
    assert ours(IMAGES).shape == (2, 3)


def test_timms_own_names(hub: Path) -> None:
    theirs = publish(hub / "timm/test_resnet.r160_in1k", "test_resnet")
    for name in ("test_resnet", "test_resnet.r160_in1k", "timm/test_resnet.r160_in1k"):
        ours = create_model(name, num_classes=1000, pretrained=True).eval()
        assert torch.equal(ours(IMAGES), theirs(IMAGES))


def test_a_folder_of_timms(tmp_path: Path) -> None:
    theirs = publish(tmp_path / "net", num_classes=5, **NARROW)
    ours = create_model(f"local-dir:{tmp_path / 'net'}", num_classes=5, pretrained=True).eval()
    assert torch.equal(ours(IMAGES), theirs(IMAGES))


def test_what_was_downloaded_needs_no_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = publish(hub / "someone/net", num_classes=5, **NARROW)
    publish(hub / "someone/other", num_classes=5, **NARROW)
    create_model("hf-hub:someone/net", num_classes=5, pretrained=True)
    create_model("hf-hub:someone/other", num_classes=5)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ours = create_model("hf-hub:someone/net", num_classes=5, pretrained=True).eval()
    assert torch.equal(ours(IMAGES), theirs(IMAGES))
    unreachable = r"\(it was not downloaded before, and the hub can't be reached; check the connection\)"
    with pytest.raises(InputError, match=rf"model: cannot download the weights of hf-hub:someone/other {unreachable}"):
        create_model("hf-hub:someone/other", num_classes=5, pretrained=True)
    with pytest.raises(InputError, match=rf"model: cannot download config.json of hf-hub:someone/third {unreachable}"):
        create_model("hf-hub:someone/third", num_classes=5)
    with pytest.raises(InputError, match=rf"path: cannot download model.safetensors of hf-hub:me/net {unreachable}"):
        load("hf-hub:me/net")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:someone/nothing", "cannot download config.json of .* \\(there is no such model, or it is private"),
        ("hf-hub:someone/net@old", "cannot download config.json of .* \\(there is no such revision\\)"),
        ("hf-hub:someone/empty", "cannot download config.json of .* \\(there is no such file\\)"),
        ("hf-hub:some one/net", "cannot download config.json of hf-hub:some one/net \\(.*'some one/net'"),
        ("hf-hub:someone/else", "config.json of hf-hub:someone/else names no architecture of timm's"),
        ("hf-hub:someone/text", "config.json is not valid JSON"),
        ("hf-hub:someone/new", "timm has no architecture 'resnet81'; did you mean"),
        ("hf-hub:someone/light", "cannot download the weights of hf-hub:someone/light \\(there is no such file\\)"),
        ("someone/net", "timm has no architecture 'someone/net'; on the Hugging Face hub it is hf-hub:someone/net"),
        ("local-dir:/nowhere", "cannot read /nowhere/config.json \\(No such file"),
        ("hf-hub:someone/wrong", "timm cannot make 'hf-hub:someone/wrong' with .*size mismatch"),
        ("resnet10", "timm has no architecture 'resnet10'; did you mean"),
        ("resnet34.none", "timm cannot make 'resnet34.none'.*Invalid pretrained tag"),
    ],
)
def test_names_that_are_refused(name: str, message: str, hub: Path) -> None:
    publish(hub / "someone/net", num_classes=5, **NARROW)
    publish(hub / "someone/wrong", num_classes=5)
    files = {
        "empty/README.md": "",
        "else/config.json": '{"model_type": "bert"}',
        "text/config.json": "model",
        "new/config.json": '{"architecture": "resnet81"}',
        "light/config.json": (hub / "someone/net/config.json").read_text(),
        "wrong/config.json": (hub / "someone/net/config.json").read_text(),
    }
    for file, content in files.items():
        path = hub / "someone" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    with pytest.raises(InputError, match=f"^model: .*{message}"):
        create_model(name, num_classes=5, pretrained=True)


def test_a_model_of_ours_is_not_timms_to_make(hub: Path) -> None:
    folder = hub / "me/small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet18", "tp_mrs": {}}))
    for name, path in (("hf-hub:me/small", "hf-hub:me/small"), (f"local-dir:{folder}", str(folder))):
        with pytest.raises(InputError, match=re.escape(f"read it with tp_mrs.load({path!r}), or give --checkpoint")):
            create_model(name, num_classes=5, pretrained=True)


def test_layers_without_weights_are_named(hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(hub / "someone/net", num_classes=5, **NARROW)
    with caplog.at_level(logging.WARNING, "tp_mrs.models"):
        create_model("hf-hub:someone/net", num_classes=5, pretrained=True)
        create_model("hf-hub:someone/net", num_classes=3, image_size=32)
        assert caplog.messages == []
        create_model("hf-hub:someone/net", num_classes=3, pretrained=True)
        create_model("hf-hub:someone/net", num_classes=5, image_size=32, pretrained=True)
    reasons = [message.partition("its weights leave untrained: ")[2] for message in caplog.messages]
    assert reasons == [
        "fc (3 classes in place of 5)",
        "conv1 (fitted to images of 32 pixels)",
    ]
    with torch.device("meta"):
        vgg = create_model("vgg11", num_classes=1000, image_size=32)
    assert left_untrained(vgg, 32) == "pre_logits, head (fitted to images of 32 pixels)"
    assert left_untrained(vgg, 224) == ""


def test_images_are_normalised_as_the_weights_expect(hub: Path) -> None:
    publish(hub / "someone/net", num_classes=10, **NARROW)
    digits = load_data("digits")
    coloured = replace(digits, shape=(3, 32, 32), mean=(0.1, 0.2, 0.3), std=(0.4,) * 3)
    for data, pretrained, mean in (
        (coloured, True, [0.485, 0.456, 0.406]),
        (coloured, False, coloured.mean),
        (digits, True, digits.mean),  # one channel: the weights' statistics are of three
    ):
        model = new_model(data, "hf-hub:someone/net", {"pretrained": pretrained}, seed=0)
        statistics = normalization(model)
        assert statistics is not None
        assert statistics[0] == pytest.approx(mean)


def test_what_is_untrained_comes_from_the_seed(hub: Path) -> None:
    publish(hub / "someone/net", num_classes=5, **NARROW)
    before = torch.get_rng_state()
    models: list[Any] = [
        new_model(load_data("digits"), "hf-hub:someone/net", {"pretrained": True}, seed=seed) for seed in (0, 0, 1)
    ]
    assert torch.equal(models[0].fc.weight, models[1].fc.weight)
    assert not torch.equal(models[0].fc.weight, models[2].fc.weight)
    assert torch.equal(models[0].layer1[0].conv1.weight, models[2].layer1[0].conv1.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cache_tells_hub_models_apart(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 8, "seed": 0, "device": "cpu", "cache": tmp_path}
    paths = {
        dense_file(load_data("digits"), name, arguments=arguments, **options)
        for name in ("hf-hub:a/b", "hf-hub:a-b")
        for arguments in ({}, {"pretrained": True})
    }
    assert len(paths) == 4
    assert {path.parent for path in paths} == {tmp_path}


QUICK = ["--calibration-images", "16", "--test-images", "10", "--attacks", "fgsm", "--quiet"]
TUNE = ["--epochs", "0.05", "--test-images", "10", "--attacks", "fgsm", "--quiet"]


def run(*arguments: str) -> int:
    return cli.main(arguments)


def test_the_command_line_takes_the_weights_as_they_are(hub: Path, tmp_path: Path, capsys: Capture) -> None:
    theirs = publish(hub / "someone/net", "test_byobnet", num_classes=10)
    model = ["--model", "hf-hub:someone/net", "--pretrained"]
    assert run("evaluate", *QUICK, *model, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"] == sum(p.numel() for p in theirs.parameters()) - 2 * theirs.stem.conv.weight[:, 0].numel()
    out = tmp_path / "out"
    assert run("prune", *QUICK, *model, "--epochs", "0", "--out", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out)["before"]["outcomes"] == found["outcomes"]
    assert "base_model: someone/net\n" in (out / "README.md").read_text()
    (hub / "someone/net/config.json").unlink()
    assert run("evaluate", *QUICK, "--checkpoint", str(out), "--json") == 0  # the folder


def test_the_command_line_trains_what_weights_leave_untrained(hub: Path, tmp_path: Path, capsys: Capture) -> None:
    publish(hub / "someone/net", num_classes=5, **NARROW)
    model = ["--model", "hf-hub:someone/net", "--pretrained"]
    out = tmp_path / "out"
    for command in (["evaluate"], ["prune", "--out", str(out)], ["prune", "--dry-run"]):
        assert run(*command, *QUICK, *model) == 2
        error = capsys.readouterr().err
        assert (
            "tp-mrs: pretrained: on digits the weights of hf-hub:someone/net leave untrained: fc (10 classes" in error
        )
        assert "conv1 (fitted to images of 32 pixels); train the model first, with --dense-epochs N" in error
    assert not list(out.glob("*"))
    assert run("evaluate", *QUICK, *model, "--dense-epochs", "0.05") == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1  # kept, trained
    assert run("finetune", *TUNE, *model, "--out", str(out)) == 0
    tuned: Any = load(out)
    assert tuned.fc.out_features == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "hf-hub:someone/nothing", "--pretrained"], "model: cannot download config.json of"),
        (["--checkpoint", "hf-hub:someone/nothing"], "checkpoint: cannot download model.safetensors of"),
        (["--checkpoint", "hf-hub:someone/net", "--pretrained"], "pretrained: the weights come from the checkpoint"),
    ],
)
def test_the_command_line_refuses(
    arguments: list[str], message: str, hub: Path, tmp_path: Path, capsys: Capture
) -> None:
    for command in ("prune", "finetune"):
        assert run(command, *arguments, "--out", str(tmp_path / "out"), "--quiet") == 2
        assert capsys.readouterr().err.startswith(f"tp-mrs: {message}")
    assert not list(tmp_path.glob("out/*"))


def test_a_plain_state_dict_of_the_hub(hub: Path, capsys: Capture) -> None:
    model = create_model("resnet18", num_classes=10, in_chans=1, image_size=32, **NARROW)
    folder = hub / "someone/plain"
    folder.mkdir(parents=True)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    options = ["--model", "resnet18", "--model-kwargs", "channels=8,8,8,8", "--checkpoint", "hf-hub:someone/plain"]
    assert run("evaluate", *QUICK, *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["params"] == sum(p.numel() for p in model.parameters())
