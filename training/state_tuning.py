"""State tuning: train the state a linear layer starts from, and nothing else.

A recurrent layer begins every sequence with a state of zeros. Here that state, one matrix per head and layer (a vector in
HGRN), is a parameter, S0, and the weights stay as they are. It does what a prompt does, without its tokens: at inference it
costs nothing, neither time nor memory, since a state is there in any case. Sources: RWKV's state tuning (2024), and
"State Tuning" (arXiv 2504.05097).

    python -m training.finetune --model runs/nano --data tasks.jsonl --method s0 --output runs/nano-tuned

    >>> from training.state_tuning import initial_cache
    >>> cache = initial_cache(model, "runs/nano-tuned")                        # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache)                        # doctest: +SKIP

A cache with a state but without tokens is all it takes: positions begin at 0, attention layers have nothing to look back
on, padding is skipped as ever, and the library's cache operations apply. generate() changes the cache it is given, so make
one for every call. Short convolutions start from zeros, as always.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache

from hybrid_models.cache import adopt, sizes_per_sequence
from hybrid_models.results import write_atomically

WEIGHTS, DESCRIPTION = "initial_state.safetensors", "initial_state.json"
FORMAT = 1


class InitialState(nn.Module):
    """S0 of every linear layer of a model: float32 parameters ``states[str(layer)]``, [H, K, V] (or [D]), zeros at first.

    Args:
        config: the model's; a PeftModel's is its base model's.

    Raises:
        ValueError: no layer is linear.
    """

    def __init__(self, config):
        super().__init__()
        linear = [i for i, kind in enumerate(config.layer_types) if kind == "linear_attention"]
        if not linear:
            raise ValueError(
                f"layer_types={config.layer_picture()!r}: every layer is full attention, which has keys and values but no "
                "state to tune. Use --method lora or full, or a model with linear layers."
            )
        sizes = sizes_per_sequence(config)
        self.config = config
        self.states = nn.ParameterDict({str(i): nn.Parameter(torch.zeros(sizes[i][0])) for i in linear})

    def cache(self, batch_size: int = 1, dtype: torch.dtype = torch.float32) -> DynamicCache:
        """A fresh cache of ``batch_size`` sequences that begin from these states; gradients reach the parameters.

        Args:
            dtype: of the convolutions' windows: the model's.
        """
        cache = DynamicCache(config=self.config)
        adopt(cache, self.config)
        sizes = sizes_per_sequence(self.config)
        for name, state in self.states.items():
            i = int(name)
            window = None
            if len(sizes[i]) > 1:
                window = torch.zeros(batch_size, *sizes[i][1], dtype=dtype, device=state.device)
            cache.layers[i].write(window, state.expand(batch_size, *state.shape), None, tokens=0)
        return cache

    def save(self, folder: str | Path) -> None:
        """Write ``initial_state.safetensors`` and ``initial_state.json`` into ``folder``, next to what is there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({f"layers.{i}": s.detach().cpu().contiguous() for i, s in self.states.items()}, folder / WEIGHTS)
        described = {
            "format": FORMAT,
            "base_model": self.config.name_or_path,
            "mixers": sorted({self.config.mixers[int(i)] for i in self.states}),
            "layers": self.config.layer_picture(),
            "shapes": {i: list(s.shape) for i, s in self.states.items()},
            "parameters": sum(s.numel() for s in self.states.values()),
        }
        write_atomically(folder / DESCRIPTION, json.dumps(described, indent=1) + "\n")

    @classmethod
    def load(cls, config, folder: str | Path) -> InitialState:
        """The states saved in ``folder``, for a model of ``config``.

        Raises:
            FileNotFoundError: ``folder`` holds none.
            ValueError: they are damaged, or of another model.
        """
        path = Path(folder) / WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not there: name the output folder of `python -m training.finetune --method s0`."
            )
        try:
            saved = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is cut short or damaged ({error}): copy it again.") from error
        one = cls(config)
        found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        wanted = {f"layers.{i}": tuple(state.shape) for i, state in one.states.items()}
        if found != wanted:
            name = next(n for n in sorted(found.keys() | wanted.keys()) if found.get(n) != wanted.get(n))
            raise ValueError(
                f"{path} was tuned for another model: {name} is {found.get(name, 'absent')} there, and "
                f"{wanted.get(name, 'absent')} in this one. {DESCRIPTION} beside it names its base model."
            )
        with torch.no_grad():
            for i, state in one.states.items():
                state.copy_(saved[f"layers.{i}"])
        return one


def initial_cache(model, path: str | Path | InitialState, batch_size: int = 1) -> DynamicCache:
    """A cache that begins from a tuned state: pass it as ``past_key_values`` to generate() or a forward.

    Args:
        model: a HybridLinearForCausalLM, or a PeftModel around one.
        path: the folder that ``InitialState.save`` wrote into, or an InitialState.
        batch_size: sequences of the batch, beams and ``num_return_sequences`` included.

    Raises:
        FileNotFoundError, ValueError: see ``InitialState.load``.
    """
    states = path if isinstance(path, InitialState) else InitialState.load(model.config, path)
    return states.to(model.device).requires_grad_(False).cache(batch_size, model.dtype)


@contextmanager
def begin_from(model, states: InitialState):
    """Inside, every forward without a cache begins from ``states``, so any trainer trains them: put them where its
    optimiser looks, with ``model.add_module("initial_state", states)``.

    generate() makes a cache of its own and is not affected: see ``initial_cache``.

    Raises:
        ValueError: in a forward: under gradient checkpointing, which drops caches, or with packed documents, each of
            which would have to begin from the states; both would train something else without a word.
    """
    decoder = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model

    def add_cache(module, args, kwargs):
        if kwargs.get("past_key_values") is not None:
            return None
        if module.training and any(getattr(layer, "gradient_checkpointing", False) for layer in module.layers):
            raise ValueError("gradient_checkpointing=True drops the cache that holds the state: train S0 without it.")
        packed = [name for name in ("cu_seq_lens_q", "seq_idx") if kwargs.get(name) is not None]
        if packed:
            raise ValueError(f"{packed[0]}: S0 begins every document, so a row must hold one: packing=False.")
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        inputs = args[0] if inputs is None else inputs
        return args, {**kwargs, "past_key_values": states.cache(inputs.shape[0], module.dtype)}

    handle = decoder.register_forward_pre_hook(add_cache, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def describe(states: InitialState) -> str:
    """How many numbers are tuned, in one line."""
    count = sum(state.numel() for state in states.states.values())
    return f"S0: {count:,} numbers in {len(states.states)} of {states.config.num_hidden_layers} layers, the linear ones"


__all__ = ["InitialState", "begin_from", "describe", "initial_cache"]
