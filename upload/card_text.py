"""The words of a card: a record as what the template fills in. Every figure comes from the record.

>>> from upload.card_text import context
>>> from upload.suite import load
>>> one = load()["1.3B-100B-HGRN2-hybrid-12-1"]
>>> context(one, [])["layer_sentence"]
'Full attention at layers 11, 23, counted from 0. "12-1" is one attention layer in every 12, so the ratio of linear to full layers is 11:1.'
"""

from __future__ import annotations

import configparser
from pathlib import Path

import yaml

from hybrid_models import HybridLinearConfig
from hybrid_models.info import human_bytes

from .metadata import LIBRARY, LICENSE, PIPELINE
from .results_text import EVALUATIONS, HEADLINES, headline, model_index, own_results, section, table, value_text
from .suite import CHECKOUT

PAPER = ("A Systematic Analysis of Hybrid Linear Attention", "2507.06457")
# What a mixer is, in half a sentence, and the paper that it is from.
MIXERS = {
    "DeltaNet": ("a matrix state per head, written by the delta rule, without decay", "2406.06484"),
    "GatedDeltaNet": (
        "a matrix state per head, decayed by a learned scalar and written by the delta rule",
        "2412.06464",
    ),
    "GLA": ("a matrix state per head, with a learned decay for every key channel", "2312.06635"),
    "HGRN": ("a vector state, with a learned forget gate for every channel", "2311.04823"),
    "HGRN2": ("a matrix state per head, with a learned forget gate that is also the key", "2404.07904"),
    "RetNet": ("a matrix state per head, with a fixed decay for every head", "2307.08621"),
}
SUITES = {
    "paper": dict(language=["en"], text="English web text", prompt="The most surprising thing about the sea is"),
    "nano": dict(language=["en"], text="Python source code", prompt="def read(self, path):\n"),
}
NAMES = {  # of a recipe's fields, where the field's own name does not say it
    "adam_beta1": "Adam beta 1",
    "adam_beta2": "Adam beta 2",
    "adam_epsilon": "Adam epsilon",
    "batch_tokens": "tokens per step",
    "bf16": "bfloat16 mixed precision",
    "boundaries": "documents of a row kept apart",
    "initializer_range": "standard deviation of initial weights",
    "lanes": "streams that rows are dealt from in turn",
    "max_grad_norm": "gradient clipping (norm)",
    "min_lr_ratio": "last learning rate, of the peak",
    "num_attention_heads": "attention heads",
}


def context(
    record: dict,
    family: list[dict],
    root: str | Path = CHECKOUT,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    bundled: bool = False,
) -> dict:
    """All variables of ``model_cards/template.md.j2``.

    Args:
        record: from ``suite.records``.
        family: records of the cells of the same size and mixer, and of the Transformers, for comparison.
        root: the checkout, for the versions that are needed.
        repo_id, revision: what the example loads; as of ``card.files``.
        bundled: the card lies in a repository of the model's own, not in the checkout.
    """
    root = Path(root)
    trained = record["provenance"]["status"] == "trained"
    results = [{**one, "link": result_link(one["file"], bundled)} for one in own_results(record)]
    by_evaluation: dict[str, list[dict]] = {}
    for one in results:
        by_evaluation.setdefault(one["evaluation"], []).append(one)
    return dict(
        front_matter=_front_matter(record),
        cell=record["cell"],
        sentence=_sentence(record, trained),
        trained=trained,
        facts=_facts(record),
        repo=repo_id or (record["cell"] if bundled else f"runs/{record['cell']}"),
        pinned=f', revision="{revision}"' if revision else "",
        where=_where(record, repo_id, bundled),
        prompt=_quoted(SUITES[record["suite"]]["prompt"]),
        requirements=requirements(root),
        picture="".join("█" if kind == "A" else "░" for kind in record["layers"]),
        mixer_note=f" ({record['mixer']})" if record["mixer"] else "",
        layer_sentence=_layer_sentence(record),
        plot=plot_path(record),
        plot_title=f"Cache of one sequence against its length, {record['size']}",
        memory=_memory_table(record),
        family=_family_table(record, family),
        sections=[section(name, by_evaluation[name]) for name in _ordered(by_evaluation)],
        not_evaluated=[
            one.title[0].lower() + one.title[1:] for name, one in EVALUATIONS.items() if name not in by_evaluation
        ],
        training=_training(record, trained),
        deviations=[
            f"{name} {both['run']!r}, not {both['recipe']!r}"
            for name, both in record["provenance"].get("deviations", {}).items()
        ],
        stated=_recipe_rows(record, "stated"),
        assumed=_recipe_rows(record, "assumed"),
        provenance=_provenance(record),
        checksums=_checksums(record),
        aliases=record["aliases"],
        defects=record["known_defects"],
        limits=_limits(record),
        paper_title=PAPER[0],
        paper_url=f"https://arxiv.org/abs/{PAPER[1]}",
        mixer_cite=_mixer_cite(record),
    )


