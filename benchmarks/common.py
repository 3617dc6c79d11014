"""What every benchmark shares: repeated timing, and a result file that says where its numbers come from."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def time_in_turn(functions: dict[str, Callable], repeats: int = 5) -> dict[str, dict[str, float]]:
    """Median and spread in seconds of several functions, called in turn so that drift of the machine hits all alike.

    Returns:
        {name: {"median_s", "min_s", "max_s"}} over ``repeats`` calls after one warm-up call.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: {"median_s": statistics.median(t), "min_s": min(t), "max_s": max(t)} for name, t in times.items()}


def environment() -> dict:
    """Device, versions and commit of this run."""

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in ("torch", "transformers", "triton", "fla-core")},
        "commit": commit(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({os.cpu_count()} cores)"


def commit() -> str:
    """The commit of the checkout, with a + where tracked files differ from it; BENCHMARK_COMMIT where there is no git."""
    if given := os.environ.get("BENCHMARK_COMMIT"):
        return given
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty else "")


def write_result(name: str, result: dict) -> None:
    """Write results/<name>.json, and print the same as the last line."""
    result = {"benchmark": name, **environment(), **result}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
