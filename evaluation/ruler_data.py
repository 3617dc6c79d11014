"""What RULER's generators draw from: stable random numbers, words, haystacks of prose and of noise, question data sets.

Words and haystack are shipped (``data/ruler.md`` says where they come from); a haystack of one's own is any text file. The
question data sets are not shipped: SQuAD's dev-v2.0.json and HotpotQA's hotpot_dev_distractor_v1.json are read from
wherever they lie.

    >>> from evaluation.ruler_data import Draw
    >>> Draw("any text").shuffled(["a", "b", "c"]) == Draw("any text").shuffled(["a", "b", "c"])
    True
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .ruler_prompts import NOISE

DATA = Path(__file__).parent / "data"


class Draw:
    """Random choices that depend on a text alone. Only ``Random.random()`` is used: all that Python keeps stable."""

    def __init__(self, key: str):
        self._key = key
        self.random = random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest())).random

    def fork(self, name: str) -> Draw:
        """An independent stream, so that how much is drawn from one does not move another."""
        return Draw(f"{self._key}|{name}")

    def below(self, n: int) -> int:
        """One of 0 .. n-1."""
        return int(self.random() * n)

    def choice(self, items: Sequence):
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence) -> list:
        """A new list in random order (Fisher-Yates)."""
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items

    def letters(self, count: int) -> str:
        return "".join(self.choice(string.ascii_lowercase) for _ in range(count))

    def uuid(self) -> str:
        """A random UUID, version 4."""
        return str(uuid.UUID(bytes=bytes(self.below(256) for _ in range(16)), version=4))

    @staticmethod
    def lazily(make: Callable) -> LazyList:
        return LazyList(make)


class LazyList:
    """A list that grows when a longer part of it is asked for; what it holds does not depend on when that was."""

    def __init__(self, make: Callable):
        self._make, self._items = make, []

    def __getitem__(self, part: slice) -> list:
        while len(self._items) < part.stop:
            self._items.append(self._make())
        return self._items[part]


@cache
def vocabulary() -> tuple[list[str], list[str]]:
    """Adjectives and nouns, sorted, no word twice."""
    adjectives, nouns = (DATA / "ruler_words.txt").read_text().split("\n\n")
    return adjectives.split(), nouns.split()


def haystack_sentences(path: str | Path | None = None) -> list[str]:
    """The sentences of a text, white space made single; None: the shipped haystack.

    Raises:
        ValueError: fewer than 40 sentences, which is how many depths there are for a needle.
    """
    path = DATA / "ruler_haystack.txt" if path is None else Path(path)
    text = " ".join(path.read_text(encoding="utf-8").split())
    sentences = [part for part in re.split(r"(?<=[.!?]) ", text) if part]
    if len(sentences) < 40:
        raise ValueError(f"haystack={str(path)!r} holds {len(sentences)} sentences: give prose of at least 40.")
    return sentences


def noise_lines(sentences: int) -> list[str]:
    """RULER's noise, five sentences a line, the last line perhaps shorter."""
    whole = [" ".join(NOISE)] * (sentences // len(NOISE))
    rest = NOISE[: sentences % len(NOISE)]
    return whole + ([" ".join(rest)] if rest else [])


def first_words(sentences: list[str], start: int, count: int) -> list[str]:
    """Sentences from ``start`` on, around the end if need be, cut after ``count`` words."""
    found = []
    while count > 0:
        words = sentences[start % len(sentences)].split()
        found.append(" ".join(words[:count]))
        count -= len(words)
        start += 1
    return found


def inserted(context: list[str], lines: list[str], depths: list[float]) -> list[str]:
    """``context`` with every line put in at its depth, a fraction of the context; depths ascend."""
    result, taken = [], 0
    for line, depth in zip(lines, depths, strict=True):
        place = round(depth * len(context))
        result += [*context[taken:place], line]
        taken = place
    return result + context[taken:]


class Question(NamedTuple):
    """A question, every accepted answer, and the documents for it, as indices."""

    id: str
    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...]  # of the same article, or chosen to distract


@dataclass(frozen=True)
class QuestionData:
    """A data set in the form that the QA tasks read."""

    documents: list[str]
    questions: list[Question]
    sha256: str


class Source(NamedTuple):
    """Where a QA task's questions come from."""

    file: str
    read: Callable[[object], tuple[list[str], list[Question]]]


def _squad(data) -> tuple[list[str], list[Question]]:
    """SQuAD 2.0: answerable questions, in order; near documents are the article's other paragraphs."""
    articles = [article["paragraphs"] for article in data["data"]]
    documents = sorted({paragraph["context"] for paragraphs in articles for paragraph in paragraphs})
    number = {document: i for i, document in enumerate(documents)}
    questions = []
    for paragraphs in articles:
        article = dict.fromkeys(number[paragraph["context"]] for paragraph in paragraphs)
        for paragraph in paragraphs:
            own = number[paragraph["context"]]
            near = tuple(i for i in article if i != own)
            for qa in paragraph["qas"]:
                if not qa.get("is_impossible", False):
                    answers = tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))
                    questions.append(Question(str(qa["id"]), qa["question"], answers, (own,), near))
    return documents, questions


def _hotpot(data) -> tuple[list[str], list[Question]]:
    """HotpotQA, distractor setting: gold documents are those of the supporting facts.

    Left out are questions whose answer does not stand in them, yes and no above all: those are guessed, not found.
    """
    texts = [[(title, f"{title}\n{''.join(sentences)}") for title, sentences in item["context"]] for item in data]
    documents = sorted({text for item in texts for _, text in item})
    number = {document: i for i, document in enumerate(documents)}
    questions = []
    for item, context in zip(data, texts):
        supporting = {title for title, _ in item["supporting_facts"]}
        gold = tuple(dict.fromkeys(number[text] for title, text in context if title in supporting))
        near = tuple(dict.fromkeys(number[text] for title, text in context if title not in supporting))
        if any(item["answer"].lower() in documents[i].lower() for i in gold):
            questions.append(Question(str(item["_id"]), item["question"], (item["answer"],), gold, near))
    return documents, questions


QUESTIONS = {
    "ruler_qa_squad": Source("squad dev-v2.0.json", _squad),
    "ruler_qa_hotpot": Source("hotpot_dev_distractor_v1.json", _hotpot),
}


def read_questions(task: str, path: str | Path) -> QuestionData:
    """The data set of a QA task.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not in that data set's format.
    """
    source, content = QUESTIONS[task], Path(path).read_bytes()
    try:
        documents, questions = source.read(json.loads(content))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not in the format of {source.file}: {type(error).__name__} {error}") from error
    return QuestionData(documents, questions, hashlib.sha256(content).hexdigest()[:12])
