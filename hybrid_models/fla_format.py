"""Checkpoints of flash-linear-attention (fla): read as they are, converted to this package's layout, and back.

The published models (m-a-p/*, fla-hub/*) were saved by fla's own classes. fla is not needed to read them, nor a GPU:

    >>> from hybrid_models import from_fla
    >>> model = from_fla("m-a-p/340M-20B-GatedDeltaNet-pure-baseline", dtype="auto")  # doctest: +SKIP

or once and for all, ``hybrid-linear convert SRC DST``, after which ``AutoModelForCausalLM.from_pretrained`` takes DST.

Which tensors of the two layouts belong together is one list (``groups``), read in both directions; the configuration is
``fla_config``'s matter. A tensor that is missing or not expected raises, and every such tensor is named. One thing does
not come back from fla -> native -> fla: an MLP saved before February 2025, gate and up in one matrix, returns as two,
which is what fla reads today.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig
from transformers.utils import logging

from .checkpoint import DOWNLOAD, Files, LazyTensor, some, stack
from .configuration_hybrid_linear import HybridLinearConfig
from .fla_config import config_from_fla, config_to_fla, with_defaults
from .mixers import MIXER_CLASSES
from .modeling_hybrid_linear import HybridLinearForCausalLM

logger = logging.get_logger(__name__)

# Parameters that stay in float32 here; fla rounds the last two when a model is loaded in 16 bits.
FLOAT32 = ("A_log", "dt_bias", "lower_bounds")

# --------------------------------------------------------------------------------------------------------------- names


class Group(NamedTuple):
    """Tensors, name -> shape, that are equal in both layouts once concatenated on dimension 0; an empty side has none."""

    native: dict[str, torch.Size]
    fla: dict[str, torch.Size]


def native_shapes(config: HybridLinearConfig) -> dict[str, torch.Size]:
    """The tensors of a native checkpoint of this configuration; nothing is allocated."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in HybridLinearForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def groups(config: HybridLinearConfig, raw: dict, fused_mlp: bool = False) -> list[Group]:
    """Which tensors of the two layouts belong together.

    Args:
        raw: fla's config.json, for the few names that it decides.
        fused_mlp: the file was saved before February 2025, with the MLP's gate and up projections in one matrix.
    """
    fla = with_defaults(raw)
    norm = "o_norm"
    if raw["model_type"] in ("hgrn", "hgrn2"):
        norm = "g_norm"
    elif raw["model_type"] in ("retnet", "gla"):
        norm = "g_norm_swish_gate" if fla["use_output_gate"] and fla["fuse_norm"] else "g_norm"
    shapes, out = native_shapes(config), []
    for name, shape in shapes.items():
        ours, theirs = {name: shape}, {}
        prefix, _, rest = name.partition("linear_attn.")
        if rest == "conv1d.weight":
            i = int(prefix.split(".")[2])
            for projection in MIXER_CLASSES[config.mixers[i]].mixed:
                width = shapes[f"{name.removesuffix('conv1d.weight')}{projection}.weight"][0]
                theirs[f"{prefix}attn.{projection[0]}_conv1d.weight"] = torch.Size((width, *shape[1:]))
        elif rest == "o_norm.weight":
            theirs = {f"{prefix}attn.{norm}.weight": shape} if fla["elementwise_affine"] else {}
        elif fused_mlp and name.endswith("mlp.gate_proj.weight"):
            ours[name.replace("gate_proj", "up_proj")] = shape
            theirs[name] = torch.Size((2 * shape[0], shape[1]))
        elif fused_mlp and name.endswith("mlp.up_proj.weight"):
            continue
        else:
            for old, new in _RENAMED:
                name = name.replace(old, new)
            theirs[name] = shape
        out.append(Group(ours, theirs))
    if fla.get("use_lower_bound") and "model.lower_bounds" not in shapes:  # fla has it even where no layer reads it
        width = int(fla["hidden_size"] * fla["expand_ratio"]) if raw["model_type"] == "hgrn" else fla["hidden_size"]
        out.append(Group({}, {"model.lower_bounds": torch.Size((config.num_hidden_layers, width))}))
    return out


_RENAMED = (
    ("model.embed_tokens.", "model.embeddings."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".mlp_norm."),
    (".self_attn.", ".attn."),
    (".linear_attn.", ".attn."),
)
# What tensors that this version does not read are a sign of.
_HINTS = {
    "attn.norm.weight": "Norms inside the sublayers (norm_first, 2024) are not supported.",
    "mlp.norm.weight": "Norms inside the sublayers (norm_first, 2024) are not supported.",
    "g_norm.bias": "HGRN2 before August 2024 had a bias in its norm, which is not supported.",
    "h_conv1d.weight": "One convolution for q, k and v (share_conv_kernel, 2024) is not supported.",
}


class Translation(NamedTuple):
    """Native tensors made from fla's, and what was found on the way."""

    tensors: dict[str, LazyTensor]
    problems: list[str]  # anything here: do not use the tensors
    dropped: list[str]  # tensors of fla's that no layer reads
    dtypes: dict[str, str]  # dtype in the file of what was widened to float32


