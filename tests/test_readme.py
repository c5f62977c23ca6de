"""The README's examples run as they stand, and its commands are those of the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from spanet.cli import app

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
EXAMPLES = [block.split("```python\n")[1].split("```")[0] for block in TEXT.split("<!-- example -->")[1:]]


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    results = [value for value in names.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    assert results
    assert all(value.isfinite().all() for value in results)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`spanet ([a-z-]+)", TEXT))))
def test_commands_exist_and_take_the_options_named(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for call in re.findall(rf"`spanet {command} ([^`]*)`", TEXT):
        for option in re.findall(r"--[a-z-]+", call):
            assert option in result.output, f"spanet {command} has no {option}"


def test_targets_of_make_exist():
    rules = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", TEXT)):
        assert f"\n{target}:" in rules, target
