"""What generate() needs beyond the library's own loop: exact positions, the right cache, and clear refusals.

``HybridGenerationMixin`` goes before ``GenerationMixin`` in the model's bases and only overrides hooks of it.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from .cache import adopt, stop_recording
from .layout import create_masks

_NO_CONTINUOUS_BATCHING = (
    "Continuous batching (generate_batch, cache_implementation='paged') pages key/value blocks and has no place for a "
    "recurrent state. Use generate() on a padded batch: rows are independent of padding and of each other."
)


class HybridGenerationMixin:
    """Hooks of transformers' GenerationMixin for models with recurrent layers."""

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # The first place where generate() asks a user's cache for its length.
        adopt(model_kwargs.get("past_key_values"), self.config)
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        # A running count, also over padding on the right: the next position is the last one plus one.
        return (mask.long().cumsum(-1) - 1).clamp(min=0)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        user_cache = model_kwargs.get("past_key_values")
        if generation_config.cache_implementation == "quantized" and user_cache is None:
            model_kwargs["past_key_values"] = quantized_cache(self.config, generation_config.cache_config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        adopt(cache, self.config)
        # A cache returned by assisted decoding still records; inside assisted decoding it must go on recording.
        if user_cache is not None and not generation_config.is_assistant:
            stop_recording(cache)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        width = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", input_ids.shape[1])
        past = 0 if cache is None else int(cache.get_seq_length())
        if past and model_kwargs.get("inputs_embeds") is None and width == input_ids.shape[1] <= past:
            raise ValueError(
                f"The cache holds {past} tokens, but input_ids has {input_ids.shape[1]}: pass the whole sequence (what the "
                f"cache has seen, then the new tokens), or the new tokens with an attention_mask that covers both."
            )
        if generation_config.prefill_chunk_size is not None and mask is not None and not mask[:, -1].all():
            raise ValueError(
                "prefill_chunk_size does not go with padding on the right: a whole chunk of a row could be padding. Pad on "
                "the left, or leave prefill_chunk_size away."
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs
    ) -> dict[str, torch.Tensor | None]:
        """Masks for static caches, made outside the compiled step."""
        return create_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids)

    def generate_batch(self, *args, **kwargs):
        """Refused for models with recurrent layers; an all-attention model takes the library's."""
        self._refuse_paging()
        return super().generate_batch(*args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused for models with recurrent layers; an all-attention model takes the library's."""
        self._refuse_paging()
        return super().init_continuous_batching(*args, **kwargs)

    def _refuse_paging(self) -> None:
        if "linear_attention" in self.config.layer_types:
            raise NotImplementedError(_NO_CONTINUOUS_BATCHING)


def quantized_cache(config, cache_config: dict | None) -> Cache:
    """Quantised keys and values at attention layers; recurrent states stay in float32, they are small and reused.

    Args:
        cache_config: arguments of transformers' QuantizedCache; ``backend`` is quanto (its default), hqq or fp8.
    """
    options = dict(cache_config or {})
    options.pop("config", None)
    cache = DynamicCache(config=config)
    attention = [i for i, layer in enumerate(cache.layers) if config.layer_types[i] == "full_attention"]
    if attention:
        only_attention = _AttentionOnly(config, len(attention))
        quantized = QuantizedCache(backend=options.pop("backend", "quanto"), config=only_attention, **options)
        for i, layer in zip(attention, quantized.layers):
            cache.layers[i] = layer
    return Cache(layers=cache.layers)


class _AttentionOnly:
    """What QuantizedCache reads of a configuration, for the attention layers alone."""

    def __init__(self, config, count: int):
        self.layer_types = ["full_attention"] * count
        self.num_hidden_layers = count
        self.per_layer_config = [config] * count

    def get_text_config(self, decoder: bool = True):
        return self


__all__ = ["HybridGenerationMixin"]