def tensors_from_fla(source: dict[str, LazyTensor], config: HybridLinearConfig, raw: dict) -> Translation:
    """Native tensors from those of an fla checkpoint; reads only what has to be looked at to trust the rest."""
    source, problems, dropped, dtypes = dict(source), [], [], {}
    if raw["model_type"] == "gated_deltanet":  # saved until March 2025, never read by any code
        for name in [name for name in source if name.endswith(".attn.D")]:
            if source.pop(name)[...].any():
                problems.append(f"{name} is not zero: no fla of any version reads it, so what trained it is not known.")
            dropped.append(name)
    if config.tie_word_embeddings and "lm_head.weight" in source:
        head, embeddings = source.pop("lm_head.weight"), source.get("model.embeddings.weight")
        dropped.append("lm_head.weight")
        if embeddings is None or head.shape != embeddings.shape or not torch.equal(head[...], embeddings[...]):
            problems.append(
                "tie_word_embeddings=true, but lm_head.weight differs from model.embeddings.weight: which one was meant is "
                "not known. Set tie_word_embeddings to false if the model was trained with both."
            )

    gate = source.get("model.layers.0.mlp.gate_proj.weight")
    fused_mlp = "model.layers.0.mlp.up_proj.weight" not in source and gate is not None
    fused_mlp = fused_mlp and gate.shape[0] == 2 * config.intermediate_size
    wanted, tensors = {}, {}
    for group in groups(config, raw, fused_mlp):
        wanted |= group.fla
        if any(name not in source or source[name].shape != shape for name, shape in group.fla.items()):
            continue  # _compare says so
        for name in group.fla:
            if name.endswith(FLOAT32) and source[name].dtype.itemsize < 4:
                dtypes[name] = str(source[name].dtype).removeprefix("torch.")
        if not group.native:
            dropped += group.fla
        elif not group.fla:  # elementwise_affine=false: a norm without weight
            tensors |= {n: LazyTensor.of(torch.ones(shape, dtype=_usual(source))) for n, shape in group.native.items()}
        else:
            whole, start = stack([source[name] for name in group.fla]), 0
            for name, shape in group.native.items():
                part = whole.rows(start, start + shape[0])
                wide = torch.promote_types(part.dtype, torch.float32)
                tensors[name] = part.to(wide) if name.endswith(FLOAT32) else part
                start += shape[0]
    problems += _compare(source, wanted) + unusable(tensors)
    return Translation(tensors, problems, dropped, dtypes)


