"""What an evaluation leaves behind: ``results.json``, ``report.md``, PNG plots, and all of it in TensorBoard."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.foreign_text import as_shown, without_credentials
from ..utils.locked_folder import write_whole
from . import tiny_world
from .asked_prompts import FILE as PROMPTS
from .plots import as_pixels, as_png
from .results import Column, Measure, Results, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ARROWS = {"up": " ↑", "down": " ↓", None: ""}


def write_report(
    folder: Path, results: Results, figures: "Mapping[str, Figure]", speeds: Mapping[str, float], command: str
) -> str:
    """Write everything.

    Args:
        folder: where to.
        results: what was found.
        figures: by the name of their file.
        speeds: tokens a second of each system that was sampled.
        command: what was typed, or the recipe; users and passwords of addresses are left out.

    Returns:
        The report, as Markdown.
    """
    for name, figure in figures.items():
        (folder / f"{name}.png").write_bytes(as_png(figure))
    text = as_markdown(results, list(figures), speeds, command, has_prompts=(folder / PROMPTS).exists())
    (folder / "report.md").write_text(text, encoding="utf-8")
    _write_tensorboard(folder / "tensorboard", results, figures, speeds, text)
    write_whole(
        folder / "results.json", json.dumps(results.as_dict(), indent=1) + "\n"
    )  # last: it says that all is there
    return text


def as_markdown(
    results: Results, figures: list[str], speeds: Mapping[str, float], command: str, *, has_prompts: bool = False
) -> str:
    """Return the report as Markdown that is read in a terminal as well."""
    lines = [f"# {results.task}", "", provenance_line(results), sizes_line(results)]
    if results.tiny_world:
        lines += ["", f"> {tiny_world.NOTICE}"]
    for table in results.tables:
        lines += ["", f"## {table.title}", "", *as_rows(table), *[f"\n{note}" for note in table.notes]]
    if speeds:
        told = ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items())
        lines += ["", f"Tokens/s while sampling: {told}."]
    lines += [f"\n![{name}]({name}.png)" for name in figures]
    lenvm = (results.provenance.get("lenvm") or {}).get("name")
    if lenvm and has_prompts:
        lines += ["", f"Single texts, token by token: `lenvm inspect THIS_FOLDER --lenvm {lenvm} --out page.html`."]
    given = "\n".join(f"{key}: {json.dumps(value)}" for key, value in results.provenance.items())
    return "\n".join([*lines, "", f"    {without_credentials(command)}", "", "```yaml", given, "```", ""])


def provenance_line(results: Results) -> str:
    """Return who was measured, in a line."""
    given = results.provenance
    parts = [f"{results.task} v{results.task_version}", _name(given.get("generator"))]
    if given.get("lenvm"):
        parts[1] += f" + {_name(given['lenvm'])}"
    if given.get("gamma"):
        parts.append(f"γ {given['gamma']:.6g}")
    if "seed" in given:
        parts.append("no seed" if given["seed"] is None else f"seed {given['seed']}")
    return " · ".join(part for part in parts if part)


def _name(model: Any) -> str:
    return str(model.get("name", "")) if isinstance(model, dict) else str(model or "")


def sizes_line(results: Results) -> str:
    """Return n of N, and what was left out."""
    if not results.questions:
        return f"{len(results.provenance.get('runs', []))} runs"
    of = results.questions_of or 0
    told = f"{results.questions:,}{f' of {of:,}' if of >= results.questions else ''} questions"
    if of > results.questions:
        told += " (--limit is for smoke tests, not results)"
    told += f", {results.completions:,} completions"
    return told + (f", {results.failed:,} FAILED" if results.failed else "")


def as_rows(table: Table) -> list[str]:
    """Return a table as lines of Markdown, in columns of equal width; a word where it has no rows."""
    if not table.rows:
        return ["Nothing."]
    label = list(table.rows[0].label)
    columns = [c for c in table.columns if any(_known(row.measures.get(c.name)) for row in table.rows)]
    head = [*label, "n", *[column.title + _ARROWS[column.better] for column in columns]]
    body = [
        [*map(_escaped, row.label.values()), f"{row.samples:,}", *[_cell(row.measures.get(c.name), c) for c in columns]]
        for row in table.rows
    ]
    widths = [max(2, *map(len, column)) for column in zip(head, *body, strict=True)]  # "-:" is the shortest rule
    rule = ["-" * width for width in widths[: len(label)]] + ["-" * (width - 1) + ":" for width in widths[len(label) :]]
    return [
        "| " + " | ".join(
            cell.ljust(width) if place < len(label) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ) + " |"
        for line in (head, rule, *body)
    ]  # fmt: skip


def _escaped(label: str) -> str:
    """A label that does not end its cell, nor moves the cursor: a word of a completion may be a bar, or an escape."""
    return as_shown(label, 200).replace("|", "\\|")


def _known(measure: Measure | None) -> bool:
    return measure is not None and measure.value is not None


def _cell(measure: Measure | None, column: Column) -> str:
    if measure is None or measure.value is None:
        return ""
    told = format(measure.value, column.form)
    if measure.low is not None and measure.high is not None:
        return f"{told} [{format(measure.low, column.form)}, {format(measure.high, column.form)}]"
    known = measure.error is not None and measure.error == measure.error
    return f"{told} ± {format(measure.error, column.form.lstrip('+'))}" if known else told


def _write_tensorboard(
    folder: Path, results: Results, figures: "Mapping[str, Figure]", speeds: Mapping[str, float], text: str
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for table in results.tables:
            for row in table.rows:
                tag = "/".join([results.task, *([table.title] if len(results.tables) > 1 else []), *row.label.values()])
                for name, measure in row.measures.items():
                    if measure.value is not None:
                        writer.add_scalar(f"{tag}/{name}".replace(" ", "_"), measure.value, 0)
        for system, speed in speeds.items():
            writer.add_scalar(f"{results.task}/{system}/tokens_per_s", speed, 0)
        for name, figure in figures.items():
            writer.add_image(f"{results.task}/{name}", as_pixels(figure), 0, dataformats="HWC")
        writer.add_text(f"{results.task}/report", text, 0)
