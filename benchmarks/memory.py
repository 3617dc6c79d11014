"""Peak memory of training steps on a GPU beside what the accounting predicts, for each mixer, with and without checkpointing.

    python -m benchmarks.memory                 # 340M, 8 sequences of 2048 tokens, bfloat16 autocast, AdamW

Each figure is ``python -m training.accounting --check-memory`` in a process of its own, so the peak is that model's alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from benchmarks.common import write_result
from hybrid_models.suite import MIXERS

CELLS = [f"{mixer}-{level}" for mixer in MIXERS for level in ("pure", "hybrid-6-1")] + ["Transformer-seed1"]
HOW = {"skip_logits": ["--skip-logits"], "checkpointing": ["--skip-logits", "--checkpointing"], "logits": []}


def check(cell: str, batch: int, length: int, how: str) -> dict:
    command = [sys.executable, "-m", "training.accounting", "--cell", cell, "--check-memory", *HOW[how]]
    done = subprocess.run([*command, "--batch", str(batch), "--length", str(length)], capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    start = done.stdout.index("{\n")  # TileLang logs to the standard output, before it
    return json.JSONDecoder().raw_decode(done.stdout, start)[0]["check_memory"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="340M-20B")
    parser.add_argument(
        "--cells", default=",".join(CELLS), help="without their size (default: pure and 6-1, Transformer)"
    )
    parser.add_argument("--how", default="skip_logits,checkpointing", help=f"of {', '.join(HOW)} (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--at-once", type=int, default=4, help="processes side by side")
    args = parser.parse_args()
    result = {"batch": [args.batch, args.length], "models": {}}
    with ThreadPoolExecutor(args.at_once) as pool:
        running = {
            (cell, how): pool.submit(check, f"{args.size}-{cell}", args.batch, args.length, how)
            for cell in args.cells.split(",")
            for how in args.how.split(",")
        }
        for (cell, how), future in running.items():
            row = result["models"].setdefault(f"{args.size}-{cell}", {})[how] = future.result()
            shown = (
                row.get("error")
                or f"{row['predicted_bytes'] / 2**30:.2f} GiB predicted, {row['ratio']:.3f} of measured"
            )
            print(f"{args.size}-{cell:26s} {how:14s} {shown}", flush=True)
    write_result("memory", result)


if __name__ == "__main__":
    main()
