"""Targets and tables from the JSON alone: on the screen, and as Markdown between the markers of a README.

A block `<!-- benchmark:NAME -->` ... `<!-- end -->` holds the table NAME of TABLES; with `<!-- benchmark:FOLDER/NAME -->`
it is filled only from results in a folder of that name, so that one README can show several machines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .record import load

SUITES = ("ops", "photos")
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """A ratio and what it should be: at most the limit against a copy, at least the limit against the chains."""

    against: str
    what: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.against == "clone" else self.value >= self.limit

    def __str__(self) -> str:
        if self.against == "clone":
            return f"{self.value:.2f} {'≤' if self.met else '>'} {self.limit:.3g} {'✓' if self.met else '✗'}"
        value = f"{self.value:.1f}" if self.value >= 2 else f"{self.value:.2f}"
        return f"{value} {'≥' if self.met else '<'} {self.limit:.3g} {'✓' if self.met else '✗'}"


def median(row: dict[str, Any], name: str) -> float | None:
    """Seconds of a competitor, or None if it did not compete."""
    return row["competitors"].get(name, {}).get("median")


def clone_limit(row: dict[str, Any], environment: dict[str, Any]) -> tuple[str, float] | None:
    """What the time may be as a multiple of `clone()`: the class of the row and its limit."""
    height, width = row["shape"][2:]
    if row["group"] == "radius":
        return None
    if environment["device"] == "cpu":
        large = row["bytes"] > environment["last level cache"]
        return ("clone, beyond the last-level cache", 1.0) if large else ("clone, in cache", 2.0)
    if max(height, width) <= 14 or width % 4:
        return "clone, small or odd planes", 1.15
    return ("clone, 32 MB and more", 1 / 0.9) if row["bytes"] >= 32 * 2**20 else None


def targets(row: dict[str, Any], environment: dict[str, Any]) -> dict[str, Target]:
    """The targets of a row by competitor."""
    ours, found = median(row, "ours"), {}
    if ours is None:
        return {}
    limit, clone = clone_limit(row, environment), median(row, "clone")
    if limit and clone:
        found["clone"] = Target("clone", limit[0], ours / clone, limit[1])
    if rfft2 := median(row, "rfft2"):
        found["rfft2"] = Target("rfft2", "rfft2 chain", rfft2 / ours, 1)
    if published := median(row, "published"):
        what, speedup = "published chain", 60
        if environment["device"] == "cuda":
            what, speedup = (f"{what}, fp32", 12) if row["dtype"] == "fp32" else (f"{what}, 16-bit", 25)
        found["published"] = Target("published", what, published / ours, speedup)
    return found


def time(seconds: float | None) -> str:
    if seconds is None:
        return "refused"
    value, unit = (seconds * 1e3, "ms") if seconds >= 1e-3 else (seconds * 1e6, "µs")
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def shape_text(row: dict[str, Any]) -> str:
    return "x".join(map(str, row["shape"]))


def noisy(row: dict[str, Any], environment: dict[str, Any]) -> bool:
    """Whether other programs took cores that the row was running on; they slow every competitor down, the fastest most."""
    spare = environment["cores"] - environment["threads"]
    return environment["device"] == "cpu" and (row.get("busy cores of others") or 0) > spare + 0.25


def cells(row: dict[str, Any], environment: dict[str, Any]) -> list[str]:
    """The line of a row: problem, times, ratios with their targets."""
    found = targets(row, environment)
    ours = median(row, "ours")

    def ratio(name: str) -> str:
        if name in found:
            return str(found[name])
        other = median(row, name)
        if other is None or ours is None:
            return "refused" if name in row["competitors"] else "-"
        return f"{ours / other:.2f}" if name == "clone" else f"{other / ours:.1f}"

    problem = [shape_text(row), f"{row['radius']:g}", row["dtype"], row["layout"].replace("nchw", "NCHW")]
    mine = time(ours) + (" ~" if noisy(row, environment) else "")
    return [*problem, mine, time(median(row, "clone")), *(ratio(name) for name in ("clone", "rfft2", "published", "compiled"))]


HEADER = ["shape", "r", "dtype", "layout", "ours", "clone", "ours / clone", "rfft2 / ours", "published / ours", "compiled / ours"]


def markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def notes(rows: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    """Every reason for which a competitor did not compete, once; how many rows are noisy."""
    found = {f"{name}: {verdict['refused']}" for row in rows for name, verdict in row["competitors"].items() if "refused" in verdict}
    found |= {
        f"published, without casts, {row['dtype']}: {row['published as it stands']}"
        for row in rows
        if row.get("published as it stands", "runs") != "runs"
    }
    if count := sum(noisy(row, environment) for row in rows):
        found.add(f"~ other programs kept the processor busy during {count} of {len(rows)} rows: their ratios mean little")
    return "".join(f"\n\n{line}." for line in sorted(found))


def group_table(*wanted: tuple[str, str]) -> Callable[[Results], str]:
    """A table of the rows of some (group, kind)."""

    def table(results: Results) -> str:
        environment = results["ops"]["environment"]
        rows = [row for row in results["ops"]["rows"] if (row["group"], row["kind"]) in wanted]
        if len({kind for _, kind in wanted}) == 1:
            return markdown(HEADER, (cells(row, environment) for row in rows)) + notes(rows, environment)
        return markdown(["", *HEADER], ([row["kind"], *cells(row, environment)] for row in rows)) + notes(rows, environment)

    return table


def summary_table(results: Results) -> str:
    """How many rows met each target, and the worst of them."""
    found: dict[str, list[tuple[Target, str]]] = {}
    for row in results["ops"]["rows"]:
        name = f"{shape_text(row)} r={row['radius']:g} {row['dtype']} {row['layout']}, {row['kind']}"
        for target in targets(row, results["ops"]["environment"]).values():
            found.setdefault(target.what, []).append((target, name))
    lines = []
    for what, entries in found.items():
        worst, name = (max if entries[0][0].against == "clone" else min)(entries, key=lambda entry: entry[0].value)
        limit = f"{'≤' if worst.against == 'clone' else '≥'} {worst.limit:.3g} x"
        lines.append([what, limit, f"{sum(target.met for target, _ in entries)} of {len(entries)}", f"{worst.value:.2f} ({name})"])
    return markdown(["against", "target", "rows that meet it", "worst row"], lines)


def overhead_table(results: Results) -> str:
    lines = []
    for entry in results["ops"].get("overhead", []):
        ours, clone = (entry["competitors"][name]["median"] * 1e6 for name in ("ours", "clone"))
        limit = 6 if entry["mode"] == "with gradients" else 3
        extra = ours - clone
        verdict = f"{extra:.1f} {'≤' if extra <= limit else '>'} {limit} {'✓' if extra <= limit else '✗'}"
        lines.append([entry["mode"], f"{ours:.1f}", f"{clone:.1f}", verdict])
    return markdown(["one call on 1x8x7x7, µs", "ours", "clone", "ours - clone"], lines)


def photos_table(results: Results) -> str:
    """Largest error per photograph and dtype, over every radius and lam."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["photos"]["rows"]:
        groups.setdefault((row["photo"], row["dtype"]), []).append(row)
    lines = []
    for (photo, dtype), rows in groups.items():
        worst = max(rows, key=lambda row: row["error"])
        right = sum(row["right"] for row in rows)
        lines.append(
            [
                photo,
                "x".join(map(str, worst["shape"][2:])),
                dtype,
                f"{right} of {len(rows)}",
                f"{worst['error']:.1e}",
                f"{worst['bound']:.1e}",
            ]
        )
    return markdown(["photograph", "size", "dtype", "filters within bound", "largest error / largest value", "bound"], lines)


