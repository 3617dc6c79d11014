"""Padding and packing, as recurrent layers need them.

Attention can mask a padded token; a recurrence cannot un-see one, and a short convolution mixes neighbours. So a row with
padding is compacted before every recurrent layer: its valid tokens move to the front, in order, and the rest neither
decays nor writes; afterwards every output returns to its column. Packed documents are marked by ``reset``, True where one
begins. Both are worked out once per forward, from whatever the caller sent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers.masking_utils import create_causal_mask
from transformers.utils.import_utils import is_tracing


class TokenLayout(NamedTuple):
    """Where the tokens of a [B, T] batch are. ``None`` in a field: nothing of the kind."""

    valid: torch.Tensor | None = None  # [B, T] bool, after compaction: ones, then zeros
    lengths: torch.Tensor | None = None  # [B] valid tokens
    counts: torch.Tensor | None = None  # [B, T] valid tokens up to and with a column, before compaction
    order: torch.Tensor | None = None  # [B, T] the column that goes to place j; None: already compact
    places: torch.Tensor | None = None  # [B, T] the inverse of order
    reset: torch.Tensor | None = None  # [B, T] bool, first token of a packed document
    since: torch.Tensor | None = None  # [B, T] int32, tokens of the same document before a token
    boundaries: torch.Tensor | None = None  # [documents + 1], where documents begin in the flattened batch; on CUDA

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> TokenLayout:
        """From a padding mask [B, T], nonzero at real tokens."""
        mask = mask.bool()
        counts = mask.cumsum(1)
        lengths = counts[:, -1]
        valid = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
        if not is_tracing(mask) and torch.equal(valid, mask):  # right padding only
            return cls(valid, lengths, counts)
        order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        return cls(valid, lengths, counts, order, order.argsort(dim=1))

    def packed(self, reset: torch.Tensor | None) -> TokenLayout:
        """The same with documents that begin where ``reset`` [B, T] is True."""
        if reset is None:
            return self
        boundaries, since = None, _tokens_since(reset)
        if reset.is_cuda and not is_tracing(reset):
            starts = (since == 0).flatten().nonzero().flatten()
            boundaries = torch.cat((starts, starts.new_tensor([reset.numel()])))
        return self._replace(reset=reset, since=since.int(), boundaries=boundaries)

    def compact(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, C] with the valid tokens of every row in front."""
        return x if self.order is None else x.gather(1, self.order[:, :, None].expand(-1, -1, x.shape[2]))

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of ``compact``."""
        return x if self.places is None else x.gather(1, self.places[:, :, None].expand(-1, -1, x.shape[2]))


def repeat_last_valid(hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, T, C] in which a padded column holds what the last valid token before it holds.

    So ``logits[:, -1]`` is the next token's distribution whatever the padding, and right-padded prompts can be
    generated from. Columns before a row's first token keep what they have, which means nothing.
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    index = torch.where(mask.bool(), columns, 0).cummax(1).values
    return hidden_states.gather(1, index[:, :, None].expand_as(hidden_states))


def read_padding(
    mask: torch.Tensor, batch_size: int, tokens: int, past: int | torch.Tensor | None
) -> torch.Tensor | None:
    """The caller's 2-D attention mask [B, past + T] as bool, or None where it masks nothing.

    Raises:
        ValueError: another shape.
    """
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {mask.dim()} dimensions (shape {tuple(mask.shape)}): a recurrent layer can only honour a "
            "2-D padding mask [batch, past + new tokens], with 1 at tokens and 0 at padding."
        )
    if mask.shape[0] != batch_size:
        raise ValueError(f"attention_mask has {mask.shape[0]} rows, but the batch has {batch_size}.")
    if isinstance(past, int) and mask.shape[1] != past + tokens:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, but there are {past} tokens in the cache and {tokens} new ones: "
            f"it must cover all {past + tokens}."
        )
    mask = mask.bool()
    return None if not is_tracing(mask) and bool(mask.all()) else mask


def read_packing(
    position_ids: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    batch_size: int,
    tokens: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Document starts from any of the three things that collators send; all that are there must agree.

    Args:
        position_ids: [1 or B, T]; a document begins wherever the step is not 1.
        cu_seq_lens: [documents + 1], cumulative lengths over the one row of a flattened batch.
        seq_idx: [1 or B, T], a number per document.

    Returns:
        reset [B, T] bool, or None for one document per row; position_ids, made from the other two if absent.

    Raises:
        ValueError: malformed or contradicting sources.
    """
    found = {}
    if position_ids is not None and tokens > 1:
        position_ids = position_ids.expand(batch_size, -1)
        found["position_ids"] = _starts(position_ids.diff(dim=1) != 1)
    if seq_idx is not None:
        if seq_idx.shape[-1] != tokens:
            raise ValueError(f"seq_idx has {seq_idx.shape[-1]} columns, but the row has {tokens} tokens.")
        found["seq_idx"] = _starts(seq_idx.expand(batch_size, -1).diff(dim=1) != 0)
    if cu_seq_lens is not None:
        found["cu_seq_lens_q"] = _starts_from_lengths(cu_seq_lens, batch_size, tokens)
    if not found:
        return None, position_ids
    (name, reset), *others = found.items()
    tracing = is_tracing(reset)
    for other_name, other in others:
        if not tracing and not torch.equal(reset, other):
            raise ValueError(
                f"{name} and {other_name} disagree about where packed documents begin: send one of them, or make them agree."
            )
    if not tracing and not reset[:, 1:].any():
        return None, position_ids
    if position_ids is None:
        position_ids = _tokens_since(reset)
    return reset, position_ids


