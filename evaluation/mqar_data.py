"""Multi-query associative recall (MQAR) as data: which value came after this key?

A sequence lists key-value pairs and then asks for every key once, at gaps that are mostly short and sometimes as long as
the sequence (Zoology, arXiv 2312.04927, section 4). In the forgetting variant, half of the keys come back with a new value
before the questions; the last value is right, the old one is *stale*. What a model must do is nothing but recall, so the
score says how much its state holds and for how long.

    >>> from evaluation.mqar_data import Task, batch
    >>> one = batch(Task(vocab_size=64, length=32, pairs=4), rows=2, seed=0)
    >>> one.ids.shape, int((one.labels >= 0).sum())
    ((2, 32), 8)

Two repairs to the published generator. A new value is drawn from those that the sequence does not hold (the published one
compares with another key's value, so that "new" may equal old), and so is whatever fills the empty slots: no stray token
can look like a second write. Nothing here touches a global random state: a batch depends on (task, seed, index) alone,
through numpy's RandomState, whose streams are frozen.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np

VERSION = 1  # of the generator: raise it when the same arguments give other data
EMPTY, IGNORED = 0, -100
GAP_POWER = 0.01  # gap g has probability ~ (g + 1)^(GAP_POWER - 1)


@dataclass(frozen=True)
class Task:
    """What a sequence looks like.

    Args:
        vocab_size: 0 is the empty token, keys are 1 .. V/2 - 1, values V/2 .. V - 1.
        length: tokens of a sequence.
        pairs: key-value pairs, each asked for once.
        updates: keys that return with a new value before the questions; pairs / 2 in the forgetting variant, 0 without.
        fill: what stands in the slots between: "random", tokens that are not used in the sequence, or "empty", zeros.

    Raises:
        ValueError: the pairs, updates and questions do not fit the length or the vocabulary.
    """

    vocab_size: int = 8192
    length: int = 64
    pairs: int = 4
    updates: int = 0
    fill: str = "random"

    def __post_init__(self):
        if self.pairs < 1 or not 0 <= self.updates <= self.pairs:
            raise ValueError(f"pairs={self.pairs}, updates={self.updates}: use pairs >= 1 and 0 <= updates <= pairs.")
        if self.fill not in ("random", "empty"):
            raise ValueError(f"fill={self.fill!r} is not known: use 'random' or 'empty'.")
        if self.length % 2 or self.vocab_size % 2:
            raise ValueError(f"length={self.length} and vocab_size={self.vocab_size} must be even.")
        if self.length < (least := 4 * self.pairs + 2 * self.updates):
            raise ValueError(
                f"length={self.length} is too short for {self.pairs} pairs, {self.updates} updates and {self.pairs} "
                f"questions: use at least {least}."
            )
        spare = 1  # a value besides those in use, for the filling
        if self.vocab_size // 2 < (least := self.pairs + self.updates + spare):
            raise ValueError(
                f"vocab_size={self.vocab_size} is too small for {self.pairs} pairs and {self.updates} updates: use at "
                f"least {2 * least}."
            )

    @property
    def context(self) -> int:
        """Tokens before the first place for a question."""
        return 2 * (self.pairs + self.updates)


class Batch(NamedTuple):
    """Sequences with what is asked of them; [rows, length] int64 where nothing else is said."""

    ids: np.ndarray
    labels: np.ndarray  # the value, at the place of the key that asks for it (the value itself is not shown); else -100
    stale: np.ndarray  # the value that a question's key had before its update; -100 where there was none
    distance: np.ndarray  # from the key's last write to its question, in tokens; -100 elsewhere


def batch(task: Task, rows: int, seed: int | str, index: int = 0) -> Batch:
    """Batch ``index`` of the endless stream that ``task`` and ``seed`` name; use different seeds for training and test."""
    name = "|".join(map(str, ("mqar", VERSION, *astuple(task), rows, seed, index)))
    random = np.random.RandomState(np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint32))
    half, n, u = task.vocab_size // 2, task.pairs, task.updates
    keys, values = 1 + _draw(random, rows, half - 1, n), half + _draw(random, rows, half, n + u)
    spare = half - 1 - n  # keys that are not used
    place = (random.random_sample((rows, task.length)) * (task.vocab_size - 1 - 2 * n - u)).astype(int)
    filling = np.where(
        place < spare,
        np.take_along_axis(keys, n + np.minimum(place, spare - 1), 1),
        np.take_along_axis(values, n + u + np.maximum(place - spare, 0), 1),
    )
    keys, first, second = keys[:, :n], values[:, :n], values[:, n : n + u]

    gaps = np.arange((task.length - task.context) // 2)
    # The places of the n smallest exponential variables of rate p(g): drawn without replacement in proportion to p.
    waiting = -np.log1p(-random.random_sample((rows, len(gaps)))) * (gaps + 1.0) ** (1 - GAP_POWER)
    questions = task.context + 2 * waiting.argsort(1)[:, :n]
    updated = _draw(random, rows, n, u)[:, :u]  # which pairs return, in this order

    row = np.arange(rows)[:, None]
    ids = filling if task.fill == "random" else np.full((rows, task.length), EMPTY)
    ids[:, 0 : 2 * n : 2], ids[:, 1 : 2 * n : 2] = keys, first
    ids[:, 2 * n : task.context : 2], ids[:, 2 * n + 1 : task.context : 2] = keys[row, updated], second
    ids[row, questions] = keys

    gold, old = first.copy(), np.full((rows, n), IGNORED)
    written = np.broadcast_to(2 * np.arange(n), (rows, n)).copy()
    old[row, updated], gold[row, updated] = first[row, updated], second
    written[row, updated] = 2 * (n + np.arange(u))
    labels, stale, distance = (np.full((rows, task.length), IGNORED) for _ in range(3))
    labels[row, questions], stale[row, questions], distance[row, questions] = gold, old, questions - written
    return Batch(ids, labels, stale, distance)


def _draw(random: np.random.RandomState, rows: int, size: int, count: int) -> np.ndarray:
    """Rows of range(size) whose first ``count`` entries are drawn without replacement; the others are what was not drawn.

    Fisher and Yates' shuffle, stopped after ``count``: with a vocabulary of thousands, sorting would cost more than a
    training step.
    """
    order, row = np.tile(np.arange(size), (rows, 1)), np.arange(rows)
    uniform = random.random_sample((rows, count))
    for i in range(count):
        j = i + (uniform[:, i] * (size - i)).astype(int)
        order[row, i], order[row, j] = order[row, j], order[row, i]
    return order


def data_sha256(task: Task, rows: int, seed: int | str, batches: int = 1) -> str:
    """Digest of the first batches, as little-endian int64: two runs with the same digest saw the same data."""
    digest = hashlib.sha256()
    for index in range(batches):
        one = batch(task, rows, seed, index)
        for array in (one.ids, one.labels, one.stale):
            digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()


__all__ = ["Batch", "Task", "batch", "data_sha256"]
