"""The picture of memory against context that a card shows: one SVG per size and mixer, all levels in it.

It is drawn from the configurations alone, by a template of twenty lines (``model_cards/memory.svg.j2``): the same bytes on
every machine and with every version of everything, so that a committed picture can be checked, and 4 kB each.

    >>> from upload.plot import memory_svg
    >>> memory_svg("1.3B-100B", "GLA").startswith("<svg")
    True
"""

from __future__ import annotations

import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hybrid_models.info import expected_cache_bytes, human_bytes
from hybrid_models.suite import Cell

from .suite import CHECKOUT, DTYPE

TEMPLATES = Path("model_cards")
TEMPLATE = "memory.svg.j2"
LEVELS = ("pure", "24-1", "12-1", "6-1", "3-1", "full")
LEFT, RIGHT, TOP, BOTTOM = 66.0, 500.0, 34.0, 292.0  # of the axes, in the template's pixels
TOKENS = [2.0 ** (power / 2) for power in range(16, 35)]  # 256 to 131,072
COLORS = ("#7db8da", "#56a0ce", "#3787c0", "#1b69af", "#08306b", "#24292f")  # darker with more attention


def environment(templates: str | Path = CHECKOUT / TEMPLATES) -> Environment:
    """Jinja as all templates here expect it: an undefined name is an error, and a block leaves no empty line."""
    return Environment(
        loader=FileSystemLoader(templates),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def memory_svg(size: str, mixer: str, templates: str | Path = CHECKOUT / TEMPLATES) -> str:
    """Cache of one sequence from 256 to 131,072 tokens, for every level of ``mixer`` and for the Transformer."""
    curves = []
    for level in LEVELS:
        config = Cell(size, None if level == "full" else mixer, level, 1 if level == "full" else None).config()
        curves.append([expected_cache_bytes(config, int(tokens), DTYPE).total for tokens in TOKENS])
    low = 4 ** math.floor(math.log(min(map(min, curves)), 4))
    high = 4 ** math.ceil(math.log(max(map(max, curves)), 4))

    def x(tokens: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * math.log(tokens / TOKENS[0], TOKENS[-1] / TOKENS[0]), 1)

    def y(count: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * math.log(count / low, high / low), 1)

    lines, lowest = [], 0.0
    for level, color, curve in reversed(list(zip(LEVELS, COLORS, curves))):
        lowest = max(y(curve[-1]) + 4, lowest + 13)  # labels do not overlap
        lines.append(
            {
                "label": "Transformer" if level == "full" else f"{mixer} {level}",
                "color": color,
                "dashed": level == "full",
                "points": "L".join(f"{x(tokens)} {y(count)}" for tokens, count in zip(TOKENS, curve)),
                "label_at": round(lowest, 1),
            }
        )
    powers = range(round(math.log(low, 4)), round(math.log(high, 4)) + 1)
    return (
        environment(templates)
        .get_template(TEMPLATE)
        .render(
            title=f"Cache of one sequence, {size} {mixer}",
            x_ticks=[{"at": x(256), "label": 256}]
            + [{"at": x(1024 * k), "label": f"{k}k"} for k in (1, 4, 16, 64, 128)],
            y_ticks=[
                {"at": y(4**power), "label": human_bytes(4**power).replace(".00", "").replace(".0", "")}
                for power in powers
            ],
            lines=lines,
        )
    )


__all__ = ["environment", "memory_svg"]
