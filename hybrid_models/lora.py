"""LoRA on both kinds of layer, and a count that says so (peft is imported only when a function here is called).

    >>> from hybrid_models import HybridLinearConfig, HybridLinearForCausalLM
    >>> from hybrid_models.lora import lora_config, lora_report
    >>> model = HybridLinearForCausalLM(HybridLinearConfig(hidden_size=64, num_hidden_layers=6, vocab_size=100))
    >>> config = lora_config(model, r=16, lora_alpha=32)   # logs the line that the report below shows
    >>> from peft import get_peft_model
    >>> print(lora_report(get_peft_model(model, config)))
    LoRA: 5 of 5 linear_attention layers (25 modules), 1 of 1 full_attention layers (4 modules), MLPs of 6 of 6 layers (18 modules)

peft skips a target name that a layer does not have, without a word. In a hybrid that is how one kind of layer stays
frozen while the loss looks fine (huggingface/peft issue 3554), so ``lora_config`` raises when it would happen.

Why these modules by default:
  * Every wide projection of the mixers and of attention, and the MLP: LoRA on all linear layers of a block is what
    matches full fine-tuning (QLoRA, arXiv 2305.14314, section 4), and leaving the MLP out costs the most (Schulman et
    al., "LoRA Without Regret", 2025). f_proj of HGRN and HGRN-2 is such a projection: it makes the key as well.
  * Not a_proj, b_proj (one number per head) and gk_proj (rank 16 already): an adapter of usual rank is larger than the
    weight, and they set decay and write strength, where LoRA on state-space models was found not to help
    (arXiv 2410.09016). ``target_modules="all-linear"`` has them; ``modules_to_save=["a_proj", "b_proj"]`` trains them
    in full.
"""

from __future__ import annotations

import copy
import os
import re
from typing import NamedTuple

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

