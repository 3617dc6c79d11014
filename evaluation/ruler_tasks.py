"""The 13 tasks of RULER, generated so that a score means something at short lengths too.

A sample depends on its task, length, index and seed and on nothing else: not on which other tasks are run, nor on Python's
version (only ``Random.random()`` is drawn from). Its prompt is filled to at least 90 % of the length with room for the
answer, its gold answer is in the prompt at a depth drawn per sample, and where a task cannot be built in so few tokens it is
refused, not replaced by an easier one. The words are RULER's (``ruler_prompts.py``), the generators are our own.

    >>> from evaluation.ruler_tasks import Ruler
    >>> ruler = Ruler(tokenizer)                                                          # doctest: +SKIP
    >>> sample = ruler.sample("niah_single_1", 1024, 0)                                   # doctest: +SKIP
    >>> sample.gold, sample.tokens + sample.budget, sample.depth                          # doctest: +SKIP
    (('8392518',), 1020, (0.41,))

What is free to change here: a task is one row of TASKS. Whoever changes what a sample holds must raise VERSION.
Definitions: Hsieh et al. 2024 (arXiv 2404.06654), appendix B.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import ruler_prompts as prompts
from .ruler_data import (
    QUESTIONS,
    Draw,
    Question,
    first_words,
    haystack_sentences,
    inserted,
    noise_lines,
    read_questions,
    vocabulary,
)
from .scoring import Encoder

VERSION = 1
FILL = 0.9  # of the length, at least; prompt, BOS and answer budget together
VT_EXAMPLE_TOKENS = 500


class CannotBuild(ValueError):
    """A task does not exist at this length, or with these data; the message says what it needs."""


@dataclass(frozen=True)
class Sample:
    """One question."""

    task: str
    length: int
    index: int
    prompt: str  # ends where the answer begins, without a space
    gold: tuple[str, ...]
    budget: int  # tokens that an answer may take
    tokens: int  # of the prompt, with BOS
    depth: tuple[float, ...]  # of every gold answer's place in the prompt: 0 beginning, 1 end
    candidates: tuple[str, ...]  # everything in the prompt that has an answer's shape, in order of appearance
    data: str = ""  # which question of a data set

    def to_json(self) -> str:
        return json.dumps(self.__dict__, sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Content:
    """A prompt of a certain size, before it is known whether it fits."""

    prompt: str
    gold: tuple[str, ...]
    places: tuple[str, ...]  # texts whose position is the gold's depth
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class Draft:
    """A sample with its size open: ``build(units, filler)`` is its content with so many units of haystack.

    ``filler`` counts smaller pieces, for tasks whose unit is a large part of a short prompt.
    """

    build: Callable[[int, int], Content]
    least: int = 0
    most: int = 1_000_000
    has_filler: bool = False
    data: str = ""


@dataclass(frozen=True)
class Task:
    """How a task is drawn, how long its answers may be, and how they are compared."""

    draft: Callable[..., Draft]
    options: dict
    budget: int
    shape: str  # of an answer, see ruler_scoring.SHAPES
    match: str = "all"  # every gold answer counts, or "any" one of them
    ordered: bool = False  # the prompt fixes order and form of the answers, so that they can be teacher-forced


class Ruler:
    """The generators for one tokenizer and one choice of data.

    Args:
        tokenizer: of the model; a prompt's size is counted in its tokens.
        haystack: text file for the essay tasks. Default: the shipped one.
        questions: path of the data set for every QA task in QUESTIONS that is to be built.
        seed: of all samples.
    """

    def __init__(self, tokenizer, haystack: str | Path | None = None, questions: dict | None = None, seed: int = 0):
        self.encode, self.seed = Encoder(tokenizer), seed
        self.haystack = haystack_sentences(haystack)
        self.questions = {task: read_questions(task, path) for task, path in (questions or {}).items()}

    def missing(self, task: str) -> str | None:
        """What a task still needs before it can be built at any length; None if nothing."""
        if task not in TASKS:
            raise ValueError(f"task={task!r} is not known: use some of {', '.join(TASKS)}.")
        return f"needs {QUESTIONS[task].file}" if task in QUESTIONS and task not in self.questions else None

    def describe(self) -> dict:
        """What decides a sample beside its task, length and index."""
        words = hashlib.sha256(" ".join(word for words in vocabulary() for word in words).encode())
        return {
            "generator": VERSION,
            "prompts_sha256": prompts.digest(),
            "words_sha256": words.hexdigest()[:12],
            "haystack_sha256": hashlib.sha256("\n".join(self.haystack).encode()).hexdigest()[:12],
            "questions_sha256": {task: data.sha256 for task, data in self.questions.items()},
            "seed": self.seed,
        }

    def samples(self, task: str, length: int, count: int) -> list[Sample]:
        """The first ``count`` samples of a task at a length, in order.

        Raises:
            CannotBuild: some of them do not exist; the whole cell is then refused.
        """
        return list(itertools.islice(self.stream(task, length), count))

    def stream(self, task: str, length: int) -> Iterator[Sample]:
        """Samples 0, 1, 2, ...; for a QA task of the questions, in order, whose gold paragraphs fit."""
        if missing := self.missing(task):
            raise CannotBuild(f"{task}: {missing}")
        if task not in QUESTIONS:
            index = 0
            while True:
                yield self._sample(task, length, index, str(index))
                index += 1
        index, reason = 0, "there are none"
        for question in self.questions[task].questions:
            try:
                sample = self._sample(task, length, index, question.id, question)
            except CannotBuild as error:
                reason = str(error)
                continue
            yield sample
            index += 1
        raise CannotBuild(
            f"{task} at {length}: only {index} questions of {QUESTIONS[task].file} fit; the last: {reason}"
        )

    def sample(self, task: str, length: int, index: int) -> Sample:
        """Sample ``index`` alone: the same as ``samples(...)[index]``."""
        if task in QUESTIONS:
            return self.samples(task, length, index + 1)[index]
        return self._sample(task, length, index, str(index))

    def _sample(self, name: str, length: int, index: int, key: str, question: Question | None = None) -> Sample:
        task = TASKS[name]
        draw = Draw(f"{VERSION}|{name}|{length}|{key}|{self.seed}")
        extra = {} if question is None else {"question": question}
        draft = task.draft(self, draw, length, **task.options, **extra)
        content, tokens = self._fill(draft, length - task.budget, f"{name} at {length}", task.budget)
        answer = content.gold if task.match == "all" else (min(content.gold, key=len),)
        if (needed := len(self.encode(" " + " ".join(answer), bos=False))) > task.budget:
            raise CannotBuild(
                f"{name}: with this tokenizer the answer takes {needed} tokens, RULER allows {task.budget}."
            )
        if tokens + task.budget < FILL * length:
            raise CannotBuild(
                f"{name} at {length}: fills only {tokens + task.budget} of {length} tokens, since the data for it are used up."
            )
        depth = tuple(round(content.prompt.rindex(place) / len(content.prompt), 4) for place in content.places)
        return Sample(
            name,
            length,
            index,
            content.prompt,
            content.gold,
            task.budget,
            tokens,
            depth,
            content.candidates,
            draft.data,
        )

    def _fill(self, draft: Draft, limit: int, what: str, budget: int) -> tuple[Content, int]:
        """The largest content of at most ``limit`` tokens, to a hundredth, and its tokens."""
        units, content, tokens = self._search(lambda n: draft.build(n, 0), limit, draft.least, draft.most, what, budget)
        if draft.has_filler and limit - tokens > limit / 100:
            _, content, tokens = self._search(lambda n: draft.build(units, n), limit, 0, limit, what, budget)
        return content, tokens

    def _search(self, build, limit: int, least: int, most: int, what: str, budget: int) -> tuple[int, Content, int]:
        """The number of units that fill ``limit`` tokens; a prompt is built and tokenized some five times.

        A binary search whose first guesses are interpolated, since a prompt's tokens are nearly linear in its units.
        """
        low, content = least, build(least)
        low_tokens = tokens = len(self.encode(content.prompt))
        if tokens > limit:
            raise CannotBuild(f"{what}: the least prompt and the answer take {tokens + budget} tokens.")
        high, guess, last = min(most, 4 * limit) + 1, least + 16, (least, tokens)
        for attempt in itertools.count():
            if high - low <= 1 or limit - low_tokens <= limit / 100:
                return low, content, low_tokens
            guess = min(max(guess, low + 1), high - 1)
            tried = build(guess)
            tokens = len(self.encode(tried.prompt))
            if tokens <= limit:
                low, content, low_tokens = guess, tried, tokens
            else:
                high = guess
            slope = (tokens - last[1]) / (guess - last[0])
            last = (guess, tokens)
            if attempt < 6 and slope > 0:
                guess = min(guess + round((limit * 0.996 - tokens) / slope), 16 * guess)
                guess += guess == last[0]
            else:
                guess = (low + high) // 2


# --------------------------------------------------------------------------------------------------------------- needles


def _values(draw: Draw, kind: str, without: set[str]) -> Iterator[str]:
    """Endless distinct keys or values of a kind; ``without`` grows by them."""
    adjectives, nouns = vocabulary()
    while True:
        if kind == "numbers":
            value = str(1_000_000 + draw.below(9_000_000))
        elif kind == "uuids":
            value = draw.uuid()
        else:
            value = f"{draw.choice(adjectives)}-{draw.choice(nouns)}"
        if value not in without:
            without.add(value)
            yield value


def niah(ruler: Ruler, draw: Draw, length: int, haystack: str, key="words", value="numbers", keys=1, values=1, asked=1):
    """Needle in a haystack: ``keys`` keys with ``values`` values each, of which ``asked`` keys are asked for.

    The haystack is lines of noise, sentences of prose, or other needles; a unit of it is a sentence, a word or a needle.
    """
    used: set[str] = set()
    new_key, new_value = _values(draw, key, used), _values(draw, value, used)
    pairs = [(k, [next(new_value) for _ in range(values)]) for k in (next(new_key) for _ in range(keys))]
    lines = [prompts.NEEDLE.format(kind=value, key=k, value=v) for k, vs in pairs for v in vs]
    lines = draw.shuffled(lines)
    depths = sorted(draw.shuffled([i / 39 for i in range(40)])[: len(lines)])  # RULER's 40 depths
    chosen = draw.shuffled(pairs)[:asked]
    gold = tuple(v for _, vs in chosen for v in vs)
    names = [k for k, _ in chosen]
    query = names[0] if asked == 1 else ", ".join(names[:-1]) + ", and " + names[-1]
    plural = len(gold) > 1
    template, kind = prompts.NIAH + prompts.NIAH_PREFIX, value
    if not plural:
        template, kind = prompts.singular(prompts.NIAH) + prompts.singular(prompts.NIAH_PREFIX), value[:-1]
    start = draw.below(len(ruler.haystack))
    others = draw.lazily(lambda d=draw.fork("others"): (next(_values(d, key, used)), next(_values(d, value, used))))

    def build(units: int, filler: int) -> Content:
        if haystack == "needles":
            context = [prompts.NEEDLE.format(kind=value, key=k, value=v) for k, v in others[:units]]
            separator = "\n"
        elif haystack == "noise":
            context, separator = noise_lines(units), "\n"
        else:
            context, separator = first_words(ruler.haystack, start, units), " "
        context = inserted(context, lines, depths)
        if haystack == "needles":
            context = noise_lines(filler) + context
        prompt = template.format(type_needle_v=kind, context=separator.join(context), query=query)
        candidates = [v for _, vs in pairs for v in vs] + [
            v for _, v in others[: units if haystack == "needles" else 0]
        ]
        places = tuple(prompts.NEEDLE.format(kind=value, key=k, value=v) for k, vs in chosen for v in vs)
        return Content(prompt, gold, places, by_appearance(candidates, prompt))

    return Draft(build, has_filler=haystack == "needles")


def by_appearance(candidates: list[str], prompt: str) -> tuple[str, ...]:
    return tuple(sorted(candidates, key=prompt.index))


# ------------------------------------------------------------------------------------- tracking, counting, reading


def variable_tracking(ruler: Ruler, draw: Draw, length: int) -> Draft:
    """A chain of five variables of one value among noise; before it a solved example of at most 500 tokens."""
    example = _chain(draw.fork("example"), 3)
    limit = VT_EXAMPLE_TOKENS - TASKS["ruler_vt"].budget
    solved = ruler._search(lambda n: example(n, ""), limit, 0, 1_000, f"ruler_vt at {length}, its example", 0)[1]
    before = f"{solved.prompt} {' '.join(solved.gold)}\n\n"
    chain = _chain(draw, 5)
    return Draft(lambda units, _: chain(units, before))


def _chain(draw: Draw, letters: int) -> Callable[[int, str], Content]:
    names = []
    while len(names) < 5:
        name = draw.letters(letters).upper()
        names += [name] * (name not in names)
    value = 10_000 + draw.below(90_000)
    lines = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in zip(names, names[1:]))]
    depths = sorted(draw.random() for _ in lines)
    text = prompts.VT + prompts.VT_PREFIX.rstrip()

    def build(units: int, before: str) -> Content:
        context = "\n".join(inserted(noise_lines(units), lines, depths))
        prompt = before + text.format(context=context, query=value, num_v=len(names))
        return Content(prompt, tuple(names), tuple(lines), tuple(names))

    return build


def common_words(ruler: Ruler, draw: Draw, length: int) -> Draft:
    """Ten words occur more often than the others of a numbered list; a solved example stands before it.

    The ratio of occurrences is RULER's: 6 to 1 below 4096 tokens, 30 to 3 from there on, which are two tasks.
    """
    common, rare, size, example_common, example_rare = (6, 1, 20, 3, 1) if length < 4096 else (30, 3, 40, 10, 3)
    pool = draw.shuffled(countable_words())
    gold, shown, others = pool[:10], pool[10 : 10 + size], pool[10 + size :]
    example_list = draw.shuffled(shown[:10] * example_common + shown[10:] * example_rare)
    text = prompts.CWE + prompts.CWE_PREFIX
    example = f"{text.format(context=numbered(example_list))} {numbered(shown[:10])}\n"
    order = draw.lazily(draw.fork("order").random)

    def build(units: int, _: int) -> Content:
        words = gold * common + [word for word in others[:units] for _ in range(rare)]
        words = [word for _, word in sorted(zip(order[: len(words)], words))]
        prompt = example + text.format(context=numbered(words))
        places = tuple(f" {word} " for word in gold)
        return Content(prompt, tuple(gold), places, tuple(dict.fromkeys(words)))

    return Draft(build, least=10, most=len(others))


@cache
def countable_words() -> list[str]:
    """Words none of which is part of another, so that finding one in an answer is no accident."""
    adjectives, nouns = vocabulary()
    words = sorted({*adjectives, *nouns})
    return [word for word in words if not any(word in other for other in words if other != word)]


def numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def frequent_words(ruler: Ruler, draw: Draw, length: int) -> Draft:
    """Coded words of which rank r occurs n / (r^2 zeta(2)) times; the first is noise, ranks 2 to 4 are asked for."""
    vocabulary_size = length // 50
    if vocabulary_size < 4:
        raise CannotBuild(
            f"ruler_fwe at {length}: one coded word for 50 tokens makes fewer than four, so it needs 200 tokens."
        )
    words: list[str] = ["..."]
    while len(words) < vocabulary_size:
        word = draw.letters(6)
        words += [word] * (word not in words)
    order = draw.lazily(draw.fork("order").random)
    text = prompts.FWE + prompts.FWE_PREFIX

    def build(units: int, _: int) -> Content:
        counts = [int(units / (rank**2 * math.pi**2 / 6)) for rank in range(1, vocabulary_size + 1)]
        coded = [word for word, count in zip(words, counts) for _ in range(count)]
        coded = [word for _, word in sorted(zip(order[: len(coded)], coded))]
        prompt = text.format(context=" ".join(coded))
        gold = tuple(words[1:4])
        return Content(prompt, gold, gold, tuple(word for word in dict.fromkeys(coded) if word != "..."))

    return Draft(build, least=73)  # from here on, whatever the number, ranks 4 and 5 differ


def reading(ruler: Ruler, draw: Draw, length: int, data: str, question: Question) -> Draft:
    """A question over numbered documents: the gold ones, others near them, then any; the last other is cut to fit."""
    documents = ruler.questions[data].documents
    near = draw.shuffled(question.near)
    known = {*question.gold, *near}
    far = draw.fork("far")

    def another() -> int:
        while (found := far.below(len(documents))) in known:
            pass
        known.add(found)
        return found

    most = len(documents) - len(question.gold)
    others = draw.lazily(another)
    order = draw.lazily(draw.fork("order").random)
    text = prompts.QA + prompts.QA_PREFIX

    def build(units: int, filler: int) -> Content:
        extra = [documents[i] for i in near[:units]] + [documents[i] for i in others[: max(0, units - len(near))]]
        if filler and units < most:
            following = near[units] if units < len(near) else others[: units - len(near) + 1][-1]
            extra.append(" ".join(documents[following].split()[:filler]))
        shown = [documents[i] for i in question.gold] + extra
        shown = [document for _, document in sorted(zip(order[: len(shown)], shown))]
        context = "\n\n".join(prompts.DOCUMENT.format(i=i, document=document) for i, document in enumerate(shown, 1))
        prompt = text.format(context=context, query=question.text)
        return Content(prompt, question.answers, tuple(documents[i] for i in question.gold), ())

    return Draft(build, most=most, has_filler=True, data=question.id)


def _needle(haystack: str, ordered: bool = True, **options) -> Task:
    return Task(niah, {"haystack": haystack, **options}, 128, options.get("value", "numbers"), ordered=ordered)


TASKS: dict[str, Task] = {
    "niah_single_1": _needle("noise"),
    "niah_single_2": _needle("prose"),
    "niah_single_3": _needle("prose", value="uuids"),
    "niah_multikey_1": _needle("prose", keys=4),
    "niah_multikey_2": _needle("needles"),
    "niah_multikey_3": _needle("needles", key="uuids", value="uuids"),
    "niah_multivalue": _needle("prose", values=4, ordered=False),
    "niah_multiquery": _needle("prose", keys=4, asked=4),
    "ruler_vt": Task(variable_tracking, {}, 30, "variables"),
    "ruler_cwe": Task(common_words, {}, 120, "words"),
    "ruler_fwe": Task(frequent_words, {}, 50, "coded"),
    "ruler_qa_squad": Task(reading, {"data": "ruler_qa_squad"}, 32, "text", match="any"),
    "ruler_qa_hotpot": Task(reading, {"data": "ruler_qa_hotpot"}, 32, "text", match="any"),
}
