"""What every benchmark shares: repeated timing, and a result file that says where its numbers come from."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from hybrid_models.results import environment

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


def write_result(name: str, result: dict) -> None:
    """Write results/<name>.json, and print the same as the last line."""
    result = {"benchmark": name, **environment(), **result}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
