"""Everything to look at, from the JSON alone: the screen, the blocks of a README, a Markdown page and an HTML page with its figures.

A block `<!-- benchmark:NAME -->` ... `<!-- end -->` holds the table NAME of TABLES; with `<!-- benchmark:FOLDER/NAME -->`
it is filled only from results in a folder of that name, so that one README can show several machines.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable
from pathlib import Path

from markdown_it import MarkdownIt
from rich.table import Table

from . import figures, model_figures, model_tables, tables
from .record import load
from .tables import Results

SUITES = ("photos", "ops", "layers", "models", "train", "scaling", "digits")  # the last by `spanet train-demo`
STAGES = ("stages S", "stages B")
KINDS = ("forward", "backward x", "backward profile")

# name of a table: the section whose results it shows, its heading on the pages, its maker
TABLES: dict[str, tuple[str, str, Callable[[Results], str]]] = {
    "models": ("models", "Inference of whole models", model_tables.speed_table("models")),
    "model-targets": ("models", "Targets of inference", model_tables.targets_table("models")),
    "train": ("train", "Training steps of whole models", model_tables.speed_table("train")),
    "train-targets": ("train", "Targets of training", model_tables.targets_table("train")),
    "layers": ("layers", "The SPAM layer", model_tables.layers_table),
    "limit": ("models", "The machine's limits", model_tables.limit_table),
    "breakdown": ("models", "Where the time of a forward pass goes", model_tables.breakdown_table),
    "scaling": ("scaling", "Cost against one axis at a time", model_tables.scaling_table),
    "parallel": ("scaling", "Data-parallel training", model_tables.parallel_table),
    "summary": ("ops", "radial_filter against its targets", tables.summary_table),
    "stages": ("ops", "radial_filter, forward", tables.group_table(*((group, "forward") for group in STAGES))),
    "gradients": ("ops", "radial_filter, gradients", tables.group_table(*((group, kind) for group in STAGES for kind in KINDS[1:]))),
    "detection": ("ops", "radial_filter at the sizes of detection", tables.group_table(("detection", "forward"))),
    "large": ("ops", "radial_filter beyond the last-level cache", tables.group_table(*(("large", kind) for kind in KINDS))),
    "radius": ("ops", "radial_filter at any radius", tables.group_table(("radius", "forward"))),
    "overhead": ("ops", "The overhead of a call", tables.overhead_table),
    "digits": ("digits", "Handwritten digits learned with other filters", tables.digits_table),
    "photos": ("photos", "Photographs through the filter", tables.photos_table),
    "environment": ("ops", "The machine", tables.environment_table),
}

BLOCK = re.compile(r"(<!-- benchmark:(\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
STYLE = """\
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent); text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; border-radius: 6px }
"""


def results_in(folder: Path) -> Results:
    """Every result of a folder. Raises ValueError if there is none."""
    found = {suite: result for suite in SUITES if (result := load(folder / f"{suite}.json")) is not None}
    if not found:
        raise ValueError(f"{folder} holds no benchmark results; run `python -m benchmarks --out {folder}` first")
    return found


def fill(text: str, results: Results, folder: str) -> str:
    """A README's text with its blocks rewritten. Raises ValueError for a block without a table or a result."""

    def block(match: re.Match[str]) -> str:
        head, name, _, tail = match.groups()
        machine, _, table = name.rpartition("/")
        if machine and machine != folder:
            return match[0]
        if table not in TABLES:
            raise ValueError(f"benchmark:{name} names no table; there are {', '.join(TABLES)}")
        suite, _, make = TABLES[table]
        if suite not in results:
            raise ValueError(f"benchmark:{name} needs {suite}.json in {folder}")
        return f"{head}{make(results)}\n{tail}"

    if text.count("<!-- benchmark:") != len(BLOCK.findall(text)):
        raise ValueError("a <!-- benchmark:NAME --> line has no <!-- end --> of its own")
    return BLOCK.sub(block, text)


def screen(results: Results) -> list[Table | str]:
    """Every table that there are results for, what missed its target in red."""
    found: list[Table | str] = []
    for suite, title, make in TABLES.values():
        if suite in results and results[suite]["rows"]:
            table, *rest = make(results).split("\n\n")
            found += [on_screen(title, table), *rest]
    return found


def on_screen(title: str, text: str) -> Table:
    """A Markdown table as a table of the screen."""
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for line in lines:
        table.add_row(*(f"[red]{cell}[/]" if "✗" in cell or cell == "refused" else cell for cell in line))
    return table


def pages(results: Results, folder: Path) -> list[Path]:
    """The figures; report.md beside them; report.html with the figures inside. Returns what was written."""
    drawn = figures.figures(results, folder) + model_figures.figures(results, folder)
    drawn += [path for name in ("digits.png", "photos.jpg") for path in folder.glob(name)]
    sections = [f"## {title}\n\n{make(results)}\n" for suite, title, make in TABLES.values() if suite in results and results[suite]["rows"]]
    name = next((result["environment"]["name"] for result in results.values() if "name" in result["environment"]), "this machine")
    text = "\n".join([f"# Benchmarks on {name}\n", *(f"![{path.stem}]({path.name})\n" for path in drawn), *sections])
    (folder / "report.md").write_text(text)
    body = MarkdownIt("commonmark").enable("table").render(text)
    for path in drawn:
        kind = "jpeg" if path.suffix == ".jpg" else "png"
        data = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="{path.name}"', f'src="data:image/{kind};base64,{data}"')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Benchmarks on {html.escape(name)}</title>'
    (folder / "report.html").write_text(f"<!doctype html>{head}<style>{STYLE}</style>{body}")
    return [*drawn, *model_tables.write_csv(results, folder), folder / "report.md", folder / "report.html"]