def of_run(record: dict, field: str):
    """A field of the recipe as the run had it, which may deviate."""
    deviation = record["provenance"].get("deviations", {}).get(field)
    return deviation["run"] if deviation else record[field]


def _text(record: dict) -> str:
    """What the model was trained on, in words."""
    deviation = record["provenance"].get("deviations", {}).get("dataset")
    return f"`{deviation['run']}`" if deviation else SUITES[record["suite"]]["text"]


def requirements(root: Path) -> str:
    """Python and the packages of the installed code with their least versions, from setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    wanted = [line.split(",")[0] for line in setup["options"]["install_requires"].split("\n") if ">=" in line]
    shown = [f"Python{setup['options']['python_requires']}", *wanted]
    *first, last = [one.replace(">=", " ") for one in shown]
    return f"{', '.join(first)} and {last}, or newer"


def arxiv_ids(record: dict) -> set[str]:
    """The papers that a card names."""
    return {PAPER[1]} | ({MIXERS[record["mixer"]][1]} if record["mixer"] else set())


def plot_path(record: dict) -> str:
    """Of the picture, beside the card; a Transformer's shows it beside GatedDeltaNet's hybrids."""
    return f"memory/{record['size']}-{record['mixer'] or 'GatedDeltaNet'}.svg"


def result_link(file: str, bundled: bool) -> str:
    """Of a result file: within a repository of the model's own, or from a card in model_cards/rendered."""
    path = Path(file)
    return f"results/{path.name}" if bundled else f"../results/{path.parent.name}/{path.name}"


def _where(record: dict, repo_id: str | None, bundled: bool) -> str:
    """What the example's path is, and what it needs."""
    cell = record["cell"]
    if repo_id:
        place = "The repository"
    elif bundled:
        place = f"`{cell}` is this repository's own folder; on the Hub its owner's name comes before it. It"
    else:
        place = (
            f"`runs/{cell}` is where `python -m training.train --cell {cell}` puts the model; it is not on the Hub. It"
        )
    return f"{place} carries the code that runs the model, which `trust_remote_code=True` allows."


def _ordered(names) -> list[str]:
    return [name for name in EVALUATIONS if name in names] + sorted(set(names) - EVALUATIONS.keys())


