"""The configuration of a hybrid linear-attention model.

One class describes all 36 architectures of the suite: ``mixer`` names the law of the linear-attention layers and
``layer_types`` says, layer by layer, which are linear and which attend to everything. What is left ``None`` is filled
in from the mixer and ``hidden_size``, so that a saved ``config.json`` is explicit.

    >>> from hybrid_models import HybridLinearConfig
    >>> config = HybridLinearConfig(mixer="hgrn2", ratio="3-1", hidden_size=256, num_hidden_layers=6)
    >>> config.layer_picture(), config.linear_num_key_heads, config.linear_key_head_dim
    ('LLALLA', 2, 128)
"""

# No `from __future__ import annotations` here: @strict checks a field's type only where the annotation is not a string.
import difflib
import math
import re
from typing import NamedTuple

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


class MixerDefaults(NamedTuple):
    """What a mixer's fields become when they are left ``None``. Head sizes follow the published checkpoints."""

    head_dim: int | None  # hidden channels per head; None: a single head, whose state is a vector
    max_heads: int | None = None
    key_ratio: float = 1.0  # key width / (hidden_size / heads)
    value_ratio: float = 1.0
    hidden_ratio: int = 4  # MLP width before the 2/3 of SwiGLU, in units of hidden_size
    short_conv: bool = False
    output_gate: bool = True


MIXERS: dict[str, MixerDefaults] = {
    "hgrn": MixerDefaults(None),
    "retnet": MixerDefaults(128, max_heads=8, value_ratio=2.0, hidden_ratio=2),
    "gla": MixerDefaults(256, max_heads=4, key_ratio=0.5),
    "hgrn2": MixerDefaults(128, output_gate=False),
    "delta_net": MixerDefaults(128, short_conv=True, output_gate=False),
    "gated_delta_net": MixerDefaults(256, short_conv=True),
}
RATIOS = ("pure", "24-1", "12-1", "6-1", "3-1", "full")
LAYER_TYPES = ("linear_attention", "full_attention")

# Mixers whose queries, keys and values share one head count; the others group heads (see linear_dims).
_UNGROUPED = ("hgrn", "hgrn2", "delta_net")
# Spellings of flash-linear-attention, so that a config copied from there does not silently fall back to defaults.
_FLA_SPELLINGS = {
    "gated_deltanet": "gated_delta_net",
    "norm_eps": "rms_norm_eps",
    "num_heads": "linear_num_key_heads (linear layers) or num_attention_heads (attention layers)",
    "num_kv_heads": "linear_num_key_heads and linear_num_value_heads, with linear_num_query_heads",
    "num_v_heads": "linear_num_value_heads",
    "expand_k": "linear_key_head_dim",
    "expand_v": "linear_value_head_dim",
    "expand_ratio": "linear_key_head_dim (hgrn2) or linear_value_head_dim (hgrn)",
    "conv_size": "linear_conv_kernel_dim",
    "use_short_conv": "linear_use_short_conv",
    "use_gate": "linear_use_output_gate",
    "use_output_gate": "linear_use_output_gate",
    "use_lower_bound": "linear_use_lower_bound",
    "allow_neg_eigval": "linear_allow_neg_eigval",
    "hidden_ratio": "intermediate_size",
    "qkv_bias": "attention_bias",
    "window_size": "sliding_window",
    "attn": "layer_types (hybrid_models.from_fla reads a whole fla checkpoint)",
}


class LinearDims(NamedTuple):
    """Head counts and widths of one linear-attention layer; the recurrent state is [batch, num_heads, key, value]."""

    num_query_heads: int
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int

    @property
    def num_heads(self) -> int:
        return max(self.num_query_heads, self.num_value_heads)


