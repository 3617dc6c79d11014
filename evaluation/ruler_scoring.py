"""How an answer to a RULER task is judged, and what can be won without the skill that a task is named after.

``official`` is RULER's own rule: a gold answer counts where it is a substring of what was written. It lets a model win that
prints everything it has seen, so two figures stand beside it: ``strict``, which takes the first answers of the right shape
and no more of them than there are gold ones, and ``shortcut``, the official score of just printing what has that shape.

    >>> from evaluation.ruler_scoring import official_score, strict_score
    >>> everything = "7654321, 1234567"
    >>> official_score(("1234567",), "all", everything), strict_score("numbers", ("1234567",), "all", everything)
    (1.0, 0.0)
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence

from .ruler_tasks import TASKS, Sample
from .scoring import Continuation, Encoder, mean_interval

# What an answer looks like, so that words around it do not count for or against it.
SHAPES = {
    "numbers": re.compile(r"(?<!\d)\d{7}(?!\d)"),
    "uuids": re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    "variables": re.compile(r"(?<![A-Za-z])[A-Z]{5}(?![A-Za-z])"),
    "words": re.compile(r"(?<![A-Za-z])[a-z]+(?![A-Za-z])"),
    "coded": re.compile(r"(?<![A-Za-z])[a-z]{6}(?![A-Za-z])"),
}


def official_score(gold: Sequence[str], match: str, text: str) -> float:
    """RULER's score of one answer in [0, 1]: the share of gold answers in it, or whether any is; case does not matter."""
    text = re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip().lower()
    found = [answer.lower() in text for answer in gold]
    return float(any(found)) if match == "any" else sum(found) / len(found)


def strict_score(shape: str, gold: Sequence[str], match: str, text: str) -> float:
    """The share of gold answers among the first ``len(gold)`` distinct answers of the right shape.

    Text in no shape (the QA tasks): whether the first line is one of the gold answers, as SQuAD normalises it.
    """
    if shape == "text":
        line = _normalised(text.strip().split("\n")[0])
        return float(any(line == _normalised(answer) for answer in gold))
    given = list(dict.fromkeys(SHAPES[shape].findall(text.lower() if shape == "uuids" else text)))[: len(gold)]
    return len(set(given) & set(gold)) / len(gold)


def _normalised(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, articles or double spaces (Rajpurkar et al. 2016)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def scores(sample: Sample, text: str) -> dict[str, float]:
    """Both scores of an answer to a sample."""
    task = TASKS[sample.task]
    return {
        "official": official_score(sample.gold, task.match, text),
        "strict": strict_score(task.shape, sample.gold, task.match, text),
    }


def shortcut_answer(sample: Sample, encode: Encoder) -> str:
    """Everything in the prompt that has an answer's shape, in order of appearance, up to the budget."""
    ids = encode(" " + " ".join(sample.candidates), bos=False)
    return encode.decode(ids[: sample.budget])


def forced_request(sample: Sample, encode: Encoder) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Teacher forcing: context and continuation in token ids, and where in the continuation every gold answer is.

    Raises:
        ValueError: the task leaves order or form of its answers open, or a token reaches over an answer's border.
    """
    if not TASKS[sample.task].ordered:
        raise ValueError(f"task={sample.task!r} leaves the order of its answers open: score it by generation.")
    parts, answers = [sample.prompt], []
    for i, gold in enumerate(sample.gold):
        parts += [""] if i == 0 else ["," if i < len(sample.gold) - 1 else ", and"]
        answers.append(len(parts))
        parts.append(" " + gold)
    ids, spans = encode.spans(parts)
    start = spans[0][1]
    return ids[:start], ids[start:], [(spans[i][0] - start, spans[i][1] - start) for i in answers]


def forced_scores(continuation: Continuation, spans: Sequence[tuple[int, int]]) -> dict[str, float]:
    """``forced``: the share of gold answers of which every token is the model's first choice, those before it given;
    ``gold_nats``: negative log-likelihood per token of the gold answers."""
    right = [all(continuation.token_greedy[a:b]) for a, b in spans]
    nats = [-x for a, b in spans for x in continuation.token_nats[a:b]]
    return {"forced": sum(right) / len(right), "gold_nats": sum(nats) / len(nats)}


def average_interval(cells: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % interval of the plain mean over tasks, each with its own samples, from the tasks' own intervals.

    Distances from the means add up in squares (MOVER, Zou and Donner 2008).
    """
    means = [sum(values) / len(values) for values in cells]
    bounds = [mean_interval(values) for values in cells]
    mean = sum(means) / len(means)
    below = math.sqrt(sum((m - low) ** 2 for m, (low, _) in zip(means, bounds))) / len(means)
    above = math.sqrt(sum((high - m) ** 2 for m, (_, high) in zip(means, bounds))) / len(means)
    return mean - below, mean + above
