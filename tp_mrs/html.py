"""A report as one HTML page: no scripts, nothing from elsewhere, for light and dark screens and for paper."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .evaluation import Evaluation, comparison
from .pipeline import Report

CAPTIONS = {
    "sensitivity": "How much robustness hangs on each group of coupled layers before it is pruned, and what share of "
    "its channels goes in the first round. Lines are 95% intervals.",
    "widths": "Channels of each group's root layer before (grey) and after pruning (blue).",
    "robustness": "Accuracy against the size of the perturbation; lines are 95% intervals.",
    "training": "Training loss of each epoch of fine-tuning.",
}

BUDGETS = {"macs": "multiply-accumulates", "params": "parameters", "channels": "prunable channels"}

STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: right; border-bottom: 1px solid #8886; vertical-align: top; }
th:first-child, table.settings td { text-align: left; overflow-wrap: anywhere; }
th[scope=row] { font-weight: normal; }
small, caption { opacity: 0.75; white-space: nowrap; }
caption { caption-side: bottom; text-align: left; white-space: normal; }
figure { margin: 1.5rem 0; break-inside: avoid; }
svg { max-width: 100%; height: auto; }
.warning { border-left: 0.3rem solid #d55e00; padding-left: 0.8rem; }
@media (prefers-color-scheme: dark) { svg { filter: invert(1) hue-rotate(180deg); } }
@media print { :root { color-scheme: light; } body { max-width: none; margin: 0; } svg { filter: none; } }
"""


def report_page(
    report: Report,
    *,
    model: str,
    data: str,
    run: Mapping[str, Any],
    classes: Sequence[str] = (),
    pictures: Mapping[str, str] | None = None,
) -> str:
    """The whole page.

    Args:
        report: of `mrpf`.
        model, data: what was pruned, and on what.
        run: the settings that `run.yaml` has.
        classes: of the data, by name.
        pictures: name, as in `CAPTIONS` → SVG element, which is taken as it is.
    """
    settings = {name.replace("_", "-"): value for name, value in run.items() if value is not None}
    budget = BUDGETS[report.settings["budget"]]
    title = f"{model} on {data}, pruned to {report.rounds[-1].reached:.1%} of its {budget}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(sentence)}</p>" for sentence in what_was_done(report)),
        *(f'<p class="warning">{escape(sentence)}</p>' for sentence in warnings(report)),
        *_results(report),
        *(figure(CAPTIONS[name], svg) for name, svg in (pictures or {}).items()),
        "<h2>Settings</h2>",
        f"<p>To repeat it: <code>tp-mrs {escape(str(run.get('command', 'prune')))} --config run.yaml</code></p>",
        settings_table({**settings, **({"classes": classes} if classes else {})}),
        "<h2>Versions</h2>",
        settings_table(report.versions),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def what_was_done(report: Report) -> list[str]:
    """A few sentences."""
    settings, first = report.settings, report.rounds[0]
    mended = (
        "What these gave, layers get from the others, as far as it can be predicted; BatchNorm has new means, and the "
        "variances that it learned."
        if settings["compensate"]
        else "BatchNorm has new means and variances."
    )
    count = "one round" if len(report.rounds) == 1 else f"{len(report.rounds)} rounds"
    steps = settings["iterative_steps"]
    count, again = (f"{count} of {steps} steps", " before each") if steps > 1 else (count, "")
    done = [
        f"Pruned in {count}: the sensitivity of each group of coupled layers was measured with "
        f"{in_short(settings['attack'])} on {first.sensitivity.images} training images{again}, and each group lost "
        f"channels accordingly, the least important ones by the criterion {settings['base']}. {mended}"
    ]
    tuned = first.finetuning
    if tuned is not None:
        epochs = f"{settings['epochs']:g} epoch" + ("s" if settings["epochs"] != 1 else "")
        each = " after each round" if len(report.rounds) > 1 else ""
        objective, attack = tuned.settings["objective"], in_short(tuned.settings["attack"])
        done.append(f"Fine-tuned for {epochs}{each}, objective {objective}, attack {attack}.")
    return done


def in_short(attack: str) -> str:
    """An attack as torchattacks describes it, with its size and number of steps alone.

    >>> in_short("PGD(model_name=ResNet, device=cpu, eps=0.1, alpha=0.025, steps=10, random_start=True)")
    'PGD (eps=0.1, steps=10)'
    """
    name, _, arguments = attack.partition("(")
    told = ", ".join(re.findall(r"\b(?:eps|steps|n_queries)=[^,)]+", arguments))
    return f"{name} ({told})" if told else name


def warnings(report: Report) -> list[str]:
    """Signs of masked gradients."""
    return [f"{name}: {text}" for name, each in report.stages.items() for text in each.warnings]


def _results(report: Report) -> list[str]:
    rows = report.stages
    if not rows:
        return []
    before, after = rows.get("dense"), list(rows.values())[-1]
    parts = ["<h2>Results</h2>", evaluations_table(rows)]
    if before is not None and len(rows) > 1:
        changes = {name: [str(after.difference(before, name))] for name in after.names}
        caption = "with 95% intervals of the difference on the same images"
        parts.append(table(["", f"change, dense to {list(rows)[-1]}"], changes, caption))
    return parts


def evaluations_table(rows: Mapping[str, Evaluation]) -> str:
    """What `print_evaluations` prints, as a table."""
    accuracies, sizes = comparison(rows)
    first = next(iter(rows.values()))
    cells: dict[str, Sequence[str | tuple[str, str]]] = {f"{name} (%)": values for name, values in accuracies.items()}
    caption = f"{first.images} test images, named attacks of size {first.eps:.4g}; small: 95% intervals"
    return table(["", *rows], {**cells, **sizes}, caption)


def settings_table(settings: Mapping[str, Any]) -> str:
    """Names and values."""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(in_words(value))}</td></tr>\n'
        for name, value in settings.items()
    )
    return f'<table class="settings">\n{rows}</table>'


def table(head: Sequence[str], rows: Mapping[str, Sequence[str | tuple[str, str]]], caption: str) -> str:
    """A table with names in the first column; of a pair, the second is set small."""
    top = "".join(f'<th scope="col">{escape(each)}</th>' for each in head)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_cell, cells))}</tr>\n' for name, cells in rows.items()
    )
    return f"<table>\n<caption>{escape(caption)}</caption>\n<tr>{top}</tr>\n{body}</table>"


def figure(caption: str, svg: str) -> str:
    """A picture with its caption; the SVG element is taken as it is."""
    return f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _cell(content: str | tuple[str, str]) -> str:
    if isinstance(content, str):
        return f"<td>{escape(content)}</td>"
    return f"<td>{escape(content[0])} <small>{escape(content[1])}</small></td>"


def in_words(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={in_words(each)}" for name, each in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(in_words, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
