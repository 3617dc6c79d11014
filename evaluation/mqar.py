"""MQAR: train small stacks to recall, and score what they recall, in one command on CPU or GPU.

    python -m evaluation.mqar DeltaNet+DeltaNet HGRN+attention --conv none all
    python -m evaluation.mqar GLA+attention --tasks 128:4 128:8 128:16 --forgetting --device cuda --label forgetting

A stack is layers joined by "+", mixers of the suite or "attention". ``--conv`` puts a short convolution in none of them, in
the linear ones or in all: it decides more than the update rule, so a comparison of mixers that differ in it compares
convolutions. Each stack gets the learning rate of the grid that is best on development data, for the best rate differs
between mixers by more than their scores do; test data are drawn from another seed. The default sizes are those of a
screening for one CPU: a minute or two a run. The published recipe (Zoology, arXiv 2312.04927) is

    python -m evaluation.mqar DeltaNet+DeltaNet --conv all --vocab-size 8192 --hidden-size 128 --batch 256 --steps 22500 \\
        --tasks 64:4 64:4 64:4 64:4 64:4 128:8 256:16 256:32 256:64 \\
        --test 64:4 64:8 64:16 128:32 256:64 512:128 1024:256 --lrs 1e-3 3e-3 1e-2 3.2e-2 --device cuda

with fresh sequences at every step where it goes 32 times over 180,000. Accuracy is over questions; a model that answers
with any value it has seen scores 1/pairs, so such a plateau is failed optimisation, not small capacity: try more rates,
steps and seeds before believing it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from hybrid_models.results import FOLDER, metric, result, this_command, write

from .mqar_data import VERSION, Task, batch, data_sha256
from .mqar_model import CONV, MqarModel, parse_stack

SOLVED, FLOOR = 0.98, 0.05  # accuracies at which a cell says nothing about capacity
MODEL = "mqar-screening"  # under which results are filed: stacks are not checkpoints


@dataclass(frozen=True)
class Recipe:
    """How a stack is trained; what the stacks of one comparison share.

    Raises:
        ValueError: no step, no sequence or no learning rate.
    """

    hidden_size: int = 64
    heads: int = 2
    steps: int = 1000
    batch: int = 64  # sequences a step, all of one task; the tasks take turns
    learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    weight_decay: float = 0.1  # of matrices
    initializer_range: float = 0.1  # of matrices and embeddings: with the 0.02 of deep models these start too quiet
    warmup: float = 0.1  # share of the steps; a cosine to zero follows
    clip: float = 1.0

    def __post_init__(self):
        if self.steps < 1 or self.batch < 1 or not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(
                f"steps={self.steps}, batch={self.batch}, learning_rates={self.learning_rates}: all must be positive."
            )


@dataclass
class Run:
    """One training, scored."""

    stack: str
    conv: str
    seed: int
    learning_rate: float
    loss: float  # nats per question, mean of the last tenth of training; infinite if it diverged
    dev_accuracy: float  # mean over the tasks, on development data
    seconds: float
    state_floats: int = 0  # recurrent state of one sequence; attention's cache is not counted, it grows
    test: list[dict] | None = None  # of the chosen learning rate: ``score`` for each test task


def train(
    stack: str, conv: str, tasks: Sequence[Task], learning_rate: float, seed: int, recipe: Recipe, device: str = "cpu"
) -> tuple[MqarModel, float]:
    """Train one stack in float32; returns it and its final loss (infinite if a loss was not finite, and training ended).

    The same arguments give the same model on the same device; the global random state is left as it was.
    """
    with torch.random.fork_rng([torch.device(device)] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        model = MqarModel(stack, conv, tasks[0].vocab_size, recipe.hidden_size, recipe.heads)
        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                torch.nn.init.normal_(module.weight, std=recipe.initializer_range)
    model.to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    warmup = max(1, round(recipe.warmup * recipe.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * s / recipe.steps))
    )
    losses = []
    for step in tqdm(range(recipe.steps), desc=f"{stack} conv={conv} lr={learning_rate:g}", leave=False, disable=None):
        data = batch(tasks[step % len(tasks)], recipe.batch, f"train {seed}", step)
        ids, labels = (torch.from_numpy(x).to(device) for x in (data.ids, data.labels))
        asked = labels >= 0
        loss = F.cross_entropy(model(ids, asked), labels[asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % 50 == 49 and not torch.isfinite(losses[-1]):
            return model, math.inf
    tail = torch.stack(losses[-max(1, recipe.steps // 10) :]).mean().item()
    return model, tail if math.isfinite(tail) else math.inf


@torch.no_grad()
def score(model, task: Task, rows: int, seed: str, batch_rows: int = 64) -> dict:
    """Accuracy on ``rows`` sequences of a task.

    Args:
        model: (ids [B, T], asked [B, T] bool) -> logits [number of True, vocabulary], with ``parameters()``.
        seed: of the data; "dev" and "test" are never trained on.

    Returns:
        accuracy and its standard error over sequences (questions of one sequence are not independent); with updates also
        ``kept`` and ``updated``, the accuracy on keys without and with an update, and ``stale``, the share of updated keys
        answered with the old value; ``by_distance``, [least distance, questions, accuracy] for distances from a power of
        two up to the next.
    """
    device = next(model.parameters()).device
    right, stale, updated, distance = [], [], [], []
    for index in range(-(-rows // batch_rows)):
        data = batch(task, batch_rows, seed, index)
        asked = torch.from_numpy(data.labels >= 0).to(device)
        answer = model(torch.from_numpy(data.ids).to(device), asked).argmax(-1).cpu().numpy()
        place = data.labels >= 0
        shape = (batch_rows, task.pairs)
        right.append((answer == data.labels[place]).reshape(shape))
        stale.append((answer == data.stale[place]).reshape(shape))
        updated.append((data.stale[place] >= 0).reshape(shape))
        distance.append(data.distance[place].reshape(shape))
    right, stale, updated, distance = (np.concatenate(x)[:rows] for x in (right, stale, updated, distance))
    per_row = right.mean(1)
    found = {"accuracy": float(right.mean()), "stderr": float(per_row.std(ddof=1) / math.sqrt(rows)), "rows": rows}
    if task.updates:
        found |= {"updated": float(right[updated].mean()), "stale": float(stale[updated].mean())}
        if task.updates < task.pairs:
            found["kept"] = float(right[~updated].mean())
    bins = np.floor(np.log2(distance)).astype(int)
    found["by_distance"] = [
        [2 ** int(b), int((bins == b).sum()), float(right[bins == b].mean())] for b in np.unique(bins)
    ]
    return found


def screen(
    stack: str,
    conv: str,
    tasks: Sequence[Task],
    test_tasks: Sequence[Task],
    recipe: Recipe,
    seeds: Sequence[int] = (0,),
    rows: int = 1000,
    device: str = "cpu",
) -> list[Run]:
    """Train a stack at every learning rate with the first seed, then at the best one with the others.

    Returns:
        All runs; those with ``test`` set are at the chosen rate, one per seed.
    """
    parse_stack(stack)

    def run(learning_rate: float, seed: int) -> tuple[Run, MqarModel]:
        start = time.perf_counter()
        model, loss = train(stack, conv, tasks, learning_rate, seed, recipe, device)
        model.eval()
        dev = [score(model, task, min(rows, 256), "dev")["accuracy"] for task in dict.fromkeys(tasks)]
        seconds = time.perf_counter() - start
        return Run(stack, conv, seed, learning_rate, loss, statistics.mean(dev), seconds, model.state_floats), model

    tried = [run(learning_rate, seeds[0]) for learning_rate in recipe.learning_rates]
    best, model = max(tried, key=lambda pair: (math.isfinite(pair[0].loss), pair[0].dev_accuracy))
    best.test = [score(model, task, rows, "test") for task in test_tasks]
    runs = [one for one, _ in tried]
    for seed in seeds[1:]:
        one, model = run(best.learning_rate, seed)
        one.test = [score(model, task, rows, "test") for task in test_tasks]
        runs.append(one)
    return runs


def failures(runs: Sequence[Run], recipe: Recipe) -> dict:
    """What must be said beside the scores of one stack: how much of the grid failed, and whether it was wide enough."""
    chosen = next(run for run in runs if run.test)
    accuracies = [task["accuracy"] for run in runs if run.test for task in run.test]
    edges = {min(recipe.learning_rates), max(recipe.learning_rates)}
    return {
        "diverged": sum(math.isinf(run.loss) for run in runs),
        "at_grid_edge": len(edges) > 1 and chosen.learning_rate in edges and min(accuracies) < SOLVED,
        "solved": min(accuracies) > SOLVED,
        "at_floor": max(accuracies) < FLOOR,
    }


def metrics_of(runs: Sequence[Run], test_tasks: Sequence[Task]) -> list[dict]:
    """The numbers of one stack for a result file."""
    rows = []
    for run in (run for run in runs if run.test):
        for task, found in zip(test_tasks, run.test, strict=True):
            where = dict(stack=run.stack, conv=run.conv, length=task.length, pairs=task.pairs, seed=run.seed)
            rows.append(metric("mqar", "accuracy", found["accuracy"], n=found["rows"], stderr=found["stderr"], **where))
            rows += [
                metric("mqar", name, found[name], **where) for name in ("kept", "updated", "stale") if name in found
            ]
    return rows


def table(stacks: list[list[Run]], test_tasks: Sequence[Task]) -> str:
    """Test accuracy, one line per stack; the mean over seeds, with the range where there are several."""
    width = max(len(runs[0].stack) for runs in stacks) + 2
    head = "".join(f"{f'{task.length}:{task.pairs}':>16}" for task in test_tasks)
    lines = [f"{'stack':{width}}{'conv':8}{'state':>7}  {'lr':>7}{head}"]
    for runs in stacks:
        tested = [run for run in runs if run.test]
        cells = []
        for i in range(len(test_tasks)):
            values = [run.test[i]["accuracy"] for run in tested]
            spread = f" {min(values):.2f}-{max(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        one = tested[0]
        lines.append(
            f"{one.stack:{width}}{one.conv:8}{one.state_floats:>7,}  {one.learning_rate:>7g}"
            + "".join(f"{cell:>16}" for cell in cells)
        )
    guess = "".join(f"{1 / task.pairs:>16.3f}" for task in test_tasks)
    return "\n".join([*lines, f"{'(any value of the context)':{width + 24}}{guess}"])


def parse_tasks(specs: Sequence[str], vocab_size: int, forgetting: bool, fill: str) -> list[Task]:
    """ "64:4" -> a task of 64 tokens and 4 pairs; forgetting updates half of the pairs.

    Raises:
        ValueError: a spec is malformed or impossible.
    """
    tasks = []
    for spec in specs:
        length, _, pairs = spec.partition(":")
        if not (length.isdigit() and pairs.isdigit()):
            raise ValueError(f"task {spec!r} is not LENGTH:PAIRS, for example 64:4.")
        tasks.append(Task(vocab_size, int(length), int(pairs), int(pairs) // 2 if forgetting else 0, fill))
    return tasks


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m evaluation.mqar",
        description="Train small stacks on multi-query associative recall and score them.",
        epilog="example:\n  python -m evaluation.mqar DeltaNet+DeltaNet HGRN+attention --conv none all --steps 300",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe = Recipe()
    parser.add_argument("stacks", nargs="+", metavar="STACK", help="layers joined by +: HGRN+attention")
    parser.add_argument("--conv", nargs="+", choices=CONV, default=["none"], help="layers with a short convolution")
    parser.add_argument("--tasks", nargs="+", default=["64:4", "64:8", "64:16"], metavar="LENGTH:PAIRS")
    parser.add_argument("--test", nargs="+", metavar="LENGTH:PAIRS", help="default: as --tasks")
    parser.add_argument("--forgetting", action="store_true", help="half of the keys return with a new value")
    parser.add_argument("--fill", choices=("random", "empty"), default="random", help="empty slots (default random)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="(default 2048)")
    parser.add_argument("--hidden-size", type=int, default=recipe.hidden_size, help=f"(default {recipe.hidden_size})")
    parser.add_argument("--heads", type=int, default=recipe.heads, help=f"(default {recipe.heads})")
    parser.add_argument("--steps", type=int, default=recipe.steps, help=f"(default {recipe.steps})")
    parser.add_argument("--batch", type=int, default=recipe.batch, help=f"sequences (default {recipe.batch})")
    parser.add_argument("--lrs", nargs="+", type=float, default=recipe.learning_rates, help="the grid, for each stack")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="the grid runs with the first (default 0)")
    parser.add_argument("--rows", type=int, default=1000, help="test sequences per task (default 1000)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--label", help="of the result file, to keep it beside others")
    parser.add_argument("--output", default=FOLDER, metavar="DIR", help="result files; default %(default)s")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        recipe = replace(
            recipe,
            hidden_size=args.hidden_size,
            heads=args.heads,
            steps=args.steps,
            batch=args.batch,
            learning_rates=tuple(args.lrs),
        )
        tasks = parse_tasks(args.tasks, args.vocab_size, args.forgetting, args.fill)
        test_tasks = parse_tasks(args.test or dict.fromkeys(args.tasks), args.vocab_size, args.forgetting, args.fill)
        for stack in args.stacks:
            MqarModel(stack, args.conv[0], args.vocab_size, args.hidden_size, args.heads)
        if args.rows < 2:
            raise ValueError(f"rows={args.rows} must be at least 2: errors are over sequences.")
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {args.device}: this machine has no CUDA device; use cpu.")
    except ValueError as error:
        parser.error(str(error))

    stacks, numbers = [], []
    pairs = [(stack, conv) for stack in args.stacks for conv in args.conv]
    for stack, conv in tqdm(pairs, desc="stacks", disable=None):
        runs = screen(stack, conv, tasks, test_tasks, recipe, args.seeds, args.rows, args.device)
        stacks.append(runs)
        numbers += metrics_of(runs, test_tasks)
    print(table(stacks, test_tasks))
    notes = {f"{runs[0].stack} conv={runs[0].conv}": failures(runs, recipe) for runs in stacks}
    for name, found in notes.items():
        if found["diverged"] or found["at_grid_edge"]:
            print(f"{name}: {found['diverged']} runs diverged; best rate at the grid's edge: {found['at_grid_edge']}")
    protocol = {
        "generator": VERSION,
        "recipe": asdict(recipe),
        "tasks": [asdict(task) for task in tasks],
        "test_tasks": [asdict(task) for task in test_tasks],
        "test_sha256": [data_sha256(task, 64, "test", -(-args.rows // 64)) for task in test_tasks],
        "rows": args.rows,
        "dtype": "float32",
        "device_type": args.device.partition(":")[0],
    }
    details = {"notes": notes, "runs": [{**asdict(run), "loss": _finite(run.loss)} for runs in stacks for run in runs]}
    one = result(
        "mqar",
        MODEL,
        this_command("evaluation.mqar", argv),
        numbers,
        protocol=protocol,
        seeds=args.seeds,
        seconds=time.perf_counter() - start,
        details=details,
    )
    print(f"written to {write(one, args.output, args.label)}")
    return 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())
