"""Does it load and compute as it did at export? Asked as a stranger would ask, in a process of its own.

A clean interpreter (``python -I``, a new HF_HOME, importing hybrid_models, fla or triton fails) downloads one commit with the
real client, hashes every file, loads the model by the code that travels with it, and compares logits and a greedy text
with ``reference.safetensors``. The client itself checks sizes, never a hash: a flipped bit passes it, and fails here.

    python -m upload.verify runs/bundles/nano-7M-GLA-pure
    python -m upload.verify org/nano-7M-GLA-pure --revision v1.0 --bundle runs/bundles/nano-7M-GLA-pure
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import constants, get_token

from .manifest import Manifest, read_manifest
from .remote import Transient, Trouble, VerificationError, redact

REFERENCE = "reference.safetensors"
# Of max |a - b| / max(1, std(b)) between machines; on one machine they are equal. Sums in another order differ by some
# units in the last place (1e-7 in float32, 8e-3 in bfloat16) through tens of layers.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-1, "float16": 2e-2}

CLEAN_PROCESS = r"""
import hashlib, json, os, sys
for name in ("hybrid_models", "fla", "triton"):  # as if not installed, wherever they are
    sys.modules[name] = None
with open(sys.argv[1]) as file:
    asked = json.load(file)
found = {"problem": None}


def check():
    source, where = asked["source"], {}
    folder = source
    if asked["revision"]:
        import httpx2
        from huggingface_hub import set_client_factory, snapshot_download
        from huggingface_hub.utils._http import default_client_factory

        def factory():
            client = default_client_factory()
            client.timeout = httpx2.Timeout(asked["timeout"])
            return client

        set_client_factory(factory)
        where = {"revision": asked["revision"]}
        try:
            folder = snapshot_download(source, max_workers=4, **where)
        except Exception as error:
            return "network", f"{type(error).__name__}: {error}"
    present = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(directory, name)
            with open(path, "rb") as file:
                present[os.path.relpath(path, folder)] = hashlib.file_digest(file, "sha256").hexdigest()
    present.pop(".gitattributes", None)
    wrong = sorted(path for path in {**present, **asked["files"]} if present.get(path) != asked["files"].get(path))
    if wrong:
        return "files", f"missing, not expected, or with another content: {', '.join(wrong[:8])}"
    if not asked["load"]:
        return None, None
    try:
        return load(source, folder, {"trust_remote_code": True, "local_files_only": True, **where})
    except Exception as error:
        return "load", f"{type(error).__name__}: {error}"


def load(source, folder, options):
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with open(os.path.join(folder, "provenance.json")) as file:
        reference = json.load(file)["reference"]
    torch.set_num_threads(reference["threads"])
    tensors = load_file(os.path.join(folder, asked["reference"]))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, reference["dtype"]), **options).eval()
    if not type(model).__module__.startswith("transformers_modules."):
        return "load", f"the model is a {type(model).__module__}, not of the code that travels with it"
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    ids, want = tensors["input_ids"], tensors["logits"]
    with torch.no_grad():
        logits = model(ids).logits[:, -want.shape[1] :].float()
        new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=reference["new_tokens"])
    text = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=False)
    deviation = float((logits - want).abs().max() / max(1.0, float(want.std())))
    found.update(deviation=deviation, text=text, tolerance=reference["tolerance"])
    if tokenizer(reference["prompt"])["input_ids"] != ids[0].tolist():
        return "tokenizer", "the tokenizer gives other ids for the recorded prompt"
    if not deviation <= reference["tolerance"]:  # nan too
        return "logits", f"logits are off by {deviation:.1e}, allowed are {reference['tolerance']:.0e}"
    if deviation == 0 and text != reference["text"]:
        return "text", f"the logits are equal, the greedy text is not: {text!r}"
    return None, None


found["problem"], found["message"] = check()
with open(asked["result"], "w") as file:
    json.dump(found, file)
