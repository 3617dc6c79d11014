"""Loading a checkpoint as someone does who has not installed this package: by the code that travels with it.

>>> from evaluation.clean_process import run_remote_code
>>> run_remote_code(folder, ids)["logits"].shape                  # doctest: +SKIP
torch.Size([1, 12, 32000])
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

REMOTE_CODE = """
import sys
import torch
for name in ("hybrid_models", "fla", "triton"):  # as if not installed, wherever they are
    sys.modules[name] = None
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, device, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
ids = torch.load(f"{folder}/ids.pt").to(device)
options = dict(trust_remote_code=True, local_files_only=True)
config = AutoConfig.from_pretrained(f"{folder}/copy", **options)
model = AutoModelForCausalLM.from_pretrained(f"{folder}/copy", dtype="auto", **options).to(device).eval()
base = AutoModel.from_pretrained(f"{folder}/copy", dtype="auto", **options).to(device).eval()
assert all(type(x).__module__.startswith("transformers_modules.") for x in (config, model, base))
with torch.no_grad():
    logits, hidden = model(ids).logits, base(ids).last_hidden_state
model.save_pretrained(f"{folder}/again")
torch.save(dict(logits=logits, hidden=hidden), f"{folder}/result.pt")
"""


def run_remote_code(saved: Path, ids: torch.Tensor) -> dict:
    """Load a copy of ``saved`` by its own code alone, in an isolated interpreter that cannot see this package.

    Returns:
        logits and hidden, of ids, and the directory ``again``, beside ``saved``, that it saved to.

    Raises:
        RuntimeError: the process failed; with the end of what it said.
    """
    folder = saved.parent
    saved.rename(folder / "copy")  # nothing may lead back to where it was written
    torch.save(ids.cpu(), folder / "ids.pt")
    settings = dict(HF_HOME=str(folder / "home"), HF_MODULES_CACHE=str(folder / "modules"), HF_HUB_OFFLINE="1")
    process = subprocess.run(
        [sys.executable, "-I", "-c", REMOTE_CODE, str(folder), str(ids.device), str(torch.get_num_threads())],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"loading by remote code failed: {process.stderr.strip()[-500:]}")
    return {**torch.load(folder / "result.pt", map_location=ids.device), "again": folder / "again"}
