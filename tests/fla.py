"""Checkpoints in fla's format for the tests: the recorded ones (see fixtures/fla/README.md), damaged copies, new ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

FIXTURES = Path(os.environ.get("HYBRID_LINEAR_FIXTURES", Path(__file__).parent / "fixtures" / "fla"))
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.safetensors"))
assert CASES, f"no recorded checkpoints in {FIXTURES}; HYBRID_LINEAR_FIXTURES names another folder"


def expected(case: str) -> dict[str, torch.Tensor]:
    """Inputs, and what fla computed from them."""
    return load_file(FIXTURES / case / "expected.safetensors")


def copy_of(case: str, folder: Path, config: dict | None = None, tensors=None, **safetensors_options) -> Path:
    """A copy of a recorded checkpoint in ``folder``.

    Args:
        config: keys to set in config.json; a value of ``...`` removes the key.
        tensors: changes the dictionary of weights in place, or returns a new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = json.loads((FIXTURES / case / "config.json").read_text())
    raw |= config or {}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    if tensors is None:
        shutil.copyfile(FIXTURES / case / "model.safetensors", folder / "model.safetensors")
    else:
        weights = load_file(FIXTURES / case / "model.safetensors")
        weights = tensors(weights) or weights
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shard(folder: Path) -> Path:
    """Split model.safetensors in two, with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def add_tokenizer(folder: Path, vocab_size: int, llama: bool = False) -> Path:
    """A BPE tokenizer of at most ``vocab_size`` tokens: byte-level, or like Llama's, with <unk>, <s> and </s>."""
    special = ["<unk>", "<s>", "</s>"]
    text = [Path(__file__).read_text(encoding="utf-8")] * 2
    if llama:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = decoders.Strip(" ", 1, 0)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
        )
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special + alphabet, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    tokenizer.train_from_iterator(text, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {
        "tokenizer_class": "LlamaTokenizer" if llama else "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
