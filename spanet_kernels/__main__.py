"""`python -m spanet_kernels`: versions, devices, and which implementation serves which operator where."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .backends import backends


def _lines(value: Any, depth: int = 0) -> list[str]:
    lines: list[str] = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += ["  " * depth + f"{key}:", *_lines(item, depth + 1)]
        else:
            text = "-" if item in (None, [], {}) else ", ".join(item) if isinstance(item, list) else item
            lines.append("  " * depth + f"{key}: {text}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spanet_kernels",
        description="Show versions, devices and, for every operator and device, the implementation in use and why the others are not.",
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    report = backends()
    print(json.dumps(report, indent=2) if parser.parse_args().json else "\n".join(_lines(report)))


if __name__ == "__main__":
    main()
