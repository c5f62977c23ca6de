"""The benchmark suite itself: no timing is asserted, but what it does with timings, errors and files is."""

from __future__ import annotations

import itertools
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from soak import soak

from benchmarks import __main__ as cli
from benchmarks import figures, limit, models, ops, peers, record, report, scaling, section, tables, trace
from benchmarks.timing import BRIEF, Timing, WallClock, WarmClock, interleave

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
    row = ops.Row("stages S", kind, (2, 3, 14, 13), 2, "fp32", "channels_last", ("ours", "rfft2", "clone", "published", "gfnet"))
    problem = ops.Problem(row, torch.device("cpu"))
    functions = {name: ops.competitor(name, problem) for name in row.competitors}
    verdicts = ops.admit(functions, problem.wanted(), ops.check)
    assert not [verdict for verdict in verdicts.values() if "refused" in verdict]


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dtype", "fp8"],
        ["--device", "tpu"],
        ["ops", "--filter", "no such row"],
        ["nothing"],
        ["--check"],
        ["report", "--out", "nowhere"],
        ["models", "--batch", "8,0"],
        ["ops", "--compare", "nowhere.json"],
        ["ops", "--compare", "README.md"],
    ],
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
    (tmp_path / "ops.json").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"ops.json is not a benchmark result"):
        record.load(tmp_path / "ops.json")
    for other in ([], {"environment": {}}, {"environment": "here", "rows": []}):
        (tmp_path / "ops.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match="no environment or no rows"):
            report.results_in(tmp_path)


def test_a_result_that_cannot_be_written_leaves_the_one_before(tmp_path):
    record.save(tmp_path / "ops.json", {"rows": []})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # what a write to a full disk meets, with another number
    try:
        with pytest.raises(OSError, match=r"could not write .*ops.json: File too large; the one before it is intact"):
            record.save(tmp_path / "ops.json", {"rows": list(range(1000))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert json.loads((tmp_path / "ops.json").read_text()) == {"rows": []}
    assert [path.name for path in tmp_path.iterdir()] == ["ops.json"]


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
    assert "1 ms ~" in tables.cells(loud, environment)
    assert "1 ms ~" not in tables.cells(quiet, environment)
    assert "1 of 2 rows" in tables.notes([quiet, loud], environment)
    assert record.Others().cores is None
    with record.Others() as others:
        sum(range(10**6))
    assert others.cores is None or others.cores >= 0


def test_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    def stopped(rows, options, advance, result):
        result["rows"].append({"kept": True})
        yield
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "run", stopped)
    assert cli.main(["ops", "--device", "cpu", "--out", str(tmp_path)]) == 130
    saved = json.loads((tmp_path / "ops.json").read_text())
    assert saved["interrupted"]
    assert saved["rows"] == [{"kept": True}]


def test_interrupt_among_models_times_those_that_are_prepared(monkeypatch):
    prepare = models.Bench.prepare

    def stopped(bench, row):
        if row.model == "published_small":
            raise KeyboardInterrupt
        return prepare(bench, row)

    monkeypatch.setattr(models.Bench, "prepare", stopped)
    monkeypatch.setitem(models.BUDGET, "quick", 0.5)
    result = {"rows": []}
    with pytest.raises(KeyboardInterrupt):
        list(models.run(tiny_rows("infer"), TINY, lambda row: None, result))
    assert [row["model"] for row in result["rows"]] == ["spanet_small"]
    assert result["rows"][0]["competitors"]["eager"]["median"] > 0


CPU = torch.device("cpu")
TINY = section.Options("quick", CPU, ["fp32"], ["nchw"])


def test_every_section_lists_its_rows(capsys):
    assert cli.main(["all", "--list", "--device", "cpu"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(set(names)) == len(names)
    infer = "spanet_small, infer, 224x224, batch 8"
    for part in ("astronaut, ", "stages S, ", "SPAM S, stage 1", infer, "spanet_small, train, ", "SPAM against pixels"):
        assert any(name.startswith(part) for name in names), part
    full = section.Options("full", CPU, ["fp32"], ["nchw"], batches=[4])
    assert {row.model for row in models.rows(full)} == set(peers.MODELS)


def test_matrix_products_are_those_of_the_paper():
    """All but the depthwise convolutions of the 4.606 G; the backward pass has two for each, but none for the image."""
    row = models.Row("infer", "published_small", 224, 1, "fp32", False)
    depthwise = 14 * (4 * 64 * 56**2 + 4 * 128 * 28**2 + 12 * 320 * 14**2 + 4 * 512 * 7**2)
    gemms = models.trace(row, peers.create(row.model, 224)).gemms
    assert round((sum(count * gemm.macs for gemm, count in gemms.items()) + depthwise) / 1e6) == 4606
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.Flatten(), torch.nn.Linear(16, 5))
    with trace.Trace() as found:
        layers(torch.ones(2, 3, 4, 4)).sum().backward()
    assert found.gemms == {
        trace.Gemm(1, 32, 4, 3): 1,
        trace.Gemm(1, 4, 3, 32): 1,
        trace.Gemm(1, 2, 5, 16): 1,
        trace.Gemm(1, 2, 16, 5): 1,
        trace.Gemm(1, 5, 16, 2): 1,
    }
    assert limit.Gemms(CPU, WallClock(CPU), 0.01).seconds(found.gemms, torch.float32) > 0


def test_brief_calls_are_repeated():
    calls = {"brief": 0, "long": 0}

    def sleep(name, seconds):
        calls[name] += 1
        time.sleep(seconds)

    brief, long = WarmClock().round([lambda: sleep("brief", BRIEF / 8), lambda: sleep("long", 2 * BRIEF)])
    assert 2 < calls["brief"] <= 9
    assert calls["long"] == 1
    assert BRIEF / 8 <= brief < BRIEF < 2 * BRIEF <= long


def test_peak_memory_and_stages():
    x = torch.ones(2**20)
    profile = trace.profiled(lambda: (x + 1) * 2, CPU)
    assert 2 * x.nbytes <= profile.peak < 2.1 * x.nbytes
    assert profile.kinds["sums and products"] > 0
    model = peers.create("published_small", 64)
    with trace.stage_times(model, CPU) as stages, torch.inference_mode():
        model(torch.ones(1, 3, 64, 64))
    assert list(stages) == ["stride 4", "stride 8", "stride 16", "stride 32", "head"]


def tiny_rows(mode):
    return [models.Row(mode, name, 32, 2, "fp32", False) for name in ("spanet_small", "published_small")]


def test_models_run_report_and_compare(tmp_path, monkeypatch, capsys):
    """Both sections of models and a curve end to end, on small images: checked, timed, drawn; then against themselves."""
    monkeypatch.setattr(models, "rows", lambda options: tiny_rows("infer"))
    monkeypatch.setattr("benchmarks.train.rows", lambda options: tiny_rows("train"))
    monkeypatch.setattr(scaling, "rows", lambda options: [scaling.Row("radial_filter", "channels", "fp32", "nchw")])
    monkeypatch.setattr(scaling, "data_parallel", lambda options: [{"processes": 1, "median": 0.5, "batch": 4, "size": 96}])
    monkeypatch.setattr("benchmarks.limit.COPIED", 2**22)
    monkeypatch.setitem(models.BUDGET, "quick", 0.5)
    names = ["models", "train", "scaling", "report"]
    assert cli.main([*names, "--device", "cpu", "--dtype", "fp32", "--layout", "channels_last", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    for section_name, mode in (("models", "infer"), ("train", "train")):
        result = json.loads((tmp_path / f"{section_name}.json").read_text())
        for row in result["rows"]:
            eager = row["competitors"]["eager"]
            assert eager["error"] <= eager["bound"]
            assert eager["samples"] >= 5
            assert row["peak bytes"] > 0
            assert row["touched bytes"] > row["floor bytes"] / 2
        header, *lines = (tmp_path / f"benchmark-{mode}.csv").read_text().splitlines()
        assert header.startswith(f"model,{mode}_samples_per_sec,{mode}_step_time,{mode}_batch_size,{mode}_img_size")
        assert len(lines) == 2
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "| SPANet-S | 32 | 2 | fp32 | published network |" in (tmp_path / "report.md").read_text()

    old = json.loads((tmp_path / "models.json").read_text())
    arguments = ["models", "--device", "cpu", "--dtype", "fp32", "--filter", "spanet_small", "--out", str(tmp_path)]
    others = {"section": "ops", "form": "full", "environment": old["environment"] | {"name": "another"}, "rows": old["rows"][1:]}
    for key, other in others.items():
        (tmp_path / "old.json").write_text(json.dumps(old | {key: other}))
        with pytest.raises(SystemExit):
            cli.main([*arguments, "--compare", str(tmp_path / "old.json")])
        assert capsys.readouterr().err.count("\n") == 1
    for row in old["rows"]:
        for timing in row["competitors"].values():
            timing |= {key: timing[key] / 1000 for key in ("lower", "median", "upper")}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert cli.main([*arguments, "--compare", str(tmp_path / "old.json")]) == 1
    assert "x its old time" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["resnet50", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_peers_have_shapes_to_trace(name, mode):
    """Buffers, windows and running statistics too, in the size that the quick form has."""
    found = models.trace(models.Row(mode, name, 224, 1, "bf16", False), peers.create(name, 224))
    assert 3.9e9 < sum(count * gemm.macs for gemm, count in found.gemms.items()) / (1 if mode == "infer" else 3) < 4.6e9


def test_a_wrong_model_is_refused_and_not_timed(monkeypatch):
    monkeypatch.setitem(models.BOUNDS, ("infer", "fp32"), 1e-12)
    bench, row = models.Bench(TINY), tiny_rows("infer")[0]
    record_, subjects = bench.prepare(row)
    assert not subjects
    (found,) = bench.time([(record_, subjects)])
    assert "wrong result" in found["competitors"]["eager"]["refused"]
    assert "median" not in found["competitors"]["eager"]
    assert len(models.wrong({"rows": [found]})) == 1
    environment = {"device": "cpu", "cores": 2, "threads": 2}
    assert report.TABLES["models"][2]({"models": {"rows": [found], "environment": environment}}).count("refused") == 1


def test_targets_of_the_layer():
    environment = {"device": "cpu", "cores": 2, "threads": 2}
    names = ("ours", "no filter", "published", "compiled", "gemms")
    times = {
        name: {"median": value, "peak": 100, "bytes over floor": 3} for name, value in zip(names, (1.0, 0.9, 3, 1.5, 0.8), strict=True)
    }
    problem = {"name": "row", "shape": [8, 64, 56, 56], "dtype": "fp32", "layout": "nchw", "bytes": 1, "competitors": times}
    rows = [problem | {"kind": kind} for kind in ("forward", "training")]
    table = report.TABLES["layers"][2]({"layers": {"rows": rows, "environment": environment}})
    assert "| 1.11 | 3.0 | 1.5 | 0.80 | 1.00 | 3 |" in table
    assert "| 1.11 > 1.05 ✗ | 3.0 ≥ 2 ✓ | 1.50 < 2 ✗ | 0.80 | 1.00 > 0.5 ✗ | 3 |" in table


def test_batches_shrink_into_memory():
    assert models.fitting(64, 100, 10**6) == 64
    assert models.fitting(64, 100, 2000) == 16
    assert models.fitting(64, 100, 10) == 1


def test_regressions_are_beyond_noise_and_drift():
    def result(ours, other, width=0.0):
        timing = {
            name: {"median": value, "lower": value * (1 - width), "upper": value * (1 + width)}
            for name, value in zip(("ours", "clone"), (ours, other), strict=True)
        }
        return {"rows": [{"name": "row", "competitors": timing}]}

    assert not record.regressions(result(1, 1), result(1.04, 1))
    assert not record.regressions(result(1, 1), result(0.5, 1))
    assert len(record.regressions(result(1, 1), result(1.2, 1))) == 1
    assert not record.regressions(result(1, 1), result(1.2, 1.2)), "the machine is slower, not ours"
    assert not record.regressions(result(1, 1), result(1.2, 1, width=0.15)), "within the noise"


def test_fitted_exponents():
    values = [1, 2, 4, 8, 16]
    assert scaling.exponent(values, [3 * value**1.5 for value in values]) == pytest.approx(1.5)
    assert scaling.exponent(values, [10 + 1e-9 * value for value in values]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("function", scaling.PAIRS)
def test_what_scales_is_right(function):
    row = scaling.Row(function, "channels", "fp32", "channels_last")
    for value, (ours, wanted) in itertools.islice(scaling.points(row, TINY).items(), 2):
        y, judge = ours().double(), wanted()
        assert (y - judge).norm() <= models.BOUNDS["infer", "fp32"] * judge.norm(), value


def test_a_dtype_that_the_device_lacks(monkeypatch, capsys):
    assert section.usable(CPU, "bf16") is None

    def lacking(*_):
        raise RuntimeError("not implemented\nfor 'Half'")

    monkeypatch.setattr(torch.nn.functional, "conv2d", lacking)
    with pytest.raises(SystemExit):
        cli.main(["ops", "--device", "cpu", "--dtype", "fp16"])
    assert capsys.readouterr().err == "python -m benchmarks: --dtype: cpu cannot compute in fp16: not implemented\n"


def test_soak_finds_other_bits_and_errors():
    counter, calls = itertools.count(), itertools.count()

    def fails():
        if next(calls) == 5:
            raise RuntimeError("once")
        return (torch.ones(1),)

    same, other = (lambda: (torch.ones(1),)), (lambda: (torch.full((1,), float(next(counter))),))
    faults = soak([("same", same), ("other", other), ("fails", fails)], 20, "cpu")
    assert [fault.split(":")[0] for fault in faults] == ["other", "fails"]
