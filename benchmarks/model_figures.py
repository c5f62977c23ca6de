"""Figures of whole models and of scaling, from the JSON alone, on white, so that they read on light and on dark pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .figures import plt, save
from .model_tables import beside, curve, fitted, problem, rate
from .peers import is_ours
from .scaling import AXES, abscissa, expected
from .tables import Results

OURS, PUBLISHED, OTHERS = "#1f6feb", "#b62324", "#8c959f"
CURVES = {"radial_filter": "#1f6feb", "axial_conv": "#d4790f", "spectral_gate": "#2da44e", "SPAM": "#8250df"}
Rows = list[dict[str, Any]]


def colour(row: dict[str, Any]) -> str:
    return OURS if is_ours(row["model"]) else PUBLISHED if row["model"].startswith("published") else OTHERS


def by_dtype(rows: Rows) -> dict[str, Rows]:
    """The rows that were timed at the problem most of them share, by dtype."""
    rows = [row for row in rows if rate(row)]
    shared = [problem(row)[:2] for row in rows]
    most = max(shared, key=shared.count, default=None)
    found: dict[str, Rows] = {}
    for row in rows:
        if problem(row)[:2] == most:
            found.setdefault(row["dtype"], []).append(row)
    return found


def panels(count: int, height: float) -> tuple[Any, list[Any]]:
    fig, axes = plt.subplots(1, count, figsize=(6.5 * count, height), squeeze=False, layout="constrained")
    return fig, list(axes.flat)


def plain_logarithms(ax: Any) -> None:
    """Logarithmic axes whose ticks are powers of two, as numbers."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)


def heading(rows: Rows, environment: dict[str, Any]) -> str:
    return f"{rows[0]['size']} x {rows[0]['size']}, batch {rows[0]['batch']}, {environment['name']}"


def accuracy_figure(results: Results, path: Path) -> Path:
    """Top-1 of the papers against images per second measured here; areas are parameters."""
    groups = by_dtype(results["models"]["rows"])
    fig, axes = panels(len(groups), 4.8)
    for ax, (dtype, rows) in zip(axes, groups.items(), strict=True):
        for row in rows:
            ax.scatter(rate(row), row["top1"], s=row["params"] / 1e5, color=colour(row), alpha=0.6, linewidth=0)
            above = 8 if is_ours(row["model"]) else -14  # the published network has the same accuracy
            ax.annotate(row["title"], (rate(row), row["top1"]), (0, above), textcoords="offset points", ha="center", fontsize=8)
        ax.margins(0.15)
        ax.set(title=dtype, xlabel="images per second, not compiled", ylabel="top-1 of the paper, %")
        ax.grid(alpha=0.3)
    fig.suptitle(heading(rows, results["models"]["environment"]))
    return save(fig, path)


def speed_figure(results: Results, section: str, path: Path) -> Path:
    """Images per second of every model, as it is and compiled, fastest first, and how many times as fast SPANet-S is as it is."""
    groups = by_dtype(results[section]["rows"])
    fig, axes = panels(len(groups), 1.4 + 0.32 * max(map(len, groups.values())))
    for ax, (dtype, rows) in zip(axes, groups.items(), strict=True):
        rows = sorted(rows, key=lambda row: rate(row) or 0)
        ax.barh([row["title"] for row in rows], [rate(row) or 0 for row in rows], color=[colour(row) for row in rows], height=0.7)
        compiled = [(place, value) for place, row in enumerate(rows) if (value := rate(row, "compiled"))]
        if compiled:
            ax.scatter(
                *zip(*((value, place) for place, value in compiled), strict=True), color="black", marker="|", s=140, label="compiled"
            )
            ax.legend(fontsize=8)
        for place, row in enumerate(rows):
            speed, small = rate(row) or 0, rate(beside(rows, row, "spanet_small"))
            faster = f"  (SPANet-S {small / speed:.2f} x)" if small and speed and row["model"] != "spanet_small" else ""
            ax.text(max(speed, rate(row, "compiled") or 0), place, f"  {speed:.1f}{faster}", va="center", fontsize=8)
        ax.set(title=dtype, xlabel="images per second")
        ax.margins(x=0.4)
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
    what = "Inference" if section == "models" else "Training steps"
    fig.suptitle(f"{what}, {heading(rows, results[section]['environment'])}")
    return save(fig, path)


