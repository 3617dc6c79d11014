"""A checkpoint carries its code: it loads where this package, Triton and fla are not installed, and gives the same numbers.

The checkpoints are written here and copied into an empty directory. A clean interpreter (``python -I``, where importing
the three packages fails) then loads them with trust_remote_code, computes, and saves again; another loads what that one
saved. Logits are compared bit for bit: it is the same code on the same machine.

What could go wrong and would show here: a file that save_pretrained does not find, an import that is not there, an Auto
class without an entry, a prompt for trust in the middle of loading, isinstance on a class that exists twice.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import hybrid_models
from hybrid_models import HybridLinearForSequenceClassification, HybridLinearModel

from .check_shipped_files import shipped_files
from .common import VOCAB, randomize, tiny_config, tiny_model, tokens

ROOT = Path(hybrid_models.__file__).parents[1]
# Mixed with a convolution; and a vector state whose lower bounds are a parameter of the whole model.
MODELS = {"mixed": ("gated_delta_net", "3-1"), "pure": ("hgrn", "pure")}
PROMPT = torch.cat((tokens(1, 5), tokens(1, 5)), 1)
TEXT = "w5 w6 w7 w8"

CLEAN = """
import sys
import torch
torch.set_num_threads(1)
for name in ("hybrid_models", "triton", "fla"):
    sys.modules[name] = None  # importing it raises ImportError, as if it were not installed

import copy, pickle
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache, pipeline,
)

folder, result = sys.argv[1:3]
prompt = torch.load(f"{folder}/prompt.pt")
trust = dict(trust_remote_code=True, local_files_only=True)
found = {}
"""

FIRST = """
for name in ("mixed", "pure"):
    path = f"{folder}/{name}"
    config = AutoConfig.from_pretrained(path, **trust)
    model = AutoModelForCausalLM.from_pretrained(path, **trust)
    base = AutoModel.from_pretrained(path, **trust)
    for thing in (config, model, base, model.model):
        assert type(thing).__module__.startswith("transformers_modules."), type(thing)
    with torch.no_grad():
        found[name, "logits"] = model(prompt).logits
        found[name, "hidden"] = base(prompt).last_hidden_state
        cache = copy.deepcopy(DynamicCache(config=model.config))
        model(prompt[:, :4], past_key_values=cache)
        found[name, "cached"] = model(prompt[:, 4:], past_key_values=pickle.loads(pickle.dumps(cache))).logits
    for how, kwargs in dict(
        greedy={}, lookup=dict(prompt_lookup_num_tokens=3), static=dict(cache_implementation="static"), beams=dict(num_beams=2),
    ).items():
        found[name, how] = model.generate(prompt, max_new_tokens=8, do_sample=False, **kwargs)
    pickle.loads(pickle.dumps(config)), copy.deepcopy(model)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    head = AutoModelForSequenceClassification.from_config(config, trust_remote_code=True)
    assert type(head.model).__module__ == type(head).__module__
    model.save_pretrained(f"{folder}/again-{name}")

tokenizer = AutoTokenizer.from_pretrained(f"{folder}/mixed")
generator = pipeline("text-generation", model=f"{folder}/mixed", tokenizer=tokenizer, trust_remote_code=True)
found["text"] = generator("TEXT", max_new_tokens=4, do_sample=False)[0]["generated_text"]
head = AutoModelForSequenceClassification.from_pretrained(f"{folder}/head", **trust)
found["head"] = head(prompt).logits.detach()
head.save_pretrained(f"{folder}/again-head")
torch.save(found, result)
""".replace("TEXT", TEXT)

SECOND = """
for name in ("mixed", "pure"):
    with torch.no_grad():
        found[name, "logits"] = AutoModelForCausalLM.from_pretrained(f"{folder}/again-{name}", **trust)(prompt).logits
        found[name, "hidden"] = AutoModel.from_pretrained(f"{folder}/again-{name}", **trust)(prompt).last_hidden_state
head = AutoModelForSequenceClassification.from_pretrained(f"{folder}/again-head", **trust)
found["head"] = head(prompt).logits.detach()
torch.save(found, result)
"""

REMOTE_THEN_PACKAGE = """
import sys
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
folder, result, root = sys.argv[1:4]
prompt = torch.load(f"{folder}/prompt.pt")
remote = AutoModelForCausalLM.from_pretrained(f"{folder}/mixed", trust_remote_code=True)
sys.path.insert(0, root)
import hybrid_models
assert type(remote).__module__.startswith("transformers_modules.")
ours = AutoModelForCausalLM.from_pretrained(f"{folder}/mixed")
assert type(ours) is hybrid_models.HybridLinearForCausalLM and type(ours) is not type(remote)
with torch.no_grad():
    # A cache of one copy of the code is a cache for the other.
    cache = DynamicCache(config=remote.config)
    remote(prompt[:, :4], past_key_values=cache)
    torch.save({"remote": remote(prompt).logits, "ours": ours(prompt).logits,
                "mixed": ours(prompt[:, 4:], past_key_values=cache).logits}, result)
