"""The configuration of flash-linear-attention (fla), from its versions 0.1 to 0.6, and this package's: one to the other.

Every key of a config.json is accounted for: it is translated, or it must have the one value that exists here, or it is
known to change nothing. Any other key raises and names itself, because a key that is skipped is a wrong model that looks
right.

    >>> config = config_from_fla({"model_type": "gla", "hidden_size": 512, "attn": {"layers": [5], "num_heads": 8}})
    >>> config.layer_picture()[:8], config.linear_num_key_heads, config.linear_key_head_dim
    ('LLLLLALL', 4, 64)
    >>> config_to_fla(config)["expand_k"]
    0.5
"""

from __future__ import annotations

import math
from collections import Counter

from transformers.utils import logging

from .checkpoint import some
from .configuration_hybrid_linear import MIXERS, HybridLinearConfig

logger = logging.get_logger(__name__)

# fla's model_type: our mixer
MIXER_OF = {name: name for name in MIXERS if name != "gated_delta_net"} | {"gated_deltanet": "gated_delta_net"}

# What an absent key means, in every version of fla from 0.1 to 0.6.
COMMON = dict(
    vocab_size=32000, hidden_size=2048, num_hidden_layers=24, hidden_ratio=4, intermediate_size=None, norm_eps=1e-6,
    max_position_embeddings=2048, elementwise_affine=True, tie_word_embeddings=False, pad_token_id=None, bos_token_id=1,
    eos_token_id=2, initializer_range=0.02, attn=None, use_short_conv=False, conv_size=4, fuse_norm=True, use_cache=True,
)  # fmt: skip
DEFAULTS = {
    "hgrn": dict(expand_ratio=1, use_lower_bound=True),
    "hgrn2": dict(expand_ratio=128, num_heads=None, use_lower_bound=True),
    "retnet": dict(expand_k=1.0, expand_v=2.0, num_heads=8, num_kv_heads=None, use_output_gate=True, hidden_ratio=2),
    "gla": dict(expand_k=0.5, expand_v=1.0, num_heads=4, num_kv_heads=None, use_output_gate=True),
    "delta_net": dict(
        expand_k=1.0, expand_v=1.0, num_heads=16, use_gate=False, allow_neg_eigval=False, use_short_conv=True
    ),
    "gated_deltanet": dict(
        head_dim=256, num_heads=6, num_v_heads=None, expand_v=2.0, use_gate=True, allow_neg_eigval=False,
        output_gate_activation="swish", use_short_conv=True, num_hidden_layers=21,
    ),
}  # fmt: skip
# Keys with a meaning of which only these values exist here.
_FIXED = dict(
    hidden_act=("swish",), attnres_block_size=(None,), norm_first=(False,), use_rope=(False,), use_elu=(False,)
)
_FIXED_BY_TYPE = {
    "retnet": dict(feature_map=(None,)),
    "gla": dict(feature_map=(None,), clamp_min=(None,)),
    "delta_net": dict(qk_norm=("l2",), qk_activation=("silu",), use_beta=(True,), elementwise_affine=(True,)),
    "gated_deltanet": dict(elementwise_affine=(True,), output_gate_activation=("swish", "silu", "sigmoid")),
}
# Keys that change nothing: how fla computes, what it leaves behind, and what transformers itself has written into any
# config.json since 4.0.
_INERT = set(
    "attn_mode use_l2warp use_gk use_gv use_output_norm repairs _attn_implementation_autoset _commit_hash _name_or_path "
    "add_cross_attention architectures auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward "
    "cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id "
    "forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length model_type "
    "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states "
    "output_scores prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict "
    "return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss "
    "tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p "
    "use_bfloat16".split()
)
_INERT_BY_TYPE = {
    "hgrn": {"num_heads"},
    "gated_deltanet": {"expand_k", "qk_norm", "qk_activation", "use_beta"},
}
_ATTENTION_KEYS = ("layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta")


