"""Text through a causal model: log-likelihoods of given continuations, and greedy generation, in batches.

Every language-model number of this folder comes from two calls, so there are two things to trust, and both are tested
against one row at a time: ``loglikelihoods`` pads on the right and ``generate`` on the left, always with the mask, which is
how a recurrent state stays clean. Nothing is ever cut: what does not fit ``max_length`` is an error.

    >>> from evaluation.scoring import Encoder, generate, load, loglikelihoods          # doctest: +SKIP
    >>> model, tokenizer = load("runs/demo")
    >>> encode = Encoder(tokenizer)
    >>> [answer] = loglikelihoods(model, [(encode("def f("), encode("self):", bos=False))])
    >>> answer.nats, answer.greedy
    (-1.93, False)
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hybrid_models  # noqa: F401, registers the model with the Auto classes
from hybrid_models import kernels, results

Z = 1.959964  # two-sided 95 %
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Continuation(NamedTuple):
    """How a model sees one continuation; the lists hold one entry per token of it."""

    token_nats: list[float]  # log-probability of every token, given all before it
    token_greedy: list[bool]  # whether it is the most probable one there

    @property
    def nats(self) -> float:
        """log p(continuation | context), natural logarithm."""
        return sum(self.token_nats)

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding would write exactly this."""
        return all(self.token_greedy)


class Encoder:
    """Text to token ids in one fixed way: BOS in front where the tokenizer's own default is so, nothing at the end.

    Harnesses differ by a BOS more often than by anything else, so results carry ``describe()``.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        default = tokenizer("")["input_ids"]
        self.bos = default[0] if default and default[0] == tokenizer.bos_token_id else None

    def __call__(self, text: str, bos: bool = True) -> list[int]:
        """The ids of ``text``; ``bos=False`` for what continues another text."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [self.bos, *ids] if bos and self.bos is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def spans(self, parts: Sequence[str]) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of the joined ``parts`` and where each part's tokens are among them, [first, last).

        Raises:
            ValueError: a token reaches over the border of two parts, so that neither can be scored alone.
        """
        text, ids, borders = "", [], [0]
        for part in parts:
            text += part
            before, ids = ids, self(text)
            if ids[: len(before)] != before:
                raise ValueError(
                    f"part={part[:40]!r} does not begin at a token's border after {text[-len(part) - 20 : -len(part)]!r}: "
                    "this tokenizer merges them; score by generation instead."
                )
            borders.append(len(ids))
        return ids, list(zip(borders, borders[1:]))

    def describe(self) -> dict:
        """What a protocol must say about the tokenizer: digest of vocabulary and rules, and the BOS it puts in front."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return {"tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest()[:12], "bos": self.bos}


def load(
    target: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
):
    """Model in eval mode and tokenizer of a checkpoint directory or repo id.

    Args:
        tokenizer: where the tokenizer is, if not with the model.

    Raises:
        ValueError: there is no tokenizer, or it knows ids that the model does not.
        OSError: there is no model there.
    """
    if not Path(target).is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(target)):
        raise OSError(f"{target} is neither a directory nor a repo id: give a checkpoint's directory.")
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).to(device).eval()
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer or target)
        encoded = loaded("The quick brown fox.")["input_ids"]
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{tokenizer or target} holds no usable tokenizer ({error}): say where one is.") from error
    if (
        not encoded
        or max(encoded) >= model.config.vocab_size
        or len(loaded) > model.get_input_embeddings().num_embeddings
    ):
        raise ValueError(
            f"tokenizer of {len(loaded)} tokens, but the model has {model.config.vocab_size}: it is not this model's."
        )
    return model, loaded


