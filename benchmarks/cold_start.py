"""How long a person waits at the start: first token and first training step, in fresh processes with empty kernel caches.

    python -m benchmarks.cold_start
    python -m benchmarks.cold_start --training 340M-20B-GLA-pure --generation ''

Each figure is a process of its own that starts with nothing compiled: ``import_s``, ``build_s`` (random weights on the
device), then ``first_s``, and for training the steady speed that follows. ``total_s`` is what a clock on the wall shows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from benchmarks.common import write_result

_START = """
import json, time
start = time.perf_counter()
import torch, hybrid_models
from benchmarks.decode import build
from hybrid_models.suite import cell_config
imported = time.perf_counter()
model = build(cell_config({cell!r}))
torch.cuda.synchronize()
built = time.perf_counter()
out = {{"import_s": imported - start, "build_s": built - imported}}
"""
_GENERATE = """
ids = torch.randint(3, 32000, (1, 128), device="cuda")
model.generate(ids, max_new_tokens=1, do_sample=False)
torch.cuda.synchronize()
out["first_s"] = time.perf_counter() - built
model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None)
torch.cuda.synchronize()
out["and_64_tokens_s"] = time.perf_counter() - built
print(json.dumps(out))
"""
_TRAIN = """
model.train()
ids = torch.randint(3, 32000, ({batch}, 2048), device="cuda")
def step():
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    torch.cuda.synchronize()
step()
out["first_s"] = time.perf_counter() - built
step()
times = []
for _ in range(5):
    begin = time.perf_counter()
    step()
    times.append(time.perf_counter() - begin)
out["tokens_per_s"] = ids.numel() / sorted(times)[2]
out["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
print(json.dumps(out))
"""


def run(code: str) -> dict:
    """Run code in a process with empty caches; what its last line says, and the wall time of the whole."""
    with tempfile.TemporaryDirectory() as caches:
        names = ("TRITON_CACHE_DIR", "TILELANG_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLA_CONFIG_DIR")
        env = os.environ | {name: f"{caches}/{name}" for name in names}
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"total_s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", default="1.3B-100B-GatedDeltaNet-hybrid-6-1")
    parser.add_argument("--training", default="340M-20B-GatedDeltaNet-pure,340M-20B-GLA-pure")
    parser.add_argument("--batch", type=int, default=16, help="sequences of 2048 tokens in a training step")
    args = parser.parse_args()
    result = {"dtype": "bfloat16", "generation": {}, "training": {}, "training_batch": [args.batch, 2048]}
    for phase, cells, code in (("generation", args.generation, _GENERATE), ("training", args.training, _TRAIN)):
        for cell in filter(None, cells.split(",")):
            row = result[phase][cell] = run((_START + code).format(cell=cell, batch=args.batch))
            print(
                f"{phase:10s} {cell:40s} "
                + " ".join(f"{k} {v:.1f}" if isinstance(v, float) else str(v) for k, v in row.items()),
                flush=True,
            )
    write_result("cold_start", result)


if __name__ == "__main__":
    main()