"""


def verify(
    source: str, manifest: Manifest, revision: str | None = None, timeout: float = 60.0, *, load: bool = True
) -> dict:
    """Load a repository's commit, or a bundle's folder, in a clean process.

    Args:
        source: a repo id with ``revision``, a full commit id; or a folder.
        manifest: what must be there, no file more and none less.
        timeout: seconds for each request.
        load: without it, files are downloaded and hashed only; a rehearsal does that.

    Returns:
        with ``load``: deviation (of the logits, relative to their standard deviation), tolerance and text.

    Raises:
        VerificationError: files, loading, tokens, logits or text are not as recorded.
        Transient: the download did not come to its end.
    """
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        asked = {
            **{
                "source": source if revision else str(Path(source).resolve()),
                "revision": revision,
                "timeout": timeout,
                "reference": REFERENCE,
                "load": load,
            },
            **{"files": {path: file.sha256 for path, file in manifest.files.items()}},
            **{"result": f"{folder}/result.json"},
        }
        Path(folder, "asked.json").write_text(json.dumps(asked))
        said = run_clean(Path(folder), timeout, online=revision is not None)
        try:
            found = json.loads(Path(folder, "result.json").read_text())
        except (OSError, ValueError):
            raise Transient(f"the clean process died: {redact(said)[-300:]}") from None
    if found["problem"] == "network":
        raise Transient(f"{source}: {redact(found['message'])}")
    if found["problem"]:
        raise VerificationError(f"{source}: {found['problem']}: {redact(found['message'])}")
    return found


def run_clean(folder: Path, timeout: float, online: bool) -> str:
    """Run CLEAN_PROCESS on ``folder/asked.json`` with its home in ``folder``; returns what it said on stderr."""
    process = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN_PROCESS, f"{folder}/asked.json"],
        cwd=folder,
        env=clean_environment(folder, timeout, online),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return process.stderr


def clean_environment(home: Path, timeout: float, online: bool) -> dict[str, str]:
    """This environment without what could satisfy a download from this machine's caches."""
    dropped = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_CACHE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    ours = {
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": constants.ENDPOINT,
        "HF_HUB_DISABLE_XET": str(int(constants.HF_HUB_DISABLE_XET)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_ETAG_TIMEOUT": str(max(1, int(timeout))),
        "HF_HUB_DOWNLOAD_TIMEOUT": str(max(1, int(timeout))),
    }
    if online and (token := get_token()):  # a private repository is read with it
        ours["HF_TOKEN"] = token
    return {**kept, **ours, **({} if online else {"HF_HUB_OFFLINE": "1"})}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m upload.verify",
        description="Load a bundle, or a published repository, in a clean process and compare it with its record.",
        epilog="examples:\n  python -m upload.verify runs/bundles/nano-7M-GLA-pure\n"
        "  python -m upload.verify org/nano-7M-GLA-pure --revision v1.0 --bundle runs/bundles/nano-7M-GLA-pure",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a bundle's folder or a repo id")
    parser.add_argument("--revision", help="a commit id, tag or branch of the repository (default: main)")
    parser.add_argument("--bundle", type=Path, help="what the repository must hold; needed for a repo id")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for a request (default: %(default)s)")
    args = parser.parse_args(argv)
    folder = args.bundle or Path(args.source)
    try:
        if not folder.is_dir():
            raise Trouble(f"{args.source} is not a folder: for a repo id, name the bundle with --bundle.")
        revision = None
        if args.bundle:
            from huggingface_hub import HfApi

            revision = HfApi().model_info(args.source, revision=args.revision, timeout=args.timeout).sha
        found = verify(args.source, read_manifest(folder), revision, args.timeout)
    except (Trouble, Transient, OSError) as error:
        print(f"upload.verify: {redact(str(error))}", file=sys.stderr)
        return 2
    print(
        f"{args.source}: logits are off by {found['deviation']:.1e} (allowed {found['tolerance']:.0e}); text {found['text']!r}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
