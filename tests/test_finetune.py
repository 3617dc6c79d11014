"""Fine-tuning through TRL: packed rows are separate documents, each method lowers the held-out loss, what is written loads."""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hybrid_models import HybridLinearForCausalLM
from hybrid_models.convert import convert
from hybrid_models.results import read_all
from tests.common import randomize, tiny_config, tokens
from training import finetune as module
from training.finetune import Job, finetune, held_out_loss, main, make_trainer, read_documents, split
from training.state_tuning import InitialState, initial_cache

# Four "languages" of their own letters and habits: a model of all four has to find out first which one it reads.
LANGUAGES = ["abcd", "efgh", "ijkl", "mnop"]


@pytest.fixture(autouse=True)
def environment():
    """TrainingArguments write precision and compiler into os.environ, where the next test's would find them."""
    with mock.patch.dict(os.environ):
        yield


def document(language: int, generator: torch.Generator) -> str:
    """12 to 20 letters of a cycle through the language's four, in a direction and with rare slips."""
    letters, length = LANGUAGES[language], int(torch.randint(12, 21, (), generator=generator))
    place, text = int(torch.randint(0, 4, (), generator=generator)), ""
    for _ in range(length):
        slip = torch.rand((), generator=generator) < 0.1
        place += 2 if slip else 1 if language % 2 else 3
        text += letters[place % 4]
    return text


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, without merges: <pad>, <s>, </s>, then 256 of them; every text begins with <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def untrained(mixer="gla", level="3-1", **fields):
    torch.manual_seed(0)
    config = tiny_config(mixer, level, vocab_size=259, num_hidden_layers=3, eos_token_id=2, bos_token_id=1, **fields)
    return HybridLinearForCausalLM(config)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint that knows all four languages, trained by the command itself."""
    folder = tmp_path_factory.mktemp("finetune")
    generator = torch.Generator().manual_seed(0)
    untrained().save_pretrained(folder / "untrained")
    byte_tokenizer().save_pretrained(folder / "untrained")
    rows = [{"text": document(i % 4, generator)} for i in range(400)]
    with mock.patch.dict(os.environ):
        job = Job(
            model=str(folder / "untrained"),
            data=[write_jsonl(folder / "all.jsonl", rows)],
            method="full",
            output=str(folder / "base"),
            length=64,
            steps=60,
            batch=16,
            learning_rate=1e-2,
            held_out_share=0.1,
        )
        outcome = finetune(job, results=None)
    print(f"\nfull, from nothing: {outcome.before} -> {outcome.after}")
    assert outcome.gain.mean > 2
    write_jsonl(folder / "one.jsonl", [{"text": document(2, generator)} for _ in range(80)])
    return folder


def job_of(base: Path, output: Path, method: str, **changes) -> Job:
    """Adapt the base to one of its languages."""
    rate = {"full": 1e-3, "lora": 5e-3, "s0": 5e-2, "lora+s0": 5e-3}[method]
    return Job(
        **{
            "model": str(base / "base"),
            "data": [str(base / "one.jsonl")],
            "method": method,
            "output": str(output),
            "length": 64,
            "steps": 24,
            "batch": 8,
            "learning_rate": rate,
            "rank": 4,
            "held_out_share": 0.25,
            **changes,
        }
    )


def loss_of(model, job: Job, tmp_path) -> float:
    """The held-out loss of a model that was loaded from what the job wrote."""
    tokenizer = AutoTokenizer.from_pretrained(job.output)
    train, held_out = split(read_documents(job.data), job)
    return held_out_loss(
        model, list(make_trainer(model, tokenizer, train, held_out, job, tmp_path).eval_dataset), job
    ).mean


# ------------------------------------------------------------------------------------------------- each method improves


@pytest.mark.parametrize("method", ["full", "lora", "s0", "lora+s0"])
def test_each_method_lowers_the_held_out_loss_and_what_it_writes_loads(method, base, tmp_path):
    job = job_of(base, tmp_path / "tuned", method)
    outcome = finetune(job, results=tmp_path / "results", command="python -m training.finetune ...")
    print(
        f"\n{method}: {outcome.before} -> {outcome.after}, gain {outcome.gain}; {outcome.trained_parameters:,} trained; {outcome.report}"
    )
    # Knowing the language saves about log(4) nats in the first tokens of 12 to 20.
    assert outcome.gain.mean > 0.03 and outcome.gain.mean > 3 * outcome.gain.stderr

    files = {path.name for path in (tmp_path / "tuned").iterdir()}
    assert ("model.safetensors" in files) == (method == "full")
    assert ("adapter_model.safetensors" in files) == ("lora" in method)
    assert ("initial_state.safetensors" in files) == ("s0" in method)
    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(job.output)
    elif method == "s0":
        model = AutoModelForCausalLM.from_pretrained(job.model)
    else:
        model = peft.AutoPeftModelForCausalLM.from_pretrained(job.output)
    if "s0" in method:
        cached = initial_cache(model, job.output, 3)
        ids = AutoTokenizer.from_pretrained(job.output)(["ijk", "lij", "kli"], return_tensors="pt").input_ids
        text = model.generate(input_ids=ids, past_key_values=cached, max_new_tokens=4, do_sample=False)
        assert text.shape == (3, ids.shape[1] + 4)
    else:
        assert loss_of(model, job, tmp_path) == pytest.approx(outcome.after.mean, abs=1e-5)  # float32, other row order

    ((path, one),) = read_all(tmp_path / "results")
    assert path.name == f"finetune-{method}.json" and one["model"] == "base" and one["weights_sha256"]
    found = {m["metric"]: m for m in one["metrics"]}
    assert found["loss_nats_gain"]["value"] == pytest.approx(outcome.before.mean - outcome.after.mean)
    assert found["loss_nats_after"]["n"] == outcome.after.tokens and found["loss_nats_after"]["stderr"] > 0
    assert str(tmp_path) not in json.dumps(one), "a result names no path of a machine"


def test_only_what_the_method_names_is_trained(base, tmp_path):
    before = AutoModelForCausalLM.from_pretrained(base / "base").state_dict()
    outcome = finetune(job_of(base, tmp_path / "s0", "s0", steps=2), results=None)
    assert outcome.trained_parameters == sum(s.numel() for s in InitialState(untrained().config).parameters())
    outcome = finetune(job_of(base, tmp_path / "lora", "lora", steps=2), results=None)
    assert "2 of 2 linear_attention layers (10 modules), 1 of 1 full_attention layers (4 modules)" in outcome.report
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").unload()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_cut_documents_are_said(base, tmp_path, capsys):
    finetune(job_of(base, tmp_path / "out", "s0", steps=1, length=16), results=None)
    assert re.search(
        r"cut at --length=16: \d+ of 20 held-out and \d+ of 60 training documents", capsys.readouterr().out
    )


def test_a_merged_adapter_is_a_plain_checkpoint(base, tmp_path):
    job = job_of(base, tmp_path / "merged", "lora", steps=4, merge=True)
    outcome = finetune(job, results=None)
    model = AutoModelForCausalLM.from_pretrained(job.output)
    assert type(model) is HybridLinearForCausalLM
    assert loss_of(model, job, tmp_path) == pytest.approx(outcome.after.mean, abs=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_fla_checkpoint(method, base, tmp_path):
    """A full run needs nothing else; an adapter gets its base rewritten beside it."""
    convert(base / "base", tmp_path / "fla", "fla")
    job = job_of(base, tmp_path / "tuned", method, model=str(tmp_path / "fla"), steps=2)
    same = finetune(job_of(base, tmp_path / "native", method, steps=2), results=None)
    outcome = finetune(job, results=None)
    assert outcome.before.mean == same.before.mean and outcome.after.mean == same.after.mean
    kind = AutoModelForCausalLM if method == "full" else peft.AutoPeftModelForCausalLM
    assert loss_of(kind.from_pretrained(job.output), job, tmp_path) == pytest.approx(outcome.after.mean, abs=1e-5)


# -------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("mixer", ["gla", "hgrn", "gated_delta_net"])
def test_the_loss_of_packed_rows_is_that_of_separate_documents(mixer, tmp_path):
    """TRL's packing, its collator and its loss, against our model on one document at a time. float32: 1e-5 of order 5."""
    generator = torch.Generator().manual_seed(1)
    texts = [document(i % 4, generator) for i in range(24)]
    tokenizer, model = byte_tokenizer(), randomize(untrained(mixer))
    tokenizer.model_max_length = 64
    job = Job(
        model="", data=[write_jsonl(tmp_path / "d.jsonl", [{"text": t} for t in texts])], method="full", output=""
    )
    job = replace(job, length=64, batch=4, steps=1)
    train, held_out = split(read_documents(job.data), job)
    trainer = make_trainer(model, tokenizer, train, held_out, job, str(tmp_path))
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).sum().item()
    assert batch["input_ids"].shape[0] == 1 and starts > 8, "the batch must be packed"

    model.train()
    with torch.no_grad():
        packed = trainer.compute_loss(model, dict(batch)).item()
        sums = count = 0.0
        for row in batch["input_ids"][0].tensor_split(batch["position_ids"][0].eq(0).nonzero()[1:, 0].cpu()):
            loss = model(input_ids=row[None], labels=row[None]).loss
            sums, count = sums + loss.item() * (len(row) - 1), count + len(row) - 1
        one_stream = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    assert packed == pytest.approx(sums / count, abs=5e-5)
    assert abs(packed - one_stream) > 1e-3, "boundaries must matter in this test"