def _quoted(text: str) -> str:
    """A Python string literal in double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _front_matter(record: dict) -> str:
    kind = record["mixer"] or "Transformer"
    data = {
        "language": SUITES[record["suite"]]["language"],
        "library_name": LIBRARY,
        "license": LICENSE,
        "pipeline_tag": PIPELINE,
        "tags": [
            "hybrid-linear-attention",
            kind.lower(),
            record["level"],
            *sorted(f"arxiv:{i}" for i in arxiv_ids(record)),
        ],
    }
    if "/" in record["dataset"] and "dataset" not in record["provenance"].get("deviations", {}):  # on the Hub
        data["datasets"] = [record["dataset"]]
    if index := model_index(record, _text(record)):
        data["model-index"] = [{"name": record["cell"], "results": index}]
    return yaml.safe_dump(data, sort_keys=True, allow_unicode=True)


def _sentence(record: dict, trained: bool) -> str:
    n, full = len(record["layers"]), len(record["attention_layers"])
    about = f"language model of {_millions(record['parameters'])} parameters"
    if not record["mixer"]:
        kind = f"A Transformer {about}, the baseline of the suite: all {n} layers are attention layers. It is one of six seeds"
    elif full:
        kind = f"A hybrid {about}: {n - full} of {n} layers are {record['mixer']} ({MIXERS[record['mixer']][0]}), {full} full attention"
    else:
        kind = f"A {about} without attention: all {n} layers are {record['mixer']} ({MIXERS[record['mixer']][0]})"
    verb = "trained from scratch" if trained else "to be trained from scratch"
    return f"{kind}, {verb} on {_billions(of_run(record, 'tokens'))} tokens of {_text(record)}."


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.{0 if count >= 1e8 else 1}f} million"


def _billions(count: int) -> str:
    return f"{count / 1e9:g} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _facts(record: dict) -> list[tuple[str, str]]:
    config = HybridLinearConfig.from_dict(record["config"])
    linear, full = record["layers"].count("L"), record["layers"].count("A")
    rows = [
        ("parameters", f"{record['parameters']:,} ({human_bytes(2 * record['parameters'])} in bfloat16)"),
        ("layers", _layers(record)),
        ("width", f"hidden {config.hidden_size:,}, MLP {config.intermediate_size:,}"),
    ]
    if linear:
        dims = config.linear_dims(0)
        shape = (
            f"vector state of {dims.value_head_dim:,} channels"
            if record["mixer"] == "HGRN"
            else f"{dims.num_heads} head{'s' * (dims.num_heads > 1)} with a state of {dims.key_head_dim} x {dims.value_head_dim}"
        )
        conv = f", short convolution over {config.linear_conv_kernel_dim} tokens" if config.uses_short_conv(0) else ""
        rows.append(("linear layer", shape + conv))
    if full:
        rows.append(("attention layer", f"{config.num_attention_heads} heads of {config.head_dim}, rotary positions"))
    rows += [
        (
            "vocabulary",
            f"{config.vocab_size:,} tokens, {'tied' if config.tie_word_embeddings else 'untied'} embeddings",
        ),
        ("training sequences", f"{of_run(record, 'sequence_length'):,} tokens each"),
        ("memory of a sequence", _memory(record)),
        ("licence", "Apache-2.0"),
    ]
    return rows


def _layers(record: dict) -> str:
    linear, full = record["layers"].count("L"), record["layers"].count("A")
    if linear and full:
        return f"{linear} linear attention, {full} full attention ({record['linear_to_full']})"
    return f"{linear} linear attention, none full" if linear else f"{full} full attention"


def _memory(record: dict) -> str:
    parts = [f"{human_bytes(record['state_bytes'])} of states"] if record["state_bytes"] else []
    parts += [f"{human_bytes(record['kv_bytes_per_token'])} per token"] if record["kv_bytes_per_token"] else []
    return " + ".join(parts) + ("" if record["kv_bytes_per_token"] else ", whatever its length")


def _layer_sentence(record: dict) -> str:
    layers = record["attention_layers"]
    if not layers:
        return "No layer attends to single tokens: everything that is remembered stands in the states."
    if len(layers) == len(record["layers"]):
        return "Every layer is full attention."
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
    group = record["level"].removesuffix("-1")
    return (
        f'Full attention at {where}, counted from 0. "{record["level"]}" is one attention layer in every {group}, so the ratio of '
        f"linear to full layers is {record['linear_to_full']}."
    )


def _memory_table(record: dict) -> str:
    header, rows = ["tokens", "keys and values", "states", "together"], []
    for tokens, cache in record["cache_bytes"].items():
        rows.append(
            [
                f"{int(tokens):,}",
                *(human_bytes(cache[name]) if cache[name] else "0" for name in ("kv", "state", "total")),
            ]
        )
        if record["mixer"]:
            other = record["transformer_cache_bytes"][tokens]
            rows[-1].append(f"{human_bytes(other)} ({other / cache['total']:.1f} times)")
    return table(header + (["Transformer"] if record["mixer"] else []), rows, left=0)


def _family_table(record: dict, family: list[dict]) -> str:
    """The headline numbers of this mixer's levels and of the Transformers; empty until two of them have one."""
    shown = [h for h in HEADLINES if sum(headline(one, *h[:3]) is not None for one in family) > 1]
    if not shown:
        return ""
    rows = []
    for one in family:
        values = [found and value_text(found) for *where, _ in shown for found in [headline(one, *where)]]
        if not any(values):
            continue
        name = one["cell"].removeprefix(f"{one['size']}-")
        row = [name, human_bytes(one["cache_bytes"]["32768"]["total"]), *(value or "not evaluated" for value in values)]
        rows.append([f"**{text}**" for text in row] if one is record else row)
    if len(rows) < 2:
        return ""
    return (
        table(["", "cache at 32k", *(label for *_, label in shown)], rows)
        + "\n\nBrackets: 95 % intervals over test items."
    )


