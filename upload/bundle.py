"""From a trained output directory to what is published, or a reason why not.

    python -m upload.bundle runs/nano-7M-GLA-pure --output runs/bundles --namespace my-org --release v1.0
    python -m upload.bundle runs/nano-7M-GLA-pure/checkpoint-200 --name nano-7M-GLA-pure@step-200 --output runs/bundles

A bundle holds native safetensors (the very files that were measured), configuration with the whole auto_map, modelling
code, tokenizer with a padding token, generation defaults, the card and its pictures, raw results, the licence, the
certificate, ``reference.safetensors`` (logits and a greedy text of a fixed prompt), ``provenance.json`` and
``SHA256SUMS``. It exists only if the invariance certificate passed and a clean process, without this package, loaded it and
computed the recorded logits. The same directory gives the same bundle, byte for byte, on the same machine: otherwise a
second publication would not be an empty one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import hybrid_models
from hybrid_models import HybridLinearConfig
from hybrid_models.checkpoint import Files, finished_or_absent, write_json
from hybrid_models.info import describe
from hybrid_models.results import environment, weights_sha256

from .card import files
from .manifest import read_manifest, write_sums
from .remote import Trouble, VerificationError
from .verify import REFERENCE, TOLERANCES, verify

ROOT = Path(__file__).parents[1]
PROMPT = "The first thing that a reader of this file should know is that"
NEW_TOKENS, KEPT_LOGITS = 16, 4


def bundle(
    source: str | Path,
    output: str | Path,
    *,
    name: str | None = None,
    namespace: str | None = None,
    release: str | None = None,
    documents: dict[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Make ``output/name`` from a trained directory.

    Args:
        source: what training wrote.
        name: of the repository; ``NAME@BRANCH`` for a training step. Default: the directory's own.
        namespace, release: where it will be published and under which tag, for the card's example.
        documents: texts by path, the README among them. Default: the cell's card and what it links to (``upload.card``).
        overwrite: replace an older bundle.

    Returns:
        the bundle's folder.

    Raises:
        Trouble: something is missing or does not fit; the certificate or the clean process failed.
        FileExistsError: the bundle exists, and ``overwrite`` is false.
    """
    source, name = Path(source), name or Path(source).resolve().name
    steps = iter(tqdm(["certificate", "files", "reference", "clean process"], desc=name, unit="step", disable=None))
    with finished_or_absent(Path(output) / name, overwrite) as folder:
        model, tokenizer = load(source)
        next(steps)
        certificate = certify(source)
        next(steps)
        save_files(source, folder, model, tokenizer)
        write_json(folder / "certificate.json", certificate)
        add_documents(folder, card(name, source, namespace, release) if documents is None else documents, source)
        next(steps)
        reference = record(model, tokenizer, folder)
        write_json(folder / "provenance.json", provenance(name, source, certificate, reference))
        write_sums(folder)
        next(steps)
        manifest = read_manifest(folder)
        found = verify(str(folder), manifest)
        if found["deviation"] != 0 or found["text"] != reference["text"]:
            raise VerificationError(
                f"{source}: on this machine the code that travels with the model must give the same numbers as the installed "
                f"one, and is off by {found['deviation']:.1e}: save the model again with this version, or report a bug."
            )
        next(steps, None)
    return Path(output) / name


