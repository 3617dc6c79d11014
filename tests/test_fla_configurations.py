"""How many of fla's kernel configurations are left to try, on a toy kernel of one of fla's names; no GPU, no fla."""

from __future__ import annotations

import sys
import types

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux and Windows")

from hybrid_models import fla_kernels  # noqa: E402
from hybrid_models.fla_kernels import TUNED  # noqa: E402

NAME = "chunk_fwd_kernel_h"  # tiles and warps to choose from
CONFIGS = [
    triton.Config({"BK": size, "BV": size}, num_warps=warps, num_stages=stages)
    for size in (32, 64)
    for warps in (2, 4, 8)
    for stages in (2, 3)
]


@pytest.fixture
def kernel(monkeypatch):
    def chunk_fwd_kernel_h(x, BK, BV):
        pass

    toy = types.ModuleType("fla.toy")
    toy.kernel = triton.autotune(configs=list(CONFIGS), key=[])(triton.jit(chunk_fwd_kernel_h))
    for name in [name for name in sys.modules if name.startswith("fla.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fla.toy", toy)
    for state, empty in (("_limited", None), ("_chosen", {}), ("_all_configs", {})):
        monkeypatch.setattr(fla_kernels, state, empty)
    monkeypatch.delenv("HYBRID_LINEAR_SEARCH", raising=False)
    return toy.kernel


def left(kernel) -> list[tuple]:
    return [(config.kwargs, config.num_warps, config.num_stages) for config in kernel.configs]


def on(card: tuple[int, int], monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: card)


def test_hopper_takes_the_tuned_one(kernel, monkeypatch):
    on((9, 0), monkeypatch)
    fla_kernels._limit_search("chunk_simple_gla", 64, 64)
    assert left(kernel) == [TUNED[NAME]]
    fla_kernels._limit_search("chunk_simple_gla", 128, 256)  # tiles that only such heads fill
    assert left(kernel) == [fla_kernels.LARGE[NAME]]
    fla_kernels._limit_search("chunk_gla", 64, 64)
    assert left(kernel) == [fla_kernels.PER_CHANNEL[NAME]]
    fla_kernels._limit_search("chunk_simple_gla", 64, 64)
    assert left(kernel) == [TUNED[NAME]]


def test_another_card_may_try_what_needs_less(kernel, monkeypatch):
    on((8, 6), monkeypatch)
    fla_kernels._limit_search("chunk_simple_gla", 128, 256)
    assert left(kernel) == [TUNED[NAME], ({"BK": 32, "BV": 32}, 4, 2), ({"BK": 32, "BV": 32}, 2, 2)]


def test_the_search_may_be_kept(kernel, monkeypatch):
    on((9, 0), monkeypatch)
    monkeypatch.setenv("HYBRID_LINEAR_SEARCH", "1")
    fla_kernels._limit_search("chunk_simple_gla", 64, 64)
    assert kernel.configs == CONFIGS
