"""Fine-tune a checkpoint, native or fla's, on plain text or chats, through TRL's SFTTrainer.

    python -m training.finetune --model runs/nano-7M-GLA-pure --data notes.jsonl --method lora --output runs/tuned
    python -m training.finetune --model m-a-p/340M-20B-GatedDeltaNet-pure-baseline --data chats.jsonl --method full --output runs/chat
    python -m training.finetune --model runs/nano-7M-GLA-pure --data docs/*.txt --method s0 --output runs/s0

Three methods: ``full`` trains every weight, ``lora`` adapters on the projections of both kinds of layer
(``hybrid_models.lora``), ``s0`` only the states that linear layers begin from (``training.state_tuning``); ``lora+s0``
trains the last two together. What comes out:

    full, or lora with --merge   a complete checkpoint: AutoModelForCausalLM.from_pretrained(output)
    lora                         an adapter: peft.AutoPeftModelForCausalLM.from_pretrained(output)
    s0                           initial_state.safetensors: training.state_tuning.initial_cache(model, output)

Data: ``.jsonl`` with rows of "messages" (chat), "prompt" and "completion", or "text"; any other file is one document of
text. Documents are packed into rows of --length tokens (TRL's best fit; longer ones are split) and stay separate:
TRL sends positions that restart, from which the model knows where a document begins. S0 begins every document, so there
rows hold one each, cut at --length. The loss on held-out documents, token by token and one document to a row, cut likewise,
is taken before and after, and written as a result file. One process, one device.

    >>> from training.finetune import Job, finetune                                          # doctest: +SKIP
    >>> finetune(Job(model="runs/nano", data=["notes.jsonl"], method="lora", output="runs/tuned")).after
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

import hybrid_models
from hybrid_models.convert import convert
from hybrid_models.lora import lora_config, lora_report
from hybrid_models.results import FOLDER, metric, result, this_command, weights_sha256, write

from .state_tuning import InitialState, begin_from, describe

METHODS = ("full", "lora", "s0", "lora+s0")
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "s0": 1e-2, "lora+s0": 2e-4}
KINDS = ({"messages"}, {"prompt", "completion"}, {"text"})  # of rows, told by their columns
# For a tokenizer that has none: what a role says, between lines that name it. The markers let TRL train on answers alone.
CHAT_TEMPLATE = (
    "{% for m in messages %}### {{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Job:
    """A fine-tuning run."""

    model: str  # folder or repo id, native or fla's
    data: list[str]
    method: str
    output: str
    held_out: list[str] | None = None  # files; None: ``held_out_share`` of the data's documents
    held_out_share: float = 0.05
    length: int = 1024  # tokens of a row
    steps: int | None = None  # None: ``epochs``
    epochs: float = 1.0
    batch: int = 8  # rows of an optimiser step on one device
    micro_batch: int | None = None  # rows of one forward; None: ``batch``
    learning_rate: float | None = None  # None: LEARNING_RATES
    state_learning_rate: float = 1e-2  # of S0 in lora+s0
    rank: int = 16
    alpha: int | None = None  # of LoRA; None: twice the rank
    merge: bool = False  # LoRA into the weights
    packing: bool = True
    checkpointing: bool = False
    chat_template: str | None = None  # a file; None: the tokenizer's, or CHAT_TEMPLATE
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not known: use one of {', '.join(METHODS)}.")
        if "s0" in self.method and self.checkpointing:
            raise ValueError(
                f"checkpointing=True does not go with method={self.method!r}: recomputed layers lose the state."
            )
        if self.merge and self.method != "lora":
            raise ValueError(f"merge=True folds an adapter into the weights, but method={self.method!r}: use 'lora'.")
        for name in ("length", "batch", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.batch % (self.micro_batch or self.batch):
            raise ValueError(f"micro_batch={self.micro_batch} does not divide batch={self.batch}.")


@dataclass(frozen=True, eq=False)
class Loss:
    """Loss of held-out documents, in nats. Documents differ in length, so its error is that of a ratio of sums."""

    sums: torch.Tensor  # [documents], float64: over a document's trained tokens
    counts: torch.Tensor  # [documents]: how many they are

    @property
    def mean(self) -> float:
        return (self.sums.sum() / self.counts.sum()).item()

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def stderr(self) -> float | None:
        """Of the mean, over documents; None for one document."""
        n = len(self.sums)
        residuals = self.sums - self.mean * self.counts
        return None if n < 2 else (residuals.square().sum() * n / (n - 1)).sqrt().item() / self.tokens

    def minus(self, other: Loss) -> Loss:
        """The gain document by document, whose error is smaller than that of two unrelated losses."""
        return Loss(self.sums - other.sums, self.counts)

    def __str__(self) -> str:
        spread = "" if self.stderr is None else f" ± {self.stderr:.4f}"
        return f"{self.mean:.4f}{spread} nats/token over {self.tokens:,} tokens"


@dataclass(frozen=True)
class Outcome:
    """What a run found, and where it is."""

    output: Path
    before: Loss
    after: Loss
    gain: Loss  # before minus after
    trained_parameters: int
    report: str  # what was trained, per kind of layer
    result: Path | None


def finetune(job: Job, results: str | Path | None = FOLDER, command: str | None = None) -> Outcome:
    """Run a job.

    Args:
        results: folder of result files; None writes none.
        command: that gives the same run again, for the result file.

    Raises:
        ValueError: data or settings that cannot be used as they are; the message says what to do.
        OSError: a file or checkpoint cannot be read, or ``job.output`` not written.
    """
    start = time.perf_counter()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: fine-tuning runs in one process, on one device.")
    output = Path(job.output)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty: choose another --output, or remove it.")
    train, held_out = split(read_documents(job.data), job)
    source = Path(job.model).name
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory()
        )  # for the Trainer, which leaves it empty, and for load
        model, tokenizer = load(job, output, Path(folder))
        note = prepare_chat(tokenizer, train, job)
        model, states, report = prepare(model, job, stack)
        trainer = make_trainer(model, tokenizer, train, held_out, job, folder)
        rows = list(trainer.eval_dataset)
        before = held_out_loss(model, rows, job)
        print("\n".join([report, *cut_documents(trainer, job), f"before: {before}"]), flush=True)
        trainer.train()
        after = held_out_loss(model, rows, job)
        gain = before.minus(after)
        print(f"after:  {after}\ngain:   {gain}", flush=True)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    save(model, states, tokenizer, job, output)
    path = None
    if results is not None:
        used = replace(job, model=source, data=_names(job.data), learning_rate=trainer.args.learning_rate)
        protocol = {name: value for name, value in asdict(used).items() if name not in ("output", "held_out")}
        protocol["held_out"] = None if job.held_out is None else _names(job.held_out)
        metrics = [
            metric("held-out", f"loss_nats_{name}", loss.mean, n=loss.tokens, stderr=loss.stderr)
            for name, loss in (("before", before), ("after", after), ("gain", gain))
        ]
        one = result(
            "finetune",
            source,
            command or this_command("training.finetune"),
            metrics,
            weights=weights_sha256(job.model) if Path(job.model).is_dir() else None,
            protocol=protocol,
            seeds=[job.seed],
            seconds=time.perf_counter() - start,
            details={
                "report": report,
                "chat": note,
                "trained_parameters": trained,
                "documents": {"train": len(train), "held_out": len(held_out)},
                "train_loss": [row["loss"] for row in trainer.state.log_history if "loss" in row],
            },
        )
        path = write(one, results, label=job.method)
    return Outcome(output, before, after, gain, trained, report, path)


def _names(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]


# ---------------------------------------------------------------------------------------------------------------- data


def read_documents(paths: list[str]) -> list[dict]:
    """Rows of all files, in order, all of one of KINDS.

    Raises:
        ValueError: a line is no JSON object, or has other columns; the message names file and line.
        FileNotFoundError: a file is not there.
    """
    rows: list[dict] = []
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file: --data takes .jsonl and text files.")
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            rows.append({"text": text})
            continue
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from None
            kind = next((kind for kind in KINDS if isinstance(row, dict) and kind <= row.keys()), None)
            if kind is None:
                found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise ValueError(f"{path}:{number} has {found}: a row needs messages, prompt and completion, or text.")
            rows.append({name: row[name] for name in kind})
    kinds = {tuple(sorted(row)) for row in rows}
    if len(kinds) > 1:
        raise ValueError(f"The data mixes rows of {' and '.join(map(str, sorted(kinds)))}: fine-tune on one kind.")
    return rows


def split(rows: list[dict], job: Job) -> tuple[Dataset, Dataset]:
    """Training and held-out documents.

    Raises:
        ValueError: one of them would be empty, or they are of different kinds.
    """
    if job.held_out is not None:
        train, held_out = rows, read_documents(job.held_out)
    else:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(job.seed)).tolist()
        count = math.ceil(job.held_out_share * len(rows))
        held_out, train = [rows[i] for i in order[:count]], [rows[i] for i in order[count:]]
    if not train or not held_out:
        raise ValueError(
            f"{len(train)} documents to train on and {len(held_out)} held out: both need one. Give more data, or "
            "--held-out with files of its own, or another --held-out-share."
        )
    if train[0].keys() != held_out[0].keys():
        raise ValueError(f"--held-out has rows of {sorted(held_out[0])}, the data of {sorted(train[0])}.")
    return Dataset.from_list(train), Dataset.from_list(held_out)


def prepare_chat(tokenizer: PreTrainedTokenizerBase, train: Dataset, job: Job) -> str:
    """Give the tokenizer a chat template if the data needs one; says which is used."""
    if "messages" not in train.column_names:
        return "none: the data is no chat"
    if job.chat_template is not None:
        tokenizer.chat_template = Path(job.chat_template).read_text(encoding="utf-8")
        return f"template of {Path(job.chat_template).name}"
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
        return "the tokenizer has no template: lines that name the roles, saved with it"
    return "the tokenizer's own template"


# --------------------------------------------------------------------------------------------------------------- model


def load(job: Job, output: Path, scratch: Path):
    """Model and tokenizer. An fla checkpoint is rewritten as a native one first, which also mends its tokenizer: in
    ``output/base`` if an adapter or S0 will belong to it, so that peft and the Auto classes find it there."""
    path = job.model
    if PreTrainedConfig.get_config_dict(path)[0].get("model_type") != hybrid_models.HybridLinearConfig.model_type:
        stays = job.method != "full" and not job.merge
        path = str(convert(path, (output if stays else scratch) / "base"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # bf16 is autocast over these
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.padding_side = "left"  # of prompts; the collator pads rows by itself
    return model, tokenizer


def prepare(model, job: Job, stack: ExitStack):
    """The model to train, its S0 if it is trained, and a line that says what is trained in which kind of layer."""
    states, parts = None, []
    if job.method == "full":
        return model, None, f"full: {sum(p.numel() for p in model.parameters()):,} parameters, all layers"
    model.requires_grad_(False)
    if "lora" in job.method:
        set_seed(job.seed)  # of the adapters
        model = get_peft_model(model, lora_config(model, r=job.rank, lora_alpha=job.alpha or 2 * job.rank))
        parts.append(str(lora_report(model)))
    if "s0" in job.method:
        states = InitialState(model.config)
        model.add_module("initial_state", states)
        stack.callback(delattr, model, "initial_state")
        stack.enter_context(begin_from(model, states))
        parts.append(describe(states))
    return model, states, "; ".join(parts)


def make_trainer(model, tokenizer, train: Dataset, held_out: Dataset, job: Job, folder: str) -> SFTTrainer:
    """TRL's trainer: packed rows (but for S0), answers alone where the template marks them, no checkpoints on the way."""
    micro_batch = job.micro_batch or job.batch
    on_gpu = torch.cuda.is_available()
    chat = "messages" in train.column_names
    args = SFTConfig(
        output_dir=folder,
        max_length=job.length,
        packing=job.packing and "s0" not in job.method,
        packing_strategy="bfd_split",
        eval_packing=False,
        assistant_only_loss=chat and "{% generation %}" in tokenizer.chat_template,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=job.batch // micro_batch,
        max_steps=job.steps or -1,
        num_train_epochs=job.epochs,
        learning_rate=job.learning_rate or LEARNING_RATES[job.method],
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        gradient_checkpointing=job.checkpointing,
        logging_steps=max(1, (job.steps or 100) // 20),
        save_strategy="no",
        report_to="none",
        seed=job.seed,
    )
    optimizer = {}
    if job.method == "lora+s0":  # a state and a matrix of small products want different steps
        groups = [
            {
                "params": [
                    p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("initial_state")
                ]
            },
            {"params": list(model.initial_state.parameters()), "lr": job.state_learning_rate},
        ]
        optimizer = {"optimizers": (torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=0.0), None)}
    return SFTTrainer(model, args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer, **optimizer)


