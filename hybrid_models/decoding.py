"""What generate() needs beyond the library's own loop: exact positions, the right cache, and clear refusals.

``HybridGenerationMixin`` goes before ``GenerationMixin`` in the model's bases and only overrides hooks of it.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache
from transformers.generation import GenerationMode
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from .cache import adopt, stop_recording
from .decode_step import MAX_EOS, prefilling, session, why_not
from .kernels import ENVIRONMENT_VARIABLE, forced_backend
from .layout import create_masks

_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
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

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        user_cache = model_kwargs.get("past_key_values")
        if "offloaded" in (generation_config.cache_implementation or "") and self.device.type == "cpu":
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} moves keys and values from an accelerator "
                "to the CPU, and this model is on the CPU: leave cache_implementation away."
            )
        if generation_mode == GenerationMode.ASSISTED_GENERATION and self._attention_weights_are_not_computed():
            generation_config.output_attentions = False  # the library's loop would fail on the empty tuple
        if generation_config.cache_implementation == "quantized" and user_cache is None:
            model_kwargs["past_key_values"] = quantized_cache(self.config, generation_config.cache_config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        adopt(cache, self.config)
        # A cache returned by assisted decoding still records; inside assisted decoding it must go on recording.
        if user_cache is not None and not generation_config.is_assistant:
            stop_recording(cache)

    def _attention_weights_are_not_computed(self) -> bool:
        return "full_attention" not in self.config.layer_types or self.config._attn_implementation != "eager"

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
        with prefilling():
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        """Greedy search and sampling: the library's loop, with the decode step captured where it can be."""
        run = super()._sample
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
        reason = self._why_not_captured(input_ids, generation_config, model_kwargs)
        if reason is not None:
            if forced_backend() == "triton":
                raise RuntimeError(f"{ENVIRONMENT_VARIABLE}=triton, but the decode step cannot be captured: {reason}.")
            return run(*arguments, **model_kwargs)
        cache = model_kwargs["past_key_values"]
        keep = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        columns = self._columns(input_ids, generation_config, model_kwargs)
        probabilities = Probabilities(logits_processor) if generation_config.do_sample else None
        alone = probabilities.on_device if generation_config.do_sample else not logits_processor
        alone = alone and not (generation_config.return_dict_in_generate or streamer or synced_gpus)
        alone = alone and _only_length_and_eos(stopping_criteria)
        with session(self, cache, input_ids.shape[0], columns, keep_cache=keep) as current:
            if not alone:
                return run(*arguments, **model_kwargs)
            return self._decode_on_device(current, input_ids, generation_config, probabilities, keep, model_kwargs)

    def _decode_on_device(self, current, input_ids, generation_config, probabilities, keep, model_kwargs):
        """Greedy search or sampling without a word from the host between tokens."""
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs["position_ids"]
        outputs = self._prefill(input_ids, generation_config, model_kwargs)
        scores = outputs.logits[:, -1].to(torch.float32, copy=True)
        limit = generation_config.max_length - input_ids.shape[1]
        positions = (positions[:, -1] + 1).expand(input_ids.shape[0])
        eos, pad = generation_config._eos_token_tensor, generation_config._pad_token_tensor
        tokens = current.decode(scores, positions, mask, limit, eos, pad, probabilities, keep)
        return torch.cat((input_ids, tokens), 1)

    @staticmethod
    def _columns(input_ids, generation_config, model_kwargs) -> int:
        """The most that the cache may come to hold. max_length counts input_ids, of which the cache may hold the first."""
        embeds = model_kwargs.get("inputs_embeds")
        past = model_kwargs["past_key_values"].get_seq_length()
        more = 0 if embeds is None else embeds.shape[1]
        return generation_config.max_length + more + (0 if input_ids.shape[1] > past else past)

    def _why_not_captured(self, input_ids, generation_config, model_kwargs) -> str | None:
        """Why this call of generate() does not take the captured step, or None if it does."""
        cache = model_kwargs.get("past_key_values")
        if forced_backend() == "torch":
            return f"{ENVIRONMENT_VARIABLE}=torch"
        if generation_config.output_attentions or generation_config.output_hidden_states:
            return "attentions or hidden states are asked for"
        if generation_config.is_assistant:
            return "this model drafts for another one"
        if (
            not isinstance(cache, DynamicCache)
            or cache.offloading
            or len(cache.layers) != self.config.num_hidden_layers
        ):
            return "it works on plain dynamic caches"
        if any(getattr(layer, "record_past", False) for layer in cache.layers):
            return "the cache records tokens for rollback"
        if generation_config.max_length is None:
            return "there is no maximum length"
        return why_not(self, input_ids.shape[0], self._columns(input_ids, generation_config, model_kwargs))

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


class Probabilities:
    """What sampling draws from: the library's warpers and a softmax, for scores [B, V].

    Attributes:
        on_device: whether all of the warpers are such as look at the scores of one step alone and need no host.
        key: the same for the same warpers, where they are such.
    """

    def __init__(self, warpers):
        self.warpers = list(warpers)
        self.on_device = all(type(warper) in _WARPERS for warper in self.warpers)
        # Of these classes alone: what somebody else's warper is made of need not be told apart, or even be readable.
        known = self.warpers if self.on_device else []
        self.key = tuple((type(warper).__name__, *sorted(vars(warper).items())) for warper in known)

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores.softmax(-1)


def _only_length_and_eos(stopping_criteria) -> bool:
    """Whether a loop that looks at nothing but length and end-of-sequence ids stops where these say."""
    for criterion in stopping_criteria:
        if isinstance(criterion, EosTokenCriteria):
            if criterion.eos_token_id.numel() > MAX_EOS:
                return False
        elif not isinstance(criterion, MaxLengthCriteria):
            return False
    return True


def quantized_cache(config, cache_config: dict | None) -> Cache:
    """Quantised keys and values at attention layers; recurrent states stay in float32, they are small and reused.

    Args:
        cache_config: arguments of transformers' QuantizedCache; ``backend`` is quanto (its default), hqq or fp8.
    """
    options = dict(cache_config or {})
    options.pop("config", None)
    cache = DynamicCache(config=config)
    attention = [i for i, layer in enumerate(cache.layers) if config.layer_types[i] == "full_attention"]
    if not attention:
        return cache
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