def _tokens_since(reset: torch.Tensor) -> torch.Tensor:
    """[B, T] how many tokens of the same document lie before each; column 0 begins one."""
    columns = torch.arange(reset.shape[1], device=reset.device)
    return columns - torch.where(reset, columns, 0).cummax(1).values


def _starts(changes: torch.Tensor) -> torch.Tensor:
    """[B, T] True at column 0 and after every change [B, T - 1]."""
    return torch.cat((torch.ones_like(changes[:, :1]), changes), 1)


def _starts_from_lengths(cu_seq_lens: torch.Tensor, batch_size: int, tokens: int) -> torch.Tensor:
    if batch_size != 1:
        raise ValueError(f"cu_seq_lens_q describes one flattened row, but the batch has {batch_size} rows.")
    if not is_tracing(cu_seq_lens):
        ends = cu_seq_lens.tolist()
        if ends[0] != 0 or ends[-1] != tokens or any(b <= a for a, b in zip(ends, ends[1:])):
            raise ValueError(f"cu_seq_lens_q={ends} must rise from 0 to the row's {tokens} tokens.")
    reset = torch.zeros(1, tokens, dtype=torch.bool, device=cu_seq_lens.device)
    return reset.index_fill(1, cu_seq_lens[:-1].long(), True)


def create_masks(
    config, inputs_embeds, attention_mask, past_key_values, position_ids
) -> dict[str, torch.Tensor | None]:
    """The masks of all layers, by ``mask_key``; made by the model, or ahead of it by generate() for static caches.

    Args:
        inputs_embeds: [B, T, *], for its shape, dtype and device.
        attention_mask: 2-D padding mask [B, past + T], 4-D mask (attention layers only), or None.
        position_ids: [1 or B, T]; without mask and cache, packed documents are read from it.
    """
    masks = {}
    for layer, kind in zip(config.per_layer_config, config.layer_types):
        key = mask_key(layer, kind)
        if key in masks or kind == "linear_attention":
            continue
        window = None if layer.sliding_window is None else _window(layer.sliding_window, attention_mask)
        masks[key] = create_causal_mask(
            config, inputs_embeds, attention_mask, past_key_values, position_ids=position_ids, and_mask_function=window
        )
    if attention_mask is not None and attention_mask.dim() == 2:
        tokens = inputs_embeds.shape[1]
        padding = read_padding(attention_mask, *inputs_embeds.shape[:2], past=None)
        padding = None if padding is None else padding[:, -tokens:]
        # A single token is padding only inside a chunked prefill. Decoding must see no mask, or it would be compiled twice.
        masks["linear_attention"] = None if padding is None or (tokens == 1 and padding.all()) else padding
    return masks


def mask_key(layer_config, kind: str) -> str:
    """Name of the mask that a layer uses: attention layers with a sliding window have one of their own."""
    if kind == "full_attention" and layer_config.sliding_window is not None:
        return f"sliding_attention_{layer_config.sliding_window}"
    return kind


def _window(width: int, mask: torch.Tensor | None):
    """Query i sees the last ``width`` tokens up to itself. Padding does not count, so tokens are ranked by the mask."""
    if mask is None or mask.dim() != 2:
        return lambda batch, head, query, key: key > query - width
    ranks = mask.long().cumsum(1)
    last = mask.shape[1] - 1  # static caches have more columns, all of them in the future
    return lambda batch, head, query, key: ranks[batch, key.clamp(max=last)] > ranks[batch, query] - width


def refuse_restarts(position_ids: torch.Tensor, mask: torch.Tensor | None, batch_size: int) -> None:
    """Packing together with a cache or with padding is not supported: raise where positions restart inside a row.

    Args:
        position_ids: [1 or B, T].
        mask: [B, T] bool, None for no padding (then any step but 1 is a restart, as for the attention layers).
    """
    if position_ids.shape[1] < 2 or is_tracing(position_ids):
        return
    steps = position_ids.expand(batch_size, -1)
    if mask is None:
        restarts = (steps.diff(dim=1) != 1).any()
        what = "with a cache: pass use_cache=False and no past_key_values"
    else:
        layout = TokenLayout.from_mask(mask)
        steps = layout.compact(steps[:, :, None])[:, :, 0]
        restarts = ((steps.diff(dim=1) <= 0) & layout.valid[:, 1:]).any()
        what = "in a padded row: leave attention_mask away, or put one document in a row"
    if restarts:
        raise ValueError(f"position_ids restart inside a row: packed documents do not go {what}.")


__all__ = [
    "TokenLayout",
    "create_masks",
    "mask_key",
    "read_packing",
    "read_padding",
    "refuse_restarts",
    "repeat_last_valid",
]
