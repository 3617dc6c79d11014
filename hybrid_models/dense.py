"""Dense layers, on the CPU by the faster of torch's two libraries.

torch multiplies float32 matrices through MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which torch
carries as well and takes for 16 bits and convolutions, has AVX-512 for all of them: more than twice as fast on an AMD EPYC
(``benchmarks/cpu.py``). A model's dense layers are most of its time, so here they go there; wherever somebody watches or
transforms torch's operations (compilation, fake tensors, torch.func, FLOP counters) they stay ``nn.Linear``'s own.

    >>> import torch
    >>> from hybrid_models.dense import dense
    >>> layer, x = torch.nn.Linear(64, 32, bias=False), torch.randn(2, 100, 64)
    >>> torch.allclose(dense(layer, x), layer(x), atol=1e-5)
    True
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.models.llama.modeling_llama import LlamaMLP

try:
    from torch.distributed.fsdp import FSDPModule
except ImportError:  # a torch without distributed

    class FSDPModule:
        pass


FEWEST_ROWS, LEAST_WEIGHT = 16, 1 << 17  # below both, the call itself takes the time
HAS_AVX512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
# What torch's own compiler makes of a linear layer on the CPU: x [.., K], weight [N, K] -> [.., N].
_linear_pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if HAS_AVX512 else None


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward on weights that are here, and nothing else.

    Hooks say no, and so does a forward of its own, by which accelerate brings offloaded weights.
    """
    return "forward" not in vars(module) and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_plain(linear: nn.Module, bias: bool = False) -> bool:
    """Whether multiplying by ``linear.weight`` is all that calling the module would do: no adapter, hook, or other bias."""
    return (
        type(linear) is nn.Linear
        and (linear.bias is not None) == bias
        and type(linear.weight.data) is torch.Tensor
        and is_untouched(linear)
    )


def is_swiglu(module: nn.Module) -> bool:
    """Whether the module is a layer's MLP and calling it does no more than its class says."""
    return type(module) is LlamaMLP and is_untouched(module)


def dense(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``linear(x)``."""
    weight = getattr(linear, "weight", None)
    if (
        not isinstance(weight, torch.Tensor)
        or not _served(x, weight)
        or not (is_plain(linear) or is_plain(linear, bias=True))
    ):
        return linear(x)
    y = _Product.apply(x, weight)
    return y if linear.bias is None else y + linear.bias


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight^T, of x [.., K] and weight [N, K] of one dtype."""
    return _Product.apply(x, weight) if _served(x, weight) else x @ weight.t()


def _served(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        _linear_pointwise is not None
        and type(x) is torch.Tensor
        and x.device.type == "cpu"
        and x.dtype == torch.float32 == weight.dtype
        and not is_transformed()
        and not torch._C._len_torch_dispatch_stack()  # fake tensors, FLOP counters, and other watchers of torch's operations
        and x.shape[-1] == weight.shape[-1]  # or let nn.Linear say what is wrong
        and x.numel() > 0
        and (x.numel() >= FEWEST_ROWS * x.shape[-1] or weight.numel() >= LEAST_WEIGHT)
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


def is_transformed() -> bool:
    """Whether torch compiles, traces, or takes derivatives in ways that an autograd Function does not know."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _Product.apply(dy, weight.t())
        if ctx.needs_input_grad[1]:
            dweight = product_over_rows(dy.flatten(0, -2), x.flatten(0, -2))
        return dx, dweight


def product_over_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a^T @ b, [N, K] of a [T, N] and b [T, K]. oneDNN is handed a copy of its first operand: the narrower one."""
    if not _served(a, b):
        return a.t() @ b
    return _Product.apply(a.t(), b.t()) if a.shape[1] <= b.shape[1] else _Product.apply(b.t(), a.t()).t()


__all__ = [
    "FSDPModule",
    "dense",
    "is_plain",
    "is_swiglu",
    "is_transformed",
    "is_untouched",
    "product",
    "product_over_rows",
]