def _training(record: dict, trained: bool) -> str:
    batch = of_run(record, "batch_tokens")
    steps = f"{of_run(record, 'tokens') // batch:,} steps of {batch:,} tokens"
    command = f"`python -m training.train --cell {record['cell']}`"
    if not trained:
        return f"Not trained. {command} trains it: {steps}, seed {record['seed']}."
    run = record["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(run["versions"].items()))
    took = f" in {run['seconds'] / 3600:.1f} hours" if run["seconds"] and run["seconds"] >= 3600 else ""
    took = took or (f" in {run['seconds']:.0f} s" if run["seconds"] else "")
    return (
        f"{steps}, seed {', '.join(map(str, run['seeds']))}{took} on {run['device']}, on {run['date']}, with {versions}, "
        f"at commit {run['commit'] or 'unknown'}:\n\n```bash\n{run['command']}\n```"
    )


def _recipe_rows(record: dict, source: str) -> list[tuple[str, str, str]]:
    rows = sorted((name, choice) for name, choice in record["recipe"].items() if choice["source"] == source)
    return [
        (NAMES.get(name, name.replace("_", " ")), _plain(choice["value"]), choice["where"]) for name, choice in rows
    ]


def _plain(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) and value >= 1000 else str(value)


def _provenance(record: dict) -> str:
    statement = record["provenance"]["statement"]
    own = record["provenance"].get("weights_sha256")
    repeats = sorted({one["weights_sha256"] for one in record["results"] if one["weights_sha256"]} - {own})
    if repeats:
        statement += f" The cell was trained {len(repeats)} more time{'s' * (len(repeats) > 1)} with other seeds; those weights are others."
    return statement


def _checksums(record: dict) -> list[tuple[str, str]]:
    own = record["provenance"].get("weights_sha256")
    weights = [("weights (all safetensors files, `hybrid_models.results.weights_sha256`)", own)] if own else []
    return weights + [(Path(one["file"]).name, one["sha256"]) for one in own_results(record)]


def _limits(record: dict) -> list[str]:
    found = [
        f"It has seen {_text(record)} only, and is neither tuned to follow instructions nor aligned; it will state what is false.",
        f"Trained on sequences of {of_run(record, 'sequence_length'):,} tokens; beyond that nothing is promised.",
        "One training run. Differences to its neighbours that are smaller than the spread of the Transformer's six seeds "
        "say nothing.",
    ]
    if not record["mixer"]:
        found[2] = "One of six training runs that differ by their seed alone; their spread is the suite's error bar."
    if record["suite"] == "nano":
        found.insert(
            0,
            "A nano model: it exercises the suite's pipeline and compares architectures; it is of no use beyond that.",
        )
    else:
        found.append(
            "The paper does not state the learning rate and much else (see above), so this is a model by its recipe, not a "
            "reproduction of its weights."
        )
    return found


def _mixer_cite(record: dict) -> str:
    if not record["mixer"]:
        return ""
    return f", the mixer from [arXiv:{MIXERS[record['mixer']][1]}](https://arxiv.org/abs/{MIXERS[record['mixer']][1]})"


__all__ = ["arxiv_ids", "context", "plot_path", "result_link"]
