"""The training command, run as users run it: to its end, killed, on a full disk, by two processes, with numbers that break.

Runs are processes of their own, forked from one that has imported everything, so that each costs a second. Losses of a run
that repeats another's operations are compared bit for bit; sums in another order agree to 1e-6 of their size.
"""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hybrid_models  # noqa: F401  (registers with the Auto classes)
from hybrid_models.results import read_all
from tests.common import tiny_model, tokens
from tests.test_data import documents, write_parquet
from training import train as command
from training import trainer
from training.accounting import flops_per_token
from training.callbacks import Speed, StepLog, device_is_shared, first_non_finite, state_statistics
from training.recipes import recipe
from training.sources import held_out_rows
from training.trainer import STAGING, HybridTrainer

CELL = "tiny-GatedDeltaNet-hybrid-3-1"
STEPS = 18
ROUNDING = 1e-6

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["training.train", "tests.test_train_command"])


def _run(argv: list[str], output: Path, environment: dict, break_it) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(output, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        if break_it is not None:
            name, argument = break_it
            globals()[name](argument)
        status = command.main(argv)
    os._exit(status)


class Run:
    """One process of the command; ``text`` is what it printed."""

    def __init__(self, argv: list[str], where: Path, environment: dict | None = None, break_it=None):
        where.mkdir(parents=True, exist_ok=True)
        self.output = where / f"output{len(list(where.glob('output*')))}"
        self.process = processes.Process(target=_run, args=(argv, self.output, environment or {}, break_it))
        self.process.start()

    def end(self) -> int:
        self.process.join(120)
        assert self.process.exitcode is not None, f"still running: {self.text}"
        return self.process.exitcode

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def losses(directory: Path) -> list[dict]:
    """Every step's line, without what depends on the clock."""
    rows = StepLog(directory / "log.jsonl").rows()
    return [{name: row[name] for name in row if name not in ("tokens_per_s", "mfu")} for row in rows]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    for i in range(8):
        write_parquet(root / "text" / f"{i}.parquet", documents(10, seed=i))
    return root


def argv(data: Path, *more: str, cell: str = CELL, name: str = "run", save: int = 3) -> list[str]:
    return [
        *("--cell", cell, "--dataset", str(data / "text"), "--cache-dir", str(data / "cache")),
        *("--output-dir", str(data / name), "--tokens", str(STEPS * 256), "--save-steps", str(save)),
        *("--log-every", "4", "--probe-every", "8", "--lanes", "4", "--cpu", *more),
    ]


@pytest.fixture(scope="module")
def reference(data):
    """A run from its beginning to its end; each lane reads into its second file."""
    run = Run(argv(data, "--results", str(data / "results"), name="reference"), data / "reference-output")
    assert run.end() == 0, run.text
    return data / "reference"


@pytest.fixture(scope="module")
def stopped(data):
    """A run that was killed at its third checkpoint; copy it to go on."""
    Run(argv(data, name="stopped"), data / "stopped-output", break_it=("die_at_save", 9)).end()
    return data / "stopped"


# ------------------------------------------------------------------------------------------------------- a run to its end


def test_a_run_says_what_happened(reference, data):
    rows = StepLog(reference / "log.jsonl").rows()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert [row["tokens"] for row in rows] == [256 * step for step in range(1, STEPS + 1)]
    assert [row["step"] for row in rows if "state_norm" in row] == [8, 16]
    assert [norm is None for norm in rows[7]["state_norm"]] == [False, False, True] * 2

    # Warm-up over 2 steps, then a cosine to a tenth of the peak; a step's rate is the one it was made with.
    one = recipe(CELL)
    rates = [one.learning_rate * step / 2 for step in range(2)]
    for step in range(2, STEPS):
        cosine = (1 + math.cos(math.pi * (step - 2) / (STEPS - 2))) / 2
        rates.append(one.learning_rate * (0.1 + 0.9 * cosine))
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates, rel=1e-12)

    [(path, found)] = read_all(data / "results")
    assert path == data / "results" / CELL / "training.json"
    assert found == json.loads((reference / "training.json").read_text())
    assert found["evaluation"] == "training" and found["model"] == CELL and found["seeds"] == [42]
    assert found["details"]["loss_curve"] == [[row["step"], row["loss"]] for row in rows]
    assert found["protocol"]["dataset"] == str(data / "text") and len(found["protocol"]["tokenizer_sha256"]) == 64
    metrics = {(one["task"], one["metric"]): one for one in found["metrics"]}
    assert {name for _, name in metrics} == {"loss_nats", "tokens_per_s", "first_step_s", "peak_bytes"}
    assert metrics["training", "peak_bytes"]["value"] > 1e8


