"""One token for a whole batch, as a fixed list of Triton launches that a CUDA graph replays.

generate() opens a session: the prompt goes through the model as always, into a dynamic cache; the session copies that into
buffers at fixed addresses, and every further token is one replay of the graph. At the end what a caller may see, a returned
or a user's cache, is copied back. Greedy search, and sampling with the usual warpers, choose the token inside the graph;
where scores, other processors or streamers are asked for, the library's own loop runs around the step, unchanged.

The first token after a session opens runs without a graph, which compiles the kernels; the second one is captured. Steps
are kept per model and shape (see ``MAX_STEPS``) and given back with the model, or by ``release``.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from .decode_layers import AttentionLayer, LinearLayer
from .mixers import HybridLinearRMSNorm, ShortConvolution
from .triton_kernels import FEW_ROWS, linear_rows, triton

MAX_STEPS = 2  # shapes (batch, length) whose buffers and graph are kept, the least recently used goes first
MAX_GRAPHS = 4  # of a step: logits for the library's loop, greedy search, and each way of sampling
MAX_EOS = 8  # end-of-sequence ids that decoding on the device knows
STEPS_BETWEEN_CHECKS = 16
_PLAIN = (nn.Linear, nn.Embedding, HybridLinearRMSNorm, ShortConvolution)


class DecodeStep:
    """Buffers, launches and graph for ``batch`` rows of at most ``max_len`` columns.

    Attributes:
        ids, positions: [batch] int64, the step's inputs; valid: [batch, max_len] bool; length: columns so far.
        logits: [batch, vocab], the step's output, in the model's dtype.
    """

    def __init__(self, model: nn.Module, batch: int, max_len: int):
        self.model, self.batch, self.max_len = model, batch, max_len
        config, weight = model.config, model.lm_head.weight
        device, dtype = weight.device, weight.dtype

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.ids, self.positions = zeros(batch, dtype=torch.long), zeros(batch, dtype=torch.long)
        self.length, self.valid = zeros((), dtype=torch.long), zeros(batch, max_len, dtype=torch.bool)
        self.h, self.logits = zeros(batch, config.hidden_size, dtype=dtype), zeros(batch, weight.shape[0], dtype=dtype)
        self.act = zeros(batch, config.intermediate_size, dtype=dtype if batch > FEW_ROWS else torch.float32)
        self.layers = [
            (LinearLayer if hasattr(layer, "linear_attn") else AttentionLayer)(model.model, i, batch, max_len, zeros)
            for i, layer in enumerate(model.model.layers)
        ]
        self.y = zeros(batch, max(layer.width for layer in self.layers))
        self.o = zeros(batch, max(layer.out_width for layer in self.layers))
        self.graphs: OrderedDict = OrderedDict()  # by what they do; None after the first, eager run
        # For decoding that stays on the device: the tokens, how many, who has finished, and what ends a row.
        self.tokens, self.produced = zeros(batch, max_len, dtype=torch.long), zeros(1, dtype=torch.long)
        self.finished, self.sound = zeros(batch, dtype=torch.bool), zeros((), dtype=torch.bool)
        self.eos, self.pad = zeros(MAX_EOS, dtype=torch.long), zeros((), dtype=torch.long)
        self.pointers = _pointers(model)

    def load(self, cache, mask: torch.Tensor | None) -> None:
        """Take over what a dynamic cache holds. mask: [batch, columns] of the prompt, or None."""
        self.length.fill_(cache.get_seq_length())
        self.valid.fill_(True)
        if mask is not None:
            self.valid[:, : mask.shape[1]] = mask.bool()
        for layer, held in zip(self.layers, cache.layers, strict=True):
            layer.load(held)

    def store(self, cache, tokens: int) -> None:
        """Give the dynamic cache what it would hold after the ``tokens`` that this step computed for it."""
        for layer, held in zip(self.layers, cache.layers, strict=True):
            layer.store(held, int(self.length), tokens)

    def run(self) -> None:
        """The launches of one token."""
        self.h.copy_(self.model.model.embed_tokens.weight[self.ids])
        for block, layer in zip(self.model.model.layers, self.layers, strict=True):
            layer.run(self, block)
            norm, mlp = block.post_attention_layernorm, block.mlp
            weights = [mlp.gate_proj.weight, mlp.up_proj.weight]
            linear_rows(self.h, weights, self.act, norm=norm.weight, eps=norm.eps, swiglu=True)
            linear_rows(self.act, [mlp.down_proj.weight], self.h, residual=True)
        norm = self.model.model.norm
        linear_rows(self.h, [self.model.lm_head.weight], self.logits, norm=norm.weight, eps=norm.eps)
        self.length.add_(1)

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [batch, vocab] after one more token per row; valid until the next call."""
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self._replay("logits", self.run)
        return self.logits

    def run_token(self, probabilities: Callable | None) -> None:
        """One token without a word from the host: the model on ``ids``, and what it chooses into ``ids`` and ``tokens``."""
        self.run()
        chosen = torch.where(self.finished, self.pad, self.choose(self.logits.float(), probabilities))
        self.tokens.index_copy_(1, self.produced, chosen[:, None])
        self.finished.logical_or_((chosen[:, None] == self.eos).any(1))
        self.ids.copy_(chosen)
        self.positions.add_(1)
        self.produced.add_(1)

    def choose(self, scores: torch.Tensor, probabilities: Callable | None) -> torch.Tensor:
        """The best token of each row of scores [batch, vocab], or one drawn with ``probabilities(scores)``.

        A draw is torch.multinomial's, of the same random numbers, without its wait for the device to look for NaN.
        """
        if probabilities is None:
            return scores.argmax(-1)
        p = probabilities(scores)
        self.sound.logical_and_(p.isfinite().all())
        return (p / torch.empty_like(p).exponential_()).argmax(-1)

    def decode(
        self,
        scores: torch.Tensor,
        positions: torch.Tensor,
        limit: int,
        eos: torch.Tensor | None,
        pad,
        probabilities: Callable | None = None,
        exact: bool = False,
    ) -> torch.Tensor:
        """Tokens [batch, n], n <= limit, of greedy search or sampling.

        Args:
            scores: [batch, vocab] float32, the logits after the prompt.
            positions: [batch] rotary positions of the first token.
            eos: token ids that end a row, or None; pad: what a finished row goes on with.
            probabilities: for sampling, from scores to probabilities; ``key`` tells one such function from another.
            exact: leave states and length as they are when the library stops: before the last token returned.

        Raises:
            RuntimeError: a probability is not a number.
        """
        self.positions.copy_(positions)
        self.eos.fill_(-1)
        if eos is not None:
            self.eos[: len(eos)] = eos
            self.pad.copy_(pad)
        self.sound.fill_(True)
        first = self.choose(scores, probabilities)
        self.ids.copy_(first)
        self.tokens[:, 0] = first
        self.produced.fill_(1)
        self.finished.copy_((first[:, None] == self.eos).any(1))
        generator = self._generator()
        before = [None]  # the generator's state before each token was drawn
        done, key = 1, "greedy" if probabilities is None else probabilities.key
        while done < limit and not (eos is not None and bool(self.finished.all())):
            # Asking the device whether all rows have finished waits for it; so only once in a while.
            block = min(STEPS_BETWEEN_CHECKS, limit - done)
            kept = [x.clone() for x in self._moving()] if exact and eos is not None else None
            for _ in range(block):
                before.append(None if probabilities is None else generator.get_state())
                self._replay(key, lambda: self.run_token(probabilities))
            done += block
        tokens = self.tokens[:, :done].clone()
        if eos is not None:
            ended = (tokens[:, :, None] == self.eos).any(2).int().cummax(1).values.bool().all(0)
            tokens = tokens[:, : int(ended.int().argmax()) + 1] if bool(ended.any()) else tokens
        if probabilities is not None and not bool(self.sound):
            raise RuntimeError("Sampling met a probability that is not a number: the logits are inf or NaN.")
        if (
            count := tokens.shape[1]
        ) < done:  # as if what came after the end had not been: no number drawn, no state changed
            start = done - block if exact else count
            if probabilities is not None:
                generator.set_state(before[start])
            if exact:
                for mine, old in zip(self._moving(), kept, strict=True):
                    mine.copy_(old)
            for _ in range(start, count):
                self._replay(key, lambda: self.run_token(probabilities))
        return tokens

    def _moving(self) -> list[torch.Tensor]:
        """What a token changes, but for keys and values, which are only added to."""
        own = [self.ids, self.positions, self.length, self.produced, self.finished]
        return own + [x for layer in self.layers for x in layer.moving()]

    def _generator(self) -> torch.Generator:
        device = self.ids.device
        return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator

    def _replay(self, key, function) -> None:
        """Run ``function``, from its second call on as the graph kept under ``key``."""
        if not self.ids.is_cuda or key not in self.graphs:
            function()  # the first time compiles kernels, which must not happen during a capture
            while len(self.graphs) >= MAX_GRAPHS:
                self.graphs.popitem(last=False)
            self.graphs[key] = None
            return
        self.graphs.move_to_end(key)
        if self.graphs[key] is None:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                function()
            self.graphs[key] = graph
        self.graphs[key].replay()


