"""Hybrid linear-attention language models for transformers.

Importing this package registers model_type ``hybrid_linear`` with the Auto classes:

    >>> import hybrid_models
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("path/or/repo")  # doctest: +SKIP
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

from .configuration_hybrid_linear import HybridLinearConfig, layer_types_from_ratio
from .fla_format import from_fla
from .modeling_hybrid_linear import (
    HybridLinearForCausalLM,
    HybridLinearForQuestionAnswering,
    HybridLinearForSequenceClassification,
    HybridLinearForTokenClassification,
    HybridLinearModel,
    HybridLinearPreTrainedModel,
)

__version__ = "0.1.0"


def _register() -> None:
    model_type = HybridLinearConfig.model_type
    AutoConfig.register(model_type, HybridLinearConfig, exist_ok=True)
    HybridLinearConfig.register_for_auto_class()
    for auto_class, model_class in (
        (AutoModel, HybridLinearModel),
        (AutoModelForCausalLM, HybridLinearForCausalLM),
        (AutoModelForSequenceClassification, HybridLinearForSequenceClassification),
        (AutoModelForTokenClassification, HybridLinearForTokenClassification),
        (AutoModelForQuestionAnswering, HybridLinearForQuestionAnswering),
    ):
        auto_class.register(HybridLinearConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)  # save_pretrained then copies the code
    # The Trainer decides by class name whether label smoothing has to shift the labels.
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = HybridLinearForCausalLM.__name__
    modeling_auto.MODEL_MAPPING_NAMES[model_type] = HybridLinearModel.__name__


_register()

__all__ = [
    "HybridLinearConfig",
    "HybridLinearForCausalLM",
    "HybridLinearForQuestionAnswering",
    "HybridLinearForSequenceClassification",
    "HybridLinearForTokenClassification",
    "HybridLinearModel",
    "HybridLinearPreTrainedModel",
    "from_fla",
    "layer_types_from_ratio",
]