def test_held_out_loss_is_the_mean_over_tokens():
    model = randomize(untrained())
    rows = [
        {"input_ids": tokens(n, seed=n).tolist(), "labels": [-100] * 2 + tokens(n, seed=n).tolist()[2:]}
        for n in (5, 9, 7)
    ]
    found = held_out_loss(model, rows, Job(model="", data=[], method="full", output="", batch=2))
    sums = count = 0
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            n = int((labels[:, 1:] != -100).sum())
            sums, count = sums + model(input_ids=ids, labels=labels).loss.item() * n, count + n
    assert found.tokens == count and found.mean == pytest.approx(sums / count, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------ chat, text


def test_chats_train_on_answers_alone(base, tmp_path):
    """The plain template marks the answers; the prompt's tokens carry no loss, and the template is saved."""
    chats = [
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd" * (i % 5 + 1)}]}
        for i in range(20)
    ]
    job = job_of(base, tmp_path / "chat", "lora", data=[write_jsonl(tmp_path / "c.jsonl", chats)], steps=3, length=96)
    outcome = finetune(job, results=None)
    # Five held-out answers "cd" * n, each with its end: 2 n letters, and </s>.
    _, held_out = split(read_documents(job.data), job)
    assert outcome.after.tokens == sum(len(row["messages"][1]["content"]) + 1 for row in held_out)
    tokenizer = AutoTokenizer.from_pretrained(job.output)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ab"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "### user\nab\n### assistant\n"


def test_text_files_and_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    rows = read_documents([str(tmp_path / "a.txt"), write_jsonl(tmp_path / "b.jsonl", [{"text": "three", "id": 7}])])
    assert rows == [{"text": "one\ntwo"}, {"text": "three"}]
    (tmp_path / "u.jsonl").write_text('{"text": "a\u2028b"}\n')  # a line separator for str.splitlines, not for JSON
    assert read_documents([str(tmp_path / "u.jsonl")]) == [{"text": "a\u2028b"}]
    pairs = [{"prompt": "1+1=", "completion": "2"}]
    assert read_documents([write_jsonl(tmp_path / "p.jsonl", pairs)]) == pairs


# ---------------------------------------------------------------------------------------------------------------- errors


def test_mistakes_are_named(base, tmp_path, capsys, monkeypatch):
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "x"}] * 4)

    def says(*arguments) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--output", str(tmp_path / "out")])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    model = ["--model", str(base / "base")]
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text"\n')
    (tmp_path / "other.jsonl").write_text('{"question": "x"}\n')
    assert "bad.jsonl:2 is not JSON" in says(*model, "--data", str(tmp_path / "bad.jsonl"), "--method", "full")
    assert "other.jsonl:1 has question: a row needs" in says(
        *model, "--data", str(tmp_path / "other.jsonl"), "--method", "full"
    )
    assert "gone.txt is not a file" in says(*model, "--data", str(tmp_path / "gone.txt"), "--method", "full")
    assert "does not go with method='s0'" in says(*model, "--data", data, "--method", "s0", "--checkpointing")
    assert "merge=True folds" in says(*model, "--data", data, "--method", "full", "--merge")
    assert "both need one" in says(*model, "--data", data, "--method", "full", "--held-out-share", "0")
    mixed = write_jsonl(tmp_path / "m.jsonl", [{"text": "x"}, {"prompt": "a", "completion": "b"}])
    assert "mixes rows of" in says(*model, "--data", mixed, "--method", "full")
    untrained("gla", "full").save_pretrained(tmp_path / "attention")
    byte_tokenizer().save_pretrained(tmp_path / "attention")
    assert "every layer is full attention" in says(
        "--model", str(tmp_path / "attention"), "--data", data, "--method", "s0"
    )
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "kept").write_text("")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in says(*model, "--data", data, "--method", "full")
    monkeypatch.delenv("WORLD_SIZE")
    assert "is not empty" in says(*model, "--data", data, "--method", "full")


def test_the_command(base, tmp_path, capsys):
    arguments = ["--model", str(base / "base"), "--data", str(base / "one.jsonl"), "--method", "s0"]
    arguments += ["--output", str(tmp_path / "out"), "--steps", "3", "--length", "64", "--results", str(tmp_path / "r")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "S0: " in out and "before: " in out and "finetune-s0.json" in out
    assert not (tmp_path / "out" / "trainer").exists() and module.METHODS == ("full", "lora", "s0", "lora+s0")
    assert copy.deepcopy(InitialState.load(untrained().config, tmp_path / "out")).states["0"].abs().max() > 0
