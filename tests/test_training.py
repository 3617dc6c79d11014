"""The stock HF Trainer on the CPU: every switch people use gives the numbers that it should.

Tolerances: the same sums in another order agree to 1e-6, absolute plus relative, in float32 (one unit in the last place
of a loss of 5 is 5e-7, and that is what is measured); what replays the very same operations is compared bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.models.auto import modeling_auto

import hybrid_models
from hybrid_models.modeling_hybrid_linear import AUTO_MAP
from tests.common import VOCAB, tiny_model

# A convolution and attention, a matrix state without convolution, and a vector state with the model-wide lower bounds.
MODELS = [("gated_delta_net", "3-1"), ("gla", "pure"), ("hgrn", "pure")]
FLOAT32_PARAMETERS = {"gated_delta_net": {"A_log", "dt_bias"}, "gla": set(), "hgrn": {"lower_bounds"}}
ROUNDING = 1e-6


@pytest.fixture(autouse=True)
def environment():
    """TrainingArguments write precision and compiler into os.environ, where the next test's would find them."""
    with mock.patch.dict(os.environ):
        yield


def tiny(mixer: str, level: str, dtype=torch.float32, **fields):
    return tiny_model(mixer, level, dtype, num_hidden_layers=3, **fields)


def documents(count: int, seed: int = 0) -> list[dict]:
    """Documents of 4 to 12 tokens. The first ones of each are not trained on, a different number in each."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        length = int(torch.randint(4, 13, (), generator=g))
        ids = torch.randint(3, VOCAB, (length,), generator=g).tolist()
        prompt = int(torch.randint(0, length - 2, (), generator=g))
        out.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return out


def padded(features: list[dict]) -> dict[str, torch.Tensor]:
    """Padding on the right, as most collators do in training."""
    width = max(len(f["input_ids"]) for f in features)

    def fill(rows, value):
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])

    return {
        "input_ids": fill([f["input_ids"] for f in features], 0),
        "attention_mask": fill([[1] * len(f["input_ids"]) for f in features], 0),
        "labels": fill([f["labels"] for f in features], -100),
    }


def trainer(model, directory, data, collate=padded, **arguments) -> Trainer:
    """A Trainer whose optimizer is SGD: Adam divides by the size of a gradient, and so blows up its rounding."""
    defaults = dict(
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
    )
    evaluation = {name: arguments.pop(name) for name in ("eval_dataset", "compute_metrics") if name in arguments}
    args = TrainingArguments(str(directory), **{**defaults, **arguments})
    return Trainer(model, args, train_dataset=data, data_collator=collate, **evaluation)


def train(*args, **kwargs) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps, and the parameters after the last."""
    run = trainer(*args, **kwargs)
    run.train()
    return losses(run), parameters(run.model)


def losses(run: Trainer) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(found, expected, tolerance: float = ROUNDING):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def negative_log_likelihoods(model, data: list[dict], smoothing: float = 0.0) -> torch.Tensor:
    """One number per trained token, document by document: what every loss below is an average of."""
    out = []
    for document in data:
        ids, labels = torch.tensor([document["input_ids"]]), torch.tensor(document["labels"])
        logits = model(input_ids=ids).logits[0, :-1]
        out.append(F.cross_entropy(logits, labels[1:], reduction="none", label_smoothing=smoothing)[labels[1:] != -100])
    return torch.cat(out)


# --------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("mixer,level", MODELS)
def test_the_first_loss_is_the_mean_over_all_tokens_of_the_step(mixer, level, tmp_path):
    """A step of four unequal batches: num_items_in_batch must reach the loss, or it is a mean of means."""
    data = documents(8)
    model = tiny(mixer, level)
    with torch.no_grad():
        per_token = negative_log_likelihoods(model.double(), data)
        counts = [sum(label != -100 for label in document["labels"][1:]) for document in data]
        mean_of_means = torch.stack([part.mean() for part in per_token.split(counts)]).mean()
    assert abs(per_token.mean() - mean_of_means) > 1e-3, "the documents must tell the two apart"

    first, _ = train(
        model.float(), tmp_path, data, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    assert_same(first, [per_token.mean().item()])


def test_loss_keywords():
    """Direct callers: num_items_in_batch divides the sum, shift_labels replace labels that are to be shifted."""
    model = tiny("gated_delta_net", "3-1", torch.float64)
    batch = padded(documents(3))
    loss = model(**batch).loss
    count = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(model(**batch, num_items_in_batch=7).loss, loss * count / 7)
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(7)).loss, loss * count / 7)
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(**batch, shift_labels=shifted).loss, loss)
    as_tuple = model(**batch, num_items_in_batch=7, return_dict=False)
    torch.testing.assert_close(as_tuple[0], loss * count / 7)


