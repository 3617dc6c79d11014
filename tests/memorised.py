"""Tiny models that were taught a few answers, so that an evaluation can be seen to find what is there and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from evaluation.scoring import Encoder, pad
from hybrid_models import HybridLinearForCausalLM

from .common import tiny_config
from .small_tokenizer import word_pieces

# One linear, one hybrid and one all-attention architecture.
VOCAB = 1024
KINDS = {"linear": ("hgrn", "pure"), "hybrid": ("gla", "3-1"), "attention": ("gated_delta_net", "full")}


def build(kind: str) -> HybridLinearForCausalLM:
    """An untrained model of the small tokenizer's vocabulary."""
    torch.manual_seed(0)
    mixer, level = KINDS[kind]
    fields = dict(vocab_size=len(word_pieces(VOCAB)), hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    if level == "full":
        fields["num_hidden_layers"] = 2
    return HybridLinearForCausalLM(tiny_config(mixer, level, bos_token_id=1, eos_token_id=2, **fields))


def teach(model, *groups: Sequence[tuple[str, str]], steps: int = 150) -> float:
    """Train on the answers of (context, answer) texts; returns the last loss in nats per token.

    Every step takes all of them; texts of like length belong in one group, since a group is one batch. By 150 steps the
    loss is at 0.002 whatever the rounding; at 110 it still falls, and rounding moves it between 0.01 and 0.1.
    """
    batches = [_batch(pairs) for pairs in groups]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    model.train()
    for _ in range(steps):
        losses = [model(**batch).loss for batch in batches]
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    return max(loss.item() for loss in losses)


def _batch(pairs: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    encode = Encoder(word_pieces(VOCAB))
    rows = []
    for context, answer in pairs:
        ids, spans = encode.spans([context, answer])
        rows.append(([*ids, encode.tokenizer.eos_token_id], spans[1][0]))
    ids, mask = pad([ids for ids, _ in rows], "right", "cpu")
    columns = torch.arange(ids.shape[1])
    answered = (columns >= torch.tensor([[start] for _, start in rows])) & mask.bool()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~answered, -100)}


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    word_pieces(VOCAB).save_pretrained(folder)
    return folder