def load(source: Path) -> tuple[PreTrainedModel, object]:
    """Model and tokenizer of a trained directory, by the installed package.

    Raises:
        Trouble: it is not a checkpoint of this family, or lacks a tokenizer that fits.
    """
    if not (source / "config.json").is_file():
        raise Trouble(f"{source} is not a checkpoint's folder: it has no config.json.")
    try:
        config = AutoConfig.from_pretrained(source)
        if not isinstance(config, HybridLinearConfig):
            raise Trouble(
                f"{source} holds a {config.model_type!r} model: convert it with `hybrid-linear convert` first."
            )
        Files(source).weights()  # safetensors that are whole, no pickles
        model, loading = AutoModelForCausalLM.from_pretrained(source, dtype="auto", output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise Trouble(f"{source}: {str(error).splitlines()[0]}") from error
    problems = {key: sorted(map(str, loading[key])) for key in loading if loading[key]}
    if problems:
        raise Trouble(f"{source}: weights and configuration do not fit together: {problems}. Save the model again.")
    if len(tokenizer) > config.vocab_size:
        raise Trouble(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, vocab_size={config.vocab_size}: one is not the model's."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise Trouble(f"{source}: the tokenizer has no padding and no end token: set pad_token and save it again.")
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token serves
    tokenizer.padding_side = "left"  # batched generation
    return model.eval(), tokenizer


def certify(source: Path) -> dict:
    """Run the invariance certificate on ``source``, in float64; returns it without what differs from run to run.

    In float32 the rounding of some trained weights reaches the tolerance; in float64 only a wrong formula does.

    Raises:
        Trouble: a check failed; with those that did.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "certificate.json"
        command = [
            sys.executable,
            "-m",
            "evaluation.certify",
            str(source.resolve()),
            "--dtype",
            "float64",
            "--json",
            str(report),
        ]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not report.is_file():
            raise Trouble(f"{source}: the certificate could not be made: {process.stderr.strip()[-300:]}")
        certificate = json.loads(report.read_text())
    if process.returncode or not certificate["passed"]:
        failed = [row["check"] for row in certificate["rows"] if row["status"] == "fail"]
        raise Trouble(f"{source} does not pass the certificate: {'; '.join(failed[:5])}. It is not published.")
    return {key: value for key, value in certificate.items() if key not in ("target", "seconds")}


def save_files(source: Path, folder: Path, model: PreTrainedModel, tokenizer) -> None:
    """Configuration, code, tokenizer and generation defaults as this version saves them, and the weights as they are."""
    if not (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_model_config(model.config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for file in Files(source).weight_files():
        shutil.copyfile(source / file, folder / file)
    tokenizer.save_pretrained(folder)


def card(name: str, source: Path, namespace: str | None, release: str | None) -> dict[str, str]:
    """The cell's card, for these weights, and every file that it links to."""
    cell = name.split("@")[0]
    weights = weights_sha256(source) if cell == name else None  # a training step has no results of its own
    return files(cell, ROOT, f"{namespace}/{cell}" if namespace else None, release if namespace else None, weights)


def add_documents(folder: Path, documents: dict[str, str], source: Path) -> None:
    """The card and what it links to, the training record, the licence."""
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    if (source / "training.json").is_file():
        shutil.copyfile(source / "training.json", folder / "training.json")
    for path, text in documents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


def record(model: PreTrainedModel, tokenizer, folder: Path) -> dict:
    """Write ``reference.safetensors``; returns what ``provenance.json`` says about it.

    input_ids [1, T] int64, logits [1, 4, V] float32 of the last positions, new_ids [1, 16] int64 of greedy decoding; on the
    CPU, in the dtype of the weights.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in TOLERANCES:
        raise Trouble(f"The weights are in {dtype}: publish {', '.join(TOLERANCES)}.")
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[:, -KEPT_LOGITS:].float().contiguous()
        new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
    if not torch.isfinite(logits).all():
        raise Trouble("The logits of the reference prompt are not finite: this model is not published.")
    new = new[:, ids.shape[1] :].contiguous()
    save_file({"input_ids": ids, "logits": logits, "new_ids": new}, folder / REFERENCE, metadata={"format": "pt"})
    return {
        "file": REFERENCE,
        "prompt": PROMPT,
        "text": tokenizer.decode(new[0], skip_special_tokens=False),
        "new_tokens": NEW_TOKENS,
        "dtype": dtype,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "tolerance": TOLERANCES[dtype],
    }


def provenance(name: str, source: Path, certificate: dict, reference: dict) -> dict:
    """Where it comes from, as far as that is on record: training's own words, this export, the check that it passed."""
    facts = describe(AutoConfig.from_pretrained(source), contexts=())
    kinds = " and ".join(facts.mixers) or "Transformer"
    ratio = f", {facts.linear_to_full} linear to full attention" if facts.linear_layers and facts.full_layers else ""
    training = json.loads((source / "training.json").read_text()) if (source / "training.json").is_file() else None
    if training and training.get("weights_sha256") not in (None, weights_sha256(source)):
        raise Trouble(f"{source}: training.json is about other weights than those beside it: train or copy again.")
    deviations = [row["deviation"] for row in certificate["rows"] if row["deviation"] is not None]
    return {
        "schema": 1,
        "model": name,
        "summary": f"{kinds}{ratio}, {facts.parameters:,} parameters",
        "package": {"hybrid_models": hybrid_models.__version__},
        "export": environment(),
        "weights_sha256": weights_sha256(source),
        "training": None
        if training is None
        else {
            key: training.get(key) for key in ("command", "commit", "date", "device", "versions", "seeds", "protocol")
        },
        "certificate": {
            "dtype": certificate["dtype"],
            "passed": sum(row["status"] == "pass" for row in certificate["rows"]),
            "largest_deviation": max(deviations),
        },
        "reference": reference,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m upload.bundle",
        description="Turn trained directories into what is published.",
        epilog="example:\n  python -m upload.bundle runs/nano-7M-GLA-pure --output runs/bundles",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="DIRECTORY", help="what training wrote")
    parser.add_argument("--output", type=Path, required=True, help="the folder of bundles")
    parser.add_argument("--name", help="of the repository, NAME@BRANCH for a training step; for one directory")
    parser.add_argument("--namespace", help="where it will be published, for the card's example")
    parser.add_argument("--release", help="the tag that it will get, for the card's example")
    parser.add_argument("--readme", type=Path, help="a card instead of the suite's; for one directory")
    parser.add_argument("--overwrite", action="store_true", help="replace older bundles")
    args = parser.parse_args(argv)
    if len(args.sources) > 1 and (args.name or args.readme):
        parser.error("--name and --readme are for one directory")
    disable_progress_bar()
    set_verbosity_error()
    failed = 0
    for source in args.sources:
        try:
            documents = {"README.md": args.readme.read_text(encoding="utf-8")} if args.readme else None
            where = {"namespace": args.namespace, "release": args.release, "name": args.name}
            made = bundle(source, args.output, documents=documents, overwrite=args.overwrite, **where)
            print(f"{made}: {read_manifest(made).bytes:,} bytes", flush=True)
        except (Trouble, OSError, ValueError) as error:
            failed += 1
            print(f"upload.bundle: {error}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