def config_from_fla(raw: dict) -> HybridLinearConfig:
    """The native configuration of an fla config.json.

    Raises:
        ValueError: an unknown model_type or key, or a known key with a meaning that is not supported.
    """
    fla = _read_keys(raw)
    kind, d, L = raw["model_type"], fla["hidden_size"], fla["num_hidden_layers"]
    if fla["intermediate_size"] is None:
        ratio = 4 if fla["hidden_ratio"] is None else fla["hidden_ratio"]
        fla["intermediate_size"] = 256 * math.ceil(int(d * ratio * 2 / 3) / 256)
    fields = dict(
        mixer=MIXER_OF[kind],
        hidden_act="silu",
        rms_norm_eps=float(fla["norm_eps"]),
        initializer_range=float(fla["initializer_range"]),
        linear_use_short_conv=kind != "retnet" and bool(fla["use_short_conv"]),  # RetNet never receives it
        linear_conv_kernel_dim=fla["conv_size"],
        **{
            name: fla[name]
            for name in "vocab_size hidden_size intermediate_size num_hidden_layers max_position_embeddings "
            "tie_word_embeddings pad_token_id bos_token_id eos_token_id use_cache".split()
        },
    )
    if kind == "hgrn":
        heads, key, value = 1, 1, int(d * fla["expand_ratio"])
    elif kind == "hgrn2":
        key = fla["expand_ratio"] or _divide(d, "hidden_size", fla["num_heads"], "num_heads")
        heads = _divide(d, "hidden_size", key, "expand_ratio")
        value = d // heads
    elif kind == "gated_deltanet":
        heads, key, value = fla["num_heads"], fla["head_dim"], int(fla["head_dim"] * fla["expand_v"])
        fields["linear_output_gate_act"] = "sigmoid" if fla["output_gate_activation"] == "sigmoid" else "silu"
    else:
        heads = fla["num_heads"]
        key = _divide(int(d * fla["expand_k"]), "hidden_size * expand_k", heads, "num_heads")
        value = _divide(int(d * fla["expand_v"]), "hidden_size * expand_v", heads, "num_heads")
    shared = fla.get("num_kv_heads") or heads
    fields.update(
        linear_num_query_heads=heads,
        linear_num_key_heads=shared,
        linear_num_value_heads=fla.get("num_v_heads") or shared,
        linear_key_head_dim=key,
        linear_value_head_dim=value,
        linear_use_output_gate=bool(fla.get("use_output_gate", fla.get("use_gate", kind == "hgrn"))),
        linear_use_lower_bound=bool(fla.get("use_lower_bound", True)),
        linear_allow_neg_eigval=bool(fla.get("allow_neg_eigval", False)),
    )

    attention = _read_attention(fla["attn"], d, L, strict="attnres_block_size" in raw)
    fields["layer_types"] = ["full_attention" if i in attention else "linear_attention" for i in range(L)]
    if attention:
        common = dict(Counter(map(_frozen, attention.values())).most_common(1)[0][0])
        per_layer = {
            i: {name: value for name, value in settings.items() if value != common[name]}
            for i, settings in attention.items()
            if _frozen(settings) != _frozen(common)
        }
        for settings in (common, *per_layer.values()):
            if "rope_theta" in settings:
                settings["rope_parameters"] = {"rope_type": "default", "rope_theta": settings.pop("rope_theta")}
        fields |= common | ({"per_layer_config": per_layer} if per_layer else {})
    if raw.get("repairs"):  # of hybrid-linear doctor, not fla's
        fields["repairs"] = raw["repairs"]
    return HybridLinearConfig(**fields, dtype=raw.get("dtype") or raw.get("torch_dtype"))


def with_defaults(raw: dict) -> dict:
    """An fla config.json with what its absent keys mean."""
    return {**COMMON, **DEFAULTS[raw["model_type"]], **raw}


def _read_keys(raw: dict) -> dict:
    """``raw`` with the defaults filled in, after every key has been accounted for."""
    kind = raw.get("model_type")
    if kind not in DEFAULTS:
        raise ValueError(f"model_type={kind!r} in config.json is not supported: {', '.join(DEFAULTS)} are.")
    fla = with_defaults(raw)
    inert = _INERT | _INERT_BY_TYPE.get(kind, set())
    fixed = {name: values for name, values in (_FIXED | _FIXED_BY_TYPE.get(kind, {})).items() if name not in inert}
    # Older spellings, harmless while they say what the newer ones say.
    fixed["rms_norm_eps"] = (fla["norm_eps"],)
    fixed["share_conv_kernel"] = (False, None, True) if kind == "retnet" or not fla["use_short_conv"] else (False, None)
    for name, allowed in fixed.items():
        if name in raw and raw[name] not in allowed:
            raise ValueError(
                f"{name}={raw[name]!r} in config.json is not supported for model_type={kind!r}, only "
                f"{' or '.join(map(repr, allowed))}."
            )
    known = inert | set(fixed) | set(COMMON) | set(DEFAULTS[kind])
    unknown = [name for name in raw if name not in known and not name.startswith("fuse_")]
    if unknown:
        raise ValueError(
            f"config.json has keys that are not known for model_type={kind!r}: "
            f"{some([f'{name}={raw[name]!r}' for name in unknown])}. If they change nothing in the model, remove them there."
        )
    for name, default in {**COMMON, **DEFAULTS[kind]}.items():
        optional = name in ("bos_token_id", "eos_token_id", "hidden_ratio") or (kind, name) == ("hgrn2", "expand_ratio")
        if type(default) in (int, float) and not (optional and fla[name] is None) and name != "eos_token_id":
            if type(fla[name]) not in (int, float) or fla[name] < 0:
                raise ValueError(f"{name}={fla[name]!r} in config.json is not a number, 0 or more.")
    return fla


