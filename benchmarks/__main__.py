"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import ops, photos, report
from .figures import figures
from .record import environment, save

DESCRIPTION = """\
Measure spanet_kernels on this machine.

  photos   real photographs through spectral_pool at several lam and radii, each result checked
           against the fp64 reference, and a figure to look at
  ops      radial_filter against clone(), against rfft2 -> mask -> irfft2, and against the published
           fft2 chain, eager and compiled: forward, gradients, any radius, call overhead
  report   tables and figures from the JSON alone; with --readme, the marked tables of a README

Without a name: photos, ops and report. Results are checked before they are timed. Ctrl-C keeps what was measured.
"""
EXAMPLES = """\
examples:
  python -m benchmarks                                  everything, quick: about four minutes on two cores
  python -m benchmarks ops --filter 56x56 --dtype fp32  the rows whose name contains 56x56, in fp32
  python -m benchmarks ops --list                       the names of the rows
  python -m benchmarks --full --out benchmarks/results/NAME
  python -m benchmarks report --readme README.md --out benchmarks/results/NAME
  python -m benchmarks report --readme README.md --out benchmarks/results/NAME --check
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def some_of(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Parser of a comma-separated selection."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(choices)}")
        return names

    return parse


def device(text: str) -> torch.device:
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; give cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not measured here; give cpu, cuda or cuda:N")
    if found.type == "cuda" and not (torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"{text!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return found


def parser() -> Parser:
    made = Parser(
        prog="python -m benchmarks", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "what", nargs="*", type=some_of(("photos", "ops", "report")), metavar="photos | ops | report", help="what to run, in this order"
    )
    form = made.add_mutually_exclusive_group()
    form.add_argument(
        "--quick", dest="form", action="store_const", const="quick", default="quick", help="minutes, on any machine (default)"
    )
    form.add_argument(
        "--full", dest="form", action="store_const", const="full", help="every batch size, gradient and radius: hours on two cores"
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", type=device, default=default, help=f"cpu, cuda or cuda:N (here: {default})")
    dtypes, layouts = tuple(ops.DTYPES), tuple(ops.LAYOUTS)
    made.add_argument("--dtype", type=some_of(dtypes), default=["fp32", "bf16"], help="some of fp32,bf16,fp16 (fp32,bf16)")
    made.add_argument("--layout", type=some_of(layouts), default=list(layouts), help="some of nchw,channels_last (both)")
    made.add_argument("--filter", default="", metavar="TEXT", help="only rows whose name contains this; see --list")
    made.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "out", metavar="DIR", help="where JSON and figures go (benchmarks/out)"
    )
    made.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    made.add_argument(
        "--readme", type=Path, metavar="FILE", help="rewrite the blocks <!-- benchmark:NAME --> ... <!-- end --> of this file"
    )
    made.add_argument("--check", action="store_true", help="with --readme: change nothing, exit 1 if the file differs from the JSON")
    return made


def drive(title: str, count: int, steps: Callable[[Callable[[str], None]], Iterator[None]], path: Path, result: dict[str, Any]) -> None:
    """Run a benchmark behind a progress bar and save after every step, ctrl-C included, which is raised again."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[row]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=count, row="")
        try:
            for _ in steps(lambda row: progress.update(task, row=row)):
                progress.advance(task)
                save(path, result)
        except KeyboardInterrupt:
            result["interrupted"] = True
            save(path, result)
            progress.console.print(f"{title}: interrupted; what was measured is in {path}")
            raise


def run_ops(options: argparse.Namespace, rows: list[ops.Row]) -> bool:
    """Returns whether every result of ours was right."""
    result = {"environment": environment(options.device), "form": options.form, "rows": [], "overhead": []}
    count = len(rows) + 1
    drive("ops", count, lambda advance: ops.run(rows, options.device, options.form, advance, result), options.out / "ops.json", result)
    return all("refused" not in row["competitors"]["ours"] for row in result["rows"])


def run_photos(options: argparse.Namespace, cases: list[tuple[str, float, float, str]], console: Console) -> bool:
    """Returns whether every result was right."""
    result = {"environment": environment(options.device), "rows": []}
    drive("photos", len(cases), lambda advance: photos.run(cases, options.device, advance, result), options.out / "photos.json", result)
    for dtype, rows in itertools.groupby(sorted(result["rows"], key=lambda row: row["dtype"]), key=lambda row: row["dtype"]):
        worst = max(rows, key=lambda row: row["error"])
        console.print(f"photos, {dtype}: largest error {worst['error']:.1e} of the largest value, {worst['bound']:.1e} allowed")
    console.print(photos.figure(options.device, options.out / "photos.jpg"))
    return all(row["right"] for row in result["rows"])


def run_report(options: argparse.Namespace, console: Console) -> bool:
    """Returns whether the README holds what the JSON says; without --check it does afterwards."""
    results = report.results_in(options.out)
    if options.readme:
        text = options.readme.read_text()
        filled = report.fill(text, results, options.out.resolve().name)
        if options.check:
            console.print(f"{options.readme} {'agrees with' if filled == text else 'differs from'} {options.out}")
            return filled == text
        options.readme.write_text(filled)
    if "ops" in results:
        for part in report.screen(results):
            console.print(part)
        for path in figures(results, options.out):
            console.print(path)
    return True


def main(arguments: list[str] | None = None) -> int:
    command = parser()
    options = command.parse_args(arguments)
    what = list(itertools.chain(*options.what)) or ["photos", "ops", "report"]
    if options.check and not options.readme:
        command.error("--check needs --readme FILE")
    if options.readme and "report" not in what:
        command.error("--readme belongs to report")
    if options.readme and not options.readme.is_file():
        command.error(f"--readme: {options.readme} is no file")
    rows = [row for row in ops.rows(options.form, options.dtype, options.layout) if options.filter in row.name]
    cases = photos.cases(options.dtype)
    if not rows:
        command.error(f"--filter: no row contains {options.filter!r}; --list prints their names")
    if options.list:
        print("\n".join(row.name for row in rows))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    right, interrupted = True, False
    try:
        try:
            if "photos" in what:
                right &= run_photos(options, cases, console)
            if "ops" in what:
                right &= run_ops(options, rows)
        except KeyboardInterrupt:
            interrupted = True
        if "report" in what:
            right &= run_report(options, console)
    except (ValueError, OSError) as error:
        command.error(str(error))
    return 130 if interrupted else 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