def layer_types_from_ratio(ratio: str, num_hidden_layers: int) -> list[str]:
    """Layer kinds for a ratio: ``"N-1"`` puts one attention layer every N layers, the last of each group.

    ``"pure"`` has none and ``"full"`` only attention layers. For 24 layers ``"6-1"`` gives attention at 5, 11, 17, 23.

    Raises:
        ValueError: the ratio is malformed, or asks for a longer group than there are layers.
    """
    if ratio == "pure":
        return ["linear_attention"] * num_hidden_layers
    if ratio == "full":
        return ["full_attention"] * num_hidden_layers
    match = re.fullmatch(r"(\d+)-1", ratio) if isinstance(ratio, str) else None
    if match is None or int(match[1]) < 1:
        raise ValueError(f"ratio={ratio!r} is not known: use one of {', '.join(RATIOS)}, or 'N-1' for any N >= 1.")
    group = int(match[1])
    if group > num_hidden_layers:
        raise ValueError(
            f"ratio={ratio!r} puts attention at every {group}th layer, but num_hidden_layers={num_hidden_layers}: "
            f"use 'pure', a smaller ratio, or at least {group} layers."
        )
    return ["full_attention" if (i + 1) % group == 0 else "linear_attention" for i in range(num_hidden_layers)]


def _num_heads(hidden_size: int, head_dim: int, max_heads: int | None) -> int:
    """The most heads of at least ``head_dim`` channels that divide ``hidden_size``."""
    most = max(1, hidden_size // head_dim)
    most = min(most, max_heads) if max_heads else most
    return next(heads for heads in range(most, 0, -1) if hidden_size % heads == 0)


@strict
class HybridLinearConfig(PreTrainedConfig):
    r"""
    Configuration of `HybridLinearModel` and its heads. Every field has a working default.

    Besides the fields, the constructor takes ``ratio`` ("pure", "24-1", "12-1", "6-1", "3-1", "full", or any "N-1")
    in place of ``layer_types``. A single attention layer may differ from the others through transformers'
    ``per_layer_config={layer: {field: value}}``, for the attention fields.

    Args:
        mixer: law of the linear-attention layers: "hgrn", "retnet", "gla", "hgrn2", "delta_net", "gated_delta_net", or
            a list with one name per layer (entries of attention layers are ignored).
        layer_types: "linear_attention" or "full_attention" for every layer. Default: every sixth layer attends (the
            last one in a model of two to five layers).
        intermediate_size: MLP width. Default: 8/3 of hidden_size (4/3 with RetNet), rounded up to a multiple of 256.
        num_attention_heads, num_key_value_heads, head_dim, attention_bias, attention_dropout, sliding_window,
            rope_parameters: the full-attention layers. ``attention_bias`` concerns q, k and v; ``sliding_window=w``
            lets a token see itself and the w - 1 before it.
        linear_num_query_heads, linear_num_key_heads, linear_num_value_heads, linear_key_head_dim,
            linear_value_head_dim: the linear layers. RetNet and GLA may share a key/value head among several query
            heads, GatedDeltaNet a query/key head among several value heads. HGRN has no heads: its state is a vector
            of ``linear_value_head_dim`` channels.
        linear_use_short_conv, linear_conv_kernel_dim: a causal depthwise convolution before the law. RetNet has none.
        linear_use_output_gate, linear_output_gate_act: gate after the output norm ("silu" or "sigmoid").
        linear_use_lower_bound: layer-wise lower bounds of the forget gate (HGRN, HGRN2).
        linear_allow_neg_eigval: write strength in (0, 2) instead of (0, 1) (DeltaNet, GatedDeltaNet).

    Raises:
        ValueError: a field or a combination is not supported; the message names the field, the value and what is
            allowed. (A value of the wrong type raises huggingface_hub's StrictDataclassFieldValidationError.)
    """

    model_type = "hybrid_linear"
    keys_to_ignore_at_inference = ["past_key_values"]
    # Linear layers are replicated under tensor parallelism, as in the library's own hybrids.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    mixer: str | list[str] = "gated_delta_net"
    layer_types: list[str] | None = None
    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    sliding_window: int | None = None
    rope_parameters: dict | None = None

    linear_num_query_heads: int | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_use_short_conv: bool | None = None
    linear_conv_kernel_dim: int = 4
    linear_use_output_gate: bool | None = None
    linear_output_gate_act: str = "silu"
    linear_use_lower_bound: bool = True
    linear_allow_neg_eigval: bool = False

    def __post_init__(self, **kwargs):
        ratio = kwargs.pop("ratio", None)
        self._refuse_misspelt(kwargs)
        self._check_before_filling()

        if ratio is not None:
            from_ratio = layer_types_from_ratio(ratio, self.num_hidden_layers)
            if self.layer_types is not None and self.layer_types != from_ratio:
                raise ValueError(
                    f"ratio={ratio!r} means layer_types={from_ratio}, but layer_types={self.layer_types} was given too: "
                    "pass only one of them."
                )
            self.layer_types = from_ratio
        elif self.layer_types is None:
            group = min(6, self.num_hidden_layers)
            self.layer_types = layer_types_from_ratio("pure" if group == 1 else f"{group}-1", self.num_hidden_layers)

        kinds = self._mixers_in_use()
        if self.num_attention_heads is None:
            self.num_attention_heads = _num_heads(self.hidden_size, 64, None)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}: "
                    "choose a divisor, or set head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            hidden_ratio = MIXERS[kinds[0]].hidden_ratio if len(kinds) == 1 else 4
            self.intermediate_size = 256 * math.ceil(int(self.hidden_size * hidden_ratio * 2 / 3) / 256)
        if len(kinds) == 1:  # one law for the whole model: write its sizes down
            defaults, dims = MIXERS[kinds[0]], self._resolve_dims(kinds[0])
            self.linear_num_query_heads = dims.num_query_heads
            self.linear_num_key_heads = dims.num_key_heads
            self.linear_num_value_heads = dims.num_value_heads
            self.linear_key_head_dim = dims.key_head_dim
            self.linear_value_head_dim = dims.value_head_dim
            if self.linear_use_short_conv is None:
                self.linear_use_short_conv = defaults.short_conv
            if self.linear_use_output_gate is None:
                self.linear_use_output_gate = defaults.output_gate
        super().__post_init__(**kwargs)
        self.validate_architecture()  # @strict calls it too, but what it raises is no ValueError

    # ---------------------------------------------------------------------------------------------- what a layer is

    @property
    def mixers(self) -> list[str]:
        """The mixer's name for every layer, attention layers included."""
        return [self.mixer] * len(self.layer_types) if isinstance(self.mixer, str) else list(self.mixer)

    def linear_dims(self, layer_idx: int) -> LinearDims:
        """Head counts and widths of linear-attention layer ``layer_idx``."""
        return self._resolve_dims(self.mixers[layer_idx])

    def uses_short_conv(self, layer_idx: int) -> bool:
        chosen = self.linear_use_short_conv
        return MIXERS[self.mixers[layer_idx]].short_conv if chosen is None else chosen

    def uses_output_gate(self, layer_idx: int) -> bool:
        chosen = self.linear_use_output_gate
        return MIXERS[self.mixers[layer_idx]].output_gate if chosen is None else chosen

    def conv_dim(self, layer_idx: int) -> int:
        """Channels of the short convolution of layer ``layer_idx``; 0 without one."""
        if not self.uses_short_conv(layer_idx):
            return 0
        dims = self.linear_dims(layer_idx)
        if self.mixers[layer_idx] == "hgrn":
            return 2 * dims.value_head_dim  # input and forget gate
        query_key = (dims.num_query_heads + dims.num_key_heads) * dims.key_head_dim
        return query_key + dims.num_value_heads * dims.value_head_dim

    def _resolve_dims(self, mixer: str) -> LinearDims:
        defaults = MIXERS[mixer]
        heads = 1 if defaults.head_dim is None else _num_heads(self.hidden_size, defaults.head_dim, defaults.max_heads)
        key_heads = self.linear_num_key_heads or heads
        query_heads = self.linear_num_query_heads or key_heads
        value_heads = self.linear_num_value_heads or key_heads
        per_head = self.hidden_size // max(query_heads if mixer in ("retnet", "gla") else key_heads, 1)
        key_dim = 1 if mixer == "hgrn" else int(per_head * defaults.key_ratio)
        return LinearDims(
            query_heads,
            key_heads,
            value_heads,
            self.linear_key_head_dim or key_dim,
            self.linear_value_head_dim or int(per_head * defaults.value_ratio),
        )

    # ------------------------------------------------------------------------------------------- what a sequence costs

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes of key/value cache that each token adds, over all full-attention layers (default: 16-bit cache)."""
        return sum(
            2 * layer.num_key_value_heads * layer.head_dim * bytes_per_element
            for layer, kind in zip(self.per_layer_config, self.layer_types)
            if kind == "full_attention"
        )

    def state_bytes(self, conv_bytes_per_element: int = 2) -> int:
        """Bytes of recurrent state of one sequence, whatever its length: float32 states and convolution windows."""
        total = 0
        for layer_idx, kind in enumerate(self.layer_types):
            if kind == "linear_attention":
                dims = self.linear_dims(layer_idx)
                total += 4 * dims.num_heads * dims.key_head_dim * dims.value_head_dim
                total += conv_bytes_per_element * self.conv_dim(layer_idx) * (self.linear_conv_kernel_dim - 1)
        return total

    def layer_picture(self) -> str:
        """The layers as one word: L for linear attention, A for full attention."""
        return "".join("A" if kind == "full_attention" else "L" for kind in self.layer_types)

    # ------------------------------------------------------------------------------------------------------ validation

    def _mixers_in_use(self) -> list[str]:
        """Distinct mixers of the linear layers; the configured one where no layer is linear."""
        used = [mixer for mixer, kind in zip(self.mixers, self.layer_types) if kind == "linear_attention"]
        return sorted(set(used or self.mixers))

    def _refuse_misspelt(self, kwargs: dict) -> None:
        for name, value in kwargs.items():
            if hasattr(type(self), name):
                continue  # the library's own, such as model_type
            if name in _FLA_SPELLINGS:
                raise ValueError(f"{name}={value!r} is fla's spelling. Here it is {_FLA_SPELLINGS[name]}.")
            close = difflib.get_close_matches(name, [*self.__dataclass_fields__, "ratio"], n=1, cutoff=0.85)
            if close:
                raise ValueError(f"{name}={value!r} is not a field of {type(self).__name__}. Did you mean {close[0]}?")

    def _check_before_filling(self) -> None:
        """What the derived fields are computed from; everything else is checked in validate_architecture."""
        for name in (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "sliding_window linear_num_query_heads linear_num_key_heads linear_num_value_heads linear_key_head_dim "
            "linear_value_head_dim linear_conv_kernel_dim"
        ).split():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive integer.")
        names = list(self.mixer) if isinstance(self.mixer, (list, tuple)) else [self.mixer]
        for name in names:
            if name not in MIXERS:
                hint = _FLA_SPELLINGS.get(name) or next(iter(difflib.get_close_matches(str(name), MIXERS, n=1)), None)
                raise ValueError(
                    f"mixer={name!r} is not known: use one of {', '.join(MIXERS)}"
                    + (f" (did you mean {hint!r}?)." if hint else ".")
                )
        for what, values in (("mixer", None if names == [self.mixer] else names), ("layer_types", self.layer_types)):
            if values is not None and len(values) != self.num_hidden_layers:
                raise ValueError(
                    f"{what} has {len(values)} entries, but num_hidden_layers={self.num_hidden_layers}: "
                    "they must be the same number."
                )
        for i, kind in enumerate(self.layer_types or ()):
            if kind not in LAYER_TYPES:
                raise ValueError(f"layer_types[{i}]={kind!r} is not known: use {' or '.join(map(repr, LAYER_TYPES))}.")

    def validate_architecture(self):
        """Combinations of fields (called by the strict dataclass after construction and before saving)."""
        if self.hidden_act not in ("silu", "swish"):
            raise ValueError(f"hidden_act={self.hidden_act!r} is not supported: the MLP is a SwiGLU, use 'silu'.")
        if self.linear_output_gate_act not in ("silu", "sigmoid"):
            raise ValueError(f"linear_output_gate_act={self.linear_output_gate_act!r}: use 'silu' or 'sigmoid'.")
        if self.rms_norm_eps <= 0:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps} must be positive.")
        kinds = self.layer_types
        for layer, kind in zip(self.per_layer_config, kinds):
            if kind == "full_attention":
                self._validate_attention(layer)
        for mixer in {mixer for mixer, kind in zip(self.mixers, kinds) if kind == "linear_attention"}:
            self._validate_mixer(mixer)

    def validate_rope(self):
        """Rotary parameters, which may differ between attention layers."""
        for layer in self.per_layer_config if self.is_heterogeneous else [self]:
            PreTrainedConfig.validate_rope(layer)

    @staticmethod
    def _validate_attention(layer) -> None:
        if layer.num_attention_heads % layer.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={layer.num_key_value_heads} does not divide "
                f"num_attention_heads={layer.num_attention_heads}."
            )
        if layer.head_dim % 2:
            raise ValueError(f"head_dim={layer.head_dim} must be even: rotary embeddings turn pairs of channels.")

    def _validate_mixer(self, mixer: str) -> None:
        dims = self._resolve_dims(mixer)
        query, key, value = dims[:3]
        allowed = {
            "retnet": query % key == 0 and key == value,
            "gla": query % key == 0 and key == value,
            "gated_delta_net": query == key and value % key == 0,
        }.get(mixer, query == key == value)
        if not allowed:
            rule = {
                "gated_delta_net": "query = key heads, and value heads a multiple of them",
                **dict.fromkeys(("retnet", "gla"), "key = value heads, and query heads a multiple of them"),
                **dict.fromkeys(_UNGROUPED, "all three equal"),
            }[mixer]
            raise ValueError(
                f"linear_num_query_heads={query}, linear_num_key_heads={key}, linear_num_value_heads={value} do not go "
                f"together in mixer={mixer!r}: it needs {rule}."
            )
        if mixer == "hgrn" and (dims.num_heads, dims.key_head_dim) != (1, 1):
            raise ValueError(
                f"mixer='hgrn' has one head and a vector state: linear_num_key_heads={key} and "
                f"linear_key_head_dim={dims.key_head_dim} must be 1; linear_value_head_dim is its width."
            )
        if min(dims) < 1:
            raise ValueError(f"mixer={mixer!r} gets empty heads from hidden_size={self.hidden_size}: {dims}.")
        if mixer == "retnet" and dims.key_head_dim % 2:
            raise ValueError(f"linear_key_head_dim={dims.key_head_dim} must be even: RetNet's q and k are rotary.")
        if mixer == "retnet" and self.linear_use_short_conv:
            raise ValueError("linear_use_short_conv=True is not supported by mixer='retnet': it has no convolution.")
        fixed_gate = {"hgrn": True, "hgrn2": False}.get(mixer)
        if fixed_gate is not None and self.linear_use_output_gate not in (None, fixed_gate):
            raise ValueError(
                f"linear_use_output_gate={self.linear_use_output_gate} is not supported by mixer={mixer!r}: "
                f"it is always {fixed_gate}."
            )
        if self.linear_allow_neg_eigval and mixer not in ("delta_net", "gated_delta_net"):
            raise ValueError(f"linear_allow_neg_eigval=True has no meaning in mixer={mixer!r}: only the delta family.")


__all__ = ["HybridLinearConfig", "layer_types_from_ratio"]