"""


def run(folder: Path, code: str, *arguments) -> dict:
    """Run ``code`` isolated, without input (a question would fail), and load what it left."""
    result = folder / "result.pt"
    result.unlink(missing_ok=True)
    settings = dict(HF_HOME=str(folder / "home"), HF_MODULES_CACHE=str(folder / "modules"), HF_HUB_OFFLINE="1")
    process = subprocess.run(
        [sys.executable, "-I", "-c", code, str(folder), str(result), *arguments],
        cwd=folder,
        env={**os.environ, **settings},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return torch.load(result)


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(*arch, num_hidden_layers=3, dtype=torch.float32) for name, arch in MODELS.items()}


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(0)
    config = tiny_config("gla", "3-1", num_hidden_layers=3, num_labels=3)
    return randomize(HybridLinearForSequenceClassification(config)).eval()


@pytest.fixture(scope="module")
def folder(models, head, tmp_path_factory):
    """Checkpoints in an empty directory: written elsewhere, which is then removed."""
    written, folder = tmp_path_factory.mktemp("written"), tmp_path_factory.mktemp("empty")
    for name, model in (*models.items(), ("head", head)):
        model.save_pretrained(written / name)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(written / "mixed")
    for name in (*models, "head"):
        shutil.copytree(written / name, folder / name)
    shutil.rmtree(written)
    torch.save(PROMPT, folder / "prompt.pt")
    return folder


@pytest.fixture(scope="module")
def first(folder):
    return run(folder, CLEAN + FIRST)


def test_every_shipped_file_travels(folder):
    files = {path.name for path in shipped_files()}
    for name in (*MODELS, "head"):
        assert {path.name for path in (folder / name).glob("*.py")} == files
        assert set(json.loads((folder / name / "config.json").read_text())["auto_map"]) == {
            "AutoConfig",
            "AutoModel",
            "AutoModelForCausalLM",
            "AutoModelForSequenceClassification",
            "AutoModelForTokenClassification",
            "AutoModelForQuestionAnswering",
        }


@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_in_a_clean_interpreter(name, first, models):
    model = models[name]
    with torch.no_grad():
        logits, hidden = model(PROMPT).logits, model.model(PROMPT).last_hidden_state
    assert torch.equal(first[name, "logits"], logits)
    assert torch.equal(first[name, "hidden"], hidden)
    torch.testing.assert_close(first[name, "cached"], logits[:, 4:], rtol=1e-5, atol=1e-5)  # two forwards, float32
    for how, kwargs in dict(
        greedy={}, lookup=dict(prompt_lookup_num_tokens=3), static=dict(cache_implementation="static"), beams=dict(num_beams=2)
    ).items():  # fmt: skip
        assert torch.equal(first[name, how], model.generate(PROMPT, max_new_tokens=8, do_sample=False, **kwargs)), how


def test_pipeline(first, models):
    ids = torch.tensor([[int(word[1:]) for word in TEXT.split()]])
    new = models["mixed"].generate(ids, max_new_tokens=4, do_sample=False)[0]
    assert first["text"].replace(" ", "") == "".join(f"w{i}" for i in new.tolist())


def test_a_task_head_needs_no_second_permission(first, head):
    with torch.no_grad():
        assert torch.equal(first["head"], head(PROMPT).logits)


def test_saved_again_from_there(first, folder):
    """What the clean interpreter saved is complete in turn."""
    again = run(folder, CLEAN + SECOND)
    for key in again:
        assert torch.equal(again[key], first[key]), key
    for name in (*MODELS, "head"):
        want = {path.name: path.read_bytes() for path in (folder / name).glob("*.py")}
        assert {path.name: path.read_bytes() for path in (folder / f"again-{name}").glob("*.py")} == want


def test_package_first(folder, models, tmp_path, monkeypatch):
    """Where the package is installed it serves, with trust_remote_code or without."""
    for trust in (True, False):
        model = AutoModelForCausalLM.from_pretrained(folder / "mixed", trust_remote_code=trust)
        assert type(model).__module__ == "hybrid_models.modeling_hybrid_linear"
        assert type(AutoConfig.from_pretrained(folder / "mixed", trust_remote_code=trust)) is type(model.config)
        assert torch.equal(model(PROMPT).logits, models["mixed"](PROMPT).logits)


def test_package_after_remote_code(folder, models):
    found = run(folder, REMOTE_THEN_PACKAGE, str(ROOT))
    want = models["mixed"](PROMPT).logits
    assert torch.equal(found["remote"], want) and torch.equal(found["ours"], want)
    torch.testing.assert_close(found["mixed"], want[:, 4:], rtol=1e-5, atol=1e-5)


def test_a_configuration_saved_alone_names_its_code(tmp_path):
    """For who writes config.json first and weights later; only saving the model brings the files of all classes."""
    tiny_config("gla", "pure").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoConfig"] == "configuration_hybrid_linear.HybridLinearConfig"
    assert (tmp_path / "configuration_hybrid_linear.py").is_file()


def test_the_decoder_alone_is_saved_with_its_code(tmp_path):
    HybridLinearModel(tiny_config("gla", "pure")).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {path.name for path in shipped_files()}
