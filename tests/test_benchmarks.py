"""The benchmark suite itself: no timing is asserted, but what it does with timings, errors and files is."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import figures, ops, record, report
from benchmarks.timing import Timing, interleave

ROOT = Path(__file__).parents[1]


class FakeClock:
    """Every function is worth the seconds it returns; keeps the order of all calls."""

    def __init__(self):
        self.calls = []

    def round(self, functions):
        seconds = [function() for function in functions]
        self.calls.append(seconds)
        return seconds


def test_rounds_interleave_and_slow_functions_run_less_often():
    clock = FakeClock()
    timings = interleave({"fast": lambda: 0.001, "slow": lambda: 0.5}, clock, budget=1.0, samples=40, least=3)
    assert timings["fast"] == Timing(0.001, 0.001, 0.001, 40)
    assert timings["slow"].samples == 3
    rounds = [index for index, seconds in enumerate(clock.calls) if 0.5 in seconds]
    assert max(b - a for a, b in itertools.pairwise(rounds[1:])) <= 15, "spread evenly"


def test_median_and_quartiles():
    assert Timing.of([4.0, 1.0, 3.0, 2.0, 100.0]) == Timing(3.0, 2.0, 4.0, 5)


def test_wrong_results_and_refusals_do_not_compete():
    x = torch.randn(1, 2, 4, 4)

    def fails():
        raise RuntimeError("no such\nkernel")

    functions = {"right": lambda: (x,), "wrong": lambda: (x + 1e-3,), "nan": lambda: (x * math.nan,), "fails": fails, "clone": lambda: (x,)}
    verdicts = ops.admit(functions, (x.double(),), ops.check)
    assert "refused" not in verdicts["right"]
    assert "wrong result" in verdicts["wrong"]["refused"]
    assert "wrong result" in verdicts["nan"]["refused"]
    assert verdicts["fails"]["refused"] == "no such"


@pytest.mark.parametrize("kind", ops.KINDS)
def test_every_competitor_is_right(kind):
    row = ops.Row("stages S", kind, (2, 3, 14, 13), 2, "fp32", "channels_last", ("ours", "rfft2", "clone", "published"))
    problem = ops.Problem(row, torch.device("cpu"))
    functions = {name: ops.competitor(name, problem) for name in row.competitors}
    verdicts = ops.admit(functions, problem.wanted(), ops.check)
    assert not [verdict for verdict in verdicts.values() if "refused" in verdict]


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "arguments",
    [["--dtype", "fp8"], ["--device", "tpu"], ["--filter", "no such row"], ["nothing"], ["--check"], ["report", "--out", "nowhere"]],
)
def test_bad_arguments_get_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_small_run_report_and_readme(tmp_path):
    done = run_cli("ops", "report", "--filter", "forward, 8x512x7x7 r=1 fp32 channels_last", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "ops.json").read_text())
    (row,) = result["rows"]
    assert row["competitors"]["ours"]["samples"] >= 3
    assert len(result["overhead"]) == 3
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "time.png").stat().st_size > 1000
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark:summary -->\n<!-- end -->\n<!-- benchmark:other/stages -->\nkept\n<!-- end -->\nafter\n")
    arguments = ["report", "--out", str(tmp_path), "--readme", str(readme)]
    assert cli.main([*arguments, "--check"]) == 1
    assert cli.main(arguments) == 0
    text = readme.read_text()
    assert "| rfft2 chain |" in text
    assert "kept" in text
    assert cli.main([*arguments, "--check"]) == 0


def test_files_that_are_no_results(tmp_path):
    (tmp_path / "ops.json").write_text("{")
    with pytest.raises(ValueError, match="is not a benchmark result"):
        record.load(tmp_path / "ops.json")
    (tmp_path / "ops.json").write_text("[]")
    with pytest.raises(ValueError, match="no environment"):
        report.results_in(tmp_path)


def test_a_block_without_table_is_an_error():
    with pytest.raises(ValueError, match="names no table"):
        report.fill("<!-- benchmark:nothing -->\n<!-- end -->", {}, "here")


def test_committed_results_are_those_of_the_readme():
    for folder in (ROOT / "benchmarks/results").iterdir():
        results = report.results_in(folder)
        text = (ROOT / "README.md").read_text()
        assert report.fill(text, results, folder.name) == text
        assert (folder / "radius.png").exists() == any(row["group"] == "radius" for row in results["ops"]["rows"])
    assert figures.COLOURS.keys() >= {"ours", "clone"}


def test_rows_under_foreign_load_are_marked():
    environment = {"device": "cpu", "cores": 2, "threads": 2, "last level cache": 2**25}
    competitors = {name: {"median": 1e-3} for name in ("ours", "clone")}
    row = {"group": "stages S", "kind": "forward", "shape": [8, 64, 56, 56], "radius": 2, "dtype": "fp32", "layout": "nchw", "bytes": 2**22}
    quiet, loud = (row | {"competitors": competitors, "busy cores of others": cores} for cores in (0.1, 1.2))
    assert "1 ms ~" in report.cells(loud, environment)
    assert "1 ms ~" not in report.cells(quiet, environment)
    assert "1 of 2 rows" in report.notes([quiet, loud], environment)
    assert record.Others().cores is None
    with record.Others() as others:
        sum(range(10**6))
    assert others.cores is None or others.cores >= 0


def test_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    def stopped(rows, device, form, advance, result):
        result["rows"].append({"kept": True})
        yield
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "run", stopped)
    assert cli.main(["ops", "--device", "cpu", "--out", str(tmp_path)]) == 130
    saved = json.loads((tmp_path / "ops.json").read_text())
    assert saved["interrupted"]
    assert saved["rows"] == [{"kept": True}]
