"""A bundle is complete, the same every time, and does not exist unless it passed: each check can fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from hybrid_models.info import describe
from hybrid_models.results import weights_sha256
from upload import bundle as bundling
from upload.bundle import bundle, card, certify, main
from upload.manifest import read_manifest
from upload.remote import Transient, Trouble, VerificationError
from upload.verify import verify

from .check_shipped_files import shipped_files
from .end_to_end import CARD, CERTIFICATE, byte_tokenizer, write_checkpoint

ROOT = Path(__file__).parents[1]
CELL = "tiny-HGRN-pure"
DOCUMENTS = {"README.md": CARD.format(name=CELL), "memory/picture.svg": "<svg/>"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_checkpoint(CELL, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def source(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / CELL))


@pytest.fixture
def certified(monkeypatch):
    """For what is not about the certificate, which takes twenty seconds."""
    monkeypatch.setattr(bundling, "certify", lambda source: CERTIFICATE)


def test_the_command_makes_a_whole_bundle(source, tmp_path):
    """With the real certificate and the real clean process."""
    (tmp_path / "card.md").write_text(DOCUMENTS["README.md"])
    command = [sys.executable, "-m", "upload.bundle", str(source), "--output", str(tmp_path / "out")]
    process = subprocess.run(
        [*command, "--readme", str(tmp_path / "card.md")], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-2000:]
    made = tmp_path / "out" / CELL
    manifest = read_manifest(made)
    assert f"{manifest.bytes:,} bytes" in process.stdout
    names = {"LICENSE", "README.md", "SHA256SUMS", "certificate.json", "config.json", "generation_config.json"}
    names |= {
        "model.safetensors",
        "provenance.json",
        "reference.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert set(manifest.files) == names | {path.name for path in shipped_files()}
    assert (made / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert len(json.loads((made / "config.json").read_text())["auto_map"]) == 6

    certificate = json.loads((made / "certificate.json").read_text())
    assert (
        certificate["passed"]
        and certificate["dtype"] == "float64"
        and {r["property"] for r in certificate["rows"]} == set(range(1, 10))
    )
    provenance = json.loads((made / "provenance.json").read_text())
    assert provenance["weights_sha256"] == weights_sha256(source)
    assert provenance["summary"] == f"hgrn, {describe(AutoConfig.from_pretrained(source)).parameters:,} parameters"
    assert provenance["certificate"]["passed"] > 50 and provenance["training"] is None
    assert str(tmp_path) not in "".join((made / name).read_text() for name in ("certificate.json", "provenance.json"))

    reference, record = load_file(made / "reference.safetensors"), provenance["reference"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), byte_tokenizer()
    ids = torch.tensor([tokenizer(record["prompt"])["input_ids"]])
    assert torch.equal(reference["input_ids"], ids)
    torch.testing.assert_close(
        reference["logits"], model(ids).logits[:, -4:], rtol=1e-4, atol=1e-4
    )  # threads may differ
    assert tokenizer.decode(reference["new_ids"][0]) == record["text"]
    found = verify(os.path.relpath(made), manifest)
    assert found["deviation"] == 0 and found["text"] == record["text"]


def test_the_same_directory_gives_the_same_bundle(source, tmp_path, certified, monkeypatch):
    monkeypatch.setattr(bundling, "verify", lambda *args: {"deviation": 0, "text": json.loads((Path(args[0]) / "provenance.json").read_text())["reference"]["text"]})  # fmt: skip
    sums = []
    for name in ("one", "two"):
        made = bundle(source, tmp_path / name, documents=DOCUMENTS)
        sums.append((made / "SHA256SUMS").read_text())
    assert sums[0] == sums[1] and "memory/picture.svg" in sums[0]
    with pytest.raises(FileExistsError, match="overwrite"):
        bundle(source, tmp_path / "one", documents=DOCUMENTS)


def test_weights_that_fail_the_certificate(source):
    """The real command, on a model with one weight that is not a number."""
    tensors = load_file(source / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Trouble, match="does not pass the certificate: .*token by token"):
        certify(source)


@pytest.mark.parametrize(
    "file, spoil, message",
    [
        ("mixers.py", lambda text: text + "\nraise RuntimeError('broken')\n", "load: RuntimeError: broken"),
        (
            "modeling_hybrid_linear.py",
            lambda text: text.replace("dense(self.lm_head, slice", "2 * dense(self.lm_head, slice"),
            "logits: ",
        ),
    ],
)
def test_code_that_travels_must_do_the_same(file, spoil, message, source, tmp_path, certified, monkeypatch):
    right = bundling.save_files

    def wrong(source, folder, model, tokenizer):
        right(source, folder, model, tokenizer)
        text = (folder / file).read_text()
        assert spoil(text) != text
        (folder / file).write_text(spoil(text))

    monkeypatch.setattr(bundling, "save_files", wrong)
    with pytest.raises(VerificationError, match=message):
        bundle(source, tmp_path / "out", documents=DOCUMENTS)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_bundled(source, tmp_path, certified, capsys):
    def refused(message: str) -> None:
        with pytest.raises(Trouble, match=message):
            bundle(source, tmp_path / "out", documents=DOCUMENTS)

    (source / "training.json").write_text(json.dumps({"weights_sha256": "0" * 64}))
    refused("about other weights")
    (source / "training.json").unlink()

    tensors = load_file(source / "model.safetensors")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt", "step": "9"})
    refused("only 'format' may be there")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused("pickle")
    (source / "pytorch_model.bin").unlink()
    save_file(dict(list(tensors.items())[1:]), source / "model.safetensors", metadata={"format": "pt"})
    refused("do not fit together")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    for path in source.glob("tokenizer*"):
        path.unlink()
    refused(str(source))
    LlamaConfig().save_pretrained(source)
    refused("'llama' model")
    assert main([str(source), "--output", str(tmp_path / "out")]) == 2
    assert "upload.bundle: " in capsys.readouterr().err


def test_a_tokenizer_gets_a_padding_token(source):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(source)
    _, loaded = bundling.load(source)
    assert loaded.pad_token == "</s>" and loaded.padding_side == "left"


def test_the_card_names_where_it_will_be(tmp_path):
    texts = card("nano-7M-GLA-pure@step-100", tmp_path, "my-org", "v1.0")
    assert "my-org/nano-7M-GLA-pure" in texts["README.md"] and "v1.0" in texts["README.md"]
    assert any(path.endswith(".svg") for path in texts)


def test_a_clean_process_that_dies_is_tried_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr("upload.verify.run_clean", lambda *args, **kwargs: "killed")
    (source / "SHA256SUMS").write_text("")
    with pytest.raises(Transient, match="the clean process died: killed"):
        verify(str(source), type("Empty", (), {"files": {}})())
