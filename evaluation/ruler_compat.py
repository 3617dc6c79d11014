"""RULER as lm-eval has it, defects included, so that a number can be set beside those that others publish.

Every cell is run as if it were the only one of an ``lm_eval --tasks TASK --metadata '{"max_seq_lengths": [LENGTH]}'``: lm-eval
draws its samples from a global random state, so data and score depend on what else is in a run. Prompts, answers, cuts and
scores are lm-eval's own. What is kept out is what has no result: lengths at which its generators never return (VT and CWE),
and the -1 that it records for lengths that were not asked for. A cell that lm-eval cannot make is named with its reason.

    python -m evaluation.ruler runs/demo --compat lm-eval --lengths 1024 --samples 20 --tasks niah_single_1 ruler_fwe

Known defects of its tasks (lm-eval 0.4.13): the solved example of CWE is counted but never shown; QA averages over aliases;
FWE leaves no room for its answer, so its list is cut; prompts at short lengths may be half empty; documents and coded words
are shuffled with one fixed seed. The essay tasks and QA download their texts. Needs ``pip install 'lm_eval[ruler]'``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

from .lm import run_harness
from .ruler import Cell
from .ruler_tasks import TASKS
from .scoring import Encoder

STOCK = {task: f"ruler/{task.removeprefix('ruler_')}.yaml" for task in TASKS}
# A least length is the longest of so many draws, and a few tokens more: names and words differ in length by few.
DRAWS, MARGIN = 200, 8
SEEDS = {"random": 0, "numpy": 1234}  # simple_evaluate's defaults


def describe() -> dict:
    """What stands in the protocol in place of our generator's version."""
    return {
        "lm_eval": version("lm_eval"),
        "wonderwords": _version_or_none("wonderwords"),
        "seeds": SEEDS,
    }


def _version_or_none(package: str) -> str | None:
    with contextlib.suppress(ImportError):
        return version(package)
    return None


class Compat:
    """lm-eval's RULER cells of one model.

    Args:
        source: where lm-eval can load the tokenizer from, by path or repo id.
    """

    def __init__(self, model, tokenizer, source: str, batch_size: int):
        self.model, self.tokenizer, self.source, self.batch_size = model, tokenizer, source, batch_size
        self._unreachable: dict[str, str] = {}  # task: why its texts cannot be had; asking again takes half a minute

    def cell(self, task: str, length: int, count: int) -> Cell:
        """The first ``count`` of lm-eval's 500 samples of a task at a length."""
        cell = Cell(task, length, refused=self._unreachable.get(task, ""))
        if cell.refused:
            return cell
        overrides = {"task": task, "metadata": {"tokenizer": self.source, "max_seq_lengths": [length]}}
        options = dict(max_length=length, batch_size=self.batch_size, limit=count)
        try:
            with _undisturbed(), _no_download_of_punkt():
                cell.refused = _why_it_would_not_return(self.tokenizer, task, length) or ""
                if cell.refused:
                    return cell
                samples = run_harness(self.model, self.tokenizer, STOCK[task], overrides, **options)
        except (ImportError, LookupError, OSError, ValueError) as error:
            first_line = str(error).strip().partition("\n")[0]
            cell.refused = f"lm-eval: {type(error).__name__}: {first_line[:200]}"
            if isinstance(error, OSError):
                self._unreachable[task] = cell.refused
            return cell
        cell.scores["official"] = [float(sample[str(length)]) for sample in samples]
        lines = "\n".join(json.dumps(sample["doc"], sort_keys=True, ensure_ascii=False) for sample in samples)
        cell.data_sha256 = hashlib.sha256(lines.encode()).hexdigest()[:12]
        return cell


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Global random states as they were, lm-eval's module-level ones as in a new process, and its prints unseen."""
    states = random.getstate(), np.random.get_state()
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)  # shuffles with a generator of its own, made when imported
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _no_download_of_punkt() -> Iterator[None]:
    """lm-eval's needle tasks look for nltk's punkt_tab when imported and download it, without a time-out, if it is missing.

    An empty folder of that name lets the tasks that split no sentences run without network; the essay tasks then say that
    they lack it.
    """
    try:
        import nltk
    except ImportError:  # the task that needs it will say so
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizers", "punkt_tab").mkdir(parents=True)
        nltk.data.path.append(folder)  # after the real ones
        try:
            yield
        finally:
            nltk.data.path.remove(folder)


def _why_it_would_not_return(tokenizer, task: str, length: int) -> str | None:
    """lm-eval repeats a sample until it fits; where its least one does not, it does so for ever. None if it returns."""
    encode = Encoder(tokenizer)

    def most(make) -> int:
        return MARGIN + max(len(encode(make())) for _ in range(DRAWS))

    if task == "ruler_vt":
        from lm_eval.tasks.ruler import vt_utils

        example = most(lambda: vt_utils.generate_input_output(5, 1, 4, is_icl=True)[0]) + 30
        if example > 500:
            return (
                f"lm-eval would not return: its example takes {example} tokens with this tokenizer, and it allows 500."
            )
        random.seed(SEEDS["random"])
        np.random.seed(SEEDS["numpy"])
        [shown] = vt_utils.sys_vartrack_w_noise_random(tokenizer, num_samples=1, max_seq_length=500, incremental=5)
        needed = len(encode(f"{shown['input']} {' '.join(shown['outputs'])}\n\n")) + 30
        needed += most(lambda: vt_utils.generate_input_output(10, 1, 4)[0])
    elif task == "ruler_cwe":
        from lm_eval.tasks.ruler import cwe_utils

        def least() -> str:
            example, text, answer = cwe_utils.generate_input_output(10, length)
            return f"{example}\n{text} {' '.join(f'{i}. {word}' for i, word in enumerate(answer, 1))}"

        needed = 120 + most(least)
    elif task == "ruler_fwe":
        needed = 200  # 4 coded words
    else:
        return None
    return f"lm-eval would not return, or ask for nothing: it needs {needed} tokens." if needed > length else None