# ------------------------------------------------------------------------------------------------------------- sessions


class _Session:
    """A step at work on one cache during one generate()."""

    def __init__(self, step: DecodeStep, model: nn.Module, cache):
        self.step, self.model, self.cache, self.tokens = step, model, cache, 0
        self.prefilling = False  # a prompt, or a chunk of one, may be a single token too, and it may be padding

    def serves(self, model, input_ids, cache) -> bool:
        if self.prefilling or model is not self.model or cache is not self.cache:
            return False
        return input_ids is not None and input_ids.shape[1] == 1

    def decode(self, scores, positions, attention_mask, limit: int, *options) -> torch.Tensor:
        """As ``DecodeStep.decode``; attention_mask [batch, columns of the prompt] or None."""
        self._begin(attention_mask)
        self._claim(limit - 1)
        tokens = self.step.decode(scores, positions, limit, *options)
        self.tokens = tokens.shape[1] - 1
        return tokens

    def _begin(self, attention_mask) -> None:
        self.room = self.step.max_len - self.cache.get_seq_length()
        self.step.load(self.cache, attention_mask)

    def _claim(self, tokens: int) -> None:
        if tokens > self.room:  # on the device it would be a write past the buffers
            raise RuntimeError(f"The decode step has room for {self.step.max_len} columns; more are wanted.")

    def __call__(self, input_ids, position_ids, attention_mask) -> torch.Tensor:
        """Logits [batch, 1, vocab]."""
        if not self.tokens:
            self._begin(None if attention_mask is None else attention_mask[:, :-1])
        self.tokens += 1
        self._claim(self.tokens)
        return self.step(input_ids[:, 0], position_ids[:, -1].expand(self.step.batch))[:, None]