MIXER_MODULES = ("q_proj", "k_proj", "v_proj", "i_proj", "f_proj", "g_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
TARGET_MODULES = MIXER_MODULES + MLP_MODULES

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_PART = re.compile(r"(?:^|\.)layers\.(\d+)\.(linear_attn|self_attn|mlp)\.")


class Part(NamedTuple):
    """How much of one kind of block has adapters."""

    layers: list[int]  # that have one
    of: list[int]  # all there are
    modules: int


class LoraReport(NamedTuple):
    """``mixers`` by kind of layer ("linear_attention", "full_attention"; with several mixers "linear_attention (gla)"),
    the MLPs of all layers, and the names of adapted modules elsewhere (lm_head, for one). ``str()`` is one line."""

    mixers: dict[str, Part]
    mlp: Part
    other: list[str]

    def __str__(self) -> str:
        parts = [
            f"{len(p.layers)} of {len(p.of)} {kind} layers ({p.modules} modules)" for kind, p in self.mixers.items()
        ]
        parts.append(f"MLPs of {len(self.mlp.layers)} of {len(self.mlp.of)} layers ({self.mlp.modules} modules)")
        if self.other:
            parts.append(f"{len(self.other)} elsewhere ({', '.join(self.other)})")
        return "LoRA: " + ", ".join(parts)


def lora_config(model, **lora_kwargs):
    """A peft ``LoraConfig`` for a hybrid model that adapts linear and full attention alike; logs how many layers it hits.

    Args:
        model: any model of this family, as it is; a PeftModel stands for its base model.
        lora_kwargs: arguments of LoraConfig. ``target_modules`` defaults to those of ``TARGET_MODULES`` that the model
            has, ``task_type`` to the model's own; the rest keeps peft's defaults.

    Raises:
        ValueError: one kind of layer would get adapters and another none; or the model is of another family.
    """
    from peft import LoraConfig

    model = _base(model)
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    lora_kwargs.setdefault("target_modules", [name for name in TARGET_MODULES if name in present])
    lora_kwargs.setdefault(
        "task_type", next((t for end, t in _TASKS.items() if type(model).__name__.endswith(end)), None)
    )
    config = LoraConfig(**lora_kwargs)

    report = lora_report(_rehearse(model, config))
    _refuse_one_sided(model, config, report)
    if int(os.environ.get("RANK", 0)) == 0:
        # A warning, because that is what a notebook shows by default, and frozen layers are worth a line.
        logger.warning(str(report))
    return config


def lora_report(model) -> LoraReport:
    """Count the adapted modules of a model that already has adapters (``get_peft_model`` or ``model.add_adapter``)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = _base(model).config
    kinds = _kinds(config)
    hits: dict[str, list[int]] = {kind: [] for kind in dict.fromkeys([*kinds, "mlp"])}
    other = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            place = _PART.search(name)
            if place is None:
                other.append(name.removeprefix("base_model.model."))
            else:
                layer = int(place[1])
                hits["mlp" if place[2] == "mlp" else kinds[layer]].append(layer)

    def part(kind, of):
        return Part(sorted(set(hits[kind])), of, len(hits[kind]))

    mixers = {kind: part(kind, [i for i, k in enumerate(kinds) if k == kind]) for kind in dict.fromkeys(kinds)}
    return LoraReport(mixers, part("mlp", list(range(len(kinds)))), other)


def _base(model):
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(model.config, "model_type", None) != "hybrid_linear":
        raise ValueError(
            f"{type(model).__name__} is a {model.config.model_type} model, but this knows the layers of hybrid_linear only: "
            "use peft.LoraConfig."
        )
    return model


def _kinds(config) -> list[str]:
    """A name per layer under which it is counted."""
    linear = {mixer for mixer, kind in zip(config.mixers, config.layer_types) if kind == "linear_attention"}
    return [
        f"{kind} ({mixer})" if kind == "linear_attention" and len(linear) > 1 else kind
        for mixer, kind in zip(config.mixers, config.layer_types)
    ]


def _rehearse(model, config):
    """A copy of the model without memory (meta device), adapted: which modules are hit is peft's own answer."""
    from peft import LoraConfig, inject_adapter_in_model

    which = (
        "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save target_parameters task_type"
    ).split()
    chosen = {name: copy.deepcopy(getattr(config, name)) for name in which}
    with torch.device("meta"):
        bare = type(model)(copy.deepcopy(model.config))
        return inject_adapter_in_model(LoraConfig(**chosen, init_lora_weights=False), bare)


def _refuse_one_sided(model, config, report: LoraReport) -> None:
    """Raise if some kind of layer gets nothing while another gets something, among the layers that were asked for."""
    wanted = config.layers_to_transform
    wanted = set(report.mlp.of if wanted is None else [wanted] if isinstance(wanted, int) else wanted)
    asked = {kind: part for kind, part in report.mixers.items() if not wanted.isdisjoint(part.of)}
    missed = [kind for kind, part in asked.items() if not part.modules]
    if not missed or len(missed) == len(asked):  # none at all (the MLP alone) treats the layers alike
        return
    layers = _base(model).base_model.layers
    remedies = []
    for kind in missed:
        mixer = getattr(layers[asked[kind].of[0]], "self_attn" if kind == "full_attention" else "linear_attn")
        has = [name for name, module in mixer.named_modules() if isinstance(module, torch.nn.Linear)]
        remedies.append(
            f"no {kind} layer is hit ({len(asked[kind].of)} of them; their projections are {', '.join(has)})"
        )
    raise ValueError(
        f"target_modules={config.target_modules!r} would adapt only a part of this hybrid: {'; '.join(remedies)}. Leave "
        "target_modules away, add some of these, or build peft.LoraConfig yourself if this is what you want."
    )


__all__ = ["MIXER_MODULES", "MLP_MODULES", "TARGET_MODULES", "LoraReport", "lora_config", "lora_report"]