def test_the_directory_is_a_checkpoint_and_its_loss_is_the_reported_one(reference, data):
    model = AutoModelForCausalLM.from_pretrained(reference)
    tokenizer = AutoTokenizer.from_pretrained(reference)
    assert {tensor.dtype for tensor in weights(reference).values()} == {torch.float32}
    assert (reference / "modeling_hybrid_linear.py").exists()
    rows = held_out_rows(str(data / "text"), tokenizer, data / "cache", 32, 256)
    with torch.no_grad():
        logits = torch.cat([model(row[None]).logits for row in rows])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), rows[:, 1:].flatten())
    found = json.loads((reference / "training.json").read_text())
    [held_out] = [one for one in found["metrics"] if one["task"] == "held-out"]
    assert held_out["value"] == pytest.approx(expected.item(), rel=ROUNDING)
    assert held_out["n"] == rows.numel() - len(rows)
    per_row = F.cross_entropy(logits[:, :-1].transpose(1, 2).double(), rows[:, 1:], reduction="none").mean(1)
    assert held_out["stderr"] == pytest.approx(per_row.std().item() / len(rows) ** 0.5, rel=1e-4)


def test_the_first_loss_is_that_of_the_first_batch(reference, data):
    """Ties the log to the model and to the stream: eight rows of the untrained model."""
    one = recipe(CELL, dataset=str(data / "text"), lanes=4)
    tokenizer = AutoTokenizer.from_pretrained(reference)
    found = command.open_sources(one.dataset, tokenizer, data / "cache", True)
    batch = next(iter(command.Stream(found, sequence_length=32, seed=42, lanes=4, rows=8)))
    command.set_seed(42)
    with torch.no_grad():
        logits = command.HybridLinearForCausalLM(one.config)(batch["input_ids"]).logits[:, :-1].double()
    expected = F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten()).item()
    assert losses(reference)[0]["loss"] == pytest.approx(expected, rel=ROUNDING)


def test_a_finished_run_is_not_trained_again(reference, data):
    before = (reference / "log.jsonl").stat().st_mtime_ns
    run = Run(argv(data, name="reference"), data / "again-output")
    assert run.end() == 0 and "complete; --restart trains it anew" in run.text
    assert (reference / "log.jsonl").stat().st_mtime_ns == before


def test_another_recipe_needs_another_directory(reference, data):
    run = Run(argv(data, "--learning-rate", "0.5", name="reference"), data / "other-output")
    assert run.end() == 2
    assert "holds another run: learning_rate was 0.003, is 0.5" in run.text


# ----------------------------------------------------------------------------------------------------------- interruptions


def test_killed_at_random_moments_a_run_is_the_uninterrupted_one(reference, data):
    """Four times in a row, each at a random step and a random moment in it."""
    seed = int.from_bytes(os.urandom(4), "big")
    draw = random.Random(seed)
    directory = data / "killed"
    marks = sorted(draw.sample(range(STEPS - 1), 4))
    for mark in marks:
        run = Run(argv(data, name="killed"), data / "killed-output")
        while run.process.is_alive() and _lines(directory) <= mark:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.3))
        run.process.kill()
        assert run.end() in (-signal.SIGKILL, 0), run.text
    run = Run(argv(data, name="killed"), data / "killed-output")
    assert run.end() == 0, run.text
    assert losses(directory) == losses(reference), f"random seed {seed}"
    assert equal(weights(directory), weights(reference))
    assert sorted(path.name for path in directory.glob("checkpoint-*")) == [
        f"checkpoint-{STEPS - 3}",
        f"checkpoint-{STEPS}",
    ]