@contextmanager
def prefilling():
    """Inside, forwards are a prompt's and take the plain path."""
    current = _session.get()
    if current is None:
        yield
        return
    current.prefilling = True
    try:
        yield
    finally:
        current.prefilling = False


_session: ContextVar[_Session | None] = ContextVar("hybrid_linear_decode_session", default=None)
_steps: weakref.WeakKeyDictionary[nn.Module, OrderedDict] = weakref.WeakKeyDictionary()


def active_session() -> _Session | None:
    return None if torch.compiler.is_compiling() else _session.get()


@contextmanager
def session(model: nn.Module, cache, batch: int, max_length: int, keep_cache: bool):
    """Serve one-token forwards of ``model`` on ``cache`` by a DecodeStep inside the ``with`` block.

    Args:
        max_length: columns that the cache may come to hold.
        keep_cache: leave ``cache`` as if the model itself had run; otherwise it is left as it was after the prompt.
    """
    current = _Session(_step_for(model, batch, max_length), model, cache)
    token = _session.set(current)
    try:
        yield current
    finally:
        _session.reset(token)
        if keep_cache and current.tokens:
            current.step.store(cache, current.tokens)


def _step_for(model: nn.Module, batch: int, max_length: int) -> DecodeStep:
    # Rounded up, so that calls of about the same length share a graph.
    grain = 256 if max_length <= 2048 else 2048
    max_len = -(-max_length // grain) * grain
    steps = _steps.setdefault(model, OrderedDict())
    for key in [key for key, step in steps.items() if step.pointers != _pointers(model)]:
        del steps[key]  # the weights moved
    step = steps.pop((batch, max_len), None)
    if step is None:
        while len(steps) >= MAX_STEPS:
            steps.popitem(last=False)
        step = DecodeStep(_Weak(model), batch, max_len)
    steps[batch, max_len] = step
    return step


class _Weak:
    """The model as a step sees it: a weak reference, or the model would be kept alive by its own steps."""

    def __init__(self, model):
        self._model = weakref.ref(model)

    def __getattr__(self, name):
        return getattr(self._model(), name)


def release(model: nn.Module) -> None:
    """Free the buffers and graphs that generate() kept for ``model``."""
    _steps.pop(model, None)


def _pointers(model) -> tuple[int, ...]:
    return tuple(parameter.data_ptr() for parameter in model.parameters())


def why_not(model: nn.Module, batch: int = 1, max_length: int = 0) -> str | None:
    """Why this model's decode step cannot be captured, or None if it can.

    Args:
        batch, max_length: rows and columns to reserve; by default the memory is not looked at.
    """
    weight = model.lm_head.weight
    if triton is None:
        return "Triton is not installed"
    if weight.device.type != "cuda":
        return f"the model is on {weight.device.type}"
    free, _ = torch.cuda.mem_get_info(weight.device)
    free += torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
    wanted = batch * max_length * model.config.kv_bytes_per_token(weight.element_size())
    if wanted > free // 2:  # the prompt's own cache is there at the same time
        return f"buffers for {batch} x {max_length} tokens take {wanted / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free"
    return why_not_shape(model)


def why_not_shape(model: nn.Module) -> str | None:
    """As ``why_not``, leaving the device aside."""
    if model.lm_head.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the weights are {model.lm_head.weight.dtype}"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is spread over several devices"
    if torch.is_autocast_enabled(model.lm_head.weight.device.type):
        return "autocast is on"
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            return f"{name} is offloaded"
        # The step reads weights past their modules, so none of these may do more than its plain class does.
        if not module._modules and module._parameters and type(module) not in _PLAIN:
            return f"{name} is a {type(module).__name__}, not a plain layer (merge the adapter, or dequantise)"
        if type(module).__module__.startswith("peft"):
            return f"{name} carries an adapter: merge it first"
        if isinstance(module, nn.Linear) and not module.weight.is_contiguous():
            return f"{name}.weight is not contiguous"
    config = model.config
    for i, (layer, kind) in enumerate(zip(config.per_layer_config, config.layer_types)):
        if kind == "full_attention" and (layer.attention_bias or layer.sliding_window):
            return f"layer {i} has attention biases or a sliding window"
        dims = config.linear_dims(i)
        per_head_norm = kind == "linear_attention" and config.mixers[i] not in ("hgrn", "hgrn2")
        if per_head_norm and triton.next_power_of_2(dims.value_head_dim) != dims.value_head_dim:
            return f"layer {i} has value heads of {dims.value_head_dim}, not a power of two"
    return None


__all__ = ["DecodeStep", "active_session", "prefilling", "release", "session", "why_not"]
