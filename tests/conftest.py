"""Settings that must stand before torch and triton are used."""

import json
import os
from pathlib import Path

import torch

# Two cores are all that CI has; one thread per test process keeps pytest-xdist from oversubscribing them.
torch.set_num_threads(1)
# Without a GPU, Triton kernels run in its interpreter, which it decides on when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--gpu-result", metavar="FILE", help="write what the tests did, with device and versions, as JSON")


def pytest_terminal_summary(terminalreporter, config):
    """One row per test for benchmarks/results/gpu_tests.json; under pytest-xdist only the controller has an option to see."""
    path = config.getoption("--gpu-result")
    if not path or hasattr(config, "workerinput"):
        return
    from hybrid_models.results import environment

    rows = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            rows.append(
                {"test": report.nodeid.split("::")[-1], "outcome": outcome, "seconds": round(report.duration, 2)}
            )
    counts = {
        outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("passed", "failed", "error", "skipped")
    }
    command = " ".join(["python -m pytest", *config.invocation_params.args])
    found = {"command": command, **environment(), **counts, "tests": sorted(rows, key=lambda row: row["test"])}
    Path(path).write_text(json.dumps(found, indent=1) + "\n")