def _divide(a: int, a_name: str, b: int | None, b_name: str) -> int:
    if not b or a % b:
        raise ValueError(f"{b_name}={b} in config.json does not divide {a_name}={a}.")
    return a // b


def _frozen(settings: dict) -> tuple:
    return tuple(settings.items())


def _read_attention(attn: dict | list | None, d: int, L: int, strict: bool) -> dict[int, dict]:
    """Attention settings by layer, in native names.

    Args:
        strict: the file was written by a version of fla that refuses layers out of range. Older ones ignored them, so
            they are dropped, as they were in training.
    """
    layers = {}
    for spec in attn if isinstance(attn, list) else [attn] if attn is not None else []:
        if not isinstance(spec, dict) or not isinstance(spec.get("layers", []), list):
            raise ValueError(f"attn in config.json holds {spec!r}: a dictionary with a list of layers is expected.")
        unknown = [name for name in spec if name not in _ATTENTION_KEYS]
        missing = [name for name in ("layers", "num_heads") if spec.get(name) is None]
        if unknown or missing:
            problem = f"has unknown keys: {some(unknown)}" if unknown else f"lacks {' and '.join(missing)}"
            raise ValueError(f"attn in config.json {problem}. The entry is {spec!r}.")
        heads = spec["num_heads"]
        settings = dict(
            num_attention_heads=heads,
            num_key_value_heads=spec.get("num_kv_heads") or heads,
            head_dim=_divide(d, "hidden_size", heads, "attn.num_heads"),
            attention_bias=bool(spec.get("qkv_bias", False)),
            sliding_window=spec.get("window_size"),
            rope_theta=float(spec.get("rope_theta") or 10000.0),
        )
        for i in spec["layers"]:
            if not isinstance(i, int) or i in layers:
                raise ValueError(
                    f"attn.layers in config.json holds {i!r} {'twice' if i in layers else '(no integer)'}."
                )
            if 0 <= i < L:
                layers[i] = settings
            elif strict:
                raise ValueError(
                    f"attn.layers in config.json holds {i}, but num_hidden_layers={L}: layers count from 0 to {L - 1}."
                )
            else:
                logger.warning(
                    f"attn.layers={spec['layers']}: layer {i} does not exist (of {L}) and is ignored, as in fla."
                )
    return layers


