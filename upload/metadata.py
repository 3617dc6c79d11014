"""What the Hub reads from a card, and the rules that it or its readers expect, checked without it.

The front matter decides how a model is found, loaded and listed, and the Hub checks little of it: a result named twice is
merged, one arXiv link too many becomes a tag, a path of the author's machine goes public. ``problems`` finds these before
a card leaves the checkout.

    >>> from upload.metadata import problems
    >>> problems("# a card without front matter\\n")
    ['there is no front matter: a card begins with a line of three dashes']
"""

from __future__ import annotations

import math
import re
from collections.abc import Container

import yaml
from huggingface_hub import ModelCard

LICENSE, LIBRARY, PIPELINE = "apache-2.0", "transformers", "text-generation"
ARXIV = re.compile(r"arxiv(?:\.org/(?:abs|pdf)/|:)(\d{4}\.\d{4,5})", re.IGNORECASE)
# Relative targets of Markdown links and pictures; another scheme or an anchor is not one.
LINKS = re.compile(r"\]\((?!https?://|#|mailto:)([^)\s]+)\)")
LEAKS = {
    "an access token": re.compile(r"hf_[A-Za-z0-9]{20,}"),
    "a private key": re.compile(r"BEGIN [A-Z ]*PRIVATE KEY"),
    "a path of somebody's home": re.compile(r"(?<![\w.])/(?:home|root|Users)/\S*"),
    "something left unfilled": re.compile(r"\[More Information Needed\]|\{\{|\{%|\bTODO\b"),
}


def front_matter(text: str) -> dict:
    """The card's metadata.

    Raises:
        ValueError: there is none, or it is not a YAML mapping.
    """
    parts = text.split("---\n", 2)
    if len(parts) != 3 or parts[0]:
        raise ValueError("there is no front matter: a card begins with a line of three dashes")
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise ValueError(f"the front matter is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("the front matter is not a mapping of fields")
    return found


def problems(text: str, *, arxiv: set[str] | None = None, files: Container[str] | None = None) -> list[str]:
    """What is wrong with a card, one sentence each; empty for a good one.

    Args:
        text: of the README.md.
        arxiv: papers that the card means to name; every other id in it would become a tag all the same.
        files: paths that relative links may point to.
    """
    try:
        data = front_matter(text)
    except ValueError as error:
        return [str(error)]
    found = []
    for field, value in (("license", LICENSE), ("library_name", LIBRARY), ("pipeline_tag", PIPELINE)):
        if data.get(field) != value:
            found.append(f"{field} is {data.get(field)!r}, not {value!r}")
    languages, datasets = data.get("language"), data.get("datasets", [])
    if not languages or not all(re.fullmatch(r"[a-z]{2,3}", str(one)) for one in languages):
        found.append(f"language {languages!r} is not a list of ISO 639 codes")
    if not all(re.fullmatch(r"[\w.-]+/[\w.-]+", str(one)) for one in datasets):
        found.append(f"datasets {datasets!r} are not ids of the Hub")
    if not all(isinstance(tag, str) and tag for tag in data.get("tags", [None])):
        found.append(f"tags {data.get('tags')!r} are not a list of words")
    found += _index_problems(data)
    if not found and ModelCard(text).data.to_dict() != data:
        found.append("the Hub's own reader gets other metadata than the text has: results may have been merged")
    if arxiv is not None and (named := set(ARXIV.findall(text))) != arxiv:
        found.append(f"arXiv ids in the card: {sorted(named)}, meant: {sorted(arxiv)}")
    if files is not None:
        found += [f"the link to {path} leads nowhere" for path in LINKS.findall(text) if path not in files]
    found += [f"it holds {what}: {match[0][:12]}..." for what, rule in LEAKS.items() if (match := rule.search(text))]
    if not text.endswith("\n"):
        found.append("the last line has no end")
    return found


def _index_problems(data: dict) -> list[str]:
    """Of the model-index, where there is one: shape, finite numbers, nothing that the Hub would merge."""
    if "model-index" not in data:
        return []
    found, seen = [], set()
    for model in data["model-index"]:
        if not model.get("name"):
            found.append("model-index has a model without a name")
        for entry in model.get("results", []):
            dataset = entry.get("dataset", {})
            if not entry.get("task", {}).get("type") or not dataset.get("type") or not dataset.get("name"):
                found.append(f"model-index has a result without task type, dataset type or dataset name: {entry}")
                continue
            key = (entry["task"]["type"], dataset["type"], dataset.get("config"), dataset.get("split"))
            if key in seen:
                found.append(f"model-index has {key} twice, which the Hub merges")
            seen.add(key)
            for metric in entry.get("metrics", []):
                value = metric.get("value")
                if not metric.get("type") or isinstance(value, bool) or not isinstance(value, (int, float)):
                    found.append(f"model-index has a metric without type or number: {metric}")
                elif not math.isfinite(value):
                    found.append(f"model-index has the number {value}")
    return found


__all__ = ["front_matter", "problems"]
