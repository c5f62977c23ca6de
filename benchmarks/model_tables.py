"""Targets and tables of whole models and of scaling, from the JSON alone; and files with the columns of timm's benchmark."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .peers import is_ours
from .scaling import abscissa, expected, exponent
from .tables import Results, Target, markdown, median, noisy, notes, shape_text, time

Row = dict[str, Any]
NAMES = {"eager": "img/s", "graph": "img/s in a CUDA graph", "compiled": "img/s compiled"}  # of the forms of a model
FORMS = "\n\nEvery model in its fastest form of those measured, compiled or not; PoolFormer in the form that is named."
POOLFORMERS = {"spanet_small": "s24", "spanet_medium": "s36", "spanet_base": "m36", "spanet_basex": "m48"}  # of the same dims and depths
FIELD = ("convnext_tiny", "swin_tiny_patch4_window7_224", "focalnet_tiny_srf", "pvt_v2_b2")


def problem(row: Row) -> tuple[int, int, str]:
    return row["size"], row["batch"], row["dtype"]


def rate(row: Row | None, form: str | None = None) -> float | None:
    """Images per second, without a form in a CUDA graph on a GPU, else eager; None for a model that did not compete."""
    if row and form is None:
        form = "graph" if median(row, "graph") else "eager"
    seconds = median(row, form) if row and form else None
    return row["batch"] / seconds if row and seconds else None


def fastest(row: Row | None) -> float | None:
    """Images per second in the fastest form."""
    return max((found for form in NAMES if (found := rate(row, form))), default=None)


def beside(rows: list[Row], row: Row, model: str, dtype: str | None = None) -> Row | None:
    """The row of another model with the same problem, in the same dtype or in another."""
    wanted = (*problem(row)[:2], dtype or row["dtype"])
    return next((other for other in rows if other["model"] == model and problem(other) == wanted), None)


def targets(row: Row, rows: list[Row], environment: dict[str, Any]) -> list[Target]:
    """The targets of a row of SPANet, as far as what it is compared with has been measured."""
    ours = fastest(row)
    if ours is None or not is_ours(row["model"]):
        return []
    found = []

    def ratio(what: str, mine: float | None, other: float | None, limit: float) -> None:
        if mine and other:
            found.append(Target("model", what, mine / other, limit))

    published = row["model"].replace("spanet", "published")
    gpu, fp32 = environment["device"] == "cuda", row["dtype"] == "fp32"
    if gpu or fp32:
        ratio("published network", ours, fastest(beside(rows, row, published)), 2.5 if gpu else 1.8)
    else:
        ratio("published network in fp32", ours, fastest(beside(rows, row, published, "fp32")), 3.5)
    if pool := POOLFORMERS.get(row["model"]):
        other = beside(rows, row, f"poolformer_{pool}")
        ratio("PoolFormer of the same size, eager", ours, rate(other), 1)
        ratio("PoolFormer of the same size, compiled", rate(row, "compiled"), rate(other, "compiled"), 0.75)
    if row["model"] == "spanet_small":
        for name in FIELD:
            if other := beside(rows, row, name):
                ratio(other["title"], ours, fastest(other), 1)
    found.append(Target("model", "time in matrix products", row["gemm seconds"] * ours / row["batch"], 0.85))
    other = beside(rows, row, published)
    if row["mode"] == "train" and other and "peak bytes" in other:
        found.append(Target("memory", "peak memory of the published network", row["peak bytes"] / other["peak bytes"], 0.6))
    return found


def targets_table(section: str) -> Callable[[Results], str]:
    def table(results: Results) -> str:
        rows, environment = results[section]["rows"], results[section]["environment"]
        lines = [
            [row["title"], f"{row['size']}", f"{row['batch']}", row["dtype"], target.what, str(target)]
            for row in rows
            for target in targets(row, rows, environment)
        ]
        return markdown(["model", "size", "batch", "dtype", "against", "ratio"], lines) + FORMS

    return table


def measured_forms(rows: list[Row]) -> list[str]:
    return [form for form in NAMES if form == "compiled" or any(form in row["competitors"] for row in rows)]


def cells(row: Row, rows: list[Row], environment: dict[str, Any]) -> list[str]:
    """Model, problem, speed, and what of the limit that is."""
    batch = f"{row['batch']}" + (f" (of {row['asked batch']})" if row["batch"] != row["asked batch"] else "")
    start = [row["title"], f"{row['size']}", batch, row["dtype"], row.get("layout", "-").replace("nchw", "NCHW")]
    forms = measured_forms(rows)
    speed, small = rate(row), rate(beside(rows, row, "spanet_small"))
    if not speed:
        return [*start, "refused", *["-"] * (len(forms) + 6)]
    seconds = row["batch"] / speed
    speeds = {name: rate(row, name) for name in forms}
    return [
        *start,
        *(
            f"{value:.1f}" + (" ~" if noisy(row, environment, name) else "") if value else "refused" if name in row["competitors"] else "-"
            for name, value in speeds.items()
        ),
        f"{small / speed:.2f}" if small and speed else "-",
        f"{row['gemm seconds'] / seconds:.2f}",
        f"{row['flop'] / seconds / 1e9:.0f}",
        f"{row['touched bytes'] / row['floor bytes']:.1f}",
        f"{row['peak bytes'] / 2**20:.0f}",
        f"{row['joules'] / row['batch']:.2f}" if row.get("joules") else "-",
        f"{row['params'] / 1e6:.1f}",
    ]


START = ["model", "size", "batch", "dtype", "layout"]
REST = ["SPANet-S / it", "share in GEMM", "GFLOP/s", "bytes / floor", "peak MiB", "J/img", "M parameters"]
LEGEND = (
    "\n\nShare in GEMM: its matrix products run alone, over its time. Bytes / floor: what its operators read and write, over the operands "
    "of its matrix products. Peak: what a call allocates at once. Compiled: torch.compile, for inference on a CPU with constant weights "
    "(`freezing`), on a GPU in a CUDA graph. Other columns are of CUDA graphs of eager calls on a GPU, else of eager calls."
)


def speed_table(section: str) -> Callable[[Results], str]:
    def table(results: Results) -> str:
        rows, environment = results[section]["rows"], results[section]["environment"]
        forms = measured_forms(rows)
        header = [*START, *(NAMES[form] for form in forms), *REST]
        return markdown(header, (cells(row, rows, environment) for row in rows)) + LEGEND + notes(rows, environment, forms[0])

    return table


def layers_table(results: Results) -> str:
    """The SPAM layer: times, and ratios with their targets; those of the published layer are for training, on CPUs in fp32."""
    environment, lines = results["layers"]["environment"], []
    gpu = environment["device"] == "cuda"
    for row in results["layers"]["rows"]:
        start = [row["kind"], shape_text(row), row["dtype"], row["layout"].replace("nchw", "NCHW")]
        ours, training = median(row, "ours"), row["kind"] == "training"
        if ours is None:
            lines.append([*start, "refused", *["-"] * 6])
            continue
        limits = {"published": 4 if gpu else 2, "compiled": 3 if gpu else 2} if training and (gpu or row["dtype"] == "fp32") else {}
        ratios = []
        for name in ("published", "compiled"):
            other = median(row, name)
            ratio = other / ours if other else None
            ratios.append("refused" if ratio is None else str(Target(name, name, ratio, limits[name])) if limits else f"{ratio:.1f}")
        plain, gemms = median(row, "no filter"), median(row, "gemms")
        cost = ours / plain if plain else None
        peaks = [row["competitors"][name].get("peak") for name in ("ours", "published")]
        memory = peaks[0] / peaks[1] if all(peaks) else None
        lines.append(
            [
                *start,
                time(ours) + (" ~" if noisy(row, environment) else ""),
                "-" if cost is None else str(Target("no filter", "no filter", cost, 1.05)) if training else f"{cost:.2f}",
                *ratios,
                f"{gemms / ours:.2f}" if gemms else "-",
                "-" if memory is None else str(Target("memory", "memory", memory, 0.5)) if training else f"{memory:.2f}",
                f"{row['competitors']['ours']['bytes over floor']}",
            ]
        )
    header = ["", "shape", "dtype", "layout", "ours", "ours / no filter", "published / ours", "compiled / ours"]
    header += ["share in GEMM", "peak memory / published", "bytes / floor"]
    return markdown(header, lines) + notes(results["layers"]["rows"], environment)


def limit_table(results: Results) -> str:
    limit = results["models"]["limit"]
    lines = [[f"{name}, read and written", f"{value / 1e9:.1f} GB/s"] for name, value in limit["bytes/s"].items()]
    lines += [[f"fastest matrix product of the models, {dtype}", f"{value / 1e9:.0f} GFLOP/s"] for dtype, value in limit["flop/s"].items()]
    return markdown(["", "measured in this run"], lines)


def breakdown_table(results: Results) -> str:
    """Milliseconds of each stage, and the parts of the time by kind of operator, of the quick models at the first problem."""
    rows = [row for row in results["models"]["rows"] if "stages" in row]
    rows = [row for row in rows if problem(row)[:2] == problem(rows[0])[:2]]
    stages = list(rows[0]["stages"]) if rows else []
    lines = []
    for row in rows:
        total = sum(row["kinds"].values())
        kinds = ", ".join(f"{kind} {seconds / total:.0%}" for kind, seconds in row["kinds"].items() if seconds > 0.02 * total)
        times = (f"{row['stages'][stage] * 1e3:.3g}" if stage in row["stages"] else "-" for stage in stages)
        lines.append([row["title"], row["dtype"], *times, kinds])
    return markdown(["model", "dtype", *(f"{stage}, ms" for stage in stages), "kinds of operators"], lines)


def curve(row: Row) -> dict[int, dict[str, float]]:
    """Value to timing, of the points that were right."""
    points = {int(name.removeprefix("ours ")): verdict for name, verdict in row["competitors"].items()}
    return {value: verdict for value, verdict in points.items() if "median" in verdict}


def fitted(row: Row) -> float | None:
    """Exponent of the cost along a curve, or None for fewer than two points."""
    points = curve(row)
    if len(points) < 2:
        return None
    return exponent([abscissa(row["axis"], value) for value in points], [timing["median"] for timing in points.values()])


def scaling_table(results: Results) -> str:
    environment, lines = results["scaling"]["environment"], []
    for row in results["scaling"]["rows"]:
        points, found = curve(row), fitted(row)
        if found is None:
            continue
        (first, start), *_, (last, end) = points.items()
        mark = " ~" if any(noisy(row, environment, f"ours {value}") for value in points) else ""
        times = f"{time(start['median'])} to {time(end['median'])}{mark}"
        lines.append(
            [row["function"], row["axis"], f"{first} to {last}", row["dtype"], row["layout"], times, f"{found:.2f}", f"{expected(row)}"]
        )
    header = ["function", "axis", "from, to", "dtype", "layout", "time", "fitted exponent", "expected"]
    return markdown(header, lines) + (
        "\n\nExponents: against the pixels, the 2 r + 1 functions per side, or the value itself; fitted over the upper half of the curve. "
        "Expected: arithmetic or memory traffic alone; an FFT takes over at large radii, and products C x C are not all of the time."
    )


def parallel_table(results: Results) -> str:
    """Images per second of all processes together, over those of one process times their number."""
    lines, alone = [], None
    for entry in results["scaling"].get("data parallel", []):
        if "refused" in entry:
            lines.append([f"{entry['processes']}", "refused", entry["refused"], "-"])
            continue
        images = entry["processes"] * entry["batch"] / entry["median"]
        alone = alone or images / entry["processes"]
        lines.append([f"{entry['processes']}", time(entry["median"]), f"{images:.1f}", f"{images / alone / entry['processes']:.2f}"])
    return markdown(["processes, one thread or GPU each", "step", "img/s", "efficiency"], lines)


def write_csv(results: Results, folder: Path) -> list[Path]:
    """benchmark-infer.csv and benchmark-train.csv: timm's columns, and after them dtype and layout, which timm has in the file's name."""
    written = []
    for section, mode in (("models", "infer"), ("train", "train")):
        rows = [row for row in results.get(section, {"rows": []})["rows"] if rate(row)]
        if not rows:
            continue
        path = folder / f"benchmark-{mode}.csv"
        with path.open("w", newline="") as file:
            table = csv.writer(file)
            names = ("samples_per_sec", "step_time", "batch_size", "img_size", "gmacs")
            table.writerow(["model", *(f"{mode}_{name}" for name in names), "param_count", "dtype", "layout"])
            for row in sorted(rows, key=lambda row: -(rate(row) or 0)):
                speed = rate(row) or 0
                numbers = (
                    f"{speed:.2f}",
                    f"{1e3 * row['batch'] / speed:.3f}",
                    row["batch"],
                    row["size"],
                    f"{row['flop'] / 2e9 / row['batch']:.2f}",
                )
                table.writerow([row["model"], *numbers, f"{row['params'] / 1e6:.2f}", row["dtype"], row["layout"]])
        written.append(path)
    return written
