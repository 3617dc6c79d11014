"""The model: a pre-norm decoder whose layers are linear attention or full attention, as ``config.layer_types`` says.

    >>> import torch
    >>> from hybrid_models import HybridLinearConfig, HybridLinearForCausalLM
    >>> config = HybridLinearConfig(mixer="gla", ratio="3-1", hidden_size=64, num_hidden_layers=3, vocab_size=100)
    >>> model = HybridLinearForCausalLM(config)
    >>> model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None).shape
    torch.Size([1, 7])

What the linear layers compute stands in ``mixers`` (projections, gates) and ``recurrence`` (the law), what they remember
in ``cache``, how padding and packing reach them in ``layout``; full attention stands in ``attention``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .attention import HybridLinearAttention, RotaryPositions
from .cache import adopt, refuse_other_sizes, sizes_per_sequence
from .checks import check_ids
from .configuration_hybrid_linear import HybridLinearConfig
from .decode_step import active_session
from .decoding import HybridGenerationMixin
from .dense import FSDPModule, dense, is_untouched
from .fused import OPERATIONS as FUSED
from .kernels import operations
from .layout import (
    TokenLayout,
    create_masks,
    mask_key,
    read_packing,
    read_padding,
    refuse_restarts,
    repeat_last_valid,
)
from .loading import StrictLoading
from .loss import causal_lm_loss, check_targets, head_cross_entropy, shift, why_not_head
from .mixers import MIXER_CLASSES, GatedDeltaNet, HybridLinearRMSNorm, KeepsFloat32
from .pointwise import full_precision

RETNET_ROPE_THETA = 10000.0

# What peft adapts when LoraConfig names no target_modules; the reasons stand in the package's lora.py.
LORA_TARGETS = "q_proj k_proj v_proj i_proj f_proj g_proj o_proj gate_proj up_proj down_proj".split()


class HybridLinearDecoderLayer(GradientCheckpointingLayer):
    """h + mixer(norm(h)), then h + mlp(norm(h)); the mixer is ``linear_attn`` or ``self_attn``."""

    def __init__(self, config: HybridLinearConfig, layer_idx: int):
        super().__init__()
        if config.layer_types[layer_idx] == "linear_attention":
            self.linear_attn = MIXER_CLASSES[config.mixers[layer_idx]](config, layer_idx)
        else:
            layer_config = config.per_layer_config[layer_idx] if config.is_heterogeneous else config
            self.self_attn = HybridLinearAttention(layer_config, layer_idx)
        self.mlp = LlamaMLP(_MlpConfig(config))
        self.input_layernorm = HybridLinearRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = HybridLinearRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        layout: TokenLayout | None = None,
        lower_bounds: torch.Tensor | None = None,
        branch: torch.Tensor | None = None,
        defer: bool = False,
        **kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            branch: what the layer before left to be added to hidden_states [B, T, d].
            defer: return the MLP's branch beside the hidden states, for the next norm to add.
        """
        ops = operations(hidden_states)
        hidden_states, normed = ops.rms_norm(self.input_layernorm, hidden_states, branch)
        if hasattr(self, "linear_attn"):
            mixed = self.linear_attn(normed, past_key_values, layout, position_embeddings, lower_bounds)
        else:
            mixed, _ = self.self_attn(normed, attention_mask, position_embeddings, past_key_values, **kwargs)
        hidden_states, normed = ops.rms_norm(self.post_attention_layernorm, hidden_states, mixed)
        branch = ops.mlp(self.mlp, normed)
        return (hidden_states, branch) if defer else hidden_states + branch


class _MlpConfig:
    """LlamaMLP reads ``mlp_bias``, which this family does not have."""

    mlp_bias = False

    def __init__(self, config):
        self.hidden_size, self.intermediate_size = config.hidden_size, config.intermediate_size
        self.hidden_act = config.hidden_act