@pytest.mark.parametrize("mixer,level", MODELS)
def test_accumulation_does_not_change_training(mixer, level, tmp_path):
    data = documents(12)
    one = train(tiny(mixer, level), tmp_path, data)
    four = train(tiny(mixer, level), tmp_path, data, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same(four[0], one[0])
    assert_same(four[1].values(), one[1].values())
    start = parameters(tiny(mixer, level))
    still = [name for name in start if torch.equal(start[name], one[1][name])]
    assert not still, "every parameter must have moved"


@pytest.mark.parametrize("mixer,level", MODELS)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_does_not_change_training(mixer, level, reentrant, tmp_path, monkeypatch):
    """Dropout is on where there is attention: the recomputed forward must draw the same mask."""
    fields = {"attention_dropout": 0.2} if level != "pure" else {}
    forwards = []
    block = hybrid_models.modeling_hybrid_linear.LlamaMLP
    plain_forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x: forwards.append(0) or plain_forward(self, x))

    plain = train(tiny(mixer, level, **fields), tmp_path, documents(12))
    count = len(forwards)
    checkpointed = train(
        tiny(mixer, level, **fields),
        tmp_path,
        documents(12),
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert len(forwards) - count == 2 * count, "every layer is computed twice, or nothing was checkpointed"
    assert checkpointed[0] == plain[0]
    assert_same(checkpointed[1].values(), plain[1].values(), 0)


@pytest.mark.parametrize("mixer,level", MODELS)
def test_label_smoothing_shifts_the_labels(mixer, level, tmp_path, monkeypatch):
    """The Trainer knows a causal model by its class name, in a table that importing the package fills."""
    data = documents(4)
    with torch.no_grad():
        expected = negative_log_likelihoods(tiny(mixer, level), data, smoothing=0.3).mean().item()
    found, _ = train(tiny(mixer, level), tmp_path, data, label_smoothing_factor=0.3, max_steps=1)
    assert_same(found, [expected])

    monkeypatch.delitem(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "hybrid_linear")
    unshifted, _ = train(tiny(mixer, level), tmp_path, data, label_smoothing_factor=0.3, max_steps=1)
    assert abs(unshifted[0] - expected) > 0.01, "without the table the loss is of the wrong tokens"


# --------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("mixer,level", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True},
        {"return_position_ids": False, "return_seq_idx": True},
    ],
    ids=["position_ids", "cu_seq_lens", "seq_idx", "seq_idx-only"],
)
def test_packed_documents_are_separate_documents(mixer, level, options):
    data = documents(4)
    model = tiny(mixer, level, torch.float64)
    expected = negative_log_likelihoods(model, data).mean()
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    batch = DataCollatorWithFlattening(**options)(data)
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss.double(), expected, rtol=0, atol=ROUNDING)  # the library's loss is float32
    F.cross_entropy(outputs.logits[0, :-1], batch["labels"][0, 1:]).backward()
    # float64: the same terms in another order.
    assert_same([parameter.grad for parameter in model.parameters()], gradients, 1e-12)


@pytest.mark.parametrize("mixer,level", MODELS)
def test_training_on_packed_rows_is_training_on_padded_rows(mixer, level, tmp_path):
    data = documents(12)
    by_padding = train(tiny(mixer, level), tmp_path, data)
    packed = train(
        tiny(mixer, level), tmp_path, data, collate=DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    )
    assert_same(packed[0], by_padding[0])
    assert_same(packed[1].values(), by_padding[1].values())


# ------------------------------------------------------------------------------------------------------ save, resume


