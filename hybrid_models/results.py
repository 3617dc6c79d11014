"""Result files: the one schema in which a number reaches a card.

Training, evaluation and benchmarks measure, cards only read. What passes between them is a JSON file that says what was
measured, on which weights, by which command, on which machine and with which versions; a number without such a file does
not exist. A checkpoint does not carry this file.

    >>> from hybrid_models.results import metric, result
    >>> one = result("lm", "nano-GLA-pure", "python -m evaluation.lm runs/nano-GLA-pure", [metric("held-out", "loss", 2.31)])
    >>> one["metrics"][0]["value"], sorted(one)[:3]
    (2.31, ['command', 'commit', 'date'])

A file lies at ``<folder>/<model>/<evaluation>.json`` or, where a label tells protocols apart,
``<folder>/<model>/<evaluation>-<label>.json``; a second run of the same command replaces it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

SCHEMA = 1
FOLDER = Path("model_cards/results")
PACKAGES = ("torch", "transformers", "triton", "fla-core", "accelerate", "datasets", "peft", "trl", "lm_eval")
REQUIRED = frozenset("schema evaluation model command metrics device versions commit date".split())


def environment() -> dict:
    """Device, threads, versions and commit of this process; ``commit`` is None outside of a checkout."""

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := version_of(name))},
        "commit": commit(),
    }


def cpu_name() -> str:
    """The processor's name and its number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({os.cpu_count()} cores)"


def commit() -> str | None:
    """The checkout's commit, with a + where Python files differ from it; BENCHMARK_COMMIT where there is no git."""
    if given := os.environ.get("BENCHMARK_COMMIT"):
        return given
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty else "")


def this_command(module: str, argv: Iterable[str] | None = None) -> str:
    """How to run the same again: ``python -m module`` and its arguments, quoted for a shell."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])


def weights_sha256(directory: str | Path) -> str | None:
    """One digest of all safetensors files of a checkpoint directory, names included; None where there are none."""
    files = sorted(Path(directory).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest() if files else None


def metric(
    task: str,
    name: str,
    value: float,
    *,
    n: int | None = None,
    stderr: float | None = None,
    ci95: tuple[float, float] | None = None,
    **conditions,
) -> dict:
    """One number of a result.

    Args:
        task: what was done, "hellaswag" or "niah_single_1".
        name: what the number is, with its unit where it has one: "acc_norm", "loss_nats", "tokens_per_s".
        n: independent items behind it.
        stderr, ci95: its uncertainty over those items, where that is known.
        conditions: what tells it apart from its neighbours: ``length=2048``, ``shots=0``.

    Raises:
        ValueError: ``value`` is not a finite number; leave out what was not measured.
    """
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{task} {name}: value={value!r} is not a finite number; leave the metric out instead.")
    given = {"n": n, "stderr": stderr, "ci95": None if ci95 is None else list(ci95), **conditions}
    return {"task": task, "metric": name, "value": value, **{k: v for k, v in given.items() if v is not None}}


def result(
    evaluation: str,
    model: str,
    command: str,
    metrics: list[dict],
    *,
    weights: str | None = None,
    protocol: dict | None = None,
    seeds: list[int] | None = None,
    seconds: float | None = None,
    details: dict | None = None,
) -> dict:
    """A whole result, ready for ``write``.

    Args:
        evaluation: what produced it: "training", "lm", "ruler", ...
        model: name of a cell of the suite, or of the checkpoint's directory.
        command: the command that gives it again (``this_command``).
        metrics: from ``metric``.
        weights: ``weights_sha256`` of the checkpoint that was measured.
        protocol: everything that must agree for two results to be compared.
        details: anything else worth keeping, per-item scores for example.
    """
    return {
        "schema": SCHEMA,
        "evaluation": evaluation,
        "model": model,
        "weights_sha256": weights,
        "command": command,
        "protocol": protocol or {},
        "seeds": seeds or [],
        "metrics": metrics,
        "details": details or {},
        "seconds": seconds,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        **environment(),
    }


def write(one: dict, folder: str | Path = FOLDER, label: str | None = None) -> Path:
    """Write a result where ``read_all`` finds it, whole or not at all; returns the path."""
    directory = Path(folder) / one["model"]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{one['evaluation']}{'-' + label if label else ''}.json"
    write_atomically(path, json.dumps(one, indent=1, allow_nan=False) + "\n")
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a restart after a kill, sees the old one or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_all(folder: str | Path = FOLDER) -> Iterator[tuple[Path, dict]]:
    """Every result below ``folder`` with its path, in the order of paths.

    Raises:
        ValueError: a file is not JSON, lacks a field of the schema, or is of a schema that this version does not know.
    """
    for path in sorted(Path(folder).glob("*/*.json")):
        try:
            one = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        missing = REQUIRED - one.keys() if isinstance(one, dict) else REQUIRED
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: it is not a result file; move it elsewhere.")
        if one["schema"] != SCHEMA:
            raise ValueError(f"{path} is of schema {one['schema']!r}, this version reads {SCHEMA}: measure again.")
        yield path, one


__all__ = [
    "commit",
    "cpu_name",
    "environment",
    "metric",
    "read_all",
    "result",
    "this_command",
    "weights_sha256",
    "write",
    "write_atomically",
]