def _compare(tensors: dict[str, LazyTensor], wanted: dict[str, torch.Size]) -> list[str]:
    """What is missing, not expected, or of another shape than wanted."""
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    problems = [
        f"{name} has shape {list(tensors[name].shape)}, config.json asks for {list(shape)}."
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {some(missing)}.")
    if unexpected:
        hints = sorted({hint for end, hint in _HINTS.items() if any(name.endswith(end) for name in unexpected)})
        problems.append(" ".join([f"{len(unexpected)} tensors are not expected: {some(unexpected)}.", *hints]))
    return problems


def _usual(tensors: dict[str, LazyTensor]) -> torch.dtype:
    return Counter(t.dtype for t in tensors.values()).most_common(1)[0][0]


def unusable(tensors: dict[str, LazyTensor]) -> list[str]:
    """NaN or Inf among the decay parameters, where one such value makes the whole model useless. Reads only those."""
    out = []
    for name, tensor in tensors.items():
        if name.endswith(FLOAT32) and (count := int((~tensor[...].isfinite()).sum())):
            out.append(f"{name} has {count} values that are NaN or infinite, of {tensor.numel()}.")
    return out


def tensors_to_fla(
    source: dict[str, LazyTensor], config: HybridLinearConfig, record: dict | None = None
) -> tuple[dict[str, LazyTensor], dict]:
    """fla's tensors and config.json from a native checkpoint's.

    Args:
        record: what ``convert`` noted about an fla file on its way in (config, dropped, dtypes), so that it comes out
            identical. Where training has changed what it says (a norm's weights are no longer 1), the tensors win.
    """
    record = record or {}
    raw = config_to_fla(config, record.get("config"))
    if not raw.get("elementwise_affine", True):
        norms = [name for name in source if name.endswith("linear_attn.o_norm.weight")]
        raw["elementwise_affine"] = not all((source[name][...] == 1).all() for name in norms)
    tensors = {}
    for group in groups(config, raw):
        if not group.native:
            tensors |= {name: LazyTensor.of(torch.zeros(shape)) for name, shape in group.fla.items()}
        whole, start = stack([source[name] for name in group.native]) if group.native else None, 0
        for name, shape in group.fla.items() if group.native else ():
            tensors[name] = whole.rows(start, start + shape[0])
            start += shape[0]
    for name, dtype in record.get("dtypes", {}).items():
        narrow = tensors[name].to(getattr(torch, dtype))
        if torch.equal(narrow[...].to(tensors[name].dtype), tensors[name][...]):
            tensors[name] = narrow
    for name in record.get("dropped", ()):
        if name == "lm_head.weight":
            tensors[name] = tensors["model.embeddings.weight"]
        elif name.endswith(".attn.D"):
            heads = tensors[name.removesuffix("D") + "A_log"].shape
            tensors[name] = LazyTensor.of(torch.zeros(heads, dtype=_usual(source)))
    return tensors, raw


# ------------------------------------------------------------------------------------------------------------- loading


@dataclass
class Checkpoint:
    """A checkpoint of either layout, as native tensors that are still in their files."""

    files: Files
    layout: str  # "native" or "fla"
    config: HybridLinearConfig
    tensors: dict[str, LazyTensor]
    problems: list[str]  # anything here: check() raises
    # What happened to it, for provenance.json: repairs, and under "fla" what the way back needs.
    record: dict = field(default_factory=dict)

    def check(self) -> Checkpoint:
        """Raise ValueError with everything that is wrong, if anything is."""
        if self.problems:
            raise ValueError("\n  ".join([f"{self.files.source} cannot be loaded:", *self.problems]))
        return self

    def load(self, **kwargs) -> HybridLinearForCausalLM:
        """The model; ``kwargs`` as for ``from_pretrained``."""
        fields = HybridLinearConfig.__dataclass_fields__.keys() - {"dtype"}  # dtype="auto" is from_pretrained's
        config = copy.deepcopy(self.config)
        for name in [name for name in kwargs if name in fields]:
            setattr(config, name, kwargs.pop(name))
        generation = self.files.json("generation_config.json")
        if generation and kwargs.get("generation_config") is None:
            kwargs["generation_config"] = GenerationConfig.from_dict(generation)
        loaded = HybridLinearForCausalLM.from_pretrained(None, config=config, state_dict=self.tensors, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config._name_or_path = self.files.source
        return loaded


def open_checkpoint(source: str | os.PathLike, **download) -> Checkpoint:
    """Read the configuration and the headers of a native or an fla checkpoint, and compare them.

    Tensors that are missing, unexpected, of a wrong shape or with a NaN in a decay parameter become ``problems``.

    Args:
        source: folder or repo id.
        download: revision, subfolder, token, cache_dir, local_files_only, force_download, proxies.

    Raises:
        ValueError: the configuration is not supported, or the files cannot be read at all.
        OSError: there is nothing there.
    """
    files = Files(source, **download)
    raw = files.json("config.json")
    if raw is None:
        raise FileNotFoundError(f"{source} has no config.json: name a checkpoint's folder or repo id.")
    native = raw.get("model_type") == HybridLinearConfig.model_type
    try:
        config = HybridLinearConfig.from_dict(raw) if native else config_from_fla(raw)
    except StrictDataclassError as error:  # the library's wrapper around a ValueError of ours
        raise ValueError(f"config.json of {source} is not valid: {error.__cause__ or error}") from error
    if native:
        tensors = files.tensors()
        problems = _compare(tensors, native_shapes(config)) + unusable(tensors)
        before = files.json("provenance.json") or {}
        record = {name: before[name] for name in ("repairs", "fla") if name in before}
        return Checkpoint(files, "native", config, tensors, problems, record)
    translation = tensors_from_fla(files.tensors(), config, raw)
    if translation.dropped:
        names = some(translation.dropped, limit=3)
        logger.warning(f"{source}: dropped {len(translation.dropped)} tensors that nothing reads: {names}.")
    record = {"fla": {"config": raw, "dropped": translation.dropped, "dtypes": translation.dtypes}}
    if getattr(config, "repairs", None):
        record["repairs"] = config.repairs
    return Checkpoint(files, "fla", config, translation.tensors, translation.problems, record)


def from_fla(path_or_repo_id: str | os.PathLike, **kwargs) -> HybridLinearForCausalLM:
    """Load a checkpoint that flash-linear-attention saved, as ``from_pretrained`` loads a native one.

    Args:
        path_or_repo_id: folder or Hub repository with fla's config.json and safetensors weights.
        kwargs: as for ``from_pretrained``: dtype ("auto": as saved), device_map, attn_implementation, revision, token,
            cache_dir, local_files_only, quantization_config, ...; fields of HybridLinearConfig override the file's.

    Raises:
        ValueError: the checkpoint is damaged, or says something that this package does not compute; the message names
            the keys and tensors at fault.
        OSError: it cannot be found or downloaded.
    """
    for name in ("config", "state_dict"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: from_fla reads it from the checkpoint. Pass single fields of the configuration instead."
            )
    download = {name: kwargs.pop(name) for name in DOWNLOAD if name in kwargs}
    checkpoint = open_checkpoint(path_or_repo_id, **download).check()
    if checkpoint.layout != "fla":
        raise ValueError(f"{path_or_repo_id} is a native checkpoint: use HybridLinearForCausalLM.from_pretrained.")
    return checkpoint.load(**kwargs)


__all__ = ["Checkpoint", "from_fla", "groups", "native_shapes", "open_checkpoint", "tensors_from_fla", "tensors_to_fla"]