def protocol_of(model, encoder: Encoder) -> dict:
    """What the model and the tokenizer bring to a result's protocol: dtype, device type, back end, tokenizer, BOS."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device_type": model.device.type,
        "backend": kernels.forced_backend() or "automatic",
        "attention": model.config._attn_implementation,
        **encoder.describe(),
    }


@torch.inference_mode()
def loglikelihoods(
    model,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: str | None = None,
) -> list[Continuation]:
    """Log-probability of every continuation given its context, in the order of ``requests``.

    Args:
        requests: pairs of context and continuation, token ids, neither empty.
        max_length: refuse what is longer, in tokens of context and continuation together.
        progress: label of a progress bar.

    Raises:
        ValueError: an empty part, or a request longer than ``max_length``.
    """
    for context, continuation in requests:
        if not context or not continuation:
            raise ValueError("a context or a continuation without tokens: put a BOS or EOS token in front.")
    _refuse_longer([len(a) + len(b) for a, b in requests], max_length)
    keeps_columns = "logits_to_keep" in inspect.signature(model.forward).parameters
    found: list[Continuation | None] = [None] * len(requests)
    for batch in _batches([len(a) + len(b) for a, b in requests], batch_size, progress):
        rows = [[*requests[i][0], *requests[i][1]][:-1] for i in batch]  # the last token is only predicted
        ids, mask = pad(rows, "right", model.device)
        starts = [len(requests[i][0]) - 1 for i in batch]  # the column that predicts a continuation's first token
        first = min(starts)
        columns = torch.arange(first, ids.shape[1], device=model.device)
        options = {"logits_to_keep": columns} if keeps_columns else {}
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
        if not keeps_columns:
            logits = logits[:, first:]
        for row, i, start in zip(logits, batch, starts, strict=True):
            targets = torch.tensor(requests[i][1], device=model.device)
            row = row[start - first :][: len(targets)]
            row = row if row.dtype == torch.float64 else row.float()
            nats = row.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            found[i] = Continuation(nats.tolist(), (row.argmax(-1) == targets).tolist())
    return found


@torch.inference_mode()
def generate(
    model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int = 8,
    eos: int | None = None,
    max_length: int | None = None,
    progress: str | None = None,
) -> list[list[int]]:
    """What greedy decoding writes after every prompt, up to ``eos`` or ``max_new_tokens``, in the order of ``prompts``.

    Args:
        prompts: token ids, none empty.
        eos: id that ends a text, not part of the result; None: nothing does.
        max_length: refuse what would be longer, in tokens of prompt and text together.
        progress: label of a progress bar.

    Raises:
        ValueError: an empty prompt, or one too long for ``max_length``.
    """
    if not all(map(len, prompts)):
        raise ValueError("a prompt without tokens: put a BOS or EOS token in front.")
    _refuse_longer([len(prompt) + max_new_tokens for prompt in prompts], max_length)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=eos,
        pad_token_id=0,  # masked, so any id will do
    )
    own, model.generation_config = model.generation_config, GenerationConfig()  # or its defaults would fill the gaps
    texts: list[list[int]] = [[]] * len(prompts)
    try:
        for batch in _batches([len(prompt) for prompt in prompts], batch_size, progress):
            ids, mask = pad([prompts[i] for i in batch], "left", model.device)
            written = model.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
            for i, row in zip(batch, written, strict=True):
                texts[i] = row[: row.index(eos)] if eos is not None and eos in row else row
    finally:
        model.generation_config = own
    return texts


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of scores in [0, 1], one per independent sample (Wilson 1927).

    Exact in kind for scores of 0 and 1; with partial credit the variance is smaller and the interval errs on the wide side.
    Unlike a bootstrap it does not shrink to nothing where every score is the same.
    """
    n, p = len(values), sum(values) / len(values)
    middle, spread = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, (middle - spread) / (1 + Z**2 / n)), min(1.0, (middle + spread) / (1 + Z**2 / n))


def pad(rows: Sequence[Sequence[int]], side: str, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T], int64, of rows of unequal length; ``side`` is "left" or "right"."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[b, columns] = torch.tensor(row)
        mask[b, columns] = 1
    return ids.to(device), mask.to(device)


def comma_separated(text: str) -> list[int]:
    """ "64,128" -> [64, 128], for argparse."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 512,1024") from None


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model is run, and where the result goes."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default %(default)s")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here %(default)s"
    )
    parser.add_argument(
        "--output", default=str(results.FOLDER), metavar="DIR", help="result files; default %(default)s"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every command on a checkpoint's texts shares."""
    parser.add_argument("--tokenizer", metavar="PATH", help="if it is not with the model")
    parser.add_argument("--batch-size", type=int, default=8, help="changes the time only (default %(default)s)")
    add_device_arguments(parser)


def _batches(lengths: Sequence[int], batch_size: int, progress: str | None) -> Iterator[list[int]]:
    """Indices in batches of like length, the longest first, so that memory runs out at once or not at all."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    with tqdm(total=len(order), desc=progress, disable=progress is None, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            yield (batch := order[start : start + batch_size])
            bar.update(len(batch))


def _refuse_longer(lengths: Sequence[int], max_length: int | None) -> None:
    if max_length is not None and max(lengths, default=0) > max_length:
        raise ValueError(
            f"max_length={max_length}, but a request takes {max(lengths)} tokens, and nothing is cut here: raise max_length "
            "or leave the item out."
        )


__all__ = [
    "DTYPES",
    "Continuation",
    "Encoder",
    "add_device_arguments",
    "add_model_arguments",
    "comma_separated",
    "generate",
    "load",
    "loglikelihoods",
    "mean_interval",
    "pad",
    "protocol_of",
]
