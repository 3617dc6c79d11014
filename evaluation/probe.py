"""A model under test: what it is measured against, and the few ways of running it.

The yardstick is the plain forward over a whole sequence, alone in its batch, without cache or padding (``Probe.full``). It
is the only one, so no two clever paths can agree with each other and be wrong together. generate() is held to it too: the
raw logits of every step are compared with the full forward on what was written, and a greedy token must be the best one
there. Comparing logits rather than tokens makes ties harmless and shows deviations that happen not to flip a token.

    >>> from evaluation.certify import build
    >>> from evaluation.probe import Probe
    >>> probe = Probe(build("tiny-RetNet-hybrid-3-1"))
    >>> probe.generated(probe.rows(9, 4), side="right") < 1e-10      # two prompts, the shorter one padded on the right
    True
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

NEW_TOKENS = 6  # that generate() is asked for; every one is compared


class Check(NamedTuple):
    """One comparison."""

    name: str
    deviation: float | None  # None: not run
    note: str = ""  # why it was not run
    exact: bool = False  # the deviation must be zero, whatever the tolerance


def deviation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| / max(1, std(expected)); infinite where shapes differ or anything is not finite.

    generate() hands out logits and scores in float32: where that is narrower than ``expected``, a rounding is not counted.
    """
    if actual.shape != expected.shape or not actual.isfinite().all() or not expected.isfinite().all():
        return float("inf")
    if not expected.numel():
        return 0.0
    difference = (actual.double() - expected.double()).abs()
    if actual.dtype.itemsize < expected.dtype.itemsize:
        difference = (difference - torch.finfo(actual.dtype).eps * expected.abs()).clamp(min=0)
    scale = 1.0 if expected.numel() == 1 else max(1.0, float(expected.double().std()))
    return float(difference.max()) / scale