def cut_documents(trainer: SFTTrainer, job: Job) -> list[str]:
    """A line that says how many documents fill their row to the end, and so lost what would follow; none if none do."""
    packed = trainer.args.packing
    rows = {"held-out": trainer.eval_dataset, **({} if packed else {"training": trainer.train_dataset})}
    full = {name: sum(len(ids) == job.length for ids in data["input_ids"]) for name, data in rows.items()}
    found = [f"{count} of {len(rows[name])} {name}" for name, count in full.items() if count]
    return [f"cut at --length={job.length}: {' and '.join(found)} documents"] if found else []


@torch.no_grad()
def held_out_loss(model, rows: list[dict], job: Job) -> Loss:
    """Loss per trained token over rows of ``input_ids`` and ``labels``, one document each."""
    was_training = model.training
    model.eval()
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    size = job.micro_batch or job.batch
    sums, counts = [], []
    for first in tqdm(range(0, len(rows), size), desc="held-out loss", leave=False):
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows[first : first + size]], True, fill)
            for name, fill in (("input_ids", 0), ("labels", -100))
        )
        on_gpu = model.device.type == "cuda"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu and torch.cuda.is_bf16_supported()):
            # No mask: padding stands on the right, where no token looks.
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.float().transpose(1, 2).cpu(), labels[:, 1:], reduction="none")
        sums.append(losses.double().sum(1))
        counts.append((labels[:, 1:] != -100).sum(1))
    model.train(was_training)
    return Loss(torch.cat(sums), torch.cat(counts))