def environment_table(results: Results) -> str:
    environment = results["ops"]["environment"]
    return markdown(["", ""], [[name, str(value)] for name, value in environment.items() if value is not None])


STAGES = ("stages S", "stages B")
TABLES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "summary": ("ops", summary_table),
    "stages": ("ops", group_table(*((group, "forward") for group in STAGES))),
    "gradients": ("ops", group_table(*((group, kind) for group in STAGES for kind in ("backward x", "backward profile")))),
    "detection": ("ops", group_table(("detection", "forward"))),
    "large": ("ops", group_table(*(("large", kind) for kind in ("forward", "backward x", "backward profile")))),
    "radius": ("ops", group_table(("radius", "forward"))),
    "overhead": ("ops", overhead_table),
    "environment": ("ops", environment_table),
    "photos": ("photos", photos_table),
}

BLOCK = re.compile(r"(<!-- benchmark:(\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


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
        suite, make = TABLES[table]
        if suite not in results:
            raise ValueError(f"benchmark:{name} needs {suite}.json in {folder}")
        return f"{head}{make(results)}\n{tail}"

    if text.count("<!-- benchmark:") != len(BLOCK.findall(text)):
        raise ValueError("a <!-- benchmark:NAME --> line has no <!-- end --> of its own")
    return BLOCK.sub(block, text)


def screen(results: Results) -> list[Table | str]:
    """Every row of ops on the screen, what missed its target in red; then the call overhead, the summary and the notes."""
    environment, rows = results["ops"]["environment"], results["ops"]["rows"]
    table = Table(title=f"radial_filter, {environment['name']}")
    for name in ("", *HEADER):
        table.add_column(name, justify="left" if name in ("", "shape", "dtype", "layout") else "right")
    for row in rows:
        line = [f"[red]{cell}[/]" if "✗" in cell or cell == "refused" else cell for cell in cells(row, environment)]
        table.add_row(f"{row['group']}, {row['kind']}", *line)
    return [table, from_markdown(overhead_table(results)), from_markdown(summary_table(results)), notes(rows, environment).strip()]


def from_markdown(text: str) -> Table:
    """A table of the README as a table of the screen."""
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    table = Table(*header)
    for line in lines:
        table.add_row(*line)
    return table
