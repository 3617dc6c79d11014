"""Let fla search the configurations of its kernels on this card, once, and keep what it finds.

    python -m benchmarks.tune_fla                                          # six mixers at 340M, 10 minutes on an H200

Each mixer's own fla model takes a training step in a process of its own. The processes share the card: they compile side by
side, and a lock keeps two of them from timing at once. ``benchmarks.peers.replay`` and the table in
``hybrid_models/fla_kernels.py`` use the result. Mixers that are not searched keep what the file has of them.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from hybrid_models.results import environment
from hybrid_models.suite import MIXERS

from . import peers


def search(cell: str, batch: int, lock: Path) -> dict:
    """One training step of fla's model with the search on; returns ``peers.found()`` and the seconds it took."""
    from triton.runtime import Autotuner
    from triton.testing import do_bench

    def one_at_a_time(kernel_call, quantiles):
        kernel_call()  # compiles, beside the others
        torch.cuda.synchronize()
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return do_bench(kernel_call, warmup=5, rep=30, quantiles=quantiles)

    Autotuner.do_bench = property(lambda self: one_at_a_time)
    start = time.perf_counter()
    model = peers.fla(cell)
    ids = torch.randint(3, 32000, (batch, 2048), device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "kernels": peers.found()}


def run(mixer: str, size: str, batch: int, lock: Path, device: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.tune_fla", "--one", f"{size}-{mixer}-pure"]
    command += ["--batch", str(batch), "--lock", str(lock)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": str(device)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        print(f"{mixer}: {done.stderr[-2000:]}", flush=True)
        return {"error": done.stderr.strip().splitlines()[-1]}
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{mixer}: {len(result['kernels'])} kernels in {result['seconds']:.0f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default="GatedDeltaNet,HGRN2,GLA,DeltaNet,RetNet,HGRN", help="in this order")
    parser.add_argument("--size", default="340M-20B")
    parser.add_argument("--batch", type=int, default=16, help="sequences of 2048 tokens")
    parser.add_argument("--at-once", type=int, default=3, help="processes per card")
    parser.add_argument("--output", default=str(peers.TABLE))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--lock", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(search(args.one, args.batch, Path(args.lock))))
        return
    mixers, cards = args.mixers.split(","), torch.cuda.device_count()
    output = Path(args.output)
    table = json.loads(output.read_text()) if output.exists() else {"mixers": {}, "searches": {}}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.at_once * cards) as pool:
        running = {
            mixer: pool.submit(run, mixer, args.size, args.batch, Path(folder) / str(i % cards), i % cards)
            for i, mixer in enumerate(mixers)
        }
        for mixer, future in running.items():
            result = future.result()
            if "error" not in result:
                about = {"size": args.size, "batch": args.batch, "seconds": result["seconds"], **environment()}
                table["mixers"][MIXERS[mixer]], table["searches"][MIXERS[mixer]] = result["kernels"], about
                output.write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps({"seconds": {mixer: about["seconds"] for mixer, about in table["searches"].items()}}))


if __name__ == "__main__":
    main()
