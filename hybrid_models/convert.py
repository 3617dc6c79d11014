"""`hybrid-linear convert`: an fla checkpoint becomes a native one, or the other way round, tensor by tensor.

    hybrid-linear convert m-a-p/340M-20B-GatedDeltaNet-pure-baseline runs/gdn          fla -> native
    hybrid-linear convert runs/gdn runs/gdn-fla --to fla                               native -> fla
    hybrid-linear convert runs/gdn runs/gdn-bf16 --dtype bfloat16                      native -> native, half the size

A native checkpoint is complete: weights, the code that runs it (for trust_remote_code), tokenizer with a pad token and
padding on the left, generation_config.json, and provenance.json, which says what it was made of: source and revision,
sha256 of the source's files, versions, repairs, and what the way back to fla needs to be identical.

Memory is that of the largest tensor, a few times over, whatever the model's size. An interrupted run leaves no
DESTINATION; running it again starts anew and finishes.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .checkpoint import DTYPE_NAMES, LazyTensor, finished_or_absent, write_json, write_weights
from .configuration_hybrid_linear import HybridLinearConfig
from .fla_format import FLOAT32, Checkpoint, open_checkpoint, tensors_to_fla
from .info import human_bytes
from .modeling_hybrid_linear import AUTO_MAP, HybridLinearForCausalLM

logger = logging.get_logger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt "
    "merges.txt spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json"
).split()
CARRIED = [*TOKENIZER_FILES, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"]
SAMPLE_TEXT = 'The robot = "Robert" cost 1,234.5 naïve €;\n\tif x != y:  # two  spaces\n中文 работа 🙂'
PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "huggingface-hub")


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    to: str = "native",
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    **download,
) -> Path:
    """Write the checkpoint ``source``, native or fla's, to the folder ``destination`` in the layout ``to``.

    Args:
        to: "native" or "fla".
        dtype: of the weights; default: as they are. Decay parameters (A_log, dt_bias, lower_bounds) stay in float32.
        max_shard_size: bytes, or a text such as "5GB".
        overwrite: replace what ``destination`` holds.
        download: revision, subfolder, token, cache_dir, local_files_only, force_download, proxies.

    Returns:
        ``destination``.

    Raises:
        ValueError: the source is damaged or not supported, or the layout cannot express it.
        FileExistsError: ``destination`` holds something.
        OSError: the source cannot be found, or the disk is full.
    """
    return write_checkpoint(
        open_checkpoint(source, **download).check(),
        destination,
        to,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )


def write_checkpoint(
    checkpoint: Checkpoint,
    destination: str | os.PathLike,
    to: str = "native",
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """As ``convert``, for a checkpoint that is open already."""
    if to not in ("native", "fla"):
        raise ValueError(f"to={to!r}: use 'native' or 'fla'.")
    config, tensors = copy.deepcopy(checkpoint.config), dict(checkpoint.tensors)
    if dtype is not None:
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype not in DTYPE_NAMES:
            raise ValueError(
                f"dtype={dtype}: use one of {', '.join(str(d).removeprefix('torch.') for d in DTYPE_NAMES)}."
            )
        tensors = {name: t if name.endswith(FLOAT32) else t.to(dtype) for name, t in tensors.items()}
    config.dtype = dtype or config.dtype or tensors["model.embed_tokens.weight"].dtype
    provenance = {"source": _source(checkpoint), "versions": _versions(), "repairs": [], **checkpoint.record}

    raw = None
    if to == "fla":
        tensors, raw = tensors_to_fla(tensors, config, checkpoint.record.get("fla"))
    _check_space(Path(destination), tensors)
    with finished_or_absent(destination, overwrite) as folder:
        write_weights(tensors, folder, max_shard_size)
        for name, path in checkpoint.files.get(*CARRIED).items():
            shutil.copyfile(path, folder / name)
        generation = _generation_config(checkpoint)
        if to == "native":
            provenance["tokenizer"] = _complete_tokenizer(folder, config)
            if generation.pad_token_id is None:
                generation.pad_token_id = config.pad_token_id
        generation.save_pretrained(folder)
        write_json(folder / "provenance.json", provenance)
        # Last of all, what makes the folder a model.
        if to == "native":
            custom_object_save(HybridLinearForCausalLM, folder)
            config.architectures = [HybridLinearForCausalLM.__name__]
            config.auto_map = dict(AUTO_MAP)
            config.save_pretrained(folder)
        else:
            write_json(folder / "config.json", raw)
    return Path(destination)


def _source(checkpoint: Checkpoint) -> dict:
    files = checkpoint.files
    return {
        "name": files.name,
        "revision": files.revision,
        "layout": checkpoint.layout,
        "files": files.hashes(["config.json", *files.weight_files(), "provenance.json", *CARRIED]),
    }


def _versions() -> dict[str, str]:
    own = sys.modules[__package__].__version__
    return {"hybrid_models": own} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _check_space(destination: Path, tensors: dict[str, LazyTensor]) -> None:
    parent = Path(os.path.abspath(destination)).parent
    while not parent.exists():
        parent = parent.parent
    needed, free = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(f"{destination} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there.")


def _generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    stored = checkpoint.files.json("generation_config.json")
    return GenerationConfig.from_dict(stored) if stored else GenerationConfig.from_model_config(checkpoint.config)


def _complete_tokenizer(folder: Path, config: HybridLinearConfig) -> dict | None:
    """Give the tokenizer in ``folder`` a pad token and padding on the left, and ``config`` the pad token's id.

    A batch of prompts needs both. The token is unk where there is one: a byte-level or byte-fallback vocabulary never
    produces it, while padding with eos teaches a fine-tuned model not to stop (collators mask the pad token).

    And it must give the ids that the model was trained on, those of tokenizer.json. transformers 5 builds some classes
    (LlamaTokenizer) anew from the vocabulary, and then " = Robert" loses its first piece; the generic class does not.

    Returns:
        what was set, for provenance.json; None without a tokenizer.
    """
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return None
    settings, changed = json.loads(path.read_text(encoding="utf-8")), {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=HybridLinearConfig())
        if ids_differ(tokenizer, folder / "tokenizer.json"):
            changed["tokenizer_class"] = "PreTrainedTokenizerFast"
            write_json(path, settings | changed)
            tokenizer = AutoTokenizer.from_pretrained(folder, config=HybridLinearConfig())
    except Exception as error:  # whatever the tokenizer's own library raises; the model is none the worse for it
        logger.warning(f"The tokenizer was carried over as it is, because it does not load: {error}")
        return None
    if tokenizer.pad_token is None:
        pad = tokenizer.unk_token or tokenizer.eos_token
        if pad is None:
            logger.warning(
                "The tokenizer has no pad token, and neither unk nor eos to take its place: batches need one."
            )
        else:
            tokenizer.pad_token = changed["pad_token"] = pad
    if settings.get("padding_side") != "left":
        changed["padding_side"] = "left"
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    write_json(path, settings | changed)
    special = folder / "special_tokens_map.json"
    if special.exists() and "pad_token" in changed:
        write_json(special, json.loads(special.read_text(encoding="utf-8")) | {"pad_token": changed["pad_token"]})
    return changed


def ids_differ(tokenizer, path: Path) -> bool:
    """Whether a loaded tokenizer gives other ids than the tokenizer.json at ``path``; False where there is none."""
    if not path.exists():
        return False
    plain = Tokenizer.from_file(str(path))
    return any(
        plain.encode(text, add_special_tokens=False).ids != tokenizer(text, add_special_tokens=False).input_ids
        for text in (" = Robert", SAMPLE_TEXT)
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="checkpoint folder or Hub repository, fla's or native")
    parser.add_argument("destination", help="folder to write; must not exist")
    parser.add_argument("--to", choices=("native", "fla"), default="native", help="layout to write (default: native)")
    parser.add_argument("--dtype", help="of the weights: float32, bfloat16, float16 (default: as they are)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (default: 5GB)")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--overwrite", action="store_true", help="replace what DESTINATION holds")


def run(args: argparse.Namespace) -> int:
    written = convert(
        args.source,
        args.destination,
        args.to,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        revision=args.revision,
    )
    size = sum(path.stat().st_size for path in written.iterdir())
    print(f"{written}: {args.to} checkpoint, {human_bytes(size)}; what it was made of is in provenance.json.")
    return 0


__all__ = ["add_arguments", "convert", "ids_differ", "run", "write_checkpoint"]
