"""The environment of a run, and results as JSON files."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import spanet_kernels
from spanet.runs import write_json
from spanet_kernels import _native

ROOT = Path(__file__).parents[1]


def _first(path: str, key: str) -> str | None:
    """Value of the first `key: value` line of a file of the system, if there is one."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def last_level_cache() -> int:
    """Bytes of the largest CPU cache; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(sizes, default=32 * 2**20)


class Others:
    """Processor time that other programs take: `with Others() as others: ...`, then others.cores, how many cores they kept busy."""

    cores: float | None = None  # None where the system does not say

    def __enter__(self) -> Others:
        self.started = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        wall, foreign = (after - before for after, before in zip(self._now(), self.started, strict=True))
        if not math.isnan(foreign):
            self.cores = round(max(0.0, foreign / wall), 2)

    @staticmethod
    def _now() -> tuple[float, float]:
        try:
            ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return time.perf_counter(), math.nan
        busy = sum(ticks) - ticks[3] - ticks[4]  # all but idle and waiting for disks
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader must know to repeat a run."""
    found: dict[str, Any] = {
        "device": device.type,
        "name": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else _first("/proc/cpuinfo", "model name") or platform.machine(),
        "cpu": _first("/proc/cpuinfo", "model name"),
        "cpu capability": _native.cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last level cache": last_level_cache(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "spanet_kernels": spanet_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "last level cache": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "gpu state": _gpu_state(str(properties.uuid)),
        }
    return found


def _gpu_state(uuid: str) -> str | None:
    """Driver, clocks and temperature, as nvidia-smi states them."""
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{query}: {done.stdout.strip()}" if done.returncode == 0 else None


def save(path: Path, result: dict[str, Any]) -> None:
    """Write JSON in one step: a reader sees the old file or the whole new one. Raises OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def load(path: Path) -> dict[str, Any] | None:
    """A result, or None if that benchmark has not been run. Raises ValueError for a file that is no result."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"{path} is not a benchmark result: {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("environment"), dict) or not isinstance(result.get("rows"), list):
        raise ValueError(f"{path} is not a benchmark result: it has no environment or no rows")
    return result


def free_memory(device: torch.device) -> int:
    """Bytes that a program may still allocate; without an answer of the system, more than any model needs."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = _first("/proc/meminfo", "MemAvailable")
    return int(available.split()[0]) * 1024 if available else 2**62


def timings(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Every time of a result by row and competitor."""
    return {
        (row["name"], competitor): verdict
        for row in result["rows"]
        for competitor, verdict in row.get("competitors", {}).items()
        if "median" in verdict
    }


def is_ours(name: str, competitor: str) -> bool:
    return competitor.startswith("ours") or name.startswith("spanet_")


def spread(timing: dict[str, Any]) -> float:
    """Interquartile range over median."""
    return (timing["upper"] - timing["lower"]) / timing["median"]


def regressions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Times of ours that have grown beyond the noise.

    The noise is the larger interquartile range, 5 % at least, beside what the code of others has slowed down by (median).
    """
    before, after = timings(old), timings(new)
    growth = {key: after[key]["median"] / before[key]["median"] for key in after if key in before}
    drift = statistics.median([max(1.0, value) for key, value in growth.items() if not is_ours(*key)] or [1.0])
    found = []
    for key, value in growth.items():
        noise = max(0.05, spread(before[key]), spread(after[key]))
        if is_ours(*key) and value > drift * (1 + noise):
            found.append(f"{', '.join(key)}: {value:.2f} x its old time, {drift * (1 + noise):.2f} x is within the noise")
    return found
