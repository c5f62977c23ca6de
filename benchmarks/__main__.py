"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import report
from .record import environment, load, regressions, save, timings
from .section import DTYPES, LAYOUTS, Options, Section, usable

SECTIONS = {
    "photos": "real photographs through spectral_pool, each result against fp64, and a figure to look at",
    "ops": "radial_filter against clone() and FFT chains: forward, gradients, any radius, call overhead",
    "layers": "the SPAM layer against the published one, against itself without filters, and against its matrix products",
    "models": "inference of whole models: SPANet, the published code, their peers of timm",
    "train": "the training step of the same models",
    "scaling": "cost against size, radius, channels, batch, threads and processes",
}
DESCRIPTION = "\n".join(
    (
        "Measure spanet_kernels and SPANet on this machine, beside what one would use instead.\n",
        *(f"  {name:8} {text}" for name, text in SECTIONS.items()),
        "  report   tables, figures and pages from the JSON alone; with --readme, the marked tables of a README",
        "  all      all of it, as without a name\n",
        "Results are checked before they are timed. Ctrl-C keeps what was measured.",
    )
)
EXAMPLES = """\
examples:
  python -m benchmarks                                  everything, quick
  python -m benchmarks ops --filter 56x56 --dtype fp32  the rows whose name contains 56x56, in fp32
  python -m benchmarks models train --filter spanet_small --batch 1,32
  python -m benchmarks models --list                    the names of the rows
  python -m benchmarks models --compare OLD/models.json exit 1 if SPANet has become slower beyond the noise
  python -m benchmarks --full --out benchmarks/results/NAME
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


def batches(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive numbers, like 1,8,32")
    return found


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
    names = (*SECTIONS, "report", "all")
    made.add_argument("what", nargs="*", type=some_of(names), metavar=" | ".join(names), help="what to run, in this order")
    form = made.add_mutually_exclusive_group()
    form.add_argument(
        "--quick", dest="form", action="store_const", const="quick", default="quick", help="minutes, on any machine (default)"
    )
    form.add_argument(
        "--full", dest="form", action="store_const", const="full", help="every model, batch, gradient and radius: hours on two cores"
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", type=device, default=default, help=f"cpu, cuda or cuda:N (here: {default})")
    dtypes, layouts = tuple(DTYPES), tuple(LAYOUTS)
    made.add_argument("--dtype", type=some_of(dtypes), default=["fp32", "bf16"], help="some of fp32,bf16,fp16 (fp32,bf16)")
    made.add_argument(
        "--layout", type=some_of(layouts), default=list(layouts), help="some of nchw,channels_last (both; models: the better one)"
    )
    made.add_argument("--compile", action="store_true", help="models: measure torch.compile too; --full does")
    made.add_argument("--batch", type=batches, default=[], metavar="N[,N]", help="models: images at once (those of the form)")
    made.add_argument(
        "--filter", action="append", default=[], metavar="TEXT", help="only rows whose name contains this, or one of several; see --list"
    )
    made.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "out", metavar="DIR", help="where JSON and figures go (benchmarks/out)"
    )
    made.add_argument("--compare", type=Path, metavar="OLD.json", help="exit 1 where ours is slower than in this file, beyond the noise")
    made.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    made.add_argument(
        "--readme", type=Path, metavar="FILE", help="rewrite the blocks <!-- benchmark:NAME --> ... <!-- end --> of this file"
    )
    made.add_argument("--check", action="store_true", help="with --readme: change nothing, exit 1 if the file differs from the JSON")
    return made


def drive(name: str, section: Section, rows: list[Any], options: Options) -> dict[str, Any]:
    """Run a section behind a progress bar and save after every step, ctrl-C included, which is raised again."""
    path = options.out / f"{name}.json"
    result = {"section": name, "environment": environment(options.device), "form": options.form, "rows": []}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[row]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=len(rows) + 1, row="")
        try:
            for _ in section.run(rows, options, lambda row: progress.update(task, row=row), result):
                progress.advance(task)
                save(path, result)
        except KeyboardInterrupt:
            result["interrupted"] = True
            save(path, result)
            progress.console.print(f"{name}: interrupted; what was measured is in {path}")
            raise
    return result


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
    for part in report.screen(results):
        console.print(part)
    for path in report.pages(results, options.out):
        console.print(path)
    return True


def main(arguments: list[str] | None = None) -> int:
    command = parser()
    given = command.parse_args(arguments)
    what = list(itertools.chain(*given.what)) or ["all"]
    if "all" in what:
        what = [*SECTIONS, "report"]
    if given.check and not given.readme:
        command.error("--check needs --readme FILE")
    if given.readme and "report" not in what:
        command.error("--readme belongs to report")
    if given.readme and not given.readme.is_file():
        command.error(f"--readme: {given.readme} is no file")
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, for every competitor
    options = Options(given.form, given.device, given.dtype, given.layout, given.compile, given.batch, given.out)
    for dtype in given.dtype:
        if why := usable(given.device, dtype):
            command.error(f"--dtype: {given.device} cannot compute in {dtype}: {why}")
    sections: dict[str, Section] = {name: importlib.import_module(f".{name}", __package__) for name in what if name != "report"}
    rows = {
        name: [row for row in section.rows(options) if any(text in row.name for text in given.filter or [""])]
        for name, section in sections.items()
    }
    if sections and not any(rows.values()):
        command.error(f"--filter: no row contains {' or '.join(given.filter)!r}; --list prints their names")
    if given.list:
        print("\n".join(row.name for name in sections for row in rows[name]))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    try:
        old = old_result(given.compare, rows, options) if given.compare else None
        good, interrupted = True, False
        try:
            for name, section in sections.items():
                if not rows[name]:
                    continue
                result = drive(name, section, rows[name], options)
                faults = section.wrong(result)
                if old and old["section"] == name:
                    faults += regressions(old, result)
                for fault in faults:
                    console.print(f"[red]{name}[/]: {fault}")
                good &= not faults
        except KeyboardInterrupt:
            interrupted = True
        if "report" in what:
            good &= run_report(given, console)
    except (ValueError, OSError) as error:
        command.error(str(error))
    return 130 if interrupted else 0 if good else 1


def old_result(path: Path, rows: dict[str, list[Any]], options: Options) -> dict[str, Any]:
    """A result to compare with. Raises ValueError unless a section of this run wrote it, with some of its rows, on a machine like this."""
    old = load(path)
    if old is None:
        raise ValueError(f"--compare: {path} is no file")
    if old.get("section") not in list(rows):
        raise ValueError(f"--compare: {path} holds {old.get('section', 'results of an older form of this suite')}, which is not run here")
    if old.get("form") != options.form:
        raise ValueError(f"--compare: {path} is of the {old.get('form')} form; this is the {options.form} one")
    here = environment(options.device)
    for key in ("device", "name", "threads"):
        if old["environment"].get(key) != here[key]:
            raise ValueError(f"--compare: {path} has {key} {old['environment'].get(key)!r}, this machine {here[key]!r}")
    if not {name for name, _ in timings(old)} & {row.name for row in rows[old["section"]]}:
        raise ValueError(f"--compare: {path} has no time of a row that is run here")
    return old


if __name__ == "__main__":
    sys.exit(main())
