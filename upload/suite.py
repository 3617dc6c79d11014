"""The suite as data: one record per cell, from its recipe and from result files, and nothing else.

A card may only say what a record says, and a record only what can be traced: the architecture comes from the recipe's
configuration (built here and counted), numbers from result files with their path, digest and command. What no file
measured is not there, and the card writes "not evaluated". Two measurements of one cell on different weights, or a
measurement of a cell that no recorded run has trained, are errors: a card must be about one model.

    >>> from upload.suite import records
    >>> one = next(one for one in records() if one["cell"] == "1.3B-100B-GLA-hybrid-6-1")
    >>> one["attention_layers"], one["linear_to_full"], one["cache_bytes"]["32768"]["kv"]
    ([5, 11, 17, 23], '5:1', 1073741824)

``python -m upload.card`` writes the records to ``model_cards/suite.jsonl`` together with the cards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from hybrid_models import HybridLinearConfig, results
from hybrid_models.info import ModelFacts, describe
from hybrid_models.suite import Cell, parse_cell

CHECKOUT = Path(__file__).resolve().parent.parent
RECIPES = Path("model_cards/recipes.jsonl")
SUITE = Path("model_cards/suite.jsonl")
CONTEXTS = (2048, 32768, 131072)
DTYPE = torch.bfloat16  # of keys, values and convolution windows in every cache figure; states are float32
TRAINING = "training"
# What these measure does not depend on the weights, so they may come from an untrained cell.
WEIGHT_FREE = ("cost",)
# Fields of a result that a record keeps; its details stay in the file.
KEPT = ("evaluation", "weights_sha256", "command", "commit", "date", "device", "seeds", "metrics")


class Defect(NamedTuple):
    """Something known to be wrong with a published counterpart of some cells, or with the code it was run by."""

    what: str
    evidence: str
    mixers: tuple[str, ...] = ()  # empty: any
    hybrids_only: bool = False
    cells: tuple[str, ...] = ()  # empty: any

    def concerns(self, cell: Cell) -> bool:
        return (
            (not self.mixers or cell.mixer in self.mixers)
            and (not self.hybrids_only or cell.level not in ("pure", "full"))
            and (not self.cells or cell.name in self.cells)
        )


# Facts on the paper's own files, all from public reports and from the history of the code that wrote them.
DEFECTS = (
    Defect(
        "Every linear layer has an unused tensor `attn.D`, all zero, which a strict load rejects.",
        "seen in the 1.3B pure file; flash-linear-attention before 12 March 2025 wrote it",
        mixers=("GatedDeltaNet",),
    ),
    Defect(
        "`A_log` and `dt_bias` started at 0 where training ran on several GPUs, so the decay was badly placed.",
        "flame issue 42, fixed in September 2025; user reports",
        mixers=("GatedDeltaNet",),
    ),
    Defect(
        "Perplexity of 378 on fineweb-edu and of 857 to 1177 on WikiText-2, and looping text.",
        "user reports; another user's LAMBADA accuracy of .375 speaks against them",
        cells=("340M-20B-GatedDeltaNet-pure",),
    ),
    Defect(
        "The trainer may have trained only the last tap of the short convolution: it passed positions as sequence numbers.",
        "flame issue 19, fixed on 13 March 2025; whether these files were trained before is not known",
        mixers=("DeltaNet", "GatedDeltaNet"),
    ),
    Defect(
        "Cached decoding put hybrids of this mixer at wrong rotary positions, so the paper's recall scores may be too low.",
        "flash-linear-attention, November 2024 to March 2026",
        mixers=("HGRN",),
        hybrids_only=True,
    ),
    Defect(
        "Cached decoding was one rotary position off.",
        "flash-linear-attention before June 2025 (pull request 478)",
        hybrids_only=True,
    ),
    Defect("No padding token is set, so batches fail to collate.", "published tokenizer and configs"),
)

# Repositories that were seen, where the name is not the plain pattern m-a-p/<cell>.
_PURE_BASELINES = ("GatedDeltaNet", "HGRN2", "HGRN", "GLA")  # 340M; RetNet and DeltaNet end in -pure
_SEEN_1B = {
    "pure": ("GatedDeltaNet", "GLA", "DeltaNet", "RetNet", "HGRN2"),
    "24-1": ("GatedDeltaNet", "RetNet", "HGRN2"),
    "12-1": ("GatedDeltaNet", "GLA", "DeltaNet", "HGRN", "RetNet", "HGRN2"),
    "6-1": ("GatedDeltaNet", "RetNet", "HGRN2"),
    "3-1": ("GatedDeltaNet", "RetNet", "HGRN2", "GLA"),
}


def aliases(cell: Cell) -> list[dict]:
    """Repositories of the paper's own weights for this cell: ``{"repo": ..., "seen": whether anyone reported it}``.

    The paper trained one Transformer of each size; it stands with the first of our six.
    """
    if cell.size not in ("340M-20B", "1.3B-100B"):
        return []
    if cell.mixer is None:
        return [{"repo": f"m-a-p/transformer_{cell.size[:4]}_baseline", "seen": True}] if cell.seed == 1 else []
    name = f"m-a-p/{cell.name}"
    if cell.size == "1.3B-100B":
        return [{"repo": name, "seen": cell.mixer in _SEEN_1B[cell.level]}]
    if cell.level == "pure":
        return [{"repo": name + ("-baseline" if cell.mixer in _PURE_BASELINES else ""), "seen": True}]
    found = [{"repo": name, "seen": True}]
    if (cell.mixer, cell.level) == ("GatedDeltaNet", "24-1"):
        found.append({"repo": "m-a-p/340M-20B-GatedDeltaNet-New-hybrid-24-1", "seen": True})
    return found


def read_recipes(path: str | Path = CHECKOUT / RECIPES) -> list[dict]:
    """The recipes, one per cell, in the file's order.

    Raises:
        ValueError: a line is not JSON, is of no cell of the suite, or is of a cell that came before.
    """
    found: dict[str, dict] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            recipe = json.loads(line)
            name = parse_cell(recipe["cell"]).name
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if name in found:
            raise ValueError(f"{path}, line {number}: {name} has a recipe already; keep one.")
        found[name] = recipe
    return list(found.values())


def records(root: str | Path = CHECKOUT, only: Callable[[Cell], bool] = lambda cell: True) -> Iterator[dict]:
    """The record of every cell that has a recipe, in the recipes' order; errors as in ``record``.

    Args:
        root: the checkout; paths in the records are relative to it.
        only: which cells; all 144 take some ten seconds, since every model is built (without memory) and counted.
    """
    measured: dict[str, list[tuple[Path, dict]]] = {}
    for path, one in results.read_all(Path(root) / results.FOLDER):
        measured.setdefault(one["model"], []).append((path, one))
    for recipe in read_recipes(Path(root) / RECIPES):
        if only(parse_cell(recipe["cell"])):
            yield record(recipe, measured.get(recipe["cell"], []), root)


def record(recipe: dict, measured: list[tuple[Path, dict]], root: str | Path = CHECKOUT) -> dict:
    """One cell's record.

    Args:
        recipe: a line of recipes.jsonl.
        measured: the cell's result files with their paths, as ``results.read_all`` gives them.
        root: what these paths are recorded relative to.

    Raises:
        ValueError: the configuration is not that of the cell, or has other parameters than the recipe says; or
            results are of a model that no recorded run has trained, or of different weights.
    """
    cell = parse_cell(recipe["cell"])
    config = HybridLinearConfig.from_dict(recipe["config"])
    if config.to_diff_dict() != cell.config().to_diff_dict():
        raise ValueError(
            f"{cell.name}: the recipe's config is not the cell's (hybrid_models/suite.py); write it again."
        )
    facts = _facts(json.dumps(recipe["config"], sort_keys=True))
    if facts.parameters != recipe["parameters"]:
        raise ValueError(
            f"{cell.name}: parameters={recipe['parameters']} in the recipe, but the model has {facts.parameters}."
        )
    run = _own_run(cell.name, measured)
    kinds = config.layer_types
    return {
        "cell": cell.name,
        "suite": recipe["suite"],
        "size": cell.size,
        "mixer": cell.mixer,
        "level": cell.level,
        "seed": recipe["seed"],
        "config": recipe["config"],
        "layers": facts.layer_picture,
        "attention_layers": [i for i, kind in enumerate(kinds) if kind == "full_attention"],
        "linear_to_full": facts.linear_to_full,
        "parameters": facts.parameters,
        "kv_bytes_per_token": config.kv_bytes_per_token(DTYPE.itemsize),
        "state_bytes": config.state_bytes(DTYPE.itemsize),
        "cache_bytes": {str(n): {"kv": c.kv, "state": c.state, "total": c.total} for n, c in facts.cache.items()},
        "transformer_cache_bytes": {str(n): c.total for n, c in facts.transformer_cache.items()},
        **{name: recipe[name] for name in ("tokens", "sequence_length", "batch_tokens", "steps", "dataset", "recipe")},
        "provenance": _provenance(cell, recipe, run),
        "aliases": aliases(cell),
        "known_defects": [
            {"what": defect.what, "evidence": defect.evidence}
            for defect in DEFECTS
            if aliases(cell) and defect.concerns(cell)
        ],
        "results": [_kept(path, one, Path(root)) for path, one in measured],
    }


@cache  # the six Transformers of a size are one architecture
def _facts(config: str) -> ModelFacts:
    fields = {**json.loads(config), "dtype": str(DTYPE).removeprefix("torch.")}
    return describe(HybridLinearConfig.from_dict(fields), CONTEXTS)


def _own_run(name: str, measured: list[tuple[Path, dict]]) -> dict | None:
    """The training result whose weights the cell's card is about; None if there is none.

    It is the file without a label. Labelled ones (``training-seed2.json``) are repeats, which may be evaluated too.
    """
    trained = {path: one for path, one in measured if one["evaluation"] == TRAINING}
    for path, one in trained.items():
        if one["weights_sha256"] is None:
            raise ValueError(f"{path} does not say which weights it trained (weights_sha256): write it again.")
    digests = {one["weights_sha256"] for one in trained.values()}
    for path, one in measured:
        if one["evaluation"] not in (TRAINING, *WEIGHT_FREE) and one["weights_sha256"] not in digests:
            raise ValueError(
                f"{path} measured weights {one['weights_sha256']} of {name}, which no {TRAINING}*.json beside it trained: "
                "evaluate the trained checkpoint again."
            )
    return next((one for path, one in trained.items() if path.name == f"{TRAINING}.json"), None)


def _deviations(recipe: dict, run: dict) -> dict:
    """Fields in which a run was not what the recipe says, with both values.

    Raises:
        ValueError: the run built another architecture; its weights are then not this cell's.
    """
    protocol, name = run["protocol"], recipe["cell"]
    trained = protocol.get("config", {})
    ignored = ("transformers_version", "dtype")
    differ = sorted(k for k in trained.keys() & recipe["config"].keys() if trained[k] != recipe["config"][k])
    if differ := [field for field in differ if field not in ignored]:
        raise ValueError(f"{name} was trained with another config ({', '.join(differ)}): train it as the recipe says.")
    wanted = {field: choice["value"] for field, choice in recipe["recipe"].items()}
    return {
        field: {"recipe": value, "run": protocol[field]}
        for field, value in wanted.items()
        if field in protocol and protocol[field] != value
    }


def _provenance(cell: Cell, recipe: dict, run: dict | None) -> dict:
    """Who trained the weights, by what; and what they are not."""
    others = (
        "The paper's own weights of this cell are another training run and are not republished here."
        if aliases(cell)
        else "No weights of this cell were published before."
    )
    if run is None:
        return {"status": "not trained", "statement": f"Not trained: there is no result of a training run. {others}"}
    kept = ("weights_sha256", "command", "commit", "date", "device", "seeds", "seconds", "versions")
    return {
        "status": "trained",
        "statement": f"Trained from scratch by this project. {others}",
        "deviations": _deviations(recipe, run),
        **{name: run.get(name) for name in kept},
    }


def _kept(path: Path, one: dict, root: Path) -> dict:
    return {
        "file": path.relative_to(root).as_posix(),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **{name: one.get(name) for name in KEPT},
    }


def dumps(found: list[dict]) -> str:
    """The text of suite.jsonl."""
    return "".join(json.dumps(one, sort_keys=True, allow_nan=False) + "\n" for one in found)


def load(path: str | Path = CHECKOUT / SUITE) -> dict[str, dict]:
    """The committed records by the cell's name."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return {one["cell"]: one for one in map(json.loads, lines)}


__all__ = ["aliases", "dumps", "load", "read_recipes", "record", "records"]