def roofline_figure(results: Results, path: Path) -> Path:
    """FLOP per second against FLOP per byte of the operands, under the copy rate and the fastest matrix product of the run."""
    groups, limit = by_dtype(results["models"]["rows"]), results["models"]["limit"]
    bandwidth = max(limit["bytes/s"].values())
    fig, axes = panels(len(groups), 4.8)
    for ax, (dtype, rows) in zip(axes, groups.items(), strict=True):
        peak = limit["flop/s"][dtype]
        reach = [row["flop"] / row["floor bytes"] for row in rows]
        low, high = min(*reach, peak / bandwidth) / 2, max(*reach, peak / bandwidth) * 2
        corner = peak / bandwidth
        ax.plot([low, corner, high], [low * bandwidth / 1e9, peak / 1e9, peak / 1e9], color="black", linewidth=1.5)
        for place, row in enumerate(sorted(rows, key=lambda row: rate(row) or 0)):
            x, y = row["flop"] / row["floor bytes"], row["flop"] * rate(row) / row["batch"] / 1e9
            ax.scatter(x, y, color=colour(row), zorder=3)
            ax.annotate(row["title"], (x, y), (6, 4 if place % 2 else -9), textcoords="offset points", fontsize=8)
        ax.set(title=dtype, xlabel="FLOP per byte of operands", ylabel="GFLOP per second")
        plain_logarithms(ax)
    fig.suptitle(f"Roofline: {bandwidth / 1e9:.0f} GB/s copied, fastest matrix product; {heading(rows, results['models']['environment'])}")
    return save(fig, path)


def breakdown_figure(results: Results, path: Path) -> Path:
    """Milliseconds of a forward pass by stage and by kind of operator, stacked."""
    groups = by_dtype(results["models"]["rows"])
    rows = [row for rows in groups.values() for row in rows][::-1]
    fig, axes = panels(2, 1.4 + 0.32 * len(rows))
    shades = plt.get_cmap("tab20").colors
    for ax, key in zip(axes, ("stages", "kinds"), strict=True):
        names = list(dict.fromkeys(name for row in rows for name in row[key]))
        left = [0.0] * len(rows)
        for index, name in enumerate(names):
            values = [row[key].get(name, 0) * 1e3 for row in rows]
            ax.barh(range(len(rows)), values, left=left, label=name, color=shades[index % 20], height=0.7)
            left = [a + b for a, b in zip(left, values, strict=True)]
        ax.set_yticks(range(len(rows)), [f"{row['title']}, {row['dtype']}" for row in rows], fontsize=8)
        ax.legend(fontsize=7, ncols=2)
        ax.set(title={"stages": "by stage", "kinds": "by kind of operator"}[key], xlabel="milliseconds, under the profiler")
    fig.suptitle(f"Where a forward pass spends its time, {heading(rows, results['models']['environment'])}")
    return save(fig, path)


def scaling_figure(results: Results, path: Path) -> Path:
    """One panel per axis: time of each operator, quartiles shaded, the expected slope dashed."""
    rows = results["scaling"]["rows"]
    axes_names = [axis for axis in AXES if any(row["axis"] == axis and curve(row) for row in rows)]
    fig, axes = plt.subplots(1, len(axes_names), figsize=(4 * len(axes_names), 4), squeeze=False, layout="constrained")
    for ax, axis in zip(axes.flat, axes_names, strict=True):
        for row in rows:
            if row["axis"] != axis or (row["dtype"], row["layout"]) != (rows[0]["dtype"], rows[0]["layout"]) or not curve(row):
                continue
            points = {abscissa(axis, value): timing for value, timing in curve(row).items()}
            slope, shade = fitted(row), CURVES[row["function"]]
            label = row["function"] + (f", {slope:.2f}" if slope is not None else "")
            ax.plot(list(points), [timing["median"] * 1e3 for timing in points.values()], "o-", markersize=4, label=label, color=shade)
            lower, upper = ([timing[end] * 1e3 for timing in points.values()] for end in ("lower", "upper"))
            ax.fill_between(list(points), lower, upper, alpha=0.2, color=shade, linewidth=0)
            last = max(points)
            guide = [points[last]["median"] * 1e3 * (value / last) ** expected(row) for value in points]
            ax.plot(list(points), guide, linestyle=":", color=shade, linewidth=1)
        name = {"pixels": "pixels", "radius": "2 radius + 1"}.get(axis, axis)
        ax.set(title=f"{axis}; dotted: expected", xlabel=name)
        plain_logarithms(ax)
        ax.legend(fontsize=8, title="fitted exponent", title_fontsize=8)
    axes[0, 0].set_ylabel("milliseconds")
    fig.suptitle(f"Cost against one axis, {rows[0]['dtype']} {rows[0]['layout']}, {results['scaling']['environment']['name']}")
    return save(fig, path)


def figures(results: Results, folder: Path) -> list[Path]:
    """Every figure that the results have rows for."""
    found = []
    if "models" in results and by_dtype(results["models"]["rows"]):
        found.append(accuracy_figure(results, folder / "accuracy.png"))
        found.append(speed_figure(results, "models", folder / "inference.png"))
        found.append(roofline_figure(results, folder / "roofline.png"))
        found.append(breakdown_figure(results, folder / "breakdown.png"))
    if "train" in results and by_dtype(results["train"]["rows"]):
        found.append(speed_figure(results, "train", folder / "training.png"))
    if "scaling" in results and any(curve(row) for row in results["scaling"]["rows"]):
        found.append(scaling_figure(results, folder / "scaling.png"))
    return found
