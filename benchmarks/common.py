"""What every benchmark shares: repeated timing, and a result file that says where its numbers come from."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
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


def rows_of(title: str, make: Callable, cases: Iterable, measure: Callable) -> dict:
    """``measure(model, case)``, a dictionary, for every case of the model that ``make()`` builds.

    Peers fail in ways that are not ours to mend: what does becomes {"error": why} in its place, and the rest goes on.
    """
    rows: dict = {}

    def attempt(place, function, *args):
        try:
            return function(*args)
        except (RuntimeError, ImportError, AttributeError, TypeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            print(f"{title} {place}: {reason}", flush=True)
            return {"error": reason}

    model = attempt("cannot be built", make)
    if isinstance(model, dict):
        return model
    for case in cases:
        rows[case] = attempt(case, measure, model, case)
        if "error" not in rows[case]:
            figures = (f"{name} {value:.4g}" for name, value in rows[case].items() if isinstance(value, float))
            print(f"{title} {case:,d}:", *figures, flush=True)
    return rows


def write_result(name: str, result: dict) -> None:
    """Write results/<name>.json, and print the same as the last line."""
    result = {"benchmark": name, **environment(), **result}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
