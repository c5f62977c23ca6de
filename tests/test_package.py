"""The house rules: one direction of imports, what is in use and why, forced implementations, files that must be there."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spanet_kernels
from spanet_kernels import radial_filter, use
from spanet_kernels.backends import OPERATORS
from spanet_kernels.testing import make_input, make_profile

ROOT = Path(__file__).parents[1]
# a module may import from its own level's left: leaves first
LEVELS = [
    {f"spanet_kernels.{leaf}" for leaf in ("modes", "reference", "products", "composed", "decompositions", "triton_kernels")},
    {"spanet_kernels.backends", "spanet_kernels.ops"},
    {"spanet_kernels.nn", "spanet_kernels.testing", "spanet_kernels.flops"},
    {"spanet_kernels", "spanet_kernels.__main__"},
    {"spanet"},
    {"benchmarks"},
]


def level(module: str) -> int | None:
    for index, names in enumerate(LEVELS):
        if any(module == name or (module.startswith(f"{name}.") and name != "spanet_kernels") for name in names):
            return index
    return None


def imported(path: Path) -> set[str]:
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    parent = package if path.name == "__init__.py" else package.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parent.split(".")[: len(parent.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            members = {f"{module}.{alias.name}" for alias in node.names}
            found |= {m if level(m) is not None and not m.startswith("spanet_kernels.__version__") else module for m in members}
    return found


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("spanet*/**/*.py"), *ROOT.glob("benchmarks/*.py")]), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_go_one_way(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for module in imported(path):
        assert not module.startswith("tests"), module
        other = level(module)
        if other is None or own.split(".")[:2] == module.split(".")[:2]:
            continue
        facts_about_the_package = own == "spanet_kernels.backends" and module == "spanet_kernels"
        assert other <= level(own) or facts_about_the_package, f"{own} imports {module}"
        if own.startswith("spanet."):
            public = {"spanet_kernels", *(f"spanet_kernels.{name}" for name in spanet_kernels.__all__)}
            assert module in public or module.partition(".")[0] == "spanet", f"{own} uses {module}, which is not public"


def test_every_operator_has_every_fallback():
    # other operators call them below autograd
    pieces = {"mode_coefficients", "outer_sum", "gelu", "column_sums", "image_moments", "pointwise_pair", "pointwise_mlp_backward"}
    pieces |= {"mixer_branch", "mixer_branch_backward", "branch_norm", "branch_norm_backward", "branch_sum"}
    gradients = {
        "axial_conv_backward",
        "spectral_gate_backward",
        "spectral_mixer_backward",
        "image_norm_backward",
    }  # differentiated by composition
    composed = {op for op in OPERATORS if op.startswith(("spectral_gate", "spectral_mixer"))}  # their parts have CPU kernels
    elsewhere = {"image_norm", "image_norm_backward", "column_sums"}  # only GPUs call them
    for op in OPERATORS:
        keys = ["Meta", "CompositeExplicitAutograd"]
        keys += (
            ["CPU"] * (op not in composed | elsewhere)
            + ["FuncTorchBatched"] * (op not in pieces)
            + ["Autograd"] * (op not in pieces | gradients)
        )
        for key in keys:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"spanet_kernels::{op}", key), (op, key)
        in_use = "composed" if op in composed else "reference" if op in elsewhere else "C++"
        assert spanet_kernels.backends()["operators"][op]["cpu"]["in use"].startswith(in_use)


def test_report():
    report = spanet_kernels.backends()
    assert report["versions"]["spanet_kernels"] == spanet_kernels.__version__
    assert report["operators"]["radial_filter"]["cpu"]["in use"].startswith("C++")
    if not torch.cuda.is_available():
        assert report["operators"]["radial_filter"]["cuda"]["in use"] is None
        assert all(report["operators"]["radial_filter"]["cuda"]["not in use"].values())
    triton_has = {path.stem for path in ROOT.glob("spanet_kernels/triton_kernels/[a-z]*.py")}
    for op, places in report["operators"].items():
        reasons = places["cuda"]["not in use"]
        assert (reasons.get("triton") == "there is no Triton kernel of it") == (op.removesuffix("_backward") not in triton_has), op
        in_library = torch._C._dispatch_has_kernel_for_dispatch_key(f"spanet_kernels::{op}", "CUDA")
        assert in_library or reasons["cuda"], op
    out = subprocess.run([sys.executable, "-m", "spanet_kernels", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout)["operators"] == json.loads(json.dumps(report["operators"]))
    assert "in use: C++" in subprocess.run([sys.executable, "-m", "spanet_kernels"], capture_output=True, text=True, check=True).stdout


def test_use_forces_and_restores():
    x = make_input((2, 8, 14, 14), torch.float32)
    base, gain = make_profile(8, 2, torch.float32)
    own = radial_filter(x, base, gain, 2)
    with use("reference"):
        by_fft = radial_filter(x, base, gain, 2)
        with use("modes"):
            by_modes = radial_filter(x, base, gain, 2)
        assert torch.equal(radial_filter(x, base, gain, 2), by_fft)
    assert not torch.equal(by_fft, own)
    assert not torch.equal(by_modes, by_fft)
    assert torch.equal(radial_filter(x, base, gain, 2), own)


def test_forced_capability_is_reported():
    for wanted in ("plain", "avx2", "nonsense"):
        code = "import spanet_kernels; print(spanet_kernels.backends()['devices']['cpu']['capability'])"
        env = dict(os.environ, SPANET_KERNELS_CPU=wanted)
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip()
        assert out == wanted or wanted == "nonsense" or out == "plain"


def test_missing_library_is_explained(tmp_path):
    import shutil

    shutil.copytree(ROOT / "spanet_kernels", tmp_path / "spanet_kernels", ignore=shutil.ignore_patterns("_cpu.so", "_cuda.so"))
    run = subprocess.run([sys.executable, "-c", "import spanet_kernels"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    assert "_cpu.so was not built; install the package" in run.stderr


def test_typed_and_licensed():
    assert (ROOT / "spanet_kernels/py.typed").exists()
    assert (ROOT / "spanet/py.typed").exists()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_no_path_of_a_machine_in_the_sources():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"/(root|home|tmp)/[a-z]")
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".md", ".toml") or path.name in ("Makefile", "run"):
            assert not pattern.search(path.read_text()) or path == Path(__file__), name
