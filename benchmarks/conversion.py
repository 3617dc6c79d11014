"""Converting a 1.3B checkpoint of fla: time, peak memory, and what an interruption leaves.

    python -m benchmarks.conversion --folder /tmp/conversion        # needs 18 GB of disk, a few minutes

Writes a checkpoint of random float32 weights in fla's format (the 1.3B GatedDeltaNet 6-1 hybrid, 5.8 GB in several
shards), converts it in a process of its own that is killed half-way, converts it again, and converts the result back.
``peak_rss_mb`` is the process's own high-water mark, imports included; ``import_rss_mb`` is what the imports alone take.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from hybrid_models.checkpoint import Files, LazyTensor, write_json, write_weights
from hybrid_models.fla_config import config_from_fla
from hybrid_models.fla_format import groups

from .common import write_result

CONFIG = {
    "model_type": "gated_deltanet",
    "architectures": ["GatedDeltaNetForCausalLM"],
    "attn": {"layers": [5, 11, 17, 23], "num_heads": 32},
    "attnres_block_size": None,
    "dtype": "float32",
    "expand_v": 1,
    "head_dim": 256,
    "hidden_size": 2048,
    "num_heads": 8,
    "num_hidden_layers": 24,
    "vocab_size": 32000,
}
BOUND_MB = 2500
# VmHWM and not ru_maxrss, which begins with what the parent process had.
CHILD = """
import json, re, sys, time
from hybrid_models.convert import convert

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024 / 1e6

imports, start = peak(), time.perf_counter()
convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
print(json.dumps({"seconds": time.perf_counter() - start, "peak_rss_mb": peak(), "import_rss_mb": imports}))
"""


def write_random(folder: Path, shard_size: str) -> int:
    """A random checkpoint in fla's format; returns its bytes."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def random(shape):
        return LazyTensor(shape, torch.float32, lambda: torch.empty(shape).normal_(0, 0.02, generator=generator))

    shapes = {name: shape for group in groups(config_from_fla(CONFIG), CONFIG) for name, shape in group.fla.items()}
    write_weights({name: random(shape) for name, shape in shapes.items()}, folder, shard_size)
    write_json(folder / "config.json", CONFIG)
    return sum(path.stat().st_size for path in folder.iterdir())


def convert(source: Path, destination: Path, to: str) -> dict:
    out = subprocess.run(
        [sys.executable, "-c", CHILD, source, destination, to], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return {name: round(value, 1) for name, value in json.loads(out.splitlines()[-1]).items()}


def kill_half_way(source: Path, destination: Path, total: int) -> dict:
    """Start a conversion, kill it when half of the bytes are there, and say what it left."""
    partial = destination.with_name(destination.name + ".partial")
    process = subprocess.Popen([sys.executable, "-c", CHILD, source, destination, "native"])
    while process.poll() is None:
        written = sum(path.stat().st_size for path in partial.iterdir()) if partial.exists() else 0
        if written > total / 2:
            process.kill()
        time.sleep(0.02)
    left = sorted(path.name for path in partial.iterdir())
    return {
        "killed": process.returncode < 0,
        "destination_exists": destination.exists(),
        "left_in_partial": left,
        "looks_complete": "config.json" in left,
    }


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every tensor."""
    out = {}
    for name, tensor in Files(folder).tensors().items():
        value = tensor[...].reshape(-1).view(torch.uint8).numpy()
        out[name] = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode() + value.tobytes()).hexdigest()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/conversion"), help="work folder, removed at the end")
    parser.add_argument("--shard-size", default="2GB", help="of the source")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    source, native, back = (args.folder / name for name in ("fla", "native", "back"))
    try:
        total = write_random(source, args.shard_size)
        print(f"source: {total / 1e9:.2f} GB", file=sys.stderr)
        interrupted = kill_half_way(source, native, total)
        print(f"interrupted: {interrupted}", file=sys.stderr)
        to_native = convert(source, native, "native")
        print(f"to native: {to_native}", file=sys.stderr)
        to_fla = convert(native, back, "fla")
        tensors = digests(source)
        result = {
            "source": {"gigabytes": round(total / 1e9, 3), "files": len(list(source.glob("*.safetensors"))), **CONFIG},
            "tensors": len(tensors),
            "interrupted_run": interrupted,
            "repeated_run": to_native | {"finished": (native / "config.json").exists()},
            "back_to_fla": to_fla,
            "round_trip_identical": tensors == digests(back),
            "bound_mb": BOUND_MB,
            "within_bound": max(to_native["peak_rss_mb"], to_fla["peak_rss_mb"]) < BOUND_MB,
        }
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    write_result("conversion", result)


if __name__ == "__main__":
    main()
