"""Figures from the JSON alone, on white, so that they read on light and on dark pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from spanet.images import save_picture

from .tables import Results, median, targets

COLOURS = {"ours": "#1f6feb", "clone": "#8c959f", "rfft2": "#d4790f", "published": "#b62324"}
NAMES = {"ours": "radial_filter", "clone": "clone()", "rfft2": "rfft2 chain", "published": "published chain"}
Rows = list[dict[str, Any]]


def label(row: dict[str, Any]) -> str:
    channels, height, width = row["shape"][1:]
    return f"{channels}x{height}x{width}" + ("\nlarge" if row["group"] == "large" else "")


def by_variant(rows: Rows) -> dict[str, Rows]:
    """The forward rows at fixed radius by dtype and layout, of each shape that with the largest batch."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "forward" and row["group"] != "radius":
            variant = found.setdefault(f"{row['dtype']}, {row['layout'].replace('nchw', 'NCHW')}", {})
            held = variant.get(label(row))
            if held is None or row["shape"][0] > held["shape"][0]:
                variant[label(row)] = row
    return {name: list(variant.values()) for name, variant in found.items()}


def bars(ax: Axes, rows: Rows, values: dict[str, list[float | None]], colours: dict[str, str]) -> None:
    """Groups of bars, one group per row."""
    width = 0.8 / len(values)
    for index, (name, heights) in enumerate(values.items()):
        places = [place + (index - (len(values) - 1) / 2) * width for place in range(len(rows))]
        ax.bar(places, [height or 0 for height in heights], width, label=name, color=colours[name])
    ax.set_xticks(range(len(rows)), [label(row) for row in rows], rotation=40, ha="right", fontsize=8, rotation_mode="anchor")
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)


def save(fig: Any, path: Path) -> Path:
    save_picture(fig, path)
    plt.close(fig)
    return path


def panels(count: int) -> tuple[Any, list[Axes]]:
    columns = min(count, 2)
    lines = -(-count // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(6.5 * columns, 3.6 * lines), squeeze=False, sharey=True, layout="constrained")
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return fig, list(axes.flat[:count])


def time_figure(results: Results, path: Path) -> Path:
    variants = by_variant(results["ops"]["rows"])
    fig, axes = panels(len(variants))
    for ax, (variant, rows) in zip(axes, variants.items(), strict=True):
        values = {NAMES[name]: [None if (value := median(row, name)) is None else value * 1e3 for row in rows] for name in NAMES}
        bars(ax, rows, values, {NAMES[name]: colour for name, colour in COLOURS.items()})
        ax.set(yscale="log", title=variant, ylabel="milliseconds")
    axes[0].legend(fontsize=8, ncols=2)
    fig.suptitle(f"radial_filter, forward: time per call, {results['ops']['environment']['name']}")
    return save(fig, path)


def ratio_figure(results: Results, path: Path, against: str, title: str, ylabel: str) -> Path:
    """One bar per shape, competitor over ours, with the target of each as a tick."""
    environment = results["ops"]["environment"]
    variants = by_variant(results["ops"]["rows"])
    fig, axes = panels(len(variants))
    for ax, (variant, rows) in zip(axes, variants.items(), strict=True):
        shown = [row for row in rows if against in row["competitors"] and median(row, against) and median(row, "ours")]
        heights: list[float | None] = [median(row, against) / median(row, "ours") for row in shown]  # type: ignore[operator]
        bars(ax, shown, {ylabel: heights}, {ylabel: COLOURS["ours"]})
        for place, row in enumerate(shown):
            if target := targets(row, environment).get(against):
                wanted = 1 / target.limit if against == "clone" else target.limit
                ax.plot(
                    [place - 0.45, place + 0.45],
                    [wanted, wanted],
                    color=COLOURS["published"],
                    linewidth=2,
                    label="target" if place == 0 else None,
                )
        ax.set(title=variant, ylabel=ylabel, yscale="linear" if against == "clone" else "log")
    axes[0].legend(fontsize=8)
    fig.suptitle(f"radial_filter, forward: {title}, {environment['name']}")
    return save(fig, path)


def radius_figure(results: Results, path: Path) -> Path:
    """Cost against radius, one panel per size: fp32 NCHW, or what was measured first."""
    sizes: dict[str, Rows] = {}
    for row in results["ops"]["rows"]:
        if row["group"] == "radius":
            sizes.setdefault("x".join(map(str, row["shape"][2:])), []).append(row)
    fig, axes = plt.subplots(1, len(sizes), figsize=(4.4 * len(sizes), 3.8), squeeze=False, layout="constrained")
    for ax, rows in zip(axes.flat, sizes.values(), strict=True):
        first = [row for row in rows if (row["dtype"], row["layout"]) == (rows[0]["dtype"], rows[0]["layout"])]
        for name in ("ours", "rfft2", "clone"):
            points = [(row["radius"], row["competitors"][name]) for row in first if median(row, name)]
            radii = [radius for radius, _ in points]
            ax.plot(
                radii, [timing["median"] * 1e3 for _, timing in points], marker="o", markersize=4, label=NAMES[name], color=COLOURS[name]
            )
            lower, upper = ([timing[end] * 1e3 for _, timing in points] for end in ("lower", "upper"))
            ax.fill_between(radii, lower, upper, alpha=0.2, color=COLOURS[name], linewidth=0)
        whole = first[-1]["radius"]
        ticks = [radius for radius in (0, 1, 2, 4, 8, 16, 32, 64, 128) if radius < whole * 0.6] + [whole]
        ax.set_yscale("log")
        ax.set_xscale("symlog", linthresh=1, base=2)
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_xlim(-0.3, whole * 1.2)
        ax.set(title=f"{'x'.join(map(str, first[0]['shape']))}, {first[0]['dtype']}", xlabel="radius (last: full spectrum)")
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("milliseconds")
    axes[0, 0].legend(fontsize=8)
    fig.suptitle(f"Cost against radius, {results['ops']['environment']['name']}")
    return save(fig, path)


def figures(results: Results, folder: Path) -> list[Path]:
    """Every figure that the results have rows for."""
    rows = results["ops"]["rows"] if "ops" in results else []
    found = []
    if by_variant(rows):
        found.append(time_figure(results, folder / "time.png"))
        found.append(ratio_figure(results, folder / "bandwidth.png", "clone", "share of the bandwidth of a copy", "clone() time / ours"))
        found.append(
            ratio_figure(results, folder / "speedup.png", "published", "speed-up over the published chain", "published time / ours")
        )
    if any(row["group"] == "radius" for row in rows):
        found.append(radius_figure(results, folder / "radius.png"))
    return found
