"""Save a model: as one file, or as a folder for the Hugging Face hub with a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from ._version import versions
from .attacks import L2_EPS
from .errors import InputError, check_module
from .evaluation import Evaluation, comparison, size_in_bytes
from .files import check_output_folder, write_bytes, write_json
from .html import BUDGETS, CAPTIONS, in_words, warnings, what_was_done
from .hub import CONFIG, HUB, WEIGHTS, on_hub
from .pipeline import Report
from .storage import save_file
from .tensorfile import read

CARD = "README.md"
FOLDER_FILES = (WEIGHTS, CONFIG, CARD)
PATHS = ("checkpoint", "teacher", "data_dir", "out")


def save(
    model: nn.Module,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    report: Report | Evaluation | None = None,
    dataset: str | None = None,
) -> Path:
    """Write `model`, pruned or not, as one safetensors file; with a `report`, as a folder for the Hugging Face hub.

    The tensors are all parameters and buffers, those outside the state dict too, in their own types. The metadata says
    how timm makes the architecture, the class names, the normalisation, the numbers of attention heads, the groups of
    convolutions, the widths of norms without weights, and the versions; a checksum covers both. Make models with
    `tp_mrs.create_model`, which remembers its arguments: timm itself does not. Where the architecture cannot be made
    again from what is known, a warning says so, and `load` needs a factory.

    The folder holds that file as `model.safetensors`; a `config.json` of timm's form; and `README.md`, a model card
    with accuracies and their intervals, size, attacks, and how to load it. `hf upload OWNER/NAME FOLDER .` pushes it,
    and `load("hf-hub:OWNER/NAME")` reads it. The licence is for you to add.

    Args:
        model: any module; stays as it is.
        path: the file, usually `*.safetensors`, or with `report` the folder, which is created if need be. Files are
            replaced whole or not at all.
        class_names: one for each output, in order; those in `model.class_names` if None and there are any.
        report: for the model card: what `mrpf` or `evaluate` returned for this model.
        dataset: for the model card: the name of the data set, as on the hub.

    Returns:
        where it was written.

    Raises:
        InputError: the class names are not one string for each output, the report is neither or of another model, the
            model holds what safetensors cannot, or a file cannot be written.
    """
    if report is None:
        return save_file(model, path, class_names=class_names)
    check_module(model)
    return save_folder(model, path, _check_report(model, report), class_names=class_names, dataset=dataset)


def save_folder(
    model: nn.Module,
    path: str | Path,
    report: Report | Evaluation,
    *,
    class_names: Sequence[str] | None = None,
    dataset: str | None = None,
    run: Mapping[str, Any] | None = None,
    pictures: Sequence[str] = (),
) -> Path:
    """What `save` says of a folder.

    Args:
        model, path, report, class_names, dataset: as for `save`.
        run: the settings that `run.yaml` has; the report's if None.
        pictures: what the card shows of those that `CAPTIONS` has, PNG files in the folder.
    """
    folder = check_output_folder(path, name="path", files=FOLDER_FILES)
    known: Any = read(save_file(model, folder / WEIGHTS, class_names=class_names))[0]
    write_json(folder / CONFIG, config(known))
    write_bytes(folder / CARD, model_card(known, report, dataset, run, pictures).encode())
    return folder


def config(known: Mapping[str, Any]) -> dict[str, Any]:
    """Content of `config.json`: what timm writes there of an architecture, as far as it is known.

    Args:
        known: the metadata of the model's file.
    """
    arguments = dict(known["recipe"] or {})
    size, channels = arguments.pop("image_size", None), arguments.get("in_chans", 3)
    statistics = known["normalize"] or {}
    found = {
        "architecture": arguments.pop("architecture", None),
        "num_classes": arguments.pop("num_classes", None),
        "label_names": known["class_names"],
        "model_args": arguments,
        "pretrained_cfg": {**({"input_size": [channels, size, size]} if size else {}), **statistics},
        "tp_mrs": {"format": known["format"]},  # tells models of ours: their shapes are not the architecture's
    }
    return {name: value for name, value in found.items() if value}


def model_card(
    known: Mapping[str, Any],
    report: Report | Evaluation,
    dataset: str | None = None,
    run: Mapping[str, Any] | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """Content of `README.md`; arguments as `config` and `save_folder`."""
    recipe, rows = known["recipe"] or {}, _rows(report)
    title = f"{recipe.get('architecture', 'Model')}{f' on {dataset}' if dataset else ''}"
    if isinstance(report, Report):
        title += f", pruned to {report.rounds[-1].reached:.1%} of its {BUDGETS[report.settings['budget']]}"
        notes = [*what_was_done(report), *(f"Warning: {text}" for text in warnings(report))]
        settings = run or report.settings
    else:
        notes, settings = [f"Warning: {text}" for text in report.warnings], run or {}
    parts = [
        f"---\n{_metadata(title, rows, dataset, _origin(settings)).to_yaml()}\n---",
        f"# {title}",
        *notes,
        *(_results(rows) if rows else ()),
        *(f"![{CAPTIONS[name]}]({name}.png)" for name in pictures),
        "## How to load it",
        _loading(recipe),
        *(_settings(settings) if settings else ()),
        f"Made with {', '.join(f'{name} {number}' for name, number in versions().items())}.",
    ]
    return "\n\n".join(parts) + "\n"


def _rows(report: Report | Evaluation) -> dict[str, Evaluation]:
    """The evaluations there are, that of the model itself last."""
    return report.stages if isinstance(report, Report) else {"model": report}


def _check_report(model: nn.Module, report: object) -> Report | Evaluation:
    if not isinstance(report, Report | Evaluation):
        raise InputError(f"report: expected what mrpf or evaluate returned, got {type(report).__name__}")
    size = size_in_bytes(model)
    for evaluation in list(_rows(report).values())[-1:]:
        if evaluation.size_bytes != size:
            raise InputError(
                f"report: it is of a model that takes {evaluation.size_bytes} bytes, this one takes {size}; evaluate "
                "the model that you save"
            )
    return report


def _metadata(title: str, rows: Mapping[str, Evaluation], dataset: str | None, origin: str | None) -> ModelCardData:
    """What the hub shows and searches: accuracies of the last row, if there is one and the data have a name."""
    results = []
    if rows and dataset:
        last = list(rows.values())[-1]
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type="accuracy",
                metric_name="clean accuracy" if name == "clean" else f"robust accuracy ({name})",
                metric_value=round(last.accuracy(name), 4),
            )
            for name in last.names
        ]
    return ModelCardData(
        library_name="tp_mrs",
        pipeline_tag="image-classification",
        tags=["timm", "pruning", "adversarial-robustness"],
        base_model=origin,
        datasets=[dataset] if dataset else None,
        metrics=["accuracy"],
        model_name=title if results else None,
        eval_results=results or None,
    )


def _origin(settings: Mapping[str, Any]) -> str | None:
    """The model on the hub that it was made from, if it was."""
    names = (settings.get("checkpoint"), settings.get("model") if settings.get("pretrained") else None)
    return next((str(name).removeprefix(HUB).partition("@")[0] for name in names if on_hub(name)), None)


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """A heading, and all settings but paths, which are nobody's business."""
    told = {name: value for name, value in settings.items() if value is not None and name not in PATHS}
    lines = [f"{name.replace('_', '-')}: {in_words(value)}" for name, value in told.items()]
    return ["## Settings", "\n".join(["```text", *lines, "```"])]