def config_to_fla(config: HybridLinearConfig, original: dict | None = None) -> dict:
    """fla's config.json for a native configuration.

    Args:
        original: the config.json that a checkpoint had before it was converted; its inert keys are kept.

    Raises:
        ValueError: fla's format cannot express the model; names the field.
    """
    mixers = config._mixers_in_use()
    if len(mixers) > 1:
        raise ValueError(
            f"mixer={config.mixer} is not one law for all linear layers: fla's format has no word for that."
        )
    mixer, d = mixers[0], config.hidden_size
    kind = next(name for name, ours in MIXER_OF.items() if ours == mixer)
    first = config.layer_types.index("linear_attention") if "linear_attention" in config.layer_types else 0
    query, key_heads, value_heads, K, V = config.linear_dims(first)
    fla = {name: getattr(config, name) for name in COMMON if hasattr(config, name)}
    fla |= dict(
        model_type=kind,
        architectures=[f"{_CLASS_NAMES[kind]}ForCausalLM"],
        hidden_act="swish",
        norm_eps=config.rms_norm_eps,
        conv_size=config.linear_conv_kernel_dim,
        use_short_conv=config.uses_short_conv(first),
        dtype=None if config.dtype is None else str(config.dtype).removeprefix("torch."),
    )
    gate = config.uses_output_gate(first)
    fla |= {
        "hgrn": lambda: dict(expand_ratio=_ratio(V, d)),
        "hgrn2": lambda: dict(expand_ratio=K, num_heads=query),
        "retnet": lambda: dict(num_kv_heads=key_heads, use_output_gate=gate),
        "gla": lambda: dict(num_kv_heads=key_heads, use_output_gate=gate),
        "delta_net": lambda: dict(use_gate=gate),
        "gated_deltanet": lambda: dict(
            head_dim=K,
            num_heads=query,
            num_v_heads=value_heads,
            expand_v=_ratio(V, K),
            use_gate=gate,
            output_gate_activation="sigmoid" if config.linear_output_gate_act == "sigmoid" else "swish",
        ),
    }[kind]()
    if kind in ("retnet", "gla", "delta_net"):
        fla |= dict(num_heads=query, expand_k=_ratio(K * query, d), expand_v=_ratio(V * query, d))
    if kind in ("hgrn", "hgrn2"):
        fla["use_lower_bound"] = config.linear_use_lower_bound
    if kind in ("delta_net", "gated_deltanet"):
        fla["allow_neg_eigval"] = config.linear_allow_neg_eigval
    fla["attn"] = _write_attention(config)
    if getattr(config, "repairs", None):
        fla["repairs"] = config.repairs
    fla = {**(original or {}), **fla}
    fla.pop("torch_dtype", None)

    before, after = _function(config), _function(config_from_fla(fla))
    for name, value in before.items():
        if after[name] != value:
            raise ValueError(f"fla's format cannot express {name}={value}: it would become {after[name]}.")
    return fla


_CLASS_NAMES = dict(
    hgrn="HGRN", hgrn2="HGRN2", retnet="RetNet", gla="GLA", delta_net="DeltaNet", gated_deltanet="GatedDeltaNet"
)


def _ratio(width: int, base: int) -> float:
    """r with int(base * r) == width."""
    ratio = width / base
    return ratio if int(base * ratio) == width else math.nextafter(ratio, math.inf)


def _write_attention(config: HybridLinearConfig) -> dict | list | None:
    specs = []
    for i, kind in enumerate(config.layer_types):
        if kind == "full_attention":
            layer = config.per_layer_config[i]
            spec = dict(
                num_heads=layer.num_attention_heads,
                num_kv_heads=layer.num_key_value_heads,
                qkv_bias=layer.attention_bias,
                window_size=layer.sliding_window,
                rope_theta=layer.rope_parameters["rope_theta"],
            )
            same = next((other for other in specs if {**other, "layers": None} == {**spec, "layers": None}), None)
            if same is None:
                specs.append({"layers": [i], **spec})
            else:
                same["layers"].append(i)
    return specs if len(specs) > 1 else specs[0] if specs else None


def _function(config: HybridLinearConfig) -> dict:
    """What a configuration says about the function that the model computes, field by field."""
    names = "vocab_size hidden_size intermediate_size num_hidden_layers rms_norm_eps tie_word_embeddings".split()
    out = {name: getattr(config, name) for name in names} | {"layer_types": config.layer_types}
    for i, kind in enumerate(config.layer_types):
        if kind == "full_attention":
            names = "num_attention_heads num_key_value_heads head_dim attention_bias attention_dropout sliding_window".split()
            layer = config.per_layer_config[i]
            out |= {f"{name} of layer {i}": getattr(layer, name) for name in names}
            out[f"rope_parameters of layer {i}"] = dict(layer.rope_parameters)
        else:
            conv = config.uses_short_conv(i)
            out |= {
                f"mixer of layer {i}": config.mixers[i],
                f"heads and widths of layer {i}": tuple(config.linear_dims(i)),
                f"linear_use_short_conv of layer {i}": conv,
                f"linear_conv_kernel_dim of layer {i}": conv and config.linear_conv_kernel_dim,
                f"linear_use_output_gate of layer {i}": config.uses_output_gate(i),
                f"linear_output_gate_act of layer {i}": config.uses_output_gate(i) and config.linear_output_gate_act,
                f"linear_use_lower_bound of layer {i}": "hgrn" in config.mixers[i] and config.linear_use_lower_bound,
                f"linear_allow_neg_eigval of layer {i}": config.linear_allow_neg_eigval,
            }
    return out


__all__ = ["config_from_fla", "config_to_fla", "with_defaults"]
