"""Six small checkpoints, trained, bundled, pushed to a local Hub, and loaded by a stranger: the whole publication as one program.

    python -m tests.end_to_end /tmp/folder
    unshare -rn python -m tests.end_to_end /tmp/folder       # the same where there is no network at all

Prints what was found as JSON; ``test_publish`` runs it and looks at that. Publisher and clean processes are forked from
interpreters that have imported everything (``fault_sweep.Harness``), the stranger at the end is a new one. The certificate
is left out here, since it takes twenty seconds for each checkpoint; ``test_bundle`` makes a real one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybrid_models import HybridLinearForCausalLM
from hybrid_models.suite import cell_config

from .common import randomize
from .fault_sweep import Harness
from .hermetic import has_network, loopback_up
from .hub_server import client_environment

CELLS = (
    "tiny-DeltaNet-pure",
    "tiny-GatedDeltaNet-hybrid-3-1",
    "tiny-GLA-pure",
    "tiny-HGRN-pure",
    "tiny-HGRN2-hybrid-3-1",
    "tiny-RetNet-pure",
)
CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# {name}\n\nA test.\n"
CERTIFICATE = {"passed": True, "dtype": "float64", "rows": [{"status": "pass", "check": "none", "deviation": 0.0}]}

STRANGER = r"""
import json, sys
for name in ("hybrid_models", "fla", "triton"):
    sys.modules[name] = None
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline
torch.set_num_threads(1)
found = {}
for repo_id in sys.argv[2:]:
    with open(hf_hub_download(repo_id, "provenance.json")) as file:
        record = json.load(file)["reference"]
    reference = load_file(hf_hub_download(repo_id, record["file"]))
    model = AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True)
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits[:, -4:]
    write = pipeline("text-generation", model=repo_id, trust_remote_code=True)
    text = write(record["prompt"], max_new_tokens=record["new_tokens"], do_sample=False, return_full_text=False)
    same_ids = write.model.generate(reference["input_ids"], max_new_tokens=record["new_tokens"], do_sample=False)
    found[repo_id] = {
        "code": type(model).__module__.split(".")[0],
        "logits": bool(torch.equal(logits, reference["logits"])),
        "ids": bool(torch.equal(same_ids[:, reference["input_ids"].shape[1] :], reference["new_ids"])),
        "text": text[0]["generated_text"] == write.tokenizer.decode(reference["new_ids"][0], skip_special_tokens=True),
    }
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and three special ones: any text, no training."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>"])}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def write_checkpoint(cell: str, folder: Path) -> Path:
    """What training would leave of a tiny cell, in ``folder/cell``; all parameters random."""
    tokenizer, config = byte_tokenizer(), cell_config(cell)
    config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = len(tokenizer), 0, 1, 2
    randomize(HybridLinearForCausalLM(config)).eval().save_pretrained(folder / cell)
    tokenizer.save_pretrained(folder / cell)
    return folder / cell


def train_checkpoint(cell: str, folder: Path) -> Path:
    """A tiny cell trained by the training command's own code, on this project's documentation, in ``folder/cell``."""
    from training.recipes import recipe
    from training.train import Options, train

    one = recipe(cell, dataset=str(Path(__file__).parents[1] / "README.md"), lanes=1)
    options = Options(
        output_dir=folder / cell,
        cache_dir=folder / "cache",
        cpu=True,
        probe_every=0,
        held_out_rows=0,
        save_steps=one.steps,
    )
    train(one, options, "python -m tests.end_to_end")
    return folder / cell


def bundles(folder: Path, cells=CELLS, harness: Harness | None = None, make: Callable = write_checkpoint) -> Path:
    """Bundles of checkpoints without their certificates, checked by the harness' clean interpreter."""
    from upload import bundle, verify

    bundle.certify = lambda source: CERTIFICATE
    if harness:
        verify.run_clean = harness.run_clean
    for cell in cells:
        source = make(cell, folder / "trained")
        bundle.bundle(source, folder / "bundles", documents={"README.md": CARD.format(name=cell)})
    return folder / "bundles"


def stranger(url: str, folder: Path, repo_ids: list[str]) -> dict:
    """Load public repositories by name, with no token, in a new interpreter that cannot import this package."""
    result = folder / "stranger.json"
    subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(result), *repo_ids],
        env=client_environment(url, folder / "stranger", token=None),
        cwd=folder,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return json.loads(result.read_text())


def main(argv: list[str] | None = None) -> int:
    folder = Path((argv or sys.argv[1:])[0])
    folder.mkdir(parents=True, exist_ok=True)
    if not has_network():
        loopback_up()
    found: dict = {"network": has_network()}
    with Harness(folder) as harness:
        made = bundles(folder, harness=harness, make=train_checkpoint)
        names = [f"org/{path}" for path in CELLS]
        found["first"] = harness.push(made, "v1.0", "--description", "Six of a test.")
        found["output"] = harness.output
        hub = harness.hub
        found["public"] = [name for name in names if not hub.state.repos[name].private]
        found["tags"] = [hub.state.repos[name].tags.get("v1.0") == hub.state.repos[name].head() for name in names]
        found["commits"] = [len(hub.state.repos[name].history("main")) for name in names]
        found["violations"] = hub.violations
        found["collections"] = [
            {"title": one.title, "description": one.description, "items": [(i["id"], i["note"]) for i in one.items]}
            for one in hub.state.collections.values()
        ]
        found["cdn_tokens"] = hub.cdn_tokens
        hub.log.clear()
        found["second"] = harness.push(made, "v1.0", "--description", "Six of a test.")
        found["second_requests"] = len(hub.log)
        found["second_writes"] = [e["path"] for e in hub.log if e["method"] not in ("GET", "HEAD")]
        found["leaks"] = harness.leaks()
        found["stranger"] = stranger(hub.url, folder, names)
    print(json.dumps(found))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