class HybridLinearPreTrainedModel(StrictLoading, PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = HybridLinearConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridLinearDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The recurrent state can be rolled back exactly (cache.RecurrentLayer.crop), so assisted decoding is allowed.
    _is_stateful = False
    # Decay rates and bounds: pulled towards zero they would set the memory's length, not the weights' size.
    no_weight_decay = ("A_log", "dt_bias", "lower_bounds")
    _can_record_outputs = {"hidden_states": HybridLinearDecoderLayer, "attentions": HybridLinearAttention}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # Only where peft is in use does it hear of this family: importing it here would cost everyone its second.
        if (constants := sys.modules.get("peft.utils.constants")) is not None:
            constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(config.model_type, LORA_TARGETS)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights. The first parameter may be ``lower_bounds``, which stays in float32 in a 16-bit model."""
        named = ((name, p) for name, p in self.named_parameters() if p.is_floating_point())
        return next(p.dtype for name, p in named if not name.endswith("lower_bounds"))

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, GatedDeltaNet):
            module.init_decay()
        elif isinstance(module, RotaryPositions):
            frequencies, _ = module.initial_frequencies()
            init.copy_(module.inv_freq, frequencies)
            init.copy_(module.original_inv_freq, frequencies)
        elif isinstance(module, HybridLinearModel) and module.lower_bounds is not None:
            init.zeros_(module.lower_bounds)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; the checkpoint also carries its code, for every Auto class that this family serves."""
        self.config.auto_map = dict(AUTO_MAP)
        found = type(self)
        # transformers saves the code of the class that it finds, and FSDP2 gives sharded models one of torch's own.
        self.__class__ = next(kind for kind in found.__mro__ if not issubclass(kind, FSDPModule))
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = found


class HybridLinearModel(KeepsFloat32, HybridLinearPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: HybridLinearConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(HybridLinearDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = HybridLinearRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mask_keys = [mask_key(layer, kind) for layer, kind in zip(config.per_layer_config, config.layer_types)]
        self._build_rotary_embeddings(config)
        self.cache_sizes = sizes_per_sequence(config)

        # Bounds of the forget gate, one row per layer, attention layers' rows included. Layer 0 has none.
        bounded = [i for i in self._linear_layers() if i > 0 and config.mixers[i] in ("hgrn", "hgrn2")]
        self.lower_bounds = None
        if bounded and config.linear_use_lower_bound:
            dims = config.linear_dims(bounded[0])
            width = dims.value_head_dim if config.mixers[bounded[0]] == "hgrn" else dims.num_heads * dims.key_head_dim
            self.lower_bounds = nn.Parameter(full_precision(torch.zeros(config.num_hidden_layers, width)))
        names = {
            name for name in ("A_log", "dt_bias", "lower_bounds") if any(name in n for n, _ in self.named_parameters())
        }
        self._keep_in_fp32_modules_strict = names
        self.gradient_checkpointing = False
        self.post_init()

    def _linear_layers(self) -> list[int]:
        return [i for i, kind in enumerate(self.config.layer_types) if kind == "linear_attention"]

    def _build_rotary_embeddings(self, config: HybridLinearConfig) -> None:
        """One module per distinct rotary embedding; ``rotary_index[i]`` is layer i's, None for a layer without."""
        self.rotary_embs, self.rotary_index, known = nn.ModuleList(), [], []
        for i, (layer, kind) in enumerate(zip(config.per_layer_config, config.layer_types)):
            if kind == "full_attention":
                wanted = (dict(layer.rope_parameters), layer.head_dim)
            elif config.mixers[i] == "retnet":
                theta = {"rope_type": "default", "rope_theta": RETNET_ROPE_THETA}
                wanted = (theta, config.linear_dims(i).key_head_dim)
            else:
                self.rotary_index.append(None)
                continue
            if wanted not in known:
                known.append(wanted)
                self.rotary_embs.append(RotaryPositions(config, *wanted))
            self.rotary_index.append(known.index(wanted))

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [B, T]; exactly one of this and inputs_embeds [B, T, d].
            attention_mask: [B, past + T] with 1 at tokens and 0 at padding, on either side or in between. Padded
                columns change nothing; their outputs repeat the last token before them.
            position_ids: [1 or B, T]. Default: the number of tokens before, padding not counted. Where they restart,
                without a cache, a new document begins (packing); ``cu_seq_lens_q`` and ``seq_idx`` say the same.
            past_key_values: any transformers cache of this configuration; changed in place.

        Raises:
            ValueError: inputs that this model cannot compute exactly; the message says what to do instead.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        settle = None
        if inputs_embeds is None:
            # Whoever replaces the embedding (assisted decoding across vocabularies does) need not say how many rows it has.
            size = getattr(self.embed_tokens, "num_embeddings", self.config.vocab_size)
            settle, input_ids = check_ids(input_ids, size, at_once=use_cache or past_key_values is not None)
            inputs_embeds = self.embed_tokens(input_ids)
        B, T = inputs_embeds.shape[:2]

        adopt(past_key_values, self.config)
        if past_key_values is not None and not is_tracing(inputs_embeds):
            refuse_other_sizes(past_key_values, B, self.cache_sizes)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        masks, padding, reset, position_ids = self._read_inputs(
            inputs_embeds, attention_mask, position_ids, past_key_values, past, kwargs
        )
        if use_cache and past_key_values is None and reset is None:
            past_key_values = DynamicCache(config=self.config)
            adopt(past_key_values, self.config)

        layout = (TokenLayout() if padding is None else TokenLayout.from_mask(padding)).packed(reset)
        rotary = [rotary_emb(inputs_embeds, position_ids) for rotary_emb in self.rotary_embs]
        hidden_states, branch = inputs_embeds, None
        layers = self.layers[: self.config.num_hidden_layers]
        # A fused norm adds what it norms: a pass over memory less, where nobody looks at what leaves a layer.
        fused = operations(hidden_states) is FUSED and not self.gradient_checkpointing
        defer = fused and all(map(is_untouched, layers))
        for i, layer in enumerate(layers):
            index = self.rotary_index[i]
            hidden_states = layer(
                hidden_states,
                attention_mask=masks.get(self.mask_keys[i]),
                position_embeddings=None if index is None else rotary[index],
                past_key_values=past_key_values,
                use_cache=use_cache,
                layout=layout,
                lower_bounds=self.lower_bounds,
                position_ids=position_ids,
                branch=branch,
                defer=defer,
                **kwargs,
            )
            if defer:
                hidden_states, branch = hidden_states
        ops = operations(hidden_states)
        _, hidden_states = ops.rms_norm(self.norm, hidden_states, branch)
        if padding is not None:
            hidden_states = repeat_last_valid(hidden_states, padding)
        if settle is not None:
            settle()
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _read_inputs(self, inputs_embeds, attention_mask, position_ids, past_key_values, past, kwargs):
        """Masks per kind of layer, padding [B, T], document starts [B, T] and positions, from whatever was sent."""
        B, T = inputs_embeds.shape[:2]
        masks, padding, reset, full_padding = None, None, None, None
        if isinstance(attention_mask, dict):  # made by create_masks, ahead of a compiled step
            masks, padding = attention_mask, attention_mask.get("linear_attention")
        elif attention_mask is not None and (attention_mask.dim() != 4 or self._linear_layers()):
            full_padding = read_padding(attention_mask, B, T, past)
            attention_mask = full_padding
            if full_padding is not None and (is_tracing(full_padding) or not full_padding[:, -T:].all()):
                padding = full_padding[:, -T:]

        cu_seq_lens, seq_idx = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
        if kwargs.get("cache") is not None and not self._linear_layers():
            pass  # continuous batching: its paged cache and its masks keep the row's requests apart
        elif masks is None and attention_mask is None and past_key_values is None:
            reset, position_ids = read_packing(position_ids, cu_seq_lens, seq_idx, B, T)
        elif cu_seq_lens is not None or seq_idx is not None:
            raise ValueError(
                "cu_seq_lens_q and seq_idx describe packed documents, which do not go with a cache or with padding: pass "
                "use_cache=False, no past_key_values and no attention_mask."
            )
        elif masks is None and position_ids is not None:
            refuse_restarts(position_ids, padding, B)

        if position_ids is None and full_padding is not None:
            position_ids = (full_padding.long().cumsum(1) - 1).clamp(min=0)[:, -T:]
        elif position_ids is None:
            position_ids = (torch.arange(T, device=inputs_embeds.device) + past)[None]
        if masks is None:
            masks = create_masks(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        return masks, padding, reset, position_ids


class HybridLinearForCausalLM(HybridLinearPreTrainedModel, HybridGenerationMixin, GenerationMixin):
    """The decoder with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HybridLinearConfig):
        super().__init__(config)
        self.model = HybridLinearModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if self.loss_type == "ForCausalLM":
            self.loss_function = causal_lm_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As ``HybridLinearModel.forward``, and:

        Args:
            labels: [B, T], shifted inside; -100 is ignored.
            logits_to_keep: the last so many columns (0: all), or a 1-D tensor of columns.
            skip_logits: with labels, return the loss alone, which takes a small part of the logits' memory (``loss``).

        Returns:
            logits [B, T, vocab], loss, past_key_values.
        """
        session = active_session()
        if session is not None and session.serves(self, input_ids, past_key_values):
            logits = session(input_ids, position_ids, attention_mask)
            return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        targets, settle = self._targets(labels, **kwargs) if skip_logits else (None, None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = loss = None
        if skip_logits:
            hidden_states, count = outputs.last_hidden_state.flatten(0, 1), kwargs.get("num_items_in_batch")
            loss = head_cross_entropy(self.lm_head, hidden_states, targets, count)
            settle()
        else:
            logits = dense(self.lm_head, slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        if labels is not None and not skip_logits:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _targets(self, labels, shift_labels=None, **kwargs) -> tuple[torch.Tensor, Callable[[], None]]:
        """[B * T], and what raises if one is outside of the vocabulary (see ``checks``)."""
        if labels is None and shift_labels is None:
            raise ValueError("skip_logits=True leaves the loss alone, and without labels there is none: pass labels.")
        if (reason := why_not_head(self.lm_head)) is not None:
            raise ValueError(
                f"skip_logits=True multiplies by lm_head.weight itself, but {reason}: leave skip_logits out."
            )
        targets = (shift(labels) if shift_labels is None else shift_labels).flatten()
        return targets, check_targets(targets, self.lm_head.weight.shape[0])


# The library's task heads make their decoder through AutoModel, which would ask, in the middle of it, whether to run the
# code of a checkpoint that the user has already trusted. So each makes its own; their forward stays the library's.


class HybridLinearForSequenceClassification(GenericForSequenceClassification, HybridLinearPreTrainedModel):
    """The decoder with a classification head on the last token."""

    def __init__(self, config: HybridLinearConfig):
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = HybridLinearModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class HybridLinearForTokenClassification(GenericForTokenClassification, HybridLinearPreTrainedModel):
    """The decoder with a classification head on every token."""

    def __init__(self, config: HybridLinearConfig):
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = HybridLinearModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class HybridLinearForQuestionAnswering(GenericForQuestionAnswering, HybridLinearPreTrainedModel):
    """The decoder with a span head."""

    def __init__(self, config: HybridLinearConfig):
        super(GenericForQuestionAnswering, self).__init__(config)
        self.model = HybridLinearModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


AUTO_MAP = {"AutoConfig": "configuration_hybrid_linear.HybridLinearConfig"} | {
    auto_class: f"modeling_hybrid_linear.{name}"
    for auto_class, name in {
        "AutoModel": "HybridLinearModel",
        "AutoModelForCausalLM": "HybridLinearForCausalLM",
        "AutoModelForSequenceClassification": "HybridLinearForSequenceClassification",
        "AutoModelForTokenClassification": "HybridLinearForTokenClassification",
        "AutoModelForQuestionAnswering": "HybridLinearForQuestionAnswering",
    }.items()
}

__all__ = [
    "HybridLinearForCausalLM",
    "HybridLinearForQuestionAnswering",
    "HybridLinearForSequenceClassification",
    "HybridLinearForTokenClassification",
    "HybridLinearModel",
    "HybridLinearPreTrainedModel",
]
