"""Training a 340M model through the training command's own code: ours, and fla's model under the same Trainer.

    python -m benchmarks.trainer                                  # GatedDeltaNet, 30 steps of 65,536 tokens, bfloat16 autocast

Both runs are ``training.train.train``: the same data, batches, optimiser, schedule, clipping, float32 weights under autocast;
only the function that builds the model differs. Speed is the median over steady steps, memory the peak of the process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common import write_result
from hybrid_models import HybridLinearForCausalLM
from training.corpus import default_cache
from training.recipes import recipe
from training.sources import open_tokenizer
from training.train import Options, train

from . import peers


def run(cell: str, who: str, rows: int, steps: int) -> dict:
    """Train ``cell`` for ``steps`` steps of ``rows`` sequences; the metrics of its result by name."""
    small = recipe("nano-7M-GLA-pure")  # the text and the tokenizer that need no network
    cache = default_cache()
    with tempfile.TemporaryDirectory() as folder:
        open_tokenizer(small.tokenizer, small.config, small.dataset, cache).save_pretrained(f"{folder}/tokenizer")
        batch = rows * recipe(cell).sequence_length
        one = recipe(
            cell,
            dataset=small.dataset,
            tokenizer=f"{folder}/tokenizer",
            batch_tokens=batch,
            tokens=steps * batch,
            warmup_steps=5,
        )

        def fla(config):
            model = peers.fla(cell, torch.float32)
            peers.replay(cell)
            return model

        options = Options(
            output_dir=Path(folder) / "run",
            rows_per_device=rows,
            save_steps=10 * steps,
            log_every=5,
            probe_every=0,
            held_out_rows=rows,
        )
        found = train(one, options, "python -m benchmarks.trainer", fla if who == "fla" else HybridLinearForCausalLM)
    return {metric["metric"]: metric["value"] for metric in found["metrics"]} | {
        "parameters": found["details"]["parameters"],
        "corpus": found["protocol"]["corpus"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="340M-20B-GatedDeltaNet-pure")
    parser.add_argument("--rows", type=int, default=32, help="sequences of 2048 tokens in a step")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(*args.one, args.rows, args.steps)))
        return
    result = {"rows": args.rows, "steps": args.steps, "precision": "bfloat16 autocast, float32 weights", "models": {}}
    for cell in args.cells.split(","):
        for who in ("ours", "fla"):
            command = [sys.executable, "-m", "benchmarks.trainer", "--one", cell, who]
            done = subprocess.run(
                [*command, "--rows", str(args.rows), "--steps", str(args.steps)], capture_output=True, text=True
            )
            row = (
                json.loads(done.stdout.strip().splitlines()[-1])
                if not done.returncode
                else {"error": done.stderr[-600:]}
            )
            result["models"].setdefault(cell, {})[who] = row
            print(
                f"{who:5s} {cell}: " + " ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float)),
                flush=True,
            )
            if "error" in row:
                print(row["error"], flush=True)
    write_result("trainer", result)


if __name__ == "__main__":
    main()