def save(model, states: InitialState | None, tokenizer, job: Job, output: Path) -> None:
    """Write what was trained (see the module's docstring)."""
    if job.merge:
        model = model.merge_and_unload()
    if job.method != "s0":
        model.save_pretrained(output)
    if states is not None:
        states.save(output)
    tokenizer.save_pretrained(output)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.finetune",
        description="Fine-tune a checkpoint in full, by LoRA, or by its initial states.",
        epilog="example:\n  python -m training.finetune --model runs/nano-7M-GLA-pure --data notes.jsonl --method lora "
        "--output runs/tuned --steps 100",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub repository, native or fla's")
    add("--data", required=True, nargs="+", help=".jsonl (messages, prompt and completion, or text) or text files")
    add("--method", choices=METHODS, required=True, help="what is trained")
    add("--output", required=True, help="folder to write; must be empty or absent")
    add("--held-out", nargs="+", help="files of held-out documents; default: a share of the data")
    add("--held-out-share", type=float, default=Job.held_out_share, help="default: %(default)s")
    add("--length", type=int, default=Job.length, help="tokens of a row; default: %(default)s")
    add("--steps", type=int, help="optimiser steps; default: --epochs")
    add("--epochs", type=float, default=Job.epochs, help="default: %(default)s")
    add("--batch", type=int, default=Job.batch, help="rows of a step on one device; default: %(default)s")
    add("--micro-batch", type=int, help="rows of one forward; default: --batch")
    add("--learning-rate", type=float, help=f"default: {LEARNING_RATES}")
    add(
        "--state-learning-rate",
        type=float,
        default=Job.state_learning_rate,
        help="of S0 in lora+s0; default: %(default)s",
    )
    add("--rank", type=int, default=Job.rank, help="of LoRA; default: %(default)s")
    add("--alpha", type=int, help="of LoRA; default: twice the rank")
    add("--merge", action="store_true", help="LoRA: write a merged checkpoint instead of an adapter")
    add("--no-packing", dest="packing", action="store_false", help="one document to a row, cut at --length")
    add("--checkpointing", action="store_true", help="compute layers again in the backward pass")
    add("--chat-template", help="a Jinja file; default: the tokenizer's, or plain lines")
    add("--seed", type=int, default=Job.seed, help="default: %(default)s")
    add("--results", default=str(FOLDER), help="folder of result files; default: %(default)s")
    options = vars(parser.parse_args(argv))
    results = options.pop("results")
    try:
        outcome = finetune(Job(**options), results, this_command("training.finetune", argv))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{outcome.output} written; result: {outcome.result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