class Probe:
    """A model, its yardstick, and the few ways of running it that the properties are made of. Changes nothing in it."""

    def __init__(self, model, seed: int = 0):
        self.model, self.config, self.device = model, model.config, model.device
        self.recurrent = "linear_attention" in self.config.layer_types
        self._generator = torch.Generator().manual_seed(seed)

    def tokens(self, *shape: int) -> torch.Tensor:
        """Random ids, none of them 0, which stands for padding."""
        return torch.randint(1, self.config.vocab_size, shape, generator=self._generator).to(self.device)

    def rows(self, *lengths: int) -> list[torch.Tensor]:
        return [self.tokens(length) for length in lengths]

    def sizes(self, total: int, largest: int) -> list[int]:
        """``total`` in random parts of 1 to ``largest``."""
        parts = []
        while total:
            parts.append(min(total, int(torch.randint(1, largest + 1, (), generator=self._generator))))
            total -= parts[-1]
        return parts

    def pad(self, rows: list[torch.Tensor], side: str, width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and mask [B, T] with padding on the ``left``, on the ``right``, in the ``middle`` (the last column is a
        token) or ``anywhere``."""
        width = max([width, *map(len, rows)])
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids)
        for b, row in enumerate(rows):
            n = len(row)
            if side in ("left", "right"):
                columns = torch.arange(n) + (width - n if side == "left" else 0)
            elif side == "middle":
                some = torch.randperm(width - 1, generator=self._generator)[: n - 1]
                columns = torch.cat((some, torch.tensor([width - 1]))).sort().values
            else:
                columns = torch.randperm(width, generator=self._generator)[:n].sort().values
            ids[b, columns.to(self.device)], mask[b, columns.to(self.device)] = row, 1
        return ids, mask

    @torch.no_grad()
    def full(self, ids: torch.Tensor, **kwargs) -> torch.Tensor:
        """Logits of one plain forward; [B, T] -> [B, T, V], or [T] -> [T, V]."""
        if ids.dim() == 1:
            return self.full(ids[None], **kwargs)[0]
        return self.model(ids, use_cache=False, **kwargs).logits

    @torch.no_grad()
    def feed(self, ids: torch.Tensor, sizes, cache, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of ids [B, T], fed in parts through ``cache``. mask [B, past + T]."""
        past, logits = 0 if mask is None else mask.shape[1] - ids.shape[1], []
        for end, size in zip(itertools.accumulate(sizes), sizes):
            covered = None if mask is None else mask[:, : past + end]
            logits.append(self.model(ids[:, end - size : end], attention_mask=covered, past_key_values=cache).logits)
        return torch.cat(logits, 1)

    def rows_deviation(self, logits: torch.Tensor, mask: torch.Tensor, rows: list[torch.Tensor]) -> float:
        """Logits [B, T, V] at the tokens that mask [B, T] marks, against every row alone."""
        return max(deviation(seen[m.bool()], self.full(row)) for seen, m, row in zip(logits, mask, rows, strict=True))

    def generate(self, rows: list[torch.Tensor], side: str = "left", past: torch.Tensor | None = None, **kwargs):
        """generate() on padded rows; greedy unless told otherwise. ``past``: mask and ids [2, B, P] of an earlier turn."""
        ids, mask = self.pad(rows, side)
        if past is not None:
            mask, ids = torch.cat((past, torch.stack((mask, ids))), 2)
        options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True)
        return self.model.generate(ids, attention_mask=mask, **{**options, **kwargs})

    def written_deviation(self, rows: list[torch.Tensor], out, greedy: bool = True) -> float:
        """What generate() wrote after ``rows``, against the full forward: its logits, and its choices if greedy."""
        logits = torch.stack(out.logits, 1)
        written = out.sequences[:, -logits.shape[1] :]
        if getattr(out, "beam_indices", None) is not None:  # the beam that each token of a sequence was chosen in
            logits = logits.transpose(0, 1).take_along_dim(out.beam_indices.t()[:, :, None].long(), 1).transpose(0, 1)
        worst = 0.0
        for row, new, seen in zip(rows, written, logits, strict=True):
            expected = self.full(torch.cat((row, new)))[len(row) - 1 : -1]
            worst = max(worst, deviation(seen, expected))
            if greedy:  # by how much the chosen token falls short of the best
                chosen = expected.gather(1, new[:, None])[:, 0]
                worst = max(worst, deviation(chosen.to(seen.dtype), expected.max(1).values))
        return worst

    def generated(self, rows: list[torch.Tensor], side: str = "left", **kwargs) -> float:
        return self.written_deviation(rows, self.generate(rows, side, **kwargs))

    def gradients(self, weights: torch.Tensor, *inputs: dict) -> dict[str, torch.Tensor]:
        """Of sum(weights * logits) by every parameter. weights [T, V]; the rows' tokens are laid one after the other."""
        names, parameters = zip(*((n, p) for n, p in self.model.named_parameters() if p.requires_grad))
        logits = torch.cat([self.model(use_cache=False, **kwargs).logits.flatten(0, 1) for kwargs in inputs])
        return dict(zip(names, torch.autograd.grad((weights * logits).sum(), parameters, materialize_grads=True)))


def gradient_deviation(actual: dict, expected: dict) -> float:
    """Relative to the largest entry of each parameter's gradient, but to no less than a tenth of the model's largest.

    The gradient of a decay rate is a sum over all tokens in which most cancels, though its rounding does not.
    """
    largest = {name: float(gradient.abs().max()) for name, gradient in expected.items()}
    floor = 0.1 * max(largest.values())
    return max(deviation(actual[n] / max(largest[n], floor), g / max(largest[n], floor)) for n, g in expected.items())


def randomize(model, seed: int = 0):
    """Make every parameter random, so that each shows in the logits. In place; returns the model.

    The function should be well-conditioned, or float32 could not tell a fault from its own rounding. So a layer adds less
    the more layers there are, as in GPT-2. And keys resemble queries: a document's first output is (q . k) v, of which
    the norm that follows leaves v / |v| and the sign of q . k, which near zero is decided by rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            query = parameters.get(name.replace("linear_attn.k_proj", "linear_attn.q_proj"))
            if "embed_tokens" in name or "lower_bounds" in name:
                parameter.copy_(noise)
            elif parameter.dim() > 1:
                gain = 1.0 if "lm_head" in name else 0.5
                if "o_proj" in name or "down_proj" in name:
                    gain *= (2 * model.config.num_hidden_layers) ** -0.5
                parameter.copy_(noise * gain * parameter[0].numel() ** -0.5)
                if "conv1d" in name:
                    parameter[..., -1] += 1
                elif query is not parameter and query.shape == parameter.shape:
                    parameter.mul_(0.6).add_(query, alpha=0.8)
            else:  # norms, biases, A_log, dt_bias: about what they are
                parameter.add_(noise * (0.3 if "norm" in name else 1.0))
    return model