def _lines(directory: Path) -> int:
    log = directory / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def die_at_flush(count: int) -> None:
    """Have the process killed when it flushes its ``count``-th file: in the middle of writing a checkpoint."""
    plain, seen = os.fsync, []

    def fsync(handle):
        seen.append(handle)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(handle)

    os.fsync = fsync


def die_at_save(step: int) -> None:
    """Have the process killed after it wrote the weights of checkpoint ``step``, before optimiser and data."""
    plain = HybridTrainer._save_optimizer_and_scheduler

    def save(self, output_dir):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, output_dir)

    HybridTrainer._save_optimizer_and_scheduler = save


def die_at_rotation(step: int) -> None:
    """Have the process killed after checkpoint ``step`` is there, before an older one is removed for it."""
    plain = trainer.rotate_checkpoints

    def rotate(output_dir, limit):
        if (Path(output_dir) / f"checkpoint-{step}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        plain(output_dir, limit)

    trainer.rotate_checkpoints = rotate


def die_at_end(_) -> None:
    """Have the process killed when the last step is done and saved, but nothing of the result is written."""
    command.measured = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


def test_killed_while_writing_a_checkpoint_a_run_is_the_uninterrupted_one(reference, data):
    directory = data / "cut"
    breaks = [("die_at_save", 6), ("die_at_flush", 4), ("die_at_flush", 9), ("die_at_save", 9)]
    breaks += [("die_at_rotation", STEPS), ("die_at_end", None)]
    for number, break_it in enumerate(breaks):
        run = Run(argv(data, name="cut"), data / "cut-output", break_it=break_it)
        assert run.end() == -signal.SIGKILL, run.text
        if "save" in break_it[0]:
            assert (directory / STAGING / f"checkpoint-{break_it[1]}" / "model.safetensors").exists()
            assert not (directory / f"checkpoint-{break_it[1]}").exists()
    assert not (directory / "training.json").exists()
    run = Run(argv(data, name="cut"), data / "cut-output")
    assert run.end() == 0, run.text
    assert f"going on after step {STEPS} of {STEPS}" in run.text
    assert losses(directory) == losses(reference)
    assert equal(weights(directory), weights(reference))
    assert not (directory / STAGING).exists()
    assert len(list(directory.glob("checkpoint-*"))) == 2
    both = [json.loads((path / "training.json").read_text())["metrics"] for path in (directory, reference)]
    assert [m["value"] for m in both[0] if m["metric"] == "loss_nats"] == [
        m["value"] for m in both[1] if m["metric"] == "loss_nats"
    ]


def limit_file_size(limit: int) -> None:
    """A disk on which no file can grow beyond ``limit`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.parametrize("limit", [100_000, 400_000], ids=["weights", "optimiser"])
def test_a_full_disk_loses_nothing(reference, stopped, data, limit):
    """Weights are 0.3 MB, the optimiser's state twice that."""
    directory = shutil.copytree(stopped, data / f"full{limit}")
    run = Run(argv(data, name=directory.name), data / "full-output", break_it=("limit_file_size", limit))
    assert run.end() == 1
    assert f"{directory}/checkpoint-9 could not be written" in run.text and "Traceback" not in run.text
    assert f"The last good checkpoint is {directory}/checkpoint-6" in run.text
    run = Run(argv(data, name=directory.name), data / "full-output")
    assert run.end() == 0 and losses(directory) == losses(reference), run.text
    assert equal(weights(directory), weights(reference))


def no_room_for_the_log(_) -> None:
    """Have the disk be full when the log is written for the second time."""
    plain, calls = StepLog.append, []

    def append(self, rows):
        calls.append(rows)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(self, rows)

    StepLog.append = append


def test_a_log_that_cannot_be_written_loses_nothing(reference, stopped, data):
    directory = shutil.copytree(stopped, data / "log")
    run = Run(argv(data, name="log"), data / "log-output", break_it=("no_room_for_the_log", None))
    assert run.end() == 1, run.text
    assert f"{directory}/log.jsonl could not be written: [Errno 28] No space left on device" in run.text
    run = Run(argv(data, name="log"), data / "log-output")
    assert run.end() == 0 and losses(directory) == losses(reference), run.text


def test_a_loss_that_is_not_a_number_stops_the_run(data):
    """Step 3 is the second one with a learning rate: the weights have just left what floats can hold."""
    run = Run(argv(data, "--learning-rate", "1e30", name="diverged", save=2), data / "diverged-output")
    assert run.end() == 1
    assert "training diverged at step 3: loss" in run.text and "Traceback" not in run.text
    directory = data / "diverged"
    assert f"The last good checkpoint is {directory}/checkpoint-2" in run.text
    assert [path.name for path in directory.glob("checkpoint-*")] == ["checkpoint-2"]
    assert [row["step"] for row in losses(directory)] == [1, 2]
    assert not (directory / "model.safetensors").exists()


def test_an_unreadable_shard_names_itself_and_loses_nothing(reference, data):
    """Read as a stream, it is met in the middle: the second file of a lane. Put right, the run goes on."""
    order = list(range(8))
    random.Random("42 0").shuffle(order)
    broken = data / "text" / f"{order[4]}.parquet"
    whole, status = broken.read_bytes(), broken.stat()
    directory = data / "shard"
    more = ["--streaming", "--workers", "0", "--held-out-rows", "0", "--tokenizer", str(reference)]
    options = argv(data, *more, name="shard")
    try:
        broken.write_bytes(whole[: len(whole) // 2])
        run = Run(options, data / "shard-output")
        assert run.end() == 2, run.text
        assert f"{broken} cannot be read" in run.text and "Traceback" not in run.text
        assert len(list(directory.glob("checkpoint-*"))) == 2
    finally:
        broken.write_bytes(whole)
        os.utime(broken, ns=(status.st_atime_ns, status.st_mtime_ns))
    run = Run(options, data / "shard-output")
    assert run.end() == 0 and "going on after step" in run.text, run.text
    assert [row["loss"] for row in losses(directory)] == [row["loss"] for row in losses(reference)]


# ------------------------------------------------------------------------------------------------- the same run, other ways


def test_two_processes_are_one(reference, data):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    # The first pair is stopped in the middle, one of them by force: what goes on must fit together.
    options = argv(data, name="two")
    pair = [Run(options, data / f"two{i}-output", env, ("die_at_save", 9)) for i, env in enumerate(environments)]
    pair[0].end()
    pair[1].process.kill()
    pair = [Run(options, data / f"two{i}-output", env) for i, env in enumerate(environments)]
    assert [run.end() for run in pair] == [0, 0], pair[0].text + pair[1].text
    for one, two in zip(losses(reference), losses(data / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=ROUNDING)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert json.loads((data / "two" / "training.json").read_text())["protocol"]["devices"] == 2
    places = sorted(path.name for path in (data / "two" / f"checkpoint-{STEPS}").glob("data-*.json"))
    assert places == ["data-0.json", "data-1.json"]


def test_how_a_step_is_computed_does_not_matter(reference, data):
    """In two parts, layers computed twice."""
    run = Run(argv(data, "--rows-per-device", "4", "--gradient-checkpointing", name="parts"), data / "parts-output")
    assert run.end() == 0, run.text
    for one, two in zip(losses(reference), losses(data / "parts"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=ROUNDING)


def test_sixteen_bits_keep_float32_weights_and_boundaries_and_events(data):
    """Autocast over float32 weights and optimiser; packed documents; a TensorBoard file."""
    options = ["--bf16", "--boundaries", "--report-to", "tensorboard", "--restart", "--set", "hidden_size=48"]
    run = Run(argv(data, *options, name="bf16"), data / "bf16-output")
    assert run.end() == 0, run.text
    rows = losses(data / "bf16")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert {tensor.dtype for tensor in weights(data / "bf16").values()} == {torch.float32}
    state = torch.load(data / "bf16" / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)["state"]
    assert {tensor.dtype for one in state.values() for tensor in one.values()} == {torch.float32}
    assert list((data / "bf16").rglob("events.out.tfevents*"))
    assert json.loads((data / "bf16" / "config.json").read_text())["hidden_size"] == 48


@pytest.mark.parametrize("name", ["tiny-HGRN-pure", "tiny-RetNet-pure", "tiny-Transformer-seed1"])
def test_every_kind_of_cell_trains(data, name):
    run = Run([*argv(data, cell=name, name=name, save=99), "--tokens", "1536"], data / "cells-output")
    assert run.end() == 0, run.text
    rows = losses(data / name)
    assert len(rows) == 6 and rows[-1]["loss"] < rows[0]["loss"]


# ------------------------------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize("mixer", ["gated_delta_net", "hgrn", "gla", "delta_net"])
def test_vectors_and_decays_have_no_weight_decay(mixer):
    model = tiny_model(mixer, "3-1", torch.float32)
    trainer = HybridTrainer.__new__(HybridTrainer)
    trainer.accelerator = type("Accelerator", (), {"unwrap_model": staticmethod(lambda model: model)})
    decayed = set(trainer.get_decay_parameter_names(model))
    for name, parameter in model.named_parameters():
        exempt = parameter.dim() == 1 or name.endswith("lower_bounds")
        assert (name in decayed) != exempt, name
    undecayed = {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()} - {
        n.rsplit(".", 1)[-1] for n in decayed
    }
    assert undecayed == {"gated_delta_net": {"A_log", "dt_bias"}, "hgrn": {"lower_bounds"}, "gla": {"bias"}}.get(
        mixer, set()
    )


def test_state_statistics_are_those_of_singular_values():
    ids = tokens(2, 20)
    for mixer in ("gla", "hgrn"):
        model = tiny_model(mixer, "3-1", torch.float64, num_hidden_layers=3).train()
        found = state_statistics(model, ids)
        assert model.training
        layers = model.eval()(ids, use_cache=True).past_key_values.layers
        for i in range(2):
            state = layers[i].recurrent_states[0]
            s = state if mixer == "hgrn" else torch.linalg.svdvals(state)
            assert found["state_norm"][i] == pytest.approx(s.square().sum(-1).sqrt().mean().item(), rel=1e-9)
            rank = s.square().sum(-1).square() / s.pow(4).sum(-1)
            assert found["state_rank"][i] == pytest.approx(rank.mean().item(), rel=1e-9)
        assert found["state_norm"][2] is found["state_rank"][2] is None


def test_speed_counts_steps_and_never_passes_the_peak(monkeypatch):
    clock = iter([0.0, 50.0, 50.0, 54.0, 60.0, 61.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    speed = Speed(batch_tokens=1000, flops_per_token=1e6, peak=1e10)
    assert speed.summary() == {}
    speed.start()
    assert speed.stop(1) == {} and speed.first_step_seconds == 50
    speed.start()
    assert speed.stop(8) == {"tokens_per_s": 2000.0, "mfu": 0.2}
    assert speed.summary() == {"tokens_per_s": 2000.0, "mfu": 0.2}
    speed.start()
    with pytest.raises(RuntimeError, match="MFU is 1.1"):
        speed.stop(11)


@pytest.mark.parametrize("others, shared", [(0, False), (1 << 30, False), (5 << 30, True)])
def test_a_device_that_another_process_uses_is_noticed(others, shared, monkeypatch):
    own = 7 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((80 << 30) - own - others, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: own)
    assert device_is_shared() is shared


def test_a_log_is_cut_to_the_checkpoint(tmp_path):
    log = StepLog(tmp_path / "log.jsonl")
    log.cut(0)
    log.append([{"step": step, "loss": 1.0} for step in (1, 2, 3)])
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')
    log.cut(2)
    assert log.path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n'
    with pytest.raises(ValueError, match="does not hold steps 1 to 3"):
        log.cut(3)


def test_what_is_not_finite_is_found():
    row = {"loss": 1.0, "grad_norm": 1.0}
    assert first_non_finite([row, row]) is None
    assert first_non_finite([row, {**row, "grad_norm": float("inf")}]) == 1
    assert first_non_finite([{**row, "loss": float("nan")}, row]) == 0


def test_a_forward_pass_takes_a_divisor_of_the_batch():
    one = recipe("340M-20B-GLA-pure")  # 24 rows of 2048
    assert [command.rows_per_device(one, None, world) for world in (1, 2, 8)] == [8, 6, 3]
    assert command.rows_per_device(one, 4, 2) == 4
    with pytest.raises(ValueError, match="rows_per_device=5 does not divide the 24"):
        command.rows_per_device(one, 5, 1)
    with pytest.raises(ValueError, match="--batch-tokens 65536"):
        command.rows_per_device(one, None, 16)


def test_a_dry_run_shows_the_plan_and_the_first_batch(reference, data, capsys):
    assert command.main([*argv(data), "--dry-run", "--gpus", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"in {STEPS} steps" in shown
    assert "<s>" in shown and any(word in shown for word in ("state", "layer"))
    assert command.main([*argv(data), "--dry-run", "--tokenizer", "/nowhere"]) == 0
    shown = capsys.readouterr().out
    assert f"in {STEPS} steps" in shown and "cannot be read here: tokenizer='/nowhere'" in shown
    assert not (data / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--cell", "tiny-GLA-pur"], "did you mean tiny-GLA-pure"),
        (["--set", "hiden_size=64"], "Did you mean hidden_size"),
        (["--set", "hidden_size"], "FIELD=VALUE"),
        (["--dataset", "/nowhere.txt"], "/nowhere.txt"),
        (["--learning-rate", "-1"], "learning_rate=-1.0 must be at least 0"),
        (["--report-to", "trackio"], "report_to='trackio' is not installed: pip install trackio"),
    ],
)
def test_mistakes_are_one_line(data, options, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with monkeypatch.context() as patch:
        patch.setattr(command.importlib.util, "find_spec", lambda name: None)
        assert command.main([*argv(data, name="mistake"), *options]) == 2
    shown = capsys.readouterr().err.strip()
    assert message in shown and len(shown.splitlines()) == 1
    assert not (data / "mistake").exists()


@pytest.mark.parametrize("name", ["one_gpu", "ddp", "fsdp2", "multi_node"])
def test_accelerate_reads_its_configurations(name):
    """Loading refuses unknown keys. What FSDP wraps must be a class of the model."""
    found = load_config_from_file(f"training/accelerate/{name}.yaml")
    assert found.mixed_precision == "no" and found.use_cpu is False
    if name == "fsdp2":
        wrapped = found.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
        assert hasattr(hybrid_models.modeling_hybrid_linear, wrapped)
        assert found.fsdp_config["fsdp_version"] == 2


def test_flops_are_of_the_recipe(reference):
    assert flops_per_token(recipe(CELL).config, 32) > 6 * 50_000


def test_restart_forgets_the_run_before(stopped, data):
    directory = shutil.copytree(stopped, data / "restart")
    (directory / "notes.txt").write_text("mine")
    more = ["--learning-rate", "0.001", "--restart", "--tokens", "1024"]
    run = Run(argv(data, *more, name="restart"), data / "restart-output")
    assert run.end() == 0 and "4 steps" in run.text, run.text
    assert [row["step"] for row in losses(directory)] == [1, 2, 3, 4]
    assert (directory / "notes.txt").exists()
