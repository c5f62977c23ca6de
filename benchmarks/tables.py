"""Targets and Markdown tables of radial_filter and of the photographs, from the JSON alone; what every table needs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .record import spread

AT_MOST = ("clone", "memory", "no filter")
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """A ratio and what it should be: at most the limit against what is in AT_MOST, at least the limit against all others."""

    against: str
    what: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.against in AT_MOST else self.value >= self.limit

    def __str__(self) -> str:
        if self.against in AT_MOST:
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


def disturbed(row: dict[str, Any], environment: dict[str, Any]) -> bool:
    """Whether other programs took cores that the row was running on; they slow every competitor down, the fastest most."""
    spare = environment["cores"] - environment["threads"]
    return environment["device"] == "cpu" and (row.get("busy cores of others") or 0) > spare + 0.25


def noisy(row: dict[str, Any], environment: dict[str, Any], competitor: str = "ours") -> bool:
    """Whether a time of a row means little: others took cores, or its interquartile range is above 5 % of the median."""
    verdict = row["competitors"].get(competitor, {})
    return disturbed(row, environment) or (verdict.get("median") is not None and "upper" in verdict and spread(verdict) > 0.05)


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


def notes(rows: list[dict[str, Any]], environment: dict[str, Any], competitor: str = "ours") -> str:
    """Every reason for which a competitor did not compete, once; how many rows are noisy."""
    found = {
        f"{row['title']}, {name}, {row['dtype']}: {verdict['refused']}" if "title" in row else f"{name}: {verdict['refused']}"
        for row in rows
        for name, verdict in row["competitors"].items()
        if "refused" in verdict
    }
    found |= {
        f"published, without casts, {row['dtype']}: {row['published as it stands']}"
        for row in rows
        if row.get("published as it stands", "runs") != "runs"
    }
    if count := sum(disturbed(row, environment) for row in rows):
        found.add(f"~ other programs kept the processor busy during {count} of {len(rows)} rows: their ratios mean little")
    if count := sum(noisy(row, environment, competitor) and not disturbed(row, environment) for row in rows):
        found.add(f"~ the interquartile range of {count} of {len(rows)} rows is above 5 % of the median")
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


def digits_table(results: Results) -> str:
    """Test accuracy after the last epoch of every filter: the mean of the seeds, and each."""
    result, variants = results["digits"], {}
    for row in result["rows"]:
        variants.setdefault(row["variant"], []).append(row)
    lines = [
        [
            variant,
            f"{rows[0]['parameters']:,}",
            f"{statistics.fmean(row['top1'][-1] for row in rows):.2%}",
            " ".join(f"{row['top1'][-1]:.1%}" for row in rows),
            f"{statistics.fmean(row['test loss'][-1] for row in rows):.3f}",
            f"{statistics.fmean(row['seconds'] for row in rows):.0f}",
        ]
        for variant, rows in variants.items()
    ]
    header = ["filter", "parameters", "test accuracy", "by seed", "test loss", "s / training"]
    recipe, cores = result["recipe"], result["environment"]["cores"]
    note = f"After {recipe['epochs']} epochs of 1,437 scans; 360 are tested: one error is 0.28 %. One thread a training, {cores} at a time."
    return f"{markdown(header, lines)}\n\n{note}"


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