def _results(rows: Mapping[str, Evaluation]) -> list[str]:
    """A heading, the table of `print_evaluations` without times, which are this machine's, and what it shows."""
    first, last = next(iter(rows.values())), list(rows.values())[-1]
    accuracies, sizes = comparison({name: replace(row, latency_ms=None) for name, row in rows.items()})
    table = [_line("", *rows), _line("---", *["---:"] * len(rows))]
    table += [_line(f"{name} (%)", *map("{0[0]} ({0[1]})".format, row)) for name, row in accuracies.items()]
    table += [_line(name, *cells) for name, cells in sizes.items()]
    caption = (
        f"Accuracy on {last.images} test images, in brackets its 95% interval, without an attack and under attacks, "
        f"named L∞ ones of size {last.eps:.4g} and L2 ones of {L2_EPS:.4g} (images are in [0, 1])."
    )
    if "worst" in last.names:
        caption += " Worst: under the worst of these for each image."
    if len(rows) > 1:
        caption += (
            f" The model keeps {last.macs / first.macs:.1%} of the multiply-accumulates and "
            f"{last.params / first.params:.1%} of the parameters."
        )
    return ["## Results", "\n".join(table), caption]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _loading(recipe: Mapping[str, Any]) -> str:
    factory = "" if recipe else ", factory=make_unpruned"
    height, width = (recipe.get("image_size", side) for side in ("height", "width"))
    shape = f"(N, {recipe.get('in_chans', 'channels')}, {height}, {width})"
    return (
        "```python\n"
        "import tp_mrs\n\n"
        f'model = tp_mrs.load("hf-hub:OWNER/NAME"{factory})  # or the folder that holds these files\n'
        f"logits = model(images)  # {shape} in [0, 1], normalised by the model itself\n"
        "```"
    )