@pytest.mark.parametrize("mixer,level", MODELS)
@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
def test_a_resumed_run_is_the_uninterrupted_one(mixer, level, streaming, tmp_path):
    data = Dataset.from_list(documents(20))
    data = data.to_iterable_dataset(num_shards=2) if streaming else data
    # Momentum, a schedule and dropout: the optimizer's, the scheduler's and the generator's state all matter.
    options = dict(
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        max_grad_norm=1.0,
    )
    fields = {"attention_dropout": 0.2} if level != "pure" else {}
    whole = train(tiny(mixer, level, **fields), tmp_path, data, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]

    torch.manual_seed(99)
    resumed = trainer(tiny(mixer, level, seed=5, **fields), tmp_path / "resumed", data, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == whole[0] and len(set(whole[0])) == 6
    assert_same(parameters(resumed.model).values(), whole[1].values(), 0)


def imported_siblings(name: str) -> set[str]:
    """File names of a module and of all that it imports from beside itself."""
    source = (Path(hybrid_models.__file__).parent / name).read_text()
    return {name}.union(
        *(imported_siblings(f"{found}.py") for found in re.findall(r"^ *from \.(\w+) import", source, re.M))
    )


@pytest.mark.parametrize("mixer,level", MODELS)
def test_a_checkpoint_is_ready_to_be_pushed(mixer, level, tmp_path):
    run = trainer(tiny(mixer, level), tmp_path, documents(4), max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    checkpoint = tmp_path / "checkpoint-1"
    names = {path.name for path in checkpoint.iterdir()}
    assert imported_siblings("modeling_hybrid_linear.py") <= names and "lora.py" not in names
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert json.loads((checkpoint / "config.json").read_text())["auto_map"] == AUTO_MAP

    ids = torch.tensor([documents(1)[0]["input_ids"]])
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.testing.assert_close(loaded(ids).logits, run.model.eval()(ids).logits, rtol=0, atol=0)
    # The Trainer switches config.use_cache off and saves it so; generate() must decode with a cache all the same.
    out = loaded.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values.get_seq_length() == ids.shape[1] + 2


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("mixer,level", MODELS)
def test_evaluation(mixer, level, tmp_path):
    """Loss as by hand, and predictions that are logits alone although a cache is returned too."""
    data = documents(4)
    model = tiny(mixer, level)
    seen = []
    run = trainer(
        model,
        tmp_path,
        data,
        eval_dataset=data,
        compute_metrics=lambda p: seen.append(p.predictions) or {},
        use_cache=True,
        per_device_eval_batch_size=4,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    loss = run.evaluate()["eval_loss"]
    with torch.no_grad():
        assert_same([loss], [negative_log_likelihoods(model, data).mean().item()])
    width = max(len(document["input_ids"]) for document in data)
    assert seen[0].shape == (4, width, VOCAB)
    run.train()
    evaluated = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert len(evaluated) == 2 and evaluated[1] < evaluated[0] < loss


# --------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("mixer,level", MODELS)
def test_bf16_autocast_trains(mixer, level, tmp_path):
    data = documents(4)
    wide, _ = train(tiny(mixer, level), tmp_path, data, max_steps=6)
    narrow, after = train(tiny(mixer, level), tmp_path, data, max_steps=6, bf16=True)
    assert narrow != wide, "autocast must have been on"
    # bfloat16 keeps 8 bits, 0.4 % of logits of order one. Later steps start from other weights and drift apart.
    assert_same(narrow[:1], wide[:1], 0.02)
    assert narrow[-1] < narrow[0]
    assert {parameter.dtype for parameter in after.values()} == {torch.float32}


@pytest.mark.parametrize("mixer,level", MODELS)
def test_bf16_weights_train_beside_float32_decays(mixer, level, tmp_path):
    """A model loaded in bfloat16 keeps its decay parameters in float32: when loaded, trained, saved, loaded again."""
    tiny(mixer, level).save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.bfloat16)
    run = trainer(model, tmp_path, documents(4), max_steps=6, save_strategy="steps", save_steps=6)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6", dtype="auto")
    assert_same(parameters(again).values(), parameters(model).values(), 0)
    for found in (model, again):
        wide = {n.rsplit(".", 1)[-1] for n, parameter in found.named_parameters() if parameter.dtype == torch.float32}
        assert wide == FLOAT32_PARAMETERS[mixer]
        assert found.dtype == found.lm_head.weight.dtype == torch.bfloat16
    assert json.loads((tmp_path / "checkpoint-6" / "config.json").read_text())["dtype"] == "bfloat16"


# ------------------------------------------------------------------------------------------- compilation, processes


@pytest.mark.parametrize("mixer,level", [MODELS[0]])
def test_torch_compile(mixer, level, tmp_path):
    """The whole forward is one graph; the backend "eager" runs it as it is."""
    data = documents(4)
    plain = train(tiny(mixer, level), tmp_path, data, max_steps=1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train(tiny(mixer, level), tmp_path, data, max_steps=1, torch_compile=True, torch_compile_backend="eager")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert_same(compiled[0], plain[0])
    assert_same(compiled[1].values(), plain[1].values())
    torch._dynamo.reset()


# HGRN with checkpointing: its lower bounds are one parameter that every layer uses, in the recomputation again.
IN_PROCESSES = [(MODELS[0], {}), (MODELS[2], {"activation_checkpointing": True})]


def _train_in_process(rank: int, processes: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = []
    for model, options in IN_PROCESSES:
        # find_unused_parameters off: a parameter without gradient would raise.
        options = dict(per_device_train_batch_size=2, ddp_find_unused_parameters=False, **options)
        found.append(train(tiny(*model), directory, documents(12), **options))
    torch.save((torch.distributed.get_world_size(), found), f"{directory}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    """DistributedDataParallel over gloo, with documents of unequal length on the two sides."""
    expected = [train(tiny(*model), tmp_path / "one", documents(12)) for model, _ in IN_PROCESSES]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train_in_process, (2, port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        size, found = torch.load(tmp_path / f"rank{rank}.pt")
        assert size == 2
        for (its_losses, its_parameters), (one_losses, one_parameters) in zip(found, expected, strict=True):
            if rank == 0:  # only the first process logs
                assert_same(its_losses, one_losses)
            assert_same(its_parameters.values(), one_parameters.values())
